"""Random sequences of events between the steps of an engine: each mean is the oracle's, or the step is refused.

The seeds of the sequences are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.integrations import deepspeed_engines
from tests.integrations.deepspeed_engines import Family, Prescribed, note_step, start
from tests.integrations.deepspeed_oracle_check import gradients_under_zero
from tests.integrations.deepspeed_setups import CLIPPED, WORLD_SIZE, Setup, zero
from tests.oracle import Oracle
from tests.problems import relative_error

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

LENGTH = 16
NUM_SEQUENCES = 12
EVENTS = (
    *("step", "step", "step", "zero step", "idle step", "write", "receive", "clear", "save", "load", "freeze"),
    *("add group", "refresh", "copy"),
)
STEPS = ("step", "zero step", "idle step")


@dataclass(frozen=True)
class Sequence(Setup):
    seed: int = 0

    def events(self) -> list[str]:
        drawn = np.random.default_rng(self.seed).choice(EVENTS, LENGTH)
        return ["step", *map(str, drawn), "step"]


class Events:
    """Events that act on an engine. Collective: all ranks must make the same calls."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.basic_optimizer
        self.saved: list[dict[str, torch.Tensor]] | None = None
        self.own_group = [dist.new_group([rank]) for rank in range(WORLD_SIZE)][dist.get_rank()]
        self.number = 0

    def happen(self, event: str) -> str | None:
        """Run an event, and return the error that it must raise, if any."""
        self.number += 1
        return getattr(self, event.replace(" ", "_"))()

    def step(self, factor: float = 1.0) -> None:
        loss = self.engine(self.number % CLIPPED.steps, dist.get_rank(), WORLD_SIZE)
        self.engine.backward(factor * loss)
        self.engine.step()

    def zero_step(self) -> None:
        self.step(0.0)

    def idle_step(self) -> None:
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        self.step(0.0)
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr

    def write(self) -> None:
        for state in self.optimizer.state.values():
            if self.number % 2:
                state["exp_avg_sq"].mul_(4.0)
            else:
                state["exp_avg_sq"].numpy()[...] *= 4.0

    def receive(self) -> None:
        for state in self.optimizer.state.values():
            v = state["exp_avg_sq"]
            dist.scatter(v, [v / 4], src=dist.get_rank(), group=self.own_group)

    def clear(self) -> None:
        self.optimizer.state.clear()

    def save(self) -> None:
        self.saved = [{key: value.clone() for key, value in s.items()} for s in self.optimizer.state.values()]

    def load(self) -> None:
        """Copy the saved states into the existing tensors, or replace them."""
        if self.saved and len(self.saved) == len(self.optimizer.state):
            for state, saved in zip(self.optimizer.state.values(), self.saved, strict=True):
                if self.number % 2:
                    state.update({key: value.clone() for key, value in saved.items()})
                else:
                    for key, value in saved.items():
                        state[key].data.copy_(value)

    def freeze(self) -> str:
        param = self.engine.module.by_name()["second.matrix"]
        param.requires_grad_(False)
        error = error_of(self.engine.optimizer.step)
        param.requires_grad_(True)
        return error

    def add_group(self) -> str:
        return error_of(self.optimizer.add_param_group, {"params": [torch.nn.Parameter(torch.ones(2))]})

    def refresh(self) -> None:
        self.optimizer.refresh()

    def copy(self) -> None:
        """Replace the states with equal tensors."""
        for state in self.optimizer.state.values():
            state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def error_of(call: Callable[..., Any], *args: Any) -> str:
    try:
        call(*args)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@dataclass
class Outcome(deepspeed_engines.Seen):
    errors: tuple[str, ...] = ()


def walk(setup: Sequence) -> Outcome:
    model = Prescribed(setup)
    engine = start(setup, model)
    happening, seen = Events(engine), Outcome()
    for event in setup.events():
        error = happening.happen(event)
        if error is not None:
            seen.errors += (error,)
        if event in STEPS:
            note_step(engine, seen)
    deepspeed_engines.gather(engine, model.by_name(), seen, has_linked_masters=False)
    engine.destroy()
    return seen


CONFIGS = {"stage-1": zero(1), "stage-3": zero(3, sub_group_size=50)}
FAMILY = Family(
    {
        f"{name} {seed}": Sequence(config, CLIPPED, seed=seed)
        for name, config in CONFIGS.items()
        for seed in range(NUM_SEQUENCES)
    },
    walk,
)


class OracleEvents:
    """Events that act on the oracle."""

    def __init__(self, setup: Sequence) -> None:
        self.problem = setup.rounded
        self.oracle: Oracle = self.problem.oracle()
        self.saved: dict[str, Any] | None = None
        self.means: list[float] = []
        self.number = 0
        self.has_states = False

    def happen(self, event: str) -> None:
        self.number += 1
        states = self.oracle.states
        if event in STEPS:
            rates = [group.lr for group in self.oracle.groups]
            for group in self.oracle.groups:
                group.lr = 0.0 if event == "idle step" else group.lr
            factor = 1.0 if event == "step" else 0.0
            drawn = gradients_under_zero(self.problem, self.number % CLIPPED.steps)
            gradients = {name: factor * g for name, g in drawn.items()}
            self.means.append(self.oracle.step(gradients).mean)
            for group, lr in zip(self.oracle.groups, rates, strict=True):
                group.lr = lr
            self.has_states = True
        elif event in ("write", "receive"):
            for state in states.values():
                state.exp_avg_sq = state.exp_avg_sq * (4.0 if event == "write" else 0.25)
        elif event == "clear":
            names = list(states)
            states.clear()
            self.oracle._make_states(names)
            self.has_states = False
        elif event == "save":
            self.saved = {name: replace(state) for name, state in states.items()} if self.has_states else {}
        elif event == "load" and self.saved and self.has_states:
            for name, state in self.saved.items():
                states[name] = replace(state)


@pytest.mark.parametrize("name", FAMILY.setups)
def test_each_mean_is_the_oracles_or_the_step_is_refused(name: str) -> None:
    setup = FAMILY.setups[name]
    assert isinstance(setup, Sequence)
    expected = OracleEvents(setup)
    for event in setup.events():
        expected.happen(event)
    refused = {
        "freeze": "under DeepSpeed the trainable parameters must not change after deepspeed.initialize()",
        "add group": "DeepSpeed must clip and configure an optimizer that it steps part by part",
    }
    messages = [refused[event] for event in setup.events() if event in refused]
    for seen in FAMILY.ranks(name):
        assert seen.means == pytest.approx(expected.means, rel=2e-6)
        assert relative_error(seen.parameters, expected.oracle, setup.rounded) < 1e-5
        assert [error[: len(m)] for error, m in zip(seen.errors, messages, strict=True)] == messages
        assert seen.num_skipped_steps == 0


def test_the_sequences_contain_every_event() -> None:
    drawn = [event for seed in range(NUM_SEQUENCES) for event in Sequence(CONFIGS["stage-1"], seed=seed).events()]
    assert set(drawn) == set(EVENTS)
