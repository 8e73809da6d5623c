"""Experts on two ranks, in two replicas: one mean over the experts and everything else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from adai_dist import AdaiV2
from tests.distributed.layouts import CollectiveCounter, local
from tests.distributed.recorded import Recorder, Recording, follow, names_of
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

VOCABULARY, WIDTH, HIDDEN, NUM_EXPERTS, BATCH, STEPS = 11, 6, 5, 4, 16, 8


class Experts(nn.Module):
    """This rank's half of the experts; tokens are exchanged with the rank of their expert."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        torch.manual_seed(1)
        up, down = torch.randn(NUM_EXPERTS, WIDTH, HIDDEN), torch.randn(NUM_EXPERTS, HIDDEN, WIDTH)
        mine = slice(mesh.get_local_rank() * NUM_EXPERTS // 2, (mesh.get_local_rank() + 1) * NUM_EXPERTS // 2)
        self.up, self.down = nn.Parameter(up[mine].clone()), nn.Parameter(down[mine].clone())
        self.process_group = mesh.get_group()

    def forward(self, tokens: Tensor) -> Tensor:
        """Args: tokens: shape (tokens of this rank, WIDTH), sorted by expert, equally many for each."""
        arrived = all_to_all_single_autograd(tokens, None, None, self.process_group)
        # (sender, my expert, token) -> (my expert, sender and token)
        by_expert = arrived.unflatten(0, (2, NUM_EXPERTS // 2, -1)).transpose(0, 1).flatten(1, 2)
        result = torch.tanh(by_expert @ local(self.up)) @ local(self.down)
        return all_to_all_single_autograd(
            result.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2).contiguous(), None, None, self.process_group
        )


class MixtureOfExperts(nn.Module):
    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.experts = Experts(mesh)
        torch.manual_seed(2)
        self.embedding, self.gate, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Linear(WIDTH, NUM_EXPERTS),
            nn.Linear(WIDTH, VOCABULARY),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        gates = self.gate(x).softmax(-1).unflatten(0, (NUM_EXPERTS, -1))
        weights = torch.cat([gates[index, :, index] for index in range(NUM_EXPERTS)])
        return self.head(x + weights.unsqueeze(-1) * self.experts(x))


def average(parameters: list[Tensor], process_group: Any) -> None:
    for parameter in parameters:
        assert parameter.grad is not None
        grad = local(parameter.grad)
        dist.all_reduce(grad, group=process_group)
        grad /= dist.get_world_size()


Prepared = tuple[Callable[[AdaiV2], None], Callable[[], None]]
"""Configuration of the optimizer, and the reduction of gradients after the backward pass."""


def plain(model: MixtureOfExperts, mesh: DeviceMesh) -> Prepared:
    experts = set(model.experts.parameters())
    others = [p for p in model.parameters() if p not in experts]

    def configure(optimizer: AdaiV2) -> None:
        optimizer.configure_sharding(num_replicas=lambda parameter: 2 if parameter in experts else None)

    def average_all() -> None:
        average(list(experts), mesh["dp"].get_group())
        average(others, None)

    return configure, average_all


def as_dtensors(model: MixtureOfExperts, mesh: DeviceMesh) -> None:
    for name, parameter in list(model.experts.named_parameters()):
        sharded = DTensor.from_local(parameter.detach(), mesh["ep"], [Shard(0)])
        model.experts.register_parameter(name, nn.Parameter(sharded))


def dtensors(model: MixtureOfExperts, mesh: DeviceMesh) -> Prepared:
    as_dtensors(model, mesh)
    _, average_all = plain(model, mesh)
    return lambda optimizer: None, average_all


def dtensors_and_fsdp2(model: MixtureOfExperts, mesh: DeviceMesh) -> Prepared:
    """Shard as torchtitan does: experts over the replicas, the rest over all ranks."""
    as_dtensors(model, mesh)
    fully_shard(model.experts, mesh=mesh["dp"])
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    return lambda optimizer: None, lambda: None


LAYOUTS = {"plain": (plain, 1), "DTensors": (dtensors, 1), "DTensors, FSDP2": (dtensors_and_fsdp2, 3)}
"""Ways to place the experts, with the number of all-reduces of a step."""


def train(layout: str) -> tuple[Recording, list[list[tuple[str, int]]]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = MixtureOfExperts(mesh["ep"]).double()
    configure, after_backward = LAYOUTS[layout][0](model, mesh)
    optimizer = AdaiV2(
        [
            {"params": list(model.experts.parameters()), "lr": 0.2},
            {"params": [p for name, p in model.named_parameters() if not name.startswith("experts.")]},
        ],
        lr=0.4,
        dampening=0.5,
        max_grad_norm=0.5,
    )
    configure(optimizer)
    # Plain experts are pieces of one tensor, like DTensors.
    here = f" of {mesh['ep'].get_local_rank()}"
    names = {p: name + (here if name.startswith("experts.") else "") for p, name in names_of(model).items()}
    recorder = Recorder([optimizer], names)
    generator = torch.Generator().manual_seed(dist.get_rank())
    calls: list[list[tuple[str, int]]] = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH,), generator=generator)
        nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
        after_backward()
        with CollectiveCounter() as counter:
            optimizer.step()
        calls.append(counter.calls)
        optimizer.zero_grad()
    return recorder.finish(), calls


def train_all() -> dict[str, tuple[Recording, list[list[tuple[str, int]]]]]:
    return {layout: train(layout) for layout in LAYOUTS}


@functools.cache
def ranks() -> list[dict[str, tuple[Recording, list[list[tuple[str, int]]]]]]:
    return run_ranks(train_all, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_and_everything_else_share_one_mean(layout: str) -> None:
    error = follow([of_rank[layout][0] for of_rank in ranks()], rounding=1e-13)
    print(f"experts, {layout}: {error:.1e}")
    assert error < 1e-13
    for of_rank in ranks():
        assert of_rank[layout][1] == [[("allreduce_", 64)] * LAYOUTS[layout][1]] * STEPS


def test_treating_experts_as_copies_would_give_another_mean() -> None:
    """Check that the test above can fail: the second moments of experts differ much from the others."""
    recording = ranks()[0]["plain"][0]
    sizes = {name: value.size for name, value in recording.starts.items()}
    squares = {name: float((g**2).sum()) for name, g in recording.gradients[0].items() if g is not None}
    experts = {name for name in sizes if name.startswith("experts.")}

    def mean(weight: float) -> float:
        parts = [(weight if name in experts else 1.0, squares[name], sizes[name]) for name in sizes]
        return sum(w * s for w, s, _ in parts) / sum(w * n for w, _, n in parts)

    assert abs(mean(1.0) / mean(2.0) - 1) > 0.02
