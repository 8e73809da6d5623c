"""torch's ZeroRedundancyOptimizer around the package's classes: the mean is over all ranks, unconfigured."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import adai_dist
from tests.distributed.layouts import MAX_NORM, SHARDED, CollectiveCounter
from tests.problems import Problem, Spec, to_numpy, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

GROUPS = replace(SHARDED, steps=14, max_grad_norm=MAX_NORM)
ONE_GROUP = Problem(
    (({"lr": 0.4, "weight_decay": 0.02}, tuple(GROUPS.specs())),),
    steps=14,
)
# Two of four ranks own nothing.
TWO_PARAMETERS = Problem(
    (({"lr": 0.3, "dampening": 0.5}, (Spec("a.weight", (5, 3)), Spec("a.bias", (3,), scale=0.2))),), steps=14
)


@dataclass(frozen=True)
class Case:
    problem: Problem
    class_name: str = "AdaiV2"
    world_size: int = 2
    bucket_view: bool = False
    add_last_group_at: int | None = None
    """The step before which the last parameter group joins."""
    reload_at: int | None = None
    """The step before which the state is saved, and loaded into a new optimizer."""


CASES: dict[str, Case] = {
    "Adai": Case(ONE_GROUP, "Adai"),
    "AdaiW": Case(ONE_GROUP.with_all(decoupled=True), "AdaiW"),
    "AdaiV2": Case(ONE_GROUP.with_all(decoupled=True, dampening=0.5), "AdaiV2", bucket_view=True),
    "parameter groups": Case(GROUPS),
    "float32": Case(replace(GROUPS, dtype=torch.float32)),
    "saved and loaded": Case(GROUPS, reload_at=6),
    "a group that joins later": Case(GROUPS, add_last_group_at=5),
    "four ranks": Case(GROUPS, world_size=4),
    "four ranks, two of which own nothing": Case(TWO_PARAMETERS, world_size=4, reload_at=6),
}


def make(case: Case, groups: list[dict[str, Any]]) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # not imported in the test process, as the import warns

    for group in groups:
        if case.class_name != "AdaiV2":
            del group["dampening"], group["decoupled"]
    return ZeroRedundancyOptimizer(
        groups,
        getattr(adai_dist, case.class_name),
        parameters_as_bucket_view=case.bucket_view,
        lr=1.0,
        max_grad_norm=case.problem.max_grad_norm,
    )


def consolidated(optimizer: Any) -> dict[str, Any]:
    """Consolidate the state on every rank. Collective: all ranks."""
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    assert saved[0] is not None
    return saved[0]


def walk(case: Case) -> tuple[dict[str, np.ndarray[Any, Any]], list[float], list[float], dict[Any, Any]]:
    parameters = case.problem.parameters()
    groups = case.problem.param_groups(parameters)
    later = [groups.pop()] if case.add_last_group_at is not None else []
    optimizer = make(case, groups)
    norms: list[float] = []
    means: list[float] = []
    for step in range(case.problem.steps):
        if step == case.add_last_group_at:
            optimizer.add_param_group(later[0])
        if step == case.reload_at:
            state_dict = consolidated(optimizer)
            optimizer = make(case, case.problem.param_groups(parameters))
            optimizer.load_state_dict(state_dict)
        case.problem.set_gradients(parameters, step)
        with CollectiveCounter() as counter:
            optimizer.step()
        assert [call for call in counter.calls if call[0] != "broadcast_"] == [("allreduce_", 64)]
        norms.append(optimizer.optim.grad_norm.item())
        means.append(optimizer.optim.inertia_mean.item())
    states = consolidated(optimizer)["state"]
    found = {name: to_numpy(parameter) for name, parameter in parameters.items()}
    return found, means, norms, {key: {k: to_numpy(v) for k, v in state.items()} for key, state in states.items()}


def walk_all(world_size: int) -> dict[str, Any]:
    return {name: walk(case) for name, case in CASES.items() if case.world_size == world_size}


@functools.cache
def walks(world_size: int) -> list[dict[str, Any]]:
    return run_ranks(walk_all, world_size, world_size)


def solve(case: Case) -> tuple[Any, list[Any]]:
    problem, oracle, seen = case.problem, case.problem.oracle(), []
    late = {spec.name for spec in problem.groups[-1][1]} if case.add_last_group_at is not None else set()
    for step in range(problem.steps):
        gradients = problem.oracle_gradients(step)
        if step < (case.add_last_group_at or 0):
            gradients = {name: value for name, value in gradients.items() if name not in late}
        seen.append(oracle.step(gradients))
    return oracle, seen


@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_over_all_ranks_without_configuration(name: str) -> None:
    case = CASES[name]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}[case.problem.dtype]
    oracle, seen = solve(case)
    for of_rank in walks(case.world_size):
        parameters, means, norms, _ = of_rank[name]
        error = worst_relative_error(parameters, oracle, case.problem)
        print(f"ZeroRedundancyOptimizer, {name}: {error:.1e}")
        assert error < tolerance
        np.testing.assert_allclose(means, [s.mean for s in seen], rtol=tolerance)
        np.testing.assert_allclose(norms, [s.grad_norm for s in seen], rtol=tolerance)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.problem.dtype == torch.float64])
def test_the_consolidated_state_equals_the_oracles(name: str) -> None:
    case = CASES[name]
    oracle, _ = solve(case)
    states = walks(case.world_size)[0][name][3]
    assert len(states) == len(oracle.states)
    for state, expected in zip((states[key] for key in sorted(states)), oracle.states.values(), strict=True):
        assert state["step"].item() == expected.step
        for part in ("exp_avg", "exp_avg_sq", "beta1_prod"):
            np.testing.assert_allclose(state[part], getattr(expected, part), rtol=1e-11, atol=1e-15)
