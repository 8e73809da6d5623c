"""What this rank holds: local tensors, and how many ranks hold a copy of each.

The mean runs over every element of the model once. A :class:`ShardingPlan` says how: it lists the process groups over
which the sums are added up, and gives every parameter a weight, so that the weights of all ranks that hold the same
element add up to 1. Both are read off the tensors:

- A DTensor brings the process groups of its mesh. Over a mesh dimension where it is sharded every rank adds its own
  elements; over one where it is replicated, or over a process group that only other parameters brought, every rank
  holds a copy and counts 1 / size.
- Plain tensors alone (one device, DDP) are the same on every rank: no process group, no collective.

What the tensors do not show, :class:`Sharding` states.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

PLAIN_TYPES = (torch.nn.Parameter, Tensor)

NumReplicas = int | Callable[[Tensor], int | None] | None


class ModelSharding(Protocol):
    """Says which ranks share the mean, and who holds what, where the tensors do not show it."""

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        """Raises: ValueError: the sharding contradicts itself. Collective: none."""
        ...


@dataclass(frozen=True)
class Sharding:
    """What :meth:`adai_dist.optimizer.AdaptiveInertia.configure_sharding` was told."""

    process_group: ProcessGroup
    num_replicas: NumReplicas

    @classmethod
    def checked(cls, process_group: object, num_replicas: NumReplicas) -> Sharding:
        """The record, after a check of what was passed; by default all ranks of the job. Collective: none."""
        if not (num_replicas is None or callable(num_replicas) or type(num_replicas) is int):
            raise TypeError(f"num_replicas must be an int, a function of the parameter or None, got {num_replicas!r}")
        if not is_distributed():
            raise RuntimeError(
                "configure_sharding needs process groups, and torch.distributed is not initialised; "
                "call torch.distributed.init_process_group() first"
            )
        process_group = dist.group.WORLD if process_group is None else process_group
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"process_group must contain this rank, got one without rank {dist.get_rank()}; "
                "every rank passes the process group that it belongs to"
            )
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r}")
        return cls(process_group, num_replicas)

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        weights = {param: 1.0 / _num_replicas(param, self) for param in params}
        return ShardingPlan(params, (self.process_group,), weights)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        return self  # a process group cannot be copied, and a copy of the optimizer shares it

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "an optimizer whose configure_sharding() was called holds a process group and cannot be pickled; "
            "save optimizer.state_dict() instead"
        )


@dataclass(frozen=True)
class ShardingPlan:
    """The process groups of the mean, and the weight of every parameter in it."""

    params: tuple[Tensor, ...]
    process_groups: tuple[ProcessGroup, ...]
    """All-reduced one after the other, in this order; the same on all their members. Empty: no collective."""
    weights: dict[Tensor, float]
    """Over all ranks of the process groups, the weights of the copies of an element add up to 1."""

    def fits(self, params: list[Tensor]) -> bool:
        """Whether the plan was made for exactly these parameters; engines replace them after construction."""
        return len(params) == len(self.params) and all(a is b for a, b in zip(params, self.params, strict=True))

    @property
    def is_main_rank(self) -> bool:
        """True on the one rank that reports: rank 0 of every process group of the mean, else of the job."""
        if self.process_groups:
            return all(dist.get_rank(process_group) == 0 for process_group in self.process_groups)
        return not is_distributed() or dist.get_rank() == 0


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    if type(tensor) in PLAIN_TYPES:  # asked several times per parameter and step
        return False
    # Importing the module costs half a second; where nobody has imported it there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def plan_sharding(params: Iterable[Tensor], sharding: ModelSharding | None) -> ShardingPlan:
    """Read from the tensors, or from ``sharding`` where it is given, which ranks share the mean and who holds what.

    Raises:
        RuntimeError: a parameter is sharded in a way that its tensor does not show (FSDP1).
        ValueError: a DTensor parameter is ``Partial``, or ``sharding`` contradicts itself.

    Collective: none.
    """
    params = tuple(params)
    if sharding is not None:
        return sharding.plan(params)
    for param in params:
        if getattr(param, "_fsdp_flattened", False):
            raise RuntimeError(
                "the mean over all parameters needs to know which ranks hold what, and FSDP1 parameters do not say it; "
                f"got one of local shape {tuple(param.shape)}; use FSDP2 (torch.distributed.fsdp.fully_shard), or call "
                "optimizer.configure_sharding(process_group=..., num_replicas=...)"
            )
    process_groups = _mesh_process_groups(params)
    weights = {param: _weight(param, process_groups) for param in params}
    return ShardingPlan(params, tuple(process_groups.values()), weights)


Ranks = tuple[int, ...]


def _ranks(process_group: ProcessGroup) -> Ranks:
    return tuple(sorted(dist.get_process_group_ranks(process_group)))


def _mesh_process_groups(params: tuple[Tensor, ...]) -> dict[Ranks, ProcessGroup]:
    """The distinct process groups of all meshes by their ranks, in order of appearance; those of one rank left out."""
    process_groups: dict[Ranks, ProcessGroup] = {}
    for mesh in dict.fromkeys(param.device_mesh for param in params if is_dtensor(param)):
        for process_group in mesh.get_all_groups():
            if dist.get_world_size(process_group) > 1:
                process_groups.setdefault(_ranks(process_group), process_group)
    return process_groups


def _weight(param: Tensor, process_groups: dict[Ranks, ProcessGroup]) -> float:
    sharded_over: set[Ranks] = set()
    if is_dtensor(param):
        _check_not_partial(param)
        for process_group, placement in zip(param.device_mesh.get_all_groups(), param.placements, strict=True):
            if not placement.is_replicate():
                sharded_over.add(_ranks(process_group))
    return 1.0 / math.prod(len(ranks) for ranks in process_groups if ranks not in sharded_over)


def _check_not_partial(param: DTensor) -> None:
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"a parameter must be sharded or replicated over its mesh, got placements {param.placements!r}; "
            "redistribute it before the optimizer steps"
        )


def _num_replicas(param: Tensor, sharding: Sharding) -> int:
    size = dist.get_world_size(sharding.process_group)
    given = sharding.num_replicas(param) if callable(sharding.num_replicas) else None
    if given is None and not is_dtensor(param) and not callable(sharding.num_replicas):
        given = sharding.num_replicas
    if given is None:
        given = _dtensor_replicas(param, size) if is_dtensor(param) else size
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= size:
        raise ValueError(
            f"num_replicas must be an int between 1 and the size of the process group ({size}), "
            f"got {given!r} for a parameter of shape {tuple(param.shape)}"
        )
    return given


def _dtensor_replicas(param: DTensor, size: int) -> int:
    """Copies within the mesh, times the copies outside of it: the ranks beyond the mesh are taken to repeat it."""
    _check_not_partial(param)
    mesh = param.device_mesh
    if size % mesh.size() != 0:
        raise ValueError(
            f"the size of the process group must be a multiple of the mesh's ({mesh.size()}), got {size}; "
            "pass num_replicas as a function of the parameter"
        )
    copies = (mesh.size(dim) for dim, placement in enumerate(param.placements) if placement.is_replicate())
    return math.prod(copies) * (size // mesh.size())


def local_tensor(tensor: Tensor) -> Tensor:
    """The elements that this rank holds, as a real tensor that shares their memory.

    Shape: the local one; complex tensors get a last dimension of 2 (real, imaginary).
    """
    if is_dtensor(tensor):
        with torch.no_grad():
            local: Any = tensor.to_local()
        # An AsyncCollectiveTensor's communication may still be under way.
        tensor = local.wait() if hasattr(local, "wait") else local
    if tensor.requires_grad:
        tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def aligned_gradient(param: Tensor) -> Tensor | None:
    """The gradient of ``param``, held like ``param``; None where there is none. ``param.grad`` stays as it is.

    Raises:
        TypeError: the gradient is sparse, or only one of parameter and gradient is a DTensor.

    Collective: all ranks of the parameter's mesh where the placements differ (tensor parallelism with sequence
    parallelism leaves partial sums), to redistribute the gradient; otherwise none.
    """
    grad = param.grad
    if grad is None:
        return None
    if grad.layout is not torch.strided:
        raise TypeError(
            f"gradients must be dense, got layout {grad.layout} for a parameter of shape {tuple(param.shape)}; "
            "use sparse=False in the embedding"
        )
    if type(param) in PLAIN_TYPES and type(grad) in PLAIN_TYPES:
        return grad
    if is_dtensor(param) != is_dtensor(grad):
        raise TypeError(
            "a parameter and its gradient must both be DTensors or both plain tensors, "
            f"got {type(param.data).__name__} with a gradient {type(grad).__name__}, shape {tuple(param.shape)}"
        )
    if is_dtensor(param) and is_dtensor(grad) and grad.placements != param.placements:
        with torch.no_grad():
            return grad.redistribute(param.device_mesh, param.placements)
    return grad
