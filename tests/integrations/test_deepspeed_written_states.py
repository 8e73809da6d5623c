"""External changes to the states or the model of an engine: the mean is exact, or the step is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.integrations import deepspeed_engines
from tests.integrations.deepspeed_engines import Family, Prescribed, backward, note_step, start
from tests.integrations.deepspeed_oracle_check import gradients_under_zero
from tests.integrations.deepspeed_setups import (
    BF16,
    CLIPPED,
    COUPLED,
    CPU_OFFLOAD,
    FP32_GRADIENTS,
    Setup,
    zero,
)
from tests.oracle import Oracle
from tests.problems import relative_error, to_numpy

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

FACTOR = 9.0
EVENT_STEPS = (3, 4, 8)
"""Steps before which the event takes place."""
CONFIGS = {
    "stage-1": zero(1),
    "stage-2-bf16": zero(2) | BF16,
    "stage-2-offload": zero(2, **CPU_OFFLOAD),
    "stage-3": zero(3, sub_group_size=50),
    "bf16-optimizer": zero(1) | BF16 | FP32_GRADIENTS,
}


@dataclass(frozen=True)
class Event(Setup):
    """Setup with an event that takes place before the steps above."""

    event: str = ""


@dataclass
class Outcome(deepspeed_engines.Seen):
    errors: list[str] = field(default_factory=list)
    num_undefined_steps: int = 0


# -- writes to states --------------------------------------------------------------------------------------------------


def second_moments(engine: Any) -> list[Tensor]:
    return [state["exp_avg_sq"] for state in engine.basic_optimizer.state.values()]


def replace_states(engine: Any) -> None:
    for state in engine.basic_optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"] * FACTOR


def receive(engine: Any) -> None:
    """Write by a collective, which torch does not record; each rank receives from itself."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    for v in second_moments(engine):
        dist.scatter(v, [v * FACTOR], src=dist.get_rank(), group=groups[dist.get_rank()])


