"""States that are received from another rank by collectives, which torch does not record as writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adai_dist import AdaiV2
from adai_dist.sharding.local_tensor import local_tensor
from tests.problems import to_numpy
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

STEPS_BEFORE, STEPS_AFTER = 4, 4


def make(seed: int = 0) -> tuple[nn.Module, AdaiV2]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 90), nn.Tanh(), nn.Linear(90, 3))
    return model, AdaiV2(model.parameters(), lr=0.5, dampening=0.5, max_grad_norm=1.0)


def step(model: nn.Module, optimizer: AdaiV2, number: int, size: float = 1.0) -> None:
    """Train on the same data on all ranks, as the test is about the optimizer."""
    data = torch.randn(16, 40, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    (size * model(data).square().mean()).backward()
    optimizer.step()


def idle_step(model: nn.Module, optimizer: AdaiV2) -> None:
    """Take a state-initialisation step, as torch.distributed.checkpoint does."""
    for param_group in optimizer.param_groups:
        param_group["lr"] = 0.0
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param_group in optimizer.param_groups:
        param_group["lr"] = 0.5


def tensors_of(model: nn.Module, optimizer: AdaiV2) -> Iterator[Tensor]:
    for param in model.parameters():
        yield param.data
        yield from (optimizer.state[param][name] for name in ("step", "exp_avg", "exp_avg_sq", "beta1_prod"))


def broadcast(model: nn.Module, optimizer: AdaiV2) -> None:
    for tensor in tensors_of(model, optimizer):
        dist.broadcast(tensor, src=0)


def scatter(model: nn.Module, optimizer: AdaiV2) -> None:
    for tensor in tensors_of(model, optimizer):
        dist.scatter(tensor, None if dist.get_rank() else [tensor.clone(), tensor.clone()], src=0)


def send(model: nn.Module, optimizer: AdaiV2) -> None:
    for tensor in tensors_of(model, optimizer):
        if dist.get_rank() == 0:
            dist.send(tensor, dst=1)
        else:
            dist.recv(tensor, src=0)


def add_up(model: nn.Module, optimizer: AdaiV2) -> None:
    """Overwrite the parameters and states of rank 1."""
    for tensor in tensors_of(model, optimizer):
        if dist.get_rank():
            tensor.data.zero_()
        dist.all_reduce(tensor)


TRANSFERS: dict[str, Callable[[nn.Module, AdaiV2], None]] = {
    "broadcast": broadcast,
    "scatter": scatter,
    "send and receive": send,
    "all-reduce": add_up,
}


def trained_elsewhere(model: nn.Module, optimizer: AdaiV2) -> None:
    for number in range(50, 53):
        step(model, optimizer, number, size=30.0)


# Actions of rank 1 before it receives states.
RECEIVERS: dict[str, Callable[[nn.Module, AdaiV2], None]] = {
    "idle step": idle_step,
    "states alone": lambda model, optimizer: optimizer.create_states(model.parameters()),
    "trained elsewhere": trained_elsewhere,
    "zero gradients": lambda model, optimizer: step(model, optimizer, 0, size=0.0),
    "clipped, not stepped": lambda model, optimizer: (trained_elsewhere(model, optimizer), clip_and_drop(optimizer)),
}


def clip_and_drop(optimizer: AdaiV2) -> None:
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()


def walk(transfer: str, receiver: str) -> dict[str, Any]:
    """Train on rank 0; rank 1 joins later. Collective: both ranks."""
    model, optimizer = make(seed=dist.get_rank())
    if dist.get_rank() == 0:
        for number in range(STEPS_BEFORE):
            step(model, optimizer, number)
    else:
        RECEIVERS[receiver](model, optimizer)
    TRANSFERS[transfer](model, optimizer)
    means: list[float] = []
    for number in range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER):
        step(model, optimizer, number)
        means.append(optimizer.inertia_mean.item())
    return {"means": means, "tensors": [to_numpy(x) for x in tensors_of(model, optimizer)]}


def walk_all() -> tuple[list[Any], dict[tuple[str, str], dict[str, Any]]]:
    """Run the uninterrupted training and every case."""
    model, optimizer = make()
    for number in range(STEPS_BEFORE + STEPS_AFTER):
        step(model, optimizer, number)
    expected = [to_numpy(x).copy() for x in tensors_of(model, optimizer)]
    return expected, {
        (transfer, receiver): walk(transfer, receiver) for transfer in TRANSFERS for receiver in RECEIVERS
    }


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_late_rank_continues_like_the_rank_it_received_from(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    (expected, first), (_, second) = run_ranks(walk_all, 2)
    for case, of_first in first.items():
        assert of_first["means"] == second[case]["means"], case
        for ranks in (of_first, second[case]):
            assert all((a == b).all() for a, b in zip(ranks["tensors"], expected, strict=True)), case


def average() -> list[tuple[float, float]]:
    """Return the mean and that of the states in local SGD, where ranks average everything every few steps."""
    model, optimizer = make()
    seen: list[tuple[float, float]] = []
    num_elements = sum(param.numel() for param in model.parameters())
    for number in range(12):
        step(model, optimizer, number + 100 * dist.get_rank(), size=1.0 + 5.0 * dist.get_rank())
        stored = sum(optimizer.state[param]["exp_avg_sq"].double().sum().item() for param in model.parameters())
        seen.append((optimizer.inertia_mean.item(), stored / (1 - 0.99 ** (number + 1)) / num_elements))
        if number % 3 == 2:
            for tensor in tensors_of(model, optimizer):
                dist.all_reduce(tensor)
                tensor.data.div_(2)
    return seen


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_after_averaging_over_ranks_the_mean_equals_that_of_the_averages(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    for seen in run_ranks(average, 2):
        for mean, stored in seen:
            assert mean == pytest.approx(stored, rel=1e-6)


def test_writes_to_shards_are_detected() -> None:
    for seen in run_ranks(shards_that_are_received, 2):
        for mean, stored in seen:
            assert mean == pytest.approx(stored, rel=1e-6)


def shards_that_are_received() -> list[tuple[float, float]]:
    """Return the mean and that of all shards, after a collective has written to FSDP2 shards of exp_avg_sq."""
    model, _ = make()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = AdaiV2(model.parameters(), lr=0.5, dampening=0.5)
    group = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    num_elements = sum(param.numel() for param in model.parameters())
    seen: list[tuple[float, float]] = []
    for number in range(8):
        step(model, optimizer, number)
        shards = [local_tensor(optimizer.state[param]["exp_avg_sq"]) for param in model.parameters()]
        stored = torch.stack([shard.double().sum() for shard in shards]).sum()
        dist.all_reduce(stored)
        seen.append((optimizer.inertia_mean.item(), stored.item() / (1 - 0.99 ** (number + 1)) / num_elements))
        for shard in shards if number % 2 else []:
            dist.scatter(shard, [25.0 * shard], src=dist.get_rank(), group=group)
    return seen
