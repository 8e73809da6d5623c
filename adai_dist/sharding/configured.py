"""What :meth:`adai_dist.optimizer.AdaptiveInertia.configure_sharding` was told."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist
from torch import Tensor, nn

from adai_dist.sharding.fsdp1 import FSDP1Parameters
from adai_dist.sharding.ownership import is_distributed, is_dtensor
from adai_dist.sharding.plan import (
    ModelSharding,
    ShardingPlan,
    check_not_partial,
    plan_by_spreads,
    plan_sharding,
    spreads_of_tensor,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

NumReplicas = int | Callable[[Tensor], int | None] | None


class _Shared:
    """Holds process groups, which cannot be copied: a copy of the optimizer shares them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimizer whose configure_sharding() was called holds a process group and cannot be pickled; "
            "save optimizer.state_dict() instead"
        )


@dataclass(frozen=True)
class OneProcessGroup(_Shared):
    """All ranks of one process group share the mean; so many of them hold the same elements of a plain parameter."""

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
class ModelAndStages(_Shared):
    """FSDP1's handles are asked about their parameters, all other tensors speak for themselves."""

    model: nn.Module | None
    stages: ProcessGroup | None
    num_replicas: NumReplicas

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        spreads_of = spreads_of_tensor if self.model is None else FSDP1Parameters.of(self.model).spreads_of
        return plan_by_spreads(params, spreads_of, self.stages, self._num_stages_with)

    def _num_stages_with(self, param: Tensor) -> int:
        if self.stages is None or self.num_replicas is None:
            return 1
        given = self.num_replicas(param) if callable(self.num_replicas) else self.num_replicas
        return 1 if given is None else _in_range(given, dist.get_world_size(self.stages), "stages", param)


@dataclass(frozen=True)
class Joint:
    """Several optimizers share one mean: what holds for the parameters of all of them."""

    all_params: tuple[Tensor, ...]
    sharding: ModelSharding | None

    def is_of(self, params: tuple[Tensor, ...]) -> bool:
        """Whether these are all the parameters still."""
        return len(params) == len(self.all_params) and all(map(operator.is_, params, self.all_params))

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        return replace(plan_sharding(self.all_params, self.sharding), params=params)


def configured_sharding(
    process_group: object, num_replicas: NumReplicas, model: object, stages: object
) -> ModelSharding | None:
    """The record of what was passed, after a check of it; None where nothing was.

    Raises: as :meth:`adai_dist.optimizer.AdaptiveInertia.configure_sharding`.

    Collective: none.
    """
    names_one_group = process_group is not None or (num_replicas is not None and stages is None)
    if names_one_group and (model is not None or stages is not None):
        raise ValueError(
            "process_group says all there is to say, with or without num_replicas, and goes with neither model nor "
            "stages; num_replicas goes with stages, but not with model alone; "
            f"got {process_group=}, {num_replicas=}, model of type {type(model).__name__} and {stages=}; leave one out"
        )
    if not (num_replicas is None or callable(num_replicas) or type(num_replicas) is int):
        raise TypeError(f"num_replicas must be an int, a function of the parameter or None, got {num_replicas!r}")
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}; pass the module that FSDP1 wraps")
    if not names_one_group and model is None and stages is None:
        return None
    if not is_distributed():
        raise RuntimeError(
            "configure_sharding needs process groups, and torch.distributed is not initialised; "
            "call torch.distributed.init_process_group() first"
        )
    if names_one_group:
        process_group = dist.group.WORLD if process_group is None else process_group
        return OneProcessGroup(_member_of("process_group", process_group), num_replicas)
    return ModelAndStages(model, None if stages is None else _member_of("stages", stages), num_replicas)


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
    """Copies within the mesh, times the copies outside of it: the ranks beyond the mesh are taken to repeat it."""
    check_not_partial(param)
    mesh = param.device_mesh
    if size % mesh.size() != 0:
        raise ValueError(
            f"the size of the process group must be a multiple of the mesh's ({mesh.size()}), got {size}; "
            "pass num_replicas as a function of the parameter"
        )
    copies = (mesh.size(dim) for dim, placement in enumerate(param.placements) if placement.is_replicate())
    return math.prod(copies) * (size // mesh.size())