def load_scaled(engine: Any) -> None:
    saved = copy.deepcopy(engine.basic_optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg_sq"] *= FACTOR
    engine.basic_optimizer.load_state_dict(saved)


def through_numpy(engine: Any) -> None:
    for v in second_moments(engine):
        v.numpy()[...] *= FACTOR


SCALES: dict[str, Callable[[Any], object]] = {
    "in place": lambda engine: torch._foreach_mul_(second_moments(engine), FACTOR),
    ".data": lambda engine: [v.data.mul_(FACTOR) for v in second_moments(engine)],
    "NumPy": through_numpy,
    "DLPack": lambda engine: [torch.from_dlpack(v).mul_(FACTOR) for v in second_moments(engine)],
    "received": receive,
    "replaced": replace_states,
    "loaded": load_scaled,
    "refresh()": lambda engine: (through_numpy(engine), engine.basic_optimizer.refresh()),
}
RESETS: dict[str, Callable[[Any], object]] = {
    "cleared": lambda engine: engine.basic_optimizer.state.clear(),
    "popped": lambda engine: [engine.basic_optimizer.state.pop(flat) for flat in list(engine.basic_optimizer.state)],
    "emptied": lambda engine: [state.clear() for state in engine.basic_optimizer.state.values()],
}
ZEROED: dict[str, Callable[[Any], object]] = {
    "zeroed through .data": lambda engine: [v.data.zero_() for v in second_moments(engine)],
    "replaced by zeros": lambda engine: [
        state.update(exp_avg_sq=torch.zeros_like(state["exp_avg_sq"]))
        for state in engine.basic_optimizer.state.values()
    ],
}
NOTHING: dict[str, Callable[[Any], object]] = {
    "refreshed for nothing": lambda engine: engine.basic_optimizer.refresh(),
    "loaded as it is": lambda engine: engine.basic_optimizer.load_state_dict(
        copy.deepcopy(engine.basic_optimizer.state_dict())
    ),
}
WRITES = SCALES | RESETS | ZEROED | NOTHING


def write_to_oracle(oracle: Oracle, event: str) -> None:
    if event in RESETS:
        names = list(oracle.states)
        oracle.states.clear()
        oracle._make_states(names)
    elif event not in NOTHING:
        for state in oracle.states.values():
            state.exp_avg_sq = state.exp_avg_sq * (FACTOR if event in SCALES else 0.0)


def walk_with_writes(setup: Event) -> Outcome:
    model = Prescribed(setup)
    engine = start(setup, model)
    seen = Outcome()
    for step in range(setup.problem.steps):
        if step in EVENT_STEPS:
            WRITES[setup.event](engine)
        backward(engine, setup, step)
        engine.step()
        note_step(engine, seen)
    deepspeed_engines.gather(engine, model.by_name(), seen, has_linked_masters=False)
    seen.num_undefined_steps = int(engine.basic_optimizer.num_undefined_steps)
    engine.destroy()
    return seen


# Under ZeRO 3 parameter groups are empty between steps, so that no optimizer has a usable state_dict().
WRITTEN = Family(
    {
        f"{config} {event}": Event(CONFIGS[config], COUPLED if config == "stage-1" else CLIPPED, event=event)
        for config in CONFIGS
        for event in WRITES
        if not (config == "stage-3" and "loaded" in event)
    },
    walk_with_writes,
)


@pytest.mark.parametrize("name", WRITTEN.setups)
def test_the_mean_is_that_of_the_current_states(name: str) -> None:
    setup = WRITTEN.setups[name]
    assert isinstance(setup, Event)
    event = setup.event
    problem = setup.rounded
    oracle, means = problem.oracle(), list[float]()
    for step in range(problem.steps):
        if step in EVENT_STEPS:
            write_to_oracle(oracle, event)
        means.append(oracle.step(gradients_under_zero(problem, step)).mean)
    for seen in WRITTEN.ranks(name):
        assert seen.means == pytest.approx(means, rel=2e-6)
        assert seen.num_skipped_steps == seen.num_undefined_steps == 0
        if not setup.config.get("bf16"):  # otherwise the parameters are those of the model, rounded
            assert relative_error(seen.parameters, oracle, problem) < 1e-5
    first, second = (seen.means for seen in WRITTEN.ranks(name))
    assert first == second, "the mean is bitwise equal on all ranks"


# -- states of a single rank -------------------------------------------------------------------------------------------


def walk_with_a_reset_of_one_rank(setup: Setup) -> Outcome:
    model = Prescribed(setup)
    engine = start(setup, model)
    seen = Outcome()
    for step in range(8):
        if step == 3 + 2 * dist.get_rank():  # rank 0 before step 3, rank 1 before step 5
            engine.basic_optimizer.state.clear()
        backward(engine, setup, step)
        engine.step()
        note_step(engine, seen)
        seen.states[str(step)] = {
            "step": sorted(float(state["step"]) for state in engine.basic_optimizer.state.values()),
            "masters": [to_numpy(flat).copy() for flat in engine.basic_optimizer.state],
        }
    engine.destroy()
    return seen


ONE_RANK = Family(
    {name: Setup(config) for name, config in CONFIGS.items() if name != "bf16-optimizer"},
    walk_with_a_reset_of_one_rank,
)


@pytest.mark.parametrize("config", ONE_RANK.setups)
def test_ranks_that_disagree_on_step_counts_skip_until_they_agree(config: str) -> None:
    """Skip steps while step counts differ, for which ZeRO's norms do not determine the mean."""
    for seen in ONE_RANK.ranks(config):
        assert [step for step, was_skipped in enumerate(seen.was_skipped) if was_skipped] == [3, 4]
        assert set(seen.states["2"]["step"]) == {3.0}
        assert set(seen.states["7"]["step"]) == {3.0}
        for before, after in zip(seen.states["3"]["masters"], seen.states["4"]["masters"], strict=True):
            assert np.array_equal(before, after)
    first, second = (seen.means[5:] for seen in ONE_RANK.ranks(config))
    assert first == second


# -- models that change ------------------------------------------------------------------------------------------------


def freeze(engine: Any) -> None:
    engine.module.by_name()["first.matrix"].requires_grad_(False)


def freeze_all_but_one(engine: Any) -> None:
    for name, param in engine.module.by_name().items():
        param.requires_grad_(name == "second.one")


def replace_parameter(engine: Any) -> None:
    block = engine.module.blocks["first_vector"]
    block.weight = torch.nn.Parameter(block.weight.detach().clone())


def add_group(engine: Any) -> None:
    engine.basic_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.1})


