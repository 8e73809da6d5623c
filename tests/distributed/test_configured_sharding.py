"""configure_sharding with plain parameters that differ between ranks, or have known numbers of copies."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from adai_dist import Adai, AdaiV2
from tests.distributed.layouts import (
    LAYOUTS,
    MAX_NORM,
    SHARDED,
    CollectiveCounter,
    backward,
    gather,
    make,
)
from tests.problems import Problem, to_numpy, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

PROBLEM = replace(SHARDED, steps=25, max_grad_norm=MAX_NORM)
REPLICATED = {"root.table", "first.bias"}
# Same hyperparameters, and a gradient in every step: ZeroRedundancyOptimizer has a single group.
UNIFORM = Problem(
    groups=tuple(
        (SHARDED.groups[0][0], tuple(replace(spec, missing_every=None, first_step=0) for spec in specs))
        for _, specs in SHARDED.groups
    ),
    steps=25,
)


def owned_names(distribution: str) -> list[str]:
    """Return the parameters that this rank holds."""
    names = [spec.name for spec in PROBLEM.specs()]
    if distribution == "all on rank zero":
        return names if dist.get_rank() == 0 else []
    mine = names[dist.get_rank() :: dist.get_world_size()]
    return [name for name in names if name in mine or (distribution == "some on all" and name in REPLICATED)]


def walk_partitioned(distribution: str) -> tuple[dict[str, np.ndarray], list[float], list[tuple[str, int]]]:
    names = owned_names(distribution)
    parameters = PROBLEM.parameters()
    groups = [
        PROBLEM.hyperparameters(k) | {"params": [parameters[s.name] for s in specs if s.name in names]}
        for k, (_, specs) in enumerate(PROBLEM.groups)
    ]
    replicated = {id(parameters[name]) for name in REPLICATED}
    optimizer = AdaiV2(groups, lr=1.0, max_grad_norm=MAX_NORM)
    optimizer.configure_sharding(
        dist.group.WORLD,
        num_replicas=(lambda p: dist.get_world_size() if id(p) in replicated else 1)
        if distribution == "some on all"
        else 1,
    )
    norms: list[float] = []
    counter = CollectiveCounter()
    for step in range(PROBLEM.steps):
        PROBLEM.set_gradients(parameters, step)
        with counter:
            optimizer.step()
        norms.append(optimizer.grad_norm.item())
    return {name: to_numpy(parameters[name]) for name in names}, norms, counter.calls


@pytest.mark.parametrize("distribution", ["each on one rank", "some on all", "all on rank zero"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_parameters_that_differ_between_ranks_share_one_mean(distribution: str, world_size: int) -> None:
    oracle, seen = PROBLEM.solve()
    found: dict[str, np.ndarray] = {}
    for parameters, norms, calls in run_ranks(walk_partitioned, world_size, distribution):
        np.testing.assert_allclose(norms, [s.grad_norm for s in seen], rtol=1e-13)
        assert len(calls) == PROBLEM.steps
        assert max(num_bytes for _, num_bytes in calls) <= 64
        for name, value in parameters.items():
            np.testing.assert_array_equal(found.setdefault(name, value), value)
    assert worst_relative_error(found, oracle, PROBLEM) < 1e-13


def walk_configured(layout: str, num_replicas: Any) -> tuple[dict[str, Any], int]:
    model, wrapped, optimizer = make(layout, PROBLEM)
    optimizer.configure_sharding(dist.group.WORLD, num_replicas)
    counter = CollectiveCounter()
    for step in range(PROBLEM.steps):
        backward(wrapped, optimizer, step)
        with counter:
            optimizer.step()
    return gather(model, optimizer).parameters, len(counter.calls)


@pytest.mark.parametrize(
    ("layout", "num_replicas"),
    [
        ("ddp-2", None),
        ("fsdp2-2", None),
        ("fsdp2-beside-plain-2", None),
        ("fsdp2-beside-plain-2", 2),
        ("hsdp-2x2", None),
        ("tp-fsdp2-2x2", None),
        ("tp-ddp-2x2", 4),
    ],
)
def test_one_process_group_serves_dtensors_and_plain_parameters_with_one_collective(
    layout: str, num_replicas: int | None
) -> None:
    oracle, _ = PROBLEM.solve()
    for parameters, num_calls in run_ranks(walk_configured, LAYOUTS[layout].world_size, layout, num_replicas):
        assert worst_relative_error(parameters, oracle, PROBLEM) < 1e-13
        assert num_calls == PROBLEM.steps


def means_of_separate_groups() -> tuple[float, float]:
    """Step each rank separately, then both together; rank r has gradients of size r + 1."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    parameter.grad = torch.full((4,), dist.get_rank() + 1.0, dtype=torch.float64)
    optimizer = Adai([parameter], lr=0.1)
    optimizer.configure_sharding(alone)
    optimizer.step()
    mean_alone = optimizer.inertia_mean.item()
    optimizer = Adai([parameter], lr=0.1)
    optimizer.configure_sharding(num_replicas=1)
    optimizer.step()
    return mean_alone, optimizer.inertia_mean.item()


