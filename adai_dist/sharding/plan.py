"""The sharding plan: the process groups of the mean, and the weight of every parameter in it.

The mean counts every element of the model once. To that end, a :class:`ShardingPlan` lists the process groups over
which the sums are all-reduced, and gives every parameter a weight such that the weights of all ranks that hold the same
element add up to 1.

A parameter is sharded over some process groups and replicated over others (:class:`GroupPlacement`). The mesh and the
placements of a DTensor define them; FSDP1's handles do for FSDP1 parameters (:mod:`.fsdp1`). These rules apply to all
other process groups of the plan:

- A plain tensor is the same on every rank.
- A process group within the mesh of the parameter is accounted for by the mesh.
- A process group that shares only this rank with the mesh is orthogonal to it: every rank holds a copy of the
  parameter, as of a plain tensor.
- Any other process group has some ranks of the mesh and some outside of it, and the tensors do not define what the
  latter hold. Instead of a usable plan there is a :attr:`ShardingPlan.refusal`.

The weight is 1 / (product of the sizes of all process groups over which the parameter is not sharded). Plain tensors
alone (one device, DDP) add no process group, and there is no collective.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from adai_dist.sharding.local_tensor import is_distributed, is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

Ranks = tuple[int, ...]


class GroupPlacement(NamedTuple):
    """The placement of a parameter over one process group: sharded or replicated."""

    process_group: ProcessGroup
    is_sharded: bool
    """Whether the ranks hold different elements of the parameter; otherwise each holds a copy."""


class ShardingPlanner(Protocol):
    """Makes the plan for parameters whose tensors do not define which rank holds which elements."""

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        """Return the plan. Raises: ValueError: the settings are contradictory. Collective: none."""
        ...


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan that only other ranks can confirm (:mod:`adai_dist.sharding.assumption_check`)."""

    copied: dict[Ranks, list[Tensor]]
    """Parameters, by process group, of which every rank is assumed to hold a copy, though their tensors do not imply
    it."""
    stages: Ranks = ()
    """The ranks of the pipeline, which hold different parameters."""
    of_one_stage: list[Tensor] = field(default_factory=list)
    """Parameters that no other stage is assumed to hold."""


@dataclass(frozen=True)
class ShardingPlan:
    """The process groups of the mean, and the weight of every parameter in it."""

    params: tuple[Tensor, ...]
    process_groups: tuple[ProcessGroup, ...]
    """Reducing over these groups in order counts every element once; the same on all their ranks. Empty: no
    collective."""
    weights: dict[Tensor, float]
    """Weights that add up to 1 over all copies of an element on the ranks of the process groups."""
    refusal: str = ""
    """Reason why the mean cannot be exact, and what to do; empty if it is exact."""
    assumptions: Assumptions | None = None
    """None if the user or an engine has defined which rank holds what."""
    starts: dict[Tensor, int] = field(default_factory=dict[Tensor, int])
    """Global index of the first element of local tensors that do not show it; their elements are consecutive."""
    ordinals: dict[Tensor, int] = field(default_factory=dict[Tensor, int])
    """Numbers from which the random bits of parameters are derived, in place of their index in the parameter groups,
    where that differs between copies or recurs (stages that share a parameter, optimizers of one model)."""

    def fits(self, params: list[Tensor]) -> bool:
        """Return whether the plan was made for exactly these parameters; engines replace them after construction."""
        return len(params) == len(self.params) and all(map(operator.is_, params, self.params))

    @property
    def num_terms(self) -> int:
        """Number of terms in a sum over the process groups."""
        return math.prod(dist.get_world_size(process_group) for process_group in self.process_groups)

    @property
    def is_main_rank(self) -> bool:
        """Whether this rank does the logging: rank 0 of every process group of the mean, or else of the job."""
        if self.process_groups:
            return all(dist.get_rank(process_group) == 0 for process_group in self.process_groups)
        return not is_distributed() or dist.get_rank() == 0


def plan_sharding(params: Iterable[Tensor], sharding: ShardingPlanner | None) -> ShardingPlan:
    """Return the plan for ``params``, read from the tensors unless a planner is given as ``sharding``.

    Raises:
        RuntimeError: a parameter is sharded in a way that its tensor does not show (FSDP1).
        ValueError: a DTensor parameter is ``Partial``, or the settings of the planner are contradictory.

    Collective: none.
    """
    params = tuple(params)
    return plan_by_placements(params, placements_of_tensor) if sharding is None else sharding.plan(params)


def placements_of_tensor(param: Tensor) -> Sequence[GroupPlacement]:
    """Return the placements that the tensor itself defines; none for a mesh without this rank.

    Raises:
        RuntimeError: the parameter is a shard, and does not show which ranks hold the other shards.
        ValueError: the parameter is ``Partial``.
    """
    if getattr(param, "_fsdp_flattened", False):
        raise RuntimeError(
            "the mean over all parameters requires knowing which ranks hold what, which FSDP1 parameters do not show; "
            f"got one of local shape {tuple(param.shape)}; call optimizer.configure_sharding(model=model) with the "
            "module that FSDP1 wraps, or use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    if not is_dtensor(param):
        _check_not_marked(param)
        return ()
    check_not_partial(param)
    if param.device_mesh.get_coordinate() is None:
        return ()
    return [
        GroupPlacement(process_group, not placement.is_replicate())
        for process_group, placement in zip(param.device_mesh.get_all_groups(), param.placements, strict=True)
    ]


def _check_not_marked(param: Tensor) -> None:
    """Refuse a plain parameter that Megatron or DeepSpeed has marked as different on other ranks."""
    marks = {"tensor_model_parallel": True, "model_parallel": True, "allreduce": False}
    for name, value in marks.items():
        if getattr(param, name, None) is value and is_distributed() and dist.get_world_size() > 1:
            raise RuntimeError(
                "the mean over all parameters requires knowing which ranks hold what; got a plain parameter of shape "
                f"{tuple(param.shape)} with {name}={value}, with which Megatron and DeepSpeed mark parameters that "
                "differ between ranks; call optimizer.configure_sharding(process_group, num_replicas=...) with a "
                "function that returns, for each parameter, how many ranks of the process group hold the same elements"
            )


def check_not_partial(param: DTensor) -> None:
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"a parameter must be sharded or replicated over its mesh, got placements {param.placements!r}; "
            "redistribute it before the optimizer steps"
        )


