"""One prescribed problem in every layout of torch; the trajectory must not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from adai_dist import AdaiV2
from adai_dist.optimizer.state import saved_state
from tests.problems import Problem, Spec, to_numpy

# Uneven over 2 and 4 ranks, with empty shards on some: `one`, `three` and `five` do not reach the last of four.
SHARDED = Problem(
    groups=(
        (
            {"lr": 0.4, "weight_decay": 0.02},
            (Spec("first.weight", (7, 6)), Spec("first.bias", (7,), scale=2.0), Spec("first.one", (1,))),
        ),
        (
            {"lr": 0.2, "betas": (0.2, 0.97), "eps": 0.01, "weight_decay": 0.05, "dampening": 0.5, "decoupled": True},
            (
                Spec("second.weight", (8, 6), scale=0.1),
                Spec("second.three", (3,), missing_every=3),
                Spec("second.late", (5, 3), first_step=11),
            ),
        ),
        (
            {"lr": 0.3, "betas": (0.1, 0.999), "dampening": 0.0, "decoupled": True},
            (Spec("root.table", (9, 4), scale=0.3), Spec("root.gain", (2,), zeros=4), Spec("root.five", (5,))),
        ),
    ),
    steps=60,
)

MAX_NORM = 10.0  # less than the norm in about half of the steps


class Block(nn.Module):
    """The parameters of one block; returns the sum of their products with the prescribed gradients."""

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum(
            (_product(getattr(self, leaf), gradient) for leaf, gradient in gradients.items()), start=torch.zeros(())
        )


class Prescribed(nn.Module):
    """A model whose loss is the product of the parameters and the gradients of the problem.

    Parameters of the block "root" belong to the model itself.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        for spec in problem.specs():
            block, leaf = spec.name.split(".")
            if block != "root" and not hasattr(self, block):
                self.add_module(block, Block())
            self.owner(block).register_parameter(leaf, nn.Parameter(problem.initial(spec)))

    def owner(self, block: str) -> nn.Module:
        return self if block == "root" else self.get_submodule(block)

    def by_name(self) -> dict[str, nn.Parameter]:
        """Return the parameters by the names of the problem."""
        return {
            f"{b}.{leaf}": getattr(self.owner(b), leaf) for b, leaf in (s.name.split(".") for s in self.problem.specs())
        }

    def forward(self, step: int) -> Tensor:
        by_block: dict[str, dict[str, Tensor]] = {}
        for spec in self.problem.specs():
            gradient = self.problem.gradient(spec, step)
            if gradient is not None:
                block, leaf = spec.name.split(".")
                by_block.setdefault(block, {})[leaf] = gradient
        total = torch.zeros(())
        for block, gradients in by_block.items():
            total = total + (Block.forward(self, gradients) if block == "root" else self.owner(block)(gradients))  # type: ignore[arg-type]
        return total