def test_the_ranks_of_the_process_group_share_the_mean() -> None:
    (first, together), (second, also_together) = run_ranks(means_of_separate_groups, 2)
    assert (first, second) == pytest.approx((1.0, 4.0), rel=1e-15)
    assert together == also_together == pytest.approx(2.5, rel=1e-15)


def wrong_settings() -> dict[str, str]:
    messages: dict[str, str] = {}
    groups = [dist.new_group([0]), dist.new_group([1])]
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    optimizer_like = Adai([parameter], lr=0.1)

    def attempt(name: str, *args: Any, **kwargs: Any) -> None:
        optimizer = Adai([parameter], lr=0.1)
        try:
            optimizer.configure_sharding(*args, **kwargs)
            optimizer.step()
        except (TypeError, ValueError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    attempt("foreign", groups[1 - dist.get_rank()])
    attempt("text", num_replicas="2")
    attempt("float", num_replicas=2.0)
    attempt("bool", num_replicas=True)
    attempt("zero", num_replicas=0)
    attempt("many", num_replicas=3)
    attempt("function", num_replicas=lambda p: 7)
    attempt("two ways", dist.group.WORLD, stages=dist.group.WORLD)
    attempt("more than stages", num_replicas=3, stages=dist.group.WORLD)
    attempt("no module", model=optimizer_like)
    attempt("no group", stages=[0, 1])
    attempt("foreign stages", stages=groups[1 - dist.get_rank()])
    attempt("good", num_replicas=2)
    attempt("good, too", stages=dist.group.WORLD)
    return messages


def test_wrong_settings_are_refused_with_their_name_and_value() -> None:
    for messages in run_ranks(wrong_settings, 2):
        of_num_replicas = {"text", "float", "bool", "zero", "many", "function", "more than stages"}
        of_the_others = {"foreign", "two ways", "no module", "no group", "foreign stages"}
        assert set(messages) == of_num_replicas | of_the_others
        assert messages["two ways"].startswith("ValueError: process_group must be given without model and stages")
        assert messages["no module"].startswith("TypeError: model must be a torch.nn.Module, got Adai")
        assert messages["no group"].startswith("TypeError: stages must be a torch.distributed.ProcessGroup, got [0, 1]")
        assert messages["foreign stages"].startswith("ValueError: stages must contain this rank")
        assert messages["foreign"].startswith("ValueError: process_group")
        for name, value in {"text": "'2'", "float": "2.0", "bool": "True"}.items():
            assert messages[name].startswith("TypeError: num_replicas")
            assert value in messages[name]
        for name, value in {"zero": "0", "many": "3", "function": "7", "more than stages": "3"}.items():
            assert messages[name].startswith("ValueError: num_replicas")
            assert f"got {value}" in messages[name]


def copy_a_configured_optimizer() -> tuple[bool, str]:
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), dist.get_rank() + 1.0)
    optimizer = Adai([parameter], lr=0.1)
    optimizer.configure_sharding(num_replicas=1)
    twin = copy.deepcopy(optimizer)
    for p in twin.param_groups[0]["params"]:
        p.grad = parameter.grad.clone()
    twin.step()
    optimizer.step()
    try:
        pickle.dumps(optimizer)
        message = ""
    except TypeError as error:
        message = str(error)
    return twin.inertia_mean.item() == optimizer.inertia_mean.item(), message


def test_a_deepcopy_shares_the_process_group_and_a_pickle_is_refused_clearly() -> None:
    for same, message in run_ranks(copy_a_configured_optimizer, 2):
        assert same
        assert "state_dict()" in message


def walk_after_reset() -> dict[str, Any]:
    model, wrapped, optimizer = make("fsdp2-2", PROBLEM)
    optimizer.configure_sharding(num_replicas=1)
    optimizer.configure_sharding()
    for step in range(PROBLEM.steps):
        backward(wrapped, optimizer, step)
        optimizer.step()
    return gather(model, optimizer).parameters


def test_without_arguments_the_sharding_is_read_from_the_tensors_again() -> None:
    oracle, _ = PROBLEM.solve()
    for parameters in run_ranks(walk_after_reset, 2):
        assert worst_relative_error(parameters, oracle, PROBLEM) < 1e-13
