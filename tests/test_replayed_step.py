"""Replayed steps: a recorder repeats a step's operations on the same addresses on the CPU, like a CUDA graph.

Everything that one step passes to the next must be written in place. tests/gpu replays a real graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adai_dist import AdaiV2
from adai_dist.sharding.mean import GlobalMean
from adai_dist.sharding.owned_shards import OwnedShards


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def prepared() -> tuple[list[Parameter], AdaiV2]:
    parameters = [Parameter(torch.linspace(-1, 1, size)) for size in (1000, 7)]
    return parameters, AdaiV2(parameters, lr=0.1, dampening=0.5, weight_decay=0.01, max_grad_norm=1.0)


def set_gradients(parameters: list[Parameter], step: int) -> None:
    for parameter in parameters:
        gradient = torch.sin(torch.arange(parameter.numel()) * (step + 1.0))
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)


def replayed_and_eager(num_replays: int) -> tuple[list[Parameter], list[Parameter]]:
    (parameters, optimizer), (expected, eager) = prepared(), prepared()
    recorder = Recorder()
    for step in range(4 + num_replays):
        set_gradients(parameters, step)
        set_gradients(expected, step)
        eager.step()
        if step < 3:  # creates the states, and the sums with which the recorded step begins
            optimizer.step()
        elif step == 3:
            with recorder:
                optimizer.step()
        else:
            recorder.replay()
    return parameters, expected


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_a_step_can_be_repeated_at_the_same_addresses(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", mode)
    for replayed, expected in zip(*replayed_and_eager(4), strict=True):
        assert torch.equal(replayed, expected)


def test_the_recorder_detects_what_is_not_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def advance_into_new_momenta(self: AdaiV2, shards: list[OwnedShards], mean: GlobalMean) -> None:
        before = [[exp_avg.clone() for exp_avg in owned.tensors.exp_avg] for owned in shards]
        advance(self, shards, mean)
        for owned, exp_avgs in zip(shards, before, strict=True):
            for param_shard, exp_avg in zip(owned.param_shards, exp_avgs, strict=True):
                param_shard.state["exp_avg"] = param_shard.exp_avg.clone()
                param_shard.exp_avg.copy_(exp_avg)

    advance = AdaiV2.advance
    monkeypatch.setattr(AdaiV2, "advance", advance_into_new_momenta)
    assert any(not torch.equal(replayed, expected) for replayed, expected in zip(*replayed_and_eager(4), strict=True))