def add_group_past_the_method(engine: Any) -> None:
    engine.basic_optimizer.param_groups.append({**engine.basic_optimizer.param_groups[0]})


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "frozen": (freeze, "blocks.first_matrix.linear.weight;"),
    "all but one frozen": (freeze_all_but_one, "and 4 more;"),
    "unfrozen": (lambda engine: engine.module.late.requires_grad_(True), "got parameters frozen, unfrozen, .*: late;"),
    "added": (lambda engine: engine.module.register_parameter("new", torch.nn.Parameter(torch.ones(3))), ": new;"),
    "removed": (lambda engine: engine.module.blocks.pop("third_two"), ": blocks.third_two.weight;"),
    "replaced": (replace_parameter, ": blocks.first_vector.weight;"),
    "a group": (add_group, r"(part by part, got add_param_group\(\)|must keep the 3 parameter groups .*, got 4); "),
    "a group, past the method": (add_group_past_the_method, r"must keep the 3 parameter groups .*, got 4; "),
    "clipped by hand": (lambda engine: engine.basic_optimizer.clip_grad_norm_(1.0), r"got clip_grad_norm_\(\); set"),
    "configured": (lambda engine: engine.basic_optimizer.configure_sharding(), r"got configure_sharding\(\); leave it"),
}


def walk_until_it_changes(setup: Event) -> Outcome:
    model = Prescribed(setup)
    model.register_parameter("late", torch.nn.Parameter(torch.ones(5), requires_grad=False))
    engine = start(setup, model)
    seen = Outcome()
    for step in range(2):
        backward(engine, setup, step)
        engine.step()
    basic = engine.basic_optimizer
    masters, num_groups = [to_numpy(flat).copy() for flat in basic.state], len(basic.param_groups)
    try:
        CHANGES[setup.event][0](engine)
        engine.optimizer.step()
    except RuntimeError as error:
        seen.errors.append(str(error))
    seen.states["masters"] = {
        str(index): (before, to_numpy(after))
        for index, (before, after) in enumerate(zip(masters, basic.state, strict=True))
    }
    del basic.param_groups[num_groups:]  # required to destroy the engine
    engine.destroy()
    return seen


CHANGED = Family(
    {
        f"{config} {event}": Event(CONFIGS[config], replace(CLIPPED, steps=2), event=event)
        for config in CONFIGS
        for event in CHANGES
    }
    | {
        f"stage-0-bf16 {event}": Event(zero(0) | BF16, replace(CLIPPED, steps=2), event=event)
        for event in CHANGES
        if event not in ("clipped by hand", "configured")
    },
    walk_until_it_changes,
)


@pytest.mark.parametrize("name", CHANGED.setups)
def test_a_model_that_changes_is_refused_before_anything_is_stepped(name: str) -> None:
    setup = CHANGED.setups[name]
    assert isinstance(setup, Event)
    event = setup.event
    for seen in CHANGED.ranks(name):
        (error,) = seen.errors
        assert re.search(CHANGES[event][1], error)
        for before, after in seen.states["masters"].values():
            assert np.array_equal(before, after)
    first, second = CHANGED.ranks(name)
    assert first.errors == second.errors, "all ranks raise the same error"


def walk_with_frozen_parameters(setup: Setup) -> Outcome:
    model = Prescribed(setup)
    engine = start(setup, model)
    seen = Outcome()
    for step in range(setup.problem.steps):
        engine.module.by_name()["first.matrix"].requires_grad_(not 4 <= step < 8)
        backward(engine, setup, step)
        engine.step()
        note_step(engine, seen)
    deepspeed_engines.gather(engine, model.by_name(), seen)
    engine.destroy()
    return seen


FROZEN = Family({"stage-0": Setup(zero(0), CLIPPED)}, walk_with_frozen_parameters)


def test_without_zero_in_float32_parameters_may_be_frozen_and_unfrozen() -> None:
    problem = FROZEN.setups["stage-0"].problem
    oracle, means = problem.oracle(), list[float]()
    for step in range(problem.steps):
        gradients = problem.oracle_gradients(step)
        means.append(oracle.step(gradients | ({"first.matrix": None} if 4 <= step < 8 else {})).mean)
    for seen in FROZEN.ranks("stage-0"):
        assert seen.means == pytest.approx(means, rel=2e-6)
        assert relative_error(seen.parameters, oracle, problem) < 1e-5
