"""Interrupted and resumed runs on real DeepSpeed engines, and snapshots to compare them."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from tests.integrations.deepspeed_engines import Prescribed, Seen, gather, start
from tests.integrations.deepspeed_setups import STATE_NAMES, Setup
from tests.problems import Problem, to_numpy

SAVED_AT = 4
NUM_STEPS = 2 * SAVED_AT
HYPER_NAMES = ("lr", "betas", "eps", "weight_decay", "dampening", "decoupled", "maximize", "foreach")

T = TypeVar("T")


@dataclass
class Snapshot:
    """State of a run on which the next step depends, with full tensors."""

    parameters: dict[str, Any]
    """Float32 master weights."""
    states: dict[str, dict[str, Any]]
    model: dict[str, Any]
    """Weights of the model in its own dtype."""
    parts: list[dict[str, Any]]
    """Optimizer states of this rank, with their steps."""
    hyper: list[dict[str, Any]]
    """Hyperparameters of the parameter groups."""


class Run:
    """Engine with its model. Collective: every method, all ranks."""

    def __init__(self, setup: Setup) -> None:
        self.model = Prescribed(setup)
        self.engine = start(setup, self.model)

    def take_steps(self, steps: range) -> None:
        for step in steps:
            loss = self.engine(step, dist.get_rank(), dist.get_world_size())
            self.engine.backward(loss)
            self.engine.step()

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder))

    def load(self, folder: Path, **options: Any) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), **options)
        assert path is not None

    def snapshot(self) -> Snapshot:
        seen = Seen()
        gather(self.engine, self.model.by_name(), seen)
        basic = self.engine.basic_optimizer
        return Snapshot(
            seen.parameters,
            seen.states,
            self.snapshot_of_model(),
            [{key: to_numpy(value) for key, value in state.items()} for state in basic.state.values()],
            self.hyper(),
        )

    def snapshot_of_model(self) -> dict[str, Any]:
        """Return the weights of the model in its own dtype."""
        from deepspeed import zero

        with zero.GatheredParameters(list(self.model.parameters())):
            return {name: to_numpy(parameter) for name, parameter in self.model.by_name().items()}

    def hyper(self) -> list[dict[str, Any]]:
        """Return the hyperparameters of the parameter groups."""
        param_groups = self.engine.basic_optimizer.param_groups
        return [{name: param_group[name] for name in HYPER_NAMES} for param_group in param_groups]

    def end(self) -> None:
        self.engine.destroy()


def uninterrupted(setup: Setup) -> Snapshot:
    """Run all steps, and return the final snapshot. Collective: all ranks."""
    run = Run(setup)
    run.take_steps(range(NUM_STEPS))
    snapshot = run.snapshot()
    run.end()
    return snapshot


def saved(setup: Setup, folder: Path) -> Snapshot:
    """Run half of the steps, save a checkpoint, and return the snapshot. Collective: all ranks."""
    run = Run(setup)
    run.take_steps(range(SAVED_AT))
    snapshot = run.snapshot()
    run.save(folder)
    run.end()
    return snapshot


def resumed(setup: Setup, folder: Path) -> tuple[Snapshot, Snapshot]:
    """Return snapshots of a new engine after loading and after the remaining steps. Collective: all ranks."""
    run = Run(other_start(setup))
    run.load(folder)
    loaded = run.snapshot()
    run.take_steps(range(SAVED_AT, NUM_STEPS))
    snapshot = run.snapshot()
    run.end()
    return loaded, snapshot


def model_names(setup: Setup) -> dict[str, str]:
    """Return the model's names of the parameters, by their names in the problem."""
    model = Prescribed(setup)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {name: names[parameter] for name, parameter in model.by_name().items()}


def other_start(setup: Setup) -> Setup:
    """Return a setup with the same gradients and wrong hyperparameters, which loading must restore."""
    groups = tuple((hyper | {"lr": 7.0, "weight_decay": 0.5}, specs) for hyper, specs in setup.problem.groups)
    return replace(setup, problem=replace(setup.problem, groups=groups))


def universal(setup: Setup) -> Setup:
    """Return the setup with loading of universal checkpoints enabled."""
    return replace(setup, config={**setup.config, "checkpoint": {"load_universal": True}})


class Failed(str):
    """Traceback in place of a result."""


def weights_only(setup: Setup, folder: Path) -> tuple[Snapshot, Snapshot]:
    """Return a run after one step, and after it has loaded only the weights of a universal checkpoint."""
    run = Run(other_start(universal(setup)))
    run.take_steps(range(1))
    before = run.snapshot()
    run.load(folder, load_optimizer_states=False)
    loaded = run.snapshot()
    run.end()
    return before, loaded


def attempt_all(function: Callable[..., T], cases: Mapping[str, tuple[Any, ...]]) -> dict[str, T | Failed]:
    """Run all cases in order in the same processes."""
    import deepspeed  # noqa: F401

    gc.collect()
    gc.freeze()  # DeepSpeed's garbage collection at every start takes most of a second with these modules
    outcomes: dict[str, T | Failed] = {}
    for name, arguments in cases.items():
        try:
            outcomes[name] = function(*arguments)
        except Exception:
            outcomes[name] = Failed(traceback.format_exc())
        gc.collect()
    return outcomes


def of_all_ranks(ranks: list[dict[str, T | Failed]], name: str) -> list[T]:
    """Return the results of one case on all ranks.

    Raises:
        AssertionError: a rank failed.
    """
    __tracebackhide__ = True
    outcomes = [outcomes_of_rank[name] for outcomes_of_rank in ranks]
    failures = [f"--- rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failed)]
    assert not failures, "\n".join(failures)
    return [outcome for outcome in outcomes if not isinstance(outcome, Failed)]


# -- comparison --------------------------------------------------------------------------------------------------------


def assert_same(one: Snapshot, other: Snapshot) -> None:
    """Assert that two snapshots are bitwise equal."""
    assert len(one.parts) == len(other.parts)
    for part, other_part in zip(one.parts, other.parts, strict=True):
        assert part.keys() == other_part.keys()
        for key, value in part.items():
            np.testing.assert_array_equal(value, other_part[key], err_msg=key)
    assert one.hyper == other.hyper
    assert one.parameters.keys() == other.parameters.keys() == one.states.keys()
    for name in one.parameters:
        np.testing.assert_array_equal(one.parameters[name], other.parameters[name], err_msg=name)
        np.testing.assert_array_equal(one.model[name], other.model[name], err_msg=name)
        for key in STATE_NAMES:
            np.testing.assert_array_equal(one.states[name][key], other.states[name][key], err_msg=f"{key} of {name}")


def distance(one: Snapshot, other: Snapshot, problem: Problem) -> float:
    """Return the largest error of a parameter (relative to its distance travelled) or state (relative to its norm)."""
    errors: list[float] = []
    for spec in problem.specs():
        expected, first = other.parameters[spec.name], to_numpy(problem.initial(spec))
        errors.append(relative(one.parameters[spec.name], expected, np.linalg.norm(expected - first)))
        for key in STATE_NAMES:
            expected = other.states[spec.name][key]
            errors.append(relative(one.states[spec.name][key], expected, np.linalg.norm(expected)))
    return max(errors)


def relative(value: Any, expected: Any, size: Any) -> float:
    return float(np.linalg.norm(value - expected) / size)


def on_first_rank(action: Callable[[], Any]) -> None:
    """Run an action on rank 0 while the other ranks wait. Collective: all ranks."""
    try:
        if dist.get_rank() == 0:
            action()
    finally:
        dist.barrier()
