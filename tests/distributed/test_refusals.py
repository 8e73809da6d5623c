"""Setups in which the mean cannot be exact are refused on every rank, with one clear message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from adai_dist import Adai, AdaiV2
from tests.distributed import fsdp1_layouts
from tests.distributed.layouts import SHARDED, Prescribed, full, make
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

FLOAT32 = replace(SHARDED, dtype=torch.float32, steps=2)
FSDP1 = fsdp1_layouts.Layout(2, use_orig_params=True)


def refusal(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def optimizer_in_backward(layout: str) -> tuple[str, bool]:
    """Run torch's optimizer-in-backward; return the error, and whether the parameters are unchanged."""
    from torch.distributed.optim import (
        _apply_optimizer_in_backward,
    )  # not imported in the test process, as the import warns

    model, wrapped, _ = make(layout, FLOAT32)
    before = {name: full(p) for name, p in model.by_name().items()}
    _apply_optimizer_in_backward(Adai, wrapped.parameters(), {"lr": 0.1})
    message = refusal(lambda: wrapped(0).backward())
    return message, all(torch.equal(before[name], full(p)) for name, p in model.by_name().items())


def step_in_a_hook(layout: str) -> tuple[str, bool]:
    """Step in gradient hooks, as in torch's tutorial."""
    model, wrapped, optimizer = make(layout, FLOAT32)
    before = {name: full(p) for name, p in model.by_name().items()}
    for parameter in wrapped.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    message = refusal(lambda: wrapped(0).backward())
    return message, all(torch.equal(before[name], full(p)) for name, p in model.by_name().items())


@pytest.mark.parametrize(
    ("attempt", "layout"),
    # Under FSDP2, torch's optimizer-in-backward never steps, with any optimizer.
    [(optimizer_in_backward, "plain-1"), (step_in_a_hook, "plain-1"), (step_in_a_hook, "fsdp2-2")],
)
def test_a_step_within_the_backward_pass_is_refused(attempt: Callable[[str], Any], layout: str) -> None:
    for message, is_unchanged in run_ranks(attempt, int(layout[-1]), layout):
        assert message.startswith("RuntimeError")
        assert "optimizer-in-backward" in message
        assert "after backward()" in message
        assert is_unchanged


def scaled_step(layout: str) -> str:
    _, wrapped, optimizer = make(layout, FLOAT32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def attempt() -> None:
        scaler.scale(wrapped(0)).backward()
        scaler.step(optimizer)
        scaler.update()

    return refusal(attempt)


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp2-2", 2), ("tp-fsdp2-2x2", 4)])
def test_a_grad_scaler_is_refused_if_torch_checks_only_one_gradient(layout: str, world_size: int) -> None:
    messages = run_ranks(scaled_step, world_size, layout)
    assert len(set(messages)) == 1
    if world_size == 4:
        assert messages[0].startswith("RuntimeError: with torch.amp.GradScaler")
        assert "bfloat16" in messages[0]
    else:
        assert messages[0] == "not refused"


def wrong_configurations() -> dict[str, str]:
    messages: dict[str, str] = {}
    problem = replace(FLOAT32, max_grad_norm=None)
    model = Prescribed(problem)
    wrapped = fsdp1_layouts.wrap(model, FSDP1)
    wrapped(0).backward()

    def attempt(name: str, **settings: Any) -> None:
        optimizer = AdaiV2(problem.param_groups(model.by_name()), lr=1.0)

        def run() -> None:
            if settings:
                optimizer.configure_sharding(**settings)
            optimizer.step()

        messages[name] = refusal(run)

    world = init_device_mesh("cpu", (2,)).get_group()
    attempt("unconfigured")
    attempt("part of the model", model=model.first)
    attempt("another model", model=nn.Linear(2, 2))
    attempt("no model", model="model")
    attempt("model and process group", model=wrapped, process_group=world)
    attempt("model and number", model=wrapped, num_replicas=1)
    attempt("stages over the shards", model=wrapped, stages=world)
    attempt("stages of others", stages=[dist.new_group([0]), dist.new_group([1])][1 - dist.get_rank()])
    attempt("no process group", model=wrapped, stages=2)
    attempt("right", model=wrapped)
    messages["over tensor parallelism"] = refusal(fsdp1_over_tensor_parallelism)
    messages["hybrid without shards"] = refusal(hybrid_fsdp1_without_shards)
    return messages


def hybrid_fsdp1_without_shards() -> None:
    """Use FSDP1's hybrid strategy with two replicas of one rank each, whose gradients it does not reduce."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.warns(UserWarning, match="FSDP is switching to use `NO_SHARD`"):
        wrapped = FSDP(
            nn.Linear(3, 2),
            device_mesh=mesh,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        )
    optimizer = AdaiV2(wrapped.parameters(), lr=1.0)
    optimizer.configure_sharding(model=wrapped)
    wrapped(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def fsdp1_over_tensor_parallelism() -> None:
    """Use FSDP1 over DTensors, whose local tensors it flattens: half of the model would be missing from the mean."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    wrapped = FSDP(model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = AdaiV2(wrapped.parameters(), lr=1.0)
    optimizer.configure_sharding(model=wrapped)
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_wrong_configurations_are_refused_with_a_remedy() -> None:
    first, second = run_ranks(wrong_configurations, 2)
    for messages in (first, second):
        expected = {
            "unconfigured": ("RuntimeError", "configure_sharding(model=model)"),
            "part of the model": ("ValueError", "pass the whole model"),
            "another model": ("ValueError", "pass the whole model"),
            "no model": ("TypeError", "model must be a torch.nn.Module, got 'model'"),
            "model and process group": ("ValueError", "leave one out"),
            "model and number": ("ValueError", "num_replicas=1"),
            "stages over the shards": ("ValueError", "stages must hold different parameters"),
            "stages of others": ("ValueError", "stages must contain this rank"),
            "no process group": ("TypeError", "stages must be a torch.distributed.ProcessGroup, got 2"),
            "right": ("not refused", ""),
            "over tensor parallelism": ("RuntimeError", "fully_shard"),
            "hybrid without shards": ("RuntimeError", "use ShardingStrategy.NO_SHARD, or DistributedDataParallel"),
        }
        assert set(messages) == set(expected)
        for name, (kind, part) in expected.items():
            assert messages[name].startswith(kind), f"{name}: {messages[name]}"
            assert part in messages[name], f"{name}: {messages[name]}"
