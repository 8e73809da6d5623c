"""A program for mpirun that trains a sharded model for a few steps and gathers every rank's mean through MPI.

mpi_mean.py fsdp2         the mean from adai_dist's own all-reduce
mpi_mean.py deepspeed     ZeRO 2, with ranks from MPI and Adai registered by `python -m adai_dist run`
"""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn

from tests.problems import Problem, Spec

# Numbers of elements not divisible by two ranks.
PROBLEM = Problem(
    groups=(({"lr": 0.4, "dampening": 0.0}, (Spec("matrix", (13, 7)), Spec("vector", (5,), scale=3.0))),),
    steps=8,
    dtype=torch.float32,
)


class Prescribed(nn.Module):
    """Model whose gradients, averaged over ranks, are those of the problem; each rank has different elements."""

    def __init__(self) -> None:
        super().__init__()
        for spec in PROBLEM.specs():
            self.register_parameter(spec.name, nn.Parameter(PROBLEM.initial(spec)))

    def forward(self, step: int) -> Tensor:
        total = torch.zeros(())
        for spec in PROBLEM.specs():
            gradient = PROBLEM.gradient(spec, step)
            assert gradient is not None
            index = torch.arange(gradient.numel()).reshape(gradient.shape)
            is_mine = index % dist.get_world_size() == dist.get_rank()
            total = total + (getattr(self, spec.name) * gradient * is_mine * dist.get_world_size()).sum()
        return total


def train_fsdp2() -> list[float]:
    from torch.distributed.fsdp import fully_shard

    from adai_dist import AdaiV2

    dist.init_process_group("gloo")
    model: Any = fully_shard(Prescribed())
    hyper, _ = PROBLEM.groups[0]
    optimizer = AdaiV2(model.parameters(), **hyper)
    means: list[float] = []
    for step in range(PROBLEM.steps):
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(optimizer.inertia_mean))
    return means


def train_deepspeed() -> list[float]:
    import deepspeed

    assert "RANK" not in os.environ, "DeepSpeed must query MPI"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdaiV2", "params": PROBLEM.groups[0][0]},
        "zero_optimization": {"stage": 2},
    }
    deepspeed.init_distributed()
    model = Prescribed()
    parameters: Any = list(model.parameters())
    engine: Any = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    means: list[float] = []
    for step in range(PROBLEM.steps):
        engine.backward(engine(step))
        engine.step()
        means.append(float(engine.basic_optimizer.inertia_mean))
    return means


def main() -> None:
    means = {"fsdp2": train_fsdp2, "deepspeed": train_deepspeed}[sys.argv[1]]()
    world = MPI.COMM_WORLD
    assert (world.rank, world.size) == (dist.get_rank(), dist.get_world_size())
    shown = world.allgather((platform.node(), means))
    if world.rank == 0:
        print(json.dumps(shown), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
