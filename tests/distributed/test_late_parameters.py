"""Parameters that join during training, and optimizers that were made before the model was wrapped."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from adai_dist import AdaiV2
from tests.distributed import fsdp1_layouts
from tests.distributed.fsdp1_layouts import UnderFSDP1, whole_parameters
from tests.distributed.layouts import LAYOUTS, MAX_NORM, SHARDED, Prescribed, backward, full
from tests.problems import Problem, to_numpy, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

JOIN_AT = 5
PROBLEM = replace(SHARDED, steps=14, max_grad_norm=MAX_NORM)
FSDP1 = {
    "fsdp1-orig-2": fsdp1_layouts.Layout(2, use_orig_params=True),
    "fsdp1-flat-2": fsdp1_layouts.Layout(2, use_orig_params=False),
}
WORLD_SIZES = {
    name: 4 if name.endswith("2x2") else 2
    for name in ("ddp-2", "fsdp2-2", "fsdp2-beside-plain-2", "tp-2", "hsdp-2x2", "tp-fsdp2-2x2", *FSDP1)
}
LATE_GROUP = {spec.name for spec in PROBLEM.groups[-1][1]}
# FSDP1's flat parameters are trained completely or not at all.
THAWED = {"first.bias", "root.table"}
THAWED_BLOCK = {spec.name for spec in PROBLEM.groups[1][1]}
CASES = ("a group is added", "parameters thaw", "made before wrapping")


def thawed(layout: str) -> set[str]:
    return THAWED_BLOCK if layout == "fsdp1-flat-2" else THAWED


def problem_of(layout: str) -> Problem:
    return UnderFSDP1.of(PROBLEM) if layout in FSDP1 else PROBLEM


def wrap(layout: str, model: Prescribed) -> nn.Module:
    return fsdp1_layouts.wrap(model, FSDP1[layout]) if layout in FSDP1 else LAYOUTS[layout].apply(model)


def param_groups(layout: str, model: Prescribed, wrapped: nn.Module) -> list[dict[str, Any]]:
    if layout in FSDP1:
        assert isinstance(wrapped, FSDP)
        return fsdp1_layouts.param_groups(model, wrapped, FSDP1[layout])
    return model.problem.param_groups(model.by_name())


def freeze(model: Prescribed, names: set[str]) -> None:
    for name in names:
        model.by_name()[name].requires_grad_(False)


def walk(layout: str, case: str) -> dict[str, Any]:
    model = Prescribed(problem_of(layout))
    early = model.problem.param_groups(model.by_name())
    if case == "parameters thaw":
        freeze(model, thawed(layout))
    wrapped = wrap(layout, model)
    if case == "parameters thaw" and layout not in FSDP1:  # creates new DTensors, which are trainable
        freeze(model, thawed(layout))
    groups = early if case == "made before wrapping" else param_groups(layout, model, wrapped)
    frozen = [p for group in groups for p in group["params"] if not p.requires_grad]
    later = [groups.pop()] if case == "a group is added" else []
    optimizer = AdaiV2(groups, lr=1.0, max_grad_norm=MAX_NORM)
    if layout in FSDP1:
        optimizer.configure_sharding(model=wrapped)
    for step in range(PROBLEM.steps):
        if step == JOIN_AT:
            for group in later:
                optimizer.add_param_group(group)
            for parameter in frozen:
                parameter.requires_grad_(True)
        wrapped.zero_grad()
        wrapped(step).backward()
        optimizer.step()
    if isinstance(wrapped, FSDP):
        return whole_parameters(model, wrapped)
    return {name: to_numpy(full(parameter)) for name, parameter in model.by_name().items()}


def can(layout: str, case: str) -> bool:
    """Return whether the layout keeps the parameters; only DDP and FSDP1 with original parameters do."""
    return case != "made before wrapping" or layout in ("ddp-2", "fsdp1-orig-2")


def walk_all(world_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (layout, case): walk(layout, case)
        for layout, size in WORLD_SIZES.items()
        for case in CASES
        if size == world_size and can(layout, case)
    }


@functools.cache
def walks(world_size: int) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(walk_all, world_size, world_size)


@pytest.mark.parametrize(("layout", "case"), [(x, y) for x in WORLD_SIZES for y in CASES if can(x, y)])
def test_parameters_that_join_late_follow_the_oracle(layout: str, case: str) -> None:
    problem = problem_of(layout)
    late = {"a group is added": LATE_GROUP, "parameters thaw": thawed(layout)}.get(case, set())
    oracle = problem.oracle()
    for step in range(PROBLEM.steps):
        gradients = problem.oracle_gradients(step)
        if step < JOIN_AT:
            gradients |= dict.fromkeys(late)
        oracle.step(gradients)
    for of_rank in walks(WORLD_SIZES[layout]):
        error = worst_relative_error(of_rank[layout, case], oracle, problem)
        print(f"{layout}, {case}: {error:.1e}")
        assert error < 1e-13


def warnings_of_lost_parameters(layout: str) -> list[str]:
    """Step an optimizer whose parameters the engine has replaced."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    model = Prescribed(problem_of(layout))
    optimizer = AdaiV2(model.problem.param_groups(model.by_name()), lr=1.0)
    wrapped = wrap(layout, model)
    if layout in FSDP1:
        optimizer.configure_sharding(model=wrapped)
    for step in range(3):
        backward(wrapped, torch.optim.SGD(wrapped.parameters()), step)
        optimizer.step()
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("layout", ["fsdp2-2", "fsdp1-flat-2"])
def test_an_optimizer_whose_parameters_were_replaced_warns_once(layout: str) -> None:
    first, second = run_ranks(warnings_of_lost_parameters, 2, layout)
    assert len(first) == 1
    assert "wrapped model" in first[0]
    assert second == []
