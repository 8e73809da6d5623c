"""Pipeline stages with different placements: sums are reduced within a stage first, and over stages last."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from adai_dist import AdaiV2
from tests.distributed.layouts import full
from tests.problems import Problem, Spec, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

FIRST, LAST = Spec("first.weight", (5,)), Spec("last.weight", (3,), scale=3.0)
MAX_NORM = 6.0  # less than the norms of half of the steps
PROBLEM = Problem(groups=(({"lr": 0.1, "weight_decay": 0.02}, (FIRST, LAST)),), steps=8, max_grad_norm=MAX_NORM)


def walk() -> tuple[str, np.ndarray, list[float]]:
    """Train with shards of the first stage on ranks 0 and 1, and copies of the last one on ranks 2 and 3."""
    rank = dist.get_rank()
    stages = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    shards = DeviceMesh("cpu", [0, 1])
    is_first = rank < 2
    spec = FIRST if is_first else LAST

    def placed(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, shards, [Shard(0)]) if is_first else tensor

    parameter = Parameter(placed(PROBLEM.initial(spec)))
    optimizer = AdaiV2([parameter], **PROBLEM.hyperparameters(0), max_grad_norm=PROBLEM.max_grad_norm)
    optimizer.configure_sharding(stages=stages)
    means: list[float] = []
    for step in range(PROBLEM.steps):
        gradient = PROBLEM.gradient(spec, step)
        assert gradient is not None
        parameter.grad = placed(gradient)
        optimizer.step()
        means.append(optimizer.inertia_mean.item())
    return spec.name, full(parameter).numpy(), means


def test_a_sharded_stage_and_a_replicated_one_step_with_one_mean() -> None:
    oracle, seen = PROBLEM.solve()
    assert 0 < sum(each.grad_norm > MAX_NORM for each in seen) < PROBLEM.steps, "some steps are clipped"
    ranks = run_ranks(walk, 4)
    for first, last in ((0, 2), (0, 3), (1, 2), (1, 3)):
        parameters = {ranks[rank][0]: ranks[rank][1] for rank in (first, last)}
        assert worst_relative_error(parameters, oracle, PROBLEM) < 1e-13
    for _, _, means in ranks:
        assert means == pytest.approx([each.mean for each in seen], rel=1e-13)