def plan_by_placements(
    params: tuple[Tensor, ...],
    placements_of: Callable[[Tensor], Sequence[GroupPlacement]],
    stages: ProcessGroup | None = None,
    num_stages_with: Callable[[Tensor], int] | None = None,
) -> ShardingPlan:
    """Return the plan for parameters that are sharded or replicated over process groups.

    Args:
        placements_of: returns the placements of a parameter.
        stages: a process group whose ranks hold different parameters.
        num_stages_with: how many ranks of ``stages`` hold a copy of a parameter; by default one.

    Raises:
        ValueError: the ranks of ``stages`` share parameters.
    """
    ranks_of = _RanksOf()
    placements = {param: [(ranks_of[each.process_group], each) for each in placements_of(param)] for param in params}
    # Sorted by creation, which has the same order on all ranks, while the order of their parameters may differ.
    process_groups: dict[Ranks, ProcessGroup] = {}
    unsorted = {placement.process_group for of_param in placements.values() for _, placement in of_param}
    for process_group in sorted(unsorted, key=_order_of_creation):
        if len(ranks := ranks_of[process_group]) > 1:
            process_groups.setdefault(ranks, process_group)

    num_stages = {param: 1 if num_stages_with is None else num_stages_with(param) for param in params}
    weights: dict[Tensor, float] = {}
    copied: dict[Ranks, list[Tensor]] = {}
    refusal = ""
    for param, of_param in placements.items():
        spanned = _spanned(param, of_param, ranks_of)
        for ranks in process_groups:
            if not spanned.issuperset(ranks):
                copied.setdefault(ranks, []).append(param)
                if len(spanned.intersection(ranks)) > 1:
                    refusal = refusal or _refusal(param, f"on ranks {in_words(sorted(spanned))}", in_words(ranks))
        if is_dtensor(param) and not of_param:
            refusal = refusal or _refusal(param, f"on {param.device_mesh}, which lacks this rank", "other ranks")
        weights[param] = _weight(of_param, process_groups) / num_stages[param]

    assumptions = Assumptions(copied)
    if stages is not None and dist.get_world_size(stages) > 1:
        if ranks_of[stages] in process_groups:
            raise ValueError(
                "the ranks of stages must hold different parameters, got the process group of ranks "
                f"{in_words(ranks_of[stages])}, over which parameters are sharded or copied; pass the process group "
                "that connects the stages"
            )
        process_groups[ranks_of[stages]] = stages
        of_one_stage = [param for param in params if num_stages[param] == 1]
        assumptions = Assumptions(copied, ranks_of[stages], of_one_stage)
    return ShardingPlan(params, tuple(process_groups.values()), weights, refusal, assumptions)


def in_words(ranks: Sequence[int]) -> str:
    """Format ascending ranks for a message, abbreviated if there are many."""
    return str(list(ranks)) if len(ranks) <= 16 else f"[{', '.join(map(str, ranks[:8]))}, ... {ranks[-1]}]"


class _RanksOf(dict[object, Ranks]):
    """A cache of the ranks of process groups and meshes, in ascending order."""

    def __missing__(self, key: Any) -> Ranks:
        found: list[int] = key.mesh.flatten().tolist() if hasattr(key, "mesh") else dist.get_process_group_ranks(key)
        ranks = self[key] = tuple(sorted(found))
        return ranks


def _order_of_creation(process_group: ProcessGroup) -> int:
    known = list(dist.distributed_c10d._world.pg_map)
    return known.index(process_group) if process_group in known else len(known)


def _spanned(param: Tensor, of_param: list[tuple[Ranks, GroupPlacement]], ranks_of: _RanksOf) -> frozenset[int]:
    """Return the ranks whose elements the placements define; only this rank for a plain tensor."""
    if is_dtensor(param) and of_param:
        return frozenset(ranks_of[param.device_mesh])
    if len(of_param) > 1 and math.prod(len(ranks) for ranks, _ in of_param) == dist.get_world_size():
        return frozenset(range(dist.get_world_size()))  # FSDP1's hybrid strategies
    return frozenset({dist.get_rank()} if is_distributed() else ()).union(*(ranks for ranks, _ in of_param))


def _refusal(param: Tensor, where: str, beyond: object) -> str:
    return (
        "the mean over all parameters requires knowing which ranks hold what, which the meshes do not define; got a "
        f"parameter of shape {tuple(param.shape)} {where}, and others over {beyond}; ranks outside its mesh may hold "
        "copies of it, other parameters in its place (experts), or nothing; place all parameters on one mesh, or call "
        "optimizer.configure_sharding(process_group, num_replicas=...) with a function that returns, for each "
        "parameter, how many ranks of the process group hold the same local elements, or None if its placements "
        "define it and ranks outside its mesh hold copies"
    )


def _weight(of_param: list[tuple[Ranks, GroupPlacement]], process_groups: dict[Ranks, ProcessGroup]) -> float:
    sharded_over = {ranks for ranks, placement in of_param if placement.is_sharded}
    return 1.0 / math.prod(len(ranks) for ranks in process_groups if ranks not in sharded_over)
