"""torch.distributed.pipelining with two stages and two replicas: every stage steps with the mean of all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

import adai_dist
from adai_dist import AdaiV2
from tests.distributed.layouts import CollectiveCounter
from tests.distributed.recorded import Recorder, Recording, follow, names_of
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

VOCABULARY, WIDTH, BATCH, LENGTH, MICRO_BATCHES, STEPS = 11, 8, 8, 4, 4, 6


class Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 5 + 2 * index), nn.Linear(5 + 2 * index, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def make_stage(index: int, num_stages: int) -> nn.Module:
    """Make stages of different sizes, and so with different gradients."""
    torch.manual_seed(index)
    layers: list[nn.Module] = [Layer(index)]
    if index == 0:
        layers.insert(0, nn.Embedding(VOCABULARY, WIDTH))
    if index == num_stages - 1:
        layers.append(nn.Linear(WIDTH, VOCABULARY))
    return nn.Sequential(*layers).double()


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return module


def fsdp2(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(module, mesh=mesh, reshard_after_forward=False)


WRAPPERS: dict[str, Callable[[nn.Module, DeviceMesh], nn.Module]] = {"plain": plain, "fsdp2": fsdp2}
SCHEDULES: dict[str, Any] = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
}
CASES = (
    ("GPipe", "plain"),
    ("1F1B", "fsdp2"),
    ("Interleaved1F1B", "plain"),
    ("Interleaved1F1B", "fsdp2"),
)


def train(schedule_name: str, wrapper: str, shares_mean: bool = True) -> tuple[Recording, list[list[tuple[str, int]]]]:
    """Return the recorded steps of this rank, and the collectives of every step. Collective: all ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    pp, dp = mesh["pp"], mesh["dp"]
    is_interleaved = schedule_name.startswith("Interleaved")
    num_stages = 4 if is_interleaved else 2
    indices = range(pp.get_local_rank(), num_stages, 2)
    modules = {index: WRAPPERS[wrapper](make_stage(index, num_stages), dp) for index in indices}
    stages = [
        PipelineStage(module, index, num_stages, torch.device("cpu"), group=pp.get_group())
        for index, module in modules.items()
    ]
    schedule = SCHEDULES[schedule_name](stages if is_interleaved else stages[0], MICRO_BATCHES, loss_fn=loss_of)

    optimizers = [AdaiV2(m.parameters(), lr=0.3, dampening=0.5, max_grad_norm=0.5) for m in modules.values()]
    if shares_mean and is_interleaved:
        adai_dist.share_mean(optimizers, stages=pp.get_group())
    elif shares_mean:
        optimizers[0].configure_sharding(stages=pp.get_group())

    names = {p: f"{index}.{name}" for index, module in modules.items() for p, name in names_of(module).items()}
    recorder = Recorder(optimizers, names)
    calls: list[list[tuple[str, int]]] = []
    generator = torch.Generator().manual_seed(dp.get_local_rank())
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        inputs = (tokens,) if 0 in modules else ()
        schedule.step(*inputs, **({"target": tokens.flip(1)} if num_stages - 1 in modules else {}))
        if wrapper == "plain":
            for parameter in names:
                dist.all_reduce(parameter.grad, group=dp.get_group())
                parameter.grad /= 2
        with CollectiveCounter() as counter:
            for optimizer in optimizers:
                optimizer.step()
        calls.append(counter.calls)
        for optimizer in optimizers:
            optimizer.zero_grad()
    return recorder.finish(), calls


def train_all() -> dict[tuple[str, ...], Any]:
    return {case: train(*case) for case in CASES} | {("alone",): train("GPipe", "plain", shares_mean=False)}


@functools.cache
def ranks() -> list[dict[tuple[str, ...], Any]]:
    return run_ranks(train_all, 4)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_all_stages_of_a_pipeline_step_with_one_mean(case: tuple[str, str]) -> None:
    error = follow([of_rank[case][0] for of_rank in ranks()], rounding=1e-13)
    print(f"{'-'.join(case)}: {error:.1e}")
    assert error < 1e-13


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_stages_of_a_rank_communicate_once_and_over_the_pipeline(case: tuple[str, str]) -> None:
    num_all_reduces = 2 if case[1] == "fsdp2" else 1  # one over the shards of a stage, one over the stages
    for of_rank in ranks():
        assert of_rank[case][1] == [[("allreduce_", 64)] * num_all_reduces] * STEPS


def test_unconfigured_stages_would_step_with_separate_means() -> None:
    """Check that the tests above can fail."""
    first, last = ranks()[0][("alone",)][0].means, ranks()[-1][("alone",)][0].means
    assert min(abs(a - b) / max(a, b) for a, b in zip(first, last, strict=True)) > 0.1
