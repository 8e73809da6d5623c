"""Ranks with only frozen parameters, without parameters, or without gradients in some steps still take part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adai_dist import AdaiV2
from tests.problems import Problem, Spec, to_numpy, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

OWN = Spec("first.own", (5, 2))
THEIRS = Spec("second.theirs", (3,), missing_every=2, first_step=4)  # none in the first steps, then in every other step
FROZEN = Spec("second.frozen", (2, 2))
PROBLEM = Problem((({"lr": 0.3, "decoupled": True}, (OWN,)), ({"lr": 0.1}, (THEIRS,))), steps=12)
ALONE = replace(PROBLEM, groups=PROBLEM.groups[:1])
CASES = ("frozen", "none", "empty")


def parameters_of(case: str) -> tuple[dict[str, nn.Parameter], list[dict[str, Any]]]:
    """Make the parameters: rank 0 owns the first one, those of rank 1 depend on the case."""
    if dist.get_rank() == 0:
        params = {OWN.name: nn.Parameter(PROBLEM.initial(OWN))}
        return params, [PROBLEM.hyperparameters(0) | {"params": list(params.values())}]
    if case == "empty":
        return {}, [{"params": []}]
    if case == "frozen":
        return {}, [{"params": [nn.Parameter(PROBLEM.initial(FROZEN), requires_grad=False)]}]
    params = {THEIRS.name: nn.Parameter(PROBLEM.initial(THEIRS))}
    return params, [PROBLEM.hyperparameters(1) | {"params": list(params.values())}]


def walk_cases() -> dict[str, tuple[dict[str, Any], list[float], int]]:
    found: dict[str, tuple[dict[str, Any], list[float], int]] = {}
    specs = {spec.name: spec for spec in PROBLEM.specs()}
    for case in CASES:
        params, param_groups = parameters_of(case)
        optimizer = AdaiV2(param_groups, lr=1.0)
        optimizer.configure_sharding(num_replicas=1)
        means: list[float] = []
        for step in range(PROBLEM.steps):
            for name, param in params.items():
                param.grad = PROBLEM.gradient(specs[name], step)
            optimizer.step()
            means.append(optimizer.inertia_mean.item())
        values = {name: to_numpy(param) for name, param in params.items()}
        found[case] = values, means, len(optimizer.state_dict()["state"])
    return found


def test_a_rank_without_gradients_takes_part_in_every_step_and_does_not_affect_the_others() -> None:
    first, second = run_ranks(walk_cases, 2)
    for case, problem in (("frozen", ALONE), ("empty", ALONE), ("none", PROBLEM)):
        oracle, seen = problem.solve()
        parameters = first[case][0] | second[case][0]
        assert worst_relative_error(parameters, oracle, problem) < 1e-13
        assert first[case][1] == second[case][1], "the mean differs between ranks"
        assert first[case][1] == pytest.approx([observed.mean for observed in seen], rel=1e-12)
    assert [second[case][2] for case in CASES] == [0, 1, 0], "only trained parameters may have states"


def walk_without_gradients() -> tuple[bool, bool]:
    """Take a step under DDP in which no parameter has a gradient, and one in which they have."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    optimizer = AdaiV2(model.parameters(), lr=0.1)
    stays = moves = True
    for step in range(4):
        before = [param.detach().clone() for param in model.parameters()]
        if step % 2 == 0:
            model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        is_same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        stays, moves = stays and (step % 2 == 0 or is_same), moves and (step % 2 == 1 or not is_same)
    return stays, moves


def test_under_ddp_a_step_without_any_gradient_changes_nothing() -> None:
    assert run_ranks(walk_without_gradients, 2) == [(True, True)] * 2