def _product(parameter: Tensor, gradient: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
    product = (parameter * gradient).sum()
    return product.full_tensor() if isinstance(product, DTensor) else product


def full(tensor: Tensor) -> Tensor:
    """Return a full copy of a tensor, gathered if it is sharded. Collective: all ranks of its mesh."""
    with torch.no_grad():
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's elements."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# -- the layouts -------------------------------------------------------------------------------------------------------


def plain(model: Prescribed) -> nn.Module:
    return model


def ddp(model: Prescribed) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp2(model: Prescribed, mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",)) if mesh is None else mesh
    fully_shard(model.get_submodule("first"), mesh=mesh)
    fully_shard(model.get_submodule("second"), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_beside_plain(model: Prescribed) -> nn.Module:
    """Shard all blocks; parameters of the root stay plain, with a copy on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.get_submodule("first"), mesh=mesh)
    fully_shard(model.get_submodule("second"), mesh=mesh)
    return model


def hsdp(model: Prescribed) -> nn.Module:
    return fsdp2(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def replicated(model: Prescribed) -> nn.Module:
    """Make every parameter a replicated DTensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    _distribute(model, mesh, {spec.name: Replicate() for spec in model.problem.specs()})
    return model


TENSOR_PARALLEL: dict[str, Placement] = {
    "first.weight": Shard(1),
    "second.weight": Shard(0),
    "root.gain": Shard(0),
    "first.bias": Replicate(),
}


def tp(model: Prescribed) -> nn.Module:
    """Distribute four parameters over the mesh; the others are plain copies."""
    _distribute(model, init_device_mesh("cpu", (dist.get_world_size(),)), TENSOR_PARALLEL)
    return model


def tp_and_fsdp2(model: Prescribed) -> nn.Module:
    """Distribute some parameters over both mesh dimensions, the others over the first only."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _distribute(model, mesh["tp"], TENSOR_PARALLEL)
    return fsdp2(model, mesh["dp"])


def tp_and_ddp(model: Prescribed) -> nn.Module:
    """Make tensor-parallel pairs that are copies of each other, with gradients averaged by the test."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _distribute(model, mesh["tp"], TENSOR_PARALLEL)
    return model


def _distribute(model: Prescribed, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    for name, placement in placements.items():
        block, leaf = name.split(".")
        owner = model.owner(block)
        sharded = distribute_tensor(getattr(owner, leaf).detach(), mesh, [placement])
        owner.register_parameter(leaf, nn.Parameter(sharded))


@dataclass(frozen=True)
class Layout:
    world_size: int
    apply: Callable[[Prescribed], nn.Module]
    num_all_reduces: int
    """Number of collectives in every step, each of at most 64 bytes."""


LAYOUTS = {
    "plain-1": Layout(1, plain, 0),
    "ddp-2": Layout(2, ddp, 0),
    "fsdp2-1": Layout(1, fsdp2, 0),
    "fsdp2-2": Layout(2, fsdp2, 1),
    "fsdp2-4": Layout(4, fsdp2, 1),
    "fsdp2-3": Layout(3, fsdp2, 1),
    "fsdp2-beside-plain-2": Layout(2, fsdp2_beside_plain, 1),
    "fsdp2-beside-plain-4": Layout(4, fsdp2_beside_plain, 1),
    "hsdp-2x2": Layout(4, hsdp, 2),
    "replicated-2": Layout(2, replicated, 1),
    "tp-2": Layout(2, tp, 1),
    "tp-fsdp2-2x2": Layout(4, tp_and_fsdp2, 2),
    "tp-ddp-2x2": Layout(4, tp_and_ddp, 1),
}


# -- training on a problem ---------------------------------------------------------------------------------------------


class CollectiveCounter(TorchDispatchMode):
    """A mode that records name and size in bytes of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional") and "wait" not in name:
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.calls.append((name.split(".")[0], sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


@dataclass
class Walk:
    """The observations of one rank while training on a problem; tensors are gathered, whatever the layout."""

    parameters: dict[str, Any]
    states: dict[str, dict[str, Any]]
    means: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    collectives: list[list[tuple[str, int]]] = field(default_factory=list)
    num_skipped_steps: int = 0


def make(layout: str, problem: Problem, **options: Any) -> tuple[Prescribed, nn.Module, AdaiV2]:
    """Return the model, the wrapped model of the layout, and the optimizer."""
    model = Prescribed(problem)
    wrapped = LAYOUTS[layout].apply(model)
    optimizer = AdaiV2(problem.param_groups(model.by_name()), lr=1.0, max_grad_norm=problem.max_grad_norm, **options)
    return model, wrapped, optimizer


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Compute the gradients of a step by a real backward pass."""
    optimizer.zero_grad()
    loss = model(step)
    if loss.requires_grad:
        loss.backward()


def walk(
    layout: str,
    problem: Problem,
    before_step: Callable[[Prescribed, AdaiV2, int], None] | None = None,
    count: bool = False,
    **options: Any,
) -> Walk:
    """Take all steps of a problem. Collective: all ranks."""
    model, wrapped, optimizer = make(layout, problem, **options)
    seen = Walk({}, {})
    for step in range(problem.steps):
        backward(wrapped, optimizer, step)
        if before_step is not None:
            before_step(model, optimizer, step)
        counter = CollectiveCounter()
        with counter if count else nullcontext():
            optimizer.step()
        seen.collectives.append(counter.calls)
        seen.means.append(optimizer.inertia_mean.item())
        seen.grad_norms.append(optimizer.grad_norm.item())
    seen.num_skipped_steps = int(optimizer.num_skipped_steps.item())
    return gather(model, optimizer, seen)


def gather(model: Prescribed, optimizer: AdaiV2, seen: Walk | None = None) -> Walk:
    """Gather parameters and states. Collective: all ranks."""
    seen = Walk({}, {}) if seen is None else seen
    for name, parameter in model.by_name().items():
        seen.parameters[name] = to_numpy(full(parameter))
        # Ranks retire their shards of beta1_prod independently, so only some may have the key.
        state = saved_state(optimizer.state[parameter], parameter)
        seen.states[name] = {key: to_numpy(full(state[key])) for key in sorted(state)}
    return seen
