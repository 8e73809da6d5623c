"""Several optimizers of one model step with one mean, in any layout of their parameters."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from adai_dist import Adai, AdaiV2, share_mean
from tests.distributed.layouts import LAYOUTS, SHARDED, CollectiveCounter, Prescribed, Walk, backward, gather
from tests.problems import Problem, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

CLIPPED = replace(SHARDED, steps=24, max_grad_norm=10.0)


class Ensemble(torch.optim.Optimizer):
    """One optimizer per parameter group of the problem, stepped in turn, with another one first each time."""

    def __init__(self, optimizers: list[AdaiV2]) -> None:
        self.optimizers = optimizers
        self.num_steps = 0
        self.state = {param: state for o in optimizers for param, state in o.state.items()}  # type: ignore[assignment]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for k in range(len(self.optimizers)):
            self.optimizers[(self.num_steps + k) % len(self.optimizers)].step()
        self.num_steps += 1


def walk_together(layout: str, problem: Problem) -> tuple[Walk, list[int]]:
    model = Prescribed(problem)
    wrapped = LAYOUTS[layout].apply(model)
    groups = problem.param_groups(model.by_name())
    optimizers = [AdaiV2([param_group], lr=1.0, max_grad_norm=problem.max_grad_norm) for param_group in groups]
    share_mean(optimizers)
    ensemble = Ensemble(optimizers)
    num_all_reduces: list[int] = []
    for step in range(problem.steps):
        backward(wrapped, ensemble, step)
        counter = CollectiveCounter()
        with counter:
            ensemble.step()
        num_all_reduces.append(len(counter.calls))
        assert len({optimizer.inertia_mean.item() for optimizer in optimizers}) == 1
    ensemble.state = {param: state for o in optimizers for param, state in o.state.items()}  # type: ignore[assignment]
    return gather(model, ensemble), num_all_reduces  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["plain-1", "ddp-2", "fsdp2-2", "tp-fsdp2-2x2"])
def test_optimizers_that_share_a_mean_step_like_one(layout: str) -> None:
    oracle, _ = CLIPPED.solve()
    for walk, num_all_reduces in run_ranks(walk_together, LAYOUTS[layout].world_size, layout, CLIPPED):
        error = worst_relative_error(walk.parameters, oracle, CLIPPED)
        print(f"{layout}: {error:.1e}")
        assert error < 1e-13
        assert num_all_reduces == [LAYOUTS[layout].num_all_reduces] * CLIPPED.steps


def pair(**options: Any) -> tuple[list[nn.Parameter], list[Adai]]:
    params = [nn.Parameter(torch.arange(1.0, 4.0)), nn.Parameter(torch.ones(2))]
    return params, [Adai([param], lr=0.1, **options) for param in params]


def set_gradients(params: list[nn.Parameter], scale: float = 1.0) -> None:
    for param in params:
        param.grad = scale * torch.arange(1.0, 1.0 + param.numel())


def test_clipping_by_one_clips_all() -> None:
    params, optimizers = pair()
    share_mean(optimizers)
    expected_params, _ = pair()
    whole = Adai(expected_params, lr=0.1, max_grad_norm=0.5)
    for _ in range(3):
        set_gradients(params)
        set_gradients(expected_params)
        norm = optimizers[1].clip_grad_norm_(0.5)
        optimizers[0].step()
        optimizers[1].step()
        whole.step()
        assert norm == whole.grad_norm == optimizers[0].grad_norm
    for param, expected in zip(params, expected_params, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=0.0)


def test_a_skip_is_logged_once_for_all(caplog: pytest.LogCaptureFixture) -> None:
    params, optimizers = pair()
    share_mean(optimizers)
    set_gradients(params)
    params[1].grad[0] = torch.inf  # type: ignore[index]
    for optimizer in optimizers:
        optimizer.step()
    assert [int(optimizer.num_skipped_steps) for optimizer in optimizers] == [1, 1]
    assert len([record for record in caplog.records if "step skipped" in record.getMessage()]) == 1
    assert torch.equal(params[0], torch.arange(1.0, 4.0))


def test_an_optimizer_that_missed_a_step_raises_an_error() -> None:
    params, optimizers = pair()
    share_mean(optimizers)
    set_gradients(params)
    optimizers[0].step()
    set_gradients(params, 2.0)
    with pytest.raises(RuntimeError, match=r"from the first step\(\) of the optimizers that share one mean"):
        optimizers[1].step()


def test_parameters_that_are_added_later_join_the_mean() -> None:
    params, optimizers = pair()
    share_mean(optimizers)
    expected_params, _ = pair()
    whole = Adai(expected_params, lr=0.1)
    for step in range(4):
        if step == 2:
            late, expected_late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
            optimizers[1].add_param_group({"params": [late]})
            whole.add_param_group({"params": [expected_late]})
            params.append(late)
            expected_params.append(expected_late)
        set_gradients(params)
        set_gradients(expected_params)
        for optimizer in (*optimizers, whole):
            optimizer.step()
    for param, expected in zip(params, expected_params, strict=True):
        np.testing.assert_allclose(param.detach(), expected.detach(), rtol=1e-6)


def means_with_a_late_dtensor() -> list[float]:
    """Step a plain parameter on two ranks; from step 2 on, the other optimizer has a sharded parameter."""
    mesh = init_device_mesh("cpu", (2,))
    params, optimizers = pair()
    share_mean(optimizers)
    means: list[float] = []
    for step in range(2):
        if step == 1:
            late = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
            optimizers[1].add_param_group({"params": [late]})
            late.grad = distribute_tensor(torch.full((4,), 3.0), mesh, [Shard(0)])
        for param in params:
            param.grad = torch.ones_like(param)
        for optimizer in optimizers:
            optimizer.step()
        means.append(optimizers[0].inertia_mean.item())
    return means


def test_a_sharded_parameter_that_is_added_later_changes_the_weights_of_all() -> None:
    for means in run_ranks(means_with_a_late_dtensor, 2):
        assert means == pytest.approx([1.0, (5 * 1.0 + 4 * 9.0) / 9], rel=1e-6)


def test_wrong_uses_are_refused() -> None:
    params, optimizers = pair()
    with pytest.raises(TypeError, match="optimizers must be Adai, AdaiW or AdaiV2, got one of type SGD"):
        share_mean([torch.optim.SGD(params, lr=0.1)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="each once, got 2, 1 distinct"):
        share_mean([optimizers[0], optimizers[0]])
    with pytest.raises(ValueError, match="one or more"):
        share_mean([])
    share_mean(optimizers)
    with pytest.raises(RuntimeError, match=r"pass the arguments to share_mean\(\)"):
        optimizers[0].configure_sharding()
    with pytest.raises(TypeError, match="must not be copied separately"):
        copy.deepcopy(optimizers[0])
    optimizers[1].max_grad_norm = 1.0
    set_gradients(params)
    with pytest.raises(ValueError, match=r"must have the same max_grad_norm, got \[None, 1.0\]"):
        optimizers[0].step()


def steps_of_stages() -> list[float]:
    """Give every rank a different parameter, without copies."""
    rank = dist.get_rank()
    param = nn.Parameter(torch.arange(1.0, 3.0 + rank, dtype=torch.float64))
    optimizer = Adai([param], lr=0.1)
    optimizer.configure_sharding(stages=dist.group.WORLD)
    for step in range(3):
        param.grad = torch.arange(1.0, 3.0 + rank, dtype=torch.float64) * (step + 1) * (rank + 1)
        optimizer.step()
    assert optimizer.sharding_plan.weights[param] == 1.0
    return param.tolist()


def test_stages_hold_different_parameters() -> None:
    params = [nn.Parameter(torch.arange(1.0, 3.0 + rank, dtype=torch.float64)) for rank in range(3)]
    whole = Adai(params, lr=0.1)
    for step in range(3):
        for rank, param in enumerate(params):
            param.grad = torch.arange(1.0, 3.0 + rank, dtype=torch.float64) * (step + 1) * (rank + 1)
        whole.step()
    for found, param in zip(run_ranks(steps_of_stages, 3), params, strict=True):
        np.testing.assert_allclose(found, param.tolist(), rtol=1e-14)
