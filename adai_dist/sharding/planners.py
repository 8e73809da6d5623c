"""Planners: sharding plans from the arguments of :meth:`adai_dist.optimizer.AdaptiveInertia.configure_sharding`."""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist
from torch import Tensor, nn

from adai_dist.sharding.fsdp1 import FSDP1Parameters
from adai_dist.sharding.local_tensor import is_distributed, is_dtensor
from adai_dist.sharding.plan import (
    ShardingPlan,
    ShardingPlanner,
    check_not_partial,
    placements_of_tensor,
    plan_by_placements,
    plan_sharding,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

NumReplicas = int | Callable[[Tensor], int | None] | None


class _KeptByCopies:
    """Base of records with process groups, which cannot be copied: a copy of the optimizer shares the record."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimizer whose configure_sharding() was called holds a process group and cannot be pickled; "
            "save optimizer.state_dict() instead"
        )


@dataclass(frozen=True)
class ProcessGroupPlanner(_KeptByCopies):
    """Plans for one process group, all of whose ranks share the mean.

    ``num_replicas`` of its ranks hold the same elements of a plain parameter.
    """

    process_group: ProcessGroup
    num_replicas: NumReplicas

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        weights = {param: 1.0 / self._num_replicas(param) for param in params}
        return ShardingPlan(params, (self.process_group,), weights)

    def _num_replicas(self, param: Tensor) -> int:
        size = dist.get_world_size(self.process_group)
        given = self.num_replicas(param) if callable(self.num_replicas) else None
        if given is None and not is_dtensor(param) and not callable(self.num_replicas):
            given = self.num_replicas
        if given is None:
            given = _dtensor_replicas(param, size) if is_dtensor(param) else size
        return _in_range(given, size, "the process group", param)


@dataclass(frozen=True)
class ModelPlanner(_KeptByCopies):
    """Plans with the placements of FSDP1's handles and of the tensors, and with pipeline stages."""

    model: nn.Module | None
    stages: ProcessGroup | None
    num_replicas: NumReplicas

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        ordinals = {param: _ordinal_of_copies(param) for param in params if self._num_stages_with(param) > 1}
        if self.model is None:
            plan = plan_by_placements(params, placements_of_tensor, self.stages, self._num_stages_with)
            return replace(plan, ordinals=ordinals)
        fsdp1 = FSDP1Parameters.of(self.model)
        plan = plan_by_placements(params, fsdp1.placements_of, self.stages, self._num_stages_with)
        return replace(plan, starts=fsdp1.starts, ordinals=ordinals)

    def _num_stages_with(self, param: Tensor) -> int:
        if self.stages is None or self.num_replicas is None:
            return 1
        given = self.num_replicas(param) if callable(self.num_replicas) else self.num_replicas
        return 1 if given is None else _in_range(given, dist.get_world_size(self.stages), "stages", param)


@dataclass(frozen=True)
class JointPlanner:
    """Plans for several optimizers that share one mean, from the parameters of all of them."""

    all_params: tuple[Tensor, ...]
    planner: ShardingPlanner | None

    def is_of(self, params: tuple[Tensor, ...]) -> bool:
        """Return whether the planner was made for exactly these parameters of all optimizers."""
        return len(params) == len(self.all_params) and all(map(operator.is_, params, self.all_params))

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        plan = plan_sharding(self.all_params, self.planner)
        ordinals = {param: ordinal for ordinal, param in enumerate(self.all_params)} | plan.ordinals
        return replace(plan, params=params, ordinals=ordinals)


def make_planner(
    process_group: object, num_replicas: NumReplicas, model: object, stages: object
) -> ShardingPlanner | None:
    """Validate the arguments and return their planner; None if the tensors define the sharding.

    Raises: as :meth:`adai_dist.optimizer.AdaptiveInertia.configure_sharding`.

    Collective: none.
    """
    names_one_group = process_group is not None or (num_replicas is not None and stages is None)
    if names_one_group and (model is not None or stages is not None):
        raise ValueError(
            "process_group must be given without model and stages, and num_replicas without model unless there are "
            f"stages; got {process_group=}, {num_replicas=}, model of type {type(model).__name__} and {stages=}; "
            "leave one out"
        )
    if not (num_replicas is None or callable(num_replicas) or type(num_replicas) is int):
        raise TypeError(f"num_replicas must be an int, a function of the parameter or None, got {num_replicas!r}")
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}; pass the module that FSDP1 wraps")
    if not names_one_group and model is None and stages is None:
        return None
    if not is_distributed():
        raise RuntimeError(
            "configure_sharding needs process groups, got a process in which torch.distributed is not initialised; "
            "call torch.distributed.init_process_group() first"
        )
    if names_one_group:
        process_group = dist.group.WORLD if process_group is None else process_group
        return ProcessGroupPlanner(_member_of("process_group", process_group), num_replicas)
    return ModelPlanner(model, None if stages is None else _member_of("stages", stages), num_replicas)


def _ordinal_of_copies(param: Tensor) -> int:
    """Return a number that all stages derive for a parameter that they share, whatever its index on each of them."""
    return zlib.crc32(repr(tuple(param.shape)).encode())


def _member_of(name: str, process_group: object) -> ProcessGroup:
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{name} must contain this rank, got one without rank {dist.get_rank()}; "
            "every rank passes the process group that it belongs to"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup, got {process_group!r}")
    return process_group


def _in_range(given: object, size: int, of: str, param: Tensor) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= size:
        raise ValueError(
            f"num_replicas must be an int between 1 and the size of {of} ({size}), "
            f"got {given!r} for a parameter of shape {tuple(param.shape)}"
        )
    return given


def _dtensor_replicas(param: DTensor, size: int) -> int:
    """Return the copies within the mesh, times the copies of the mesh: ranks outside are assumed to repeat it."""
    check_not_partial(param)
    mesh = param.device_mesh
    if size % mesh.size() != 0:
        raise ValueError(
            f"the size of the process group must be a multiple of the mesh's ({mesh.size()}), got {size}; "
            "pass num_replicas as a function of the parameter"
        )
    copies = (mesh.size(dim) for dim, placement in enumerate(param.placements) if placement.is_replicate())
    return math.prod(copies) * (size // mesh.size())
