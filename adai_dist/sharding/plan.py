"""Who holds what: the process groups of the mean, and the weight of every parameter in it.

The mean runs over every element of the model once. A :class:`ShardingPlan` says how: it lists the process groups over
which the sums are added up, and gives every parameter a weight, so that the weights of all ranks that hold the same
element add up to 1.

A parameter is spread over process groups (:class:`Spread`): over some its ranks hold different elements, over others
copies. A DTensor says so by its mesh and placements; FSDP1's handles do for their parameters (:mod:`.fsdp1`); a plain
tensor is the same on every rank. Over a process group that only other parameters brought, every rank holds a copy. So
the weight is 1 / (product of the sizes of all process groups over which the parameter is not sharded). Plain tensors
alone (one device, DDP) bring no process group, and there is no collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from adai_dist.sharding.ownership import is_distributed, is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Ranks = tuple[int, ...]


class Spread(NamedTuple):
    """One of the process groups over which a parameter is spread."""

    process_group: ProcessGroup
    is_sharded: bool
    """Whether its ranks hold different elements; else each holds a copy."""


class ModelSharding(Protocol):
    """Says which ranks share the mean, and who holds what, where the tensors do not show it."""

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        """Raises: ValueError: the sharding contradicts itself. Collective: none."""
        ...


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


def plan_sharding(params: Iterable[Tensor], sharding: ModelSharding | None) -> ShardingPlan:
    """Read from the tensors, or from ``sharding`` where it is given, which ranks share the mean and who holds what.

    Raises:
        RuntimeError: a parameter is sharded in a way that its tensor does not show (FSDP1).
        ValueError: a DTensor parameter is ``Partial``, or ``sharding`` contradicts itself.

    Collective: none.
    """
    params = tuple(params)
    return plan_by_spreads(params, spreads_of_tensor) if sharding is None else sharding.plan(params)


def spreads_of_tensor(param: Tensor) -> Sequence[Spread]:
    """What a parameter's own tensor says."""
    if getattr(param, "_fsdp_flattened", False):
        raise RuntimeError(
            "the mean over all parameters needs to know which ranks hold what, and FSDP1 parameters do not say it; "
            f"got one of local shape {tuple(param.shape)}; call optimizer.configure_sharding(model=model) with the "
            "module that FSDP1 wraps, or use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    if not is_dtensor(param):
        return ()
    check_not_partial(param)
    return [
        Spread(process_group, not placement.is_replicate())
        for process_group, placement in zip(param.device_mesh.get_all_groups(), param.placements, strict=True)
    ]


def check_not_partial(param: DTensor) -> None:
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"a parameter must be sharded or replicated over its mesh, got placements {param.placements!r}; "
            "redistribute it before the optimizer steps"
        )


def plan_by_spreads(
    params: tuple[Tensor, ...],
    spreads_of: Callable[[Tensor], Sequence[Spread]],
    stages: ProcessGroup | None = None,
) -> ShardingPlan:
    """The plan for parameters that are spread over process groups.

    Args:
        spreads_of: the process groups of a parameter.
        stages: a process group whose ranks hold different parameters: no parameter has a copy there.

    Raises:
        ValueError: the ranks of ``stages`` share parameters.
    """
    spreads = {param: [(_ranks(spread.process_group), spread) for spread in spreads_of(param)] for param in params}
    process_groups: dict[Ranks, ProcessGroup] = {}  # by their ranks, in order of appearance; those of one rank left out
    for of_param in spreads.values():
        for ranks, spread in of_param:
            if len(ranks) > 1:
                process_groups.setdefault(ranks, spread.process_group)
    weights = {param: _weight(of_param, process_groups) for param, of_param in spreads.items()}
    if stages is not None and dist.get_world_size(stages) > 1:
        if _ranks(stages) in process_groups:
            raise ValueError(
                "the ranks of stages must hold different parameters, got the process group of ranks "
                f"{_ranks(stages)}, over which parameters are sharded or copied; pass the process group that "
                "connects the stages"
            )
        process_groups[_ranks(stages)] = stages
    return ShardingPlan(params, tuple(process_groups.values()), weights)


def _ranks(process_group: ProcessGroup) -> Ranks:
    return tuple(sorted(dist.get_process_group_ranks(process_group)))


def _weight(of_param: list[tuple[Ranks, Spread]], process_groups: dict[Ranks, ProcessGroup]) -> float:
    sharded_over = {ranks for ranks, spread in of_param if spread.is_sharded}
    return 1.0 / math.prod(len(ranks) for ranks in process_groups if ranks not in sharded_over)
