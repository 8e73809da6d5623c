"""Who holds what: the process groups of the mean, and the weight of every parameter in it.

The mean runs over every element of the model once. A :class:`ShardingPlan` says how: it lists the process groups over
which the sums are added up, and gives every parameter a weight, so that the weights of all ranks that hold the same
element add up to 1.

A parameter is spread over process groups (:class:`Spread`): over some its ranks hold different elements, over others
copies. A DTensor says so by its mesh and placements; FSDP1's handles do for their parameters (:mod:`.fsdp1`). What a
parameter is not spread over is decided by these rules:

- A plain tensor is the same on every rank.
- A process group within the mesh of the parameter is accounted for by the mesh.
- A process group that crosses the mesh at right angles, having this rank alone in common with it, is a dimension that
  the parameter does not use: every rank holds a copy, as of a plain tensor.
- Any other process group has some ranks of the mesh and some beyond it, of which the tensors tell nothing. There is
  no plan then, but a :attr:`ShardingPlan.refusal`.

The weight is 1 / (product of the sizes of all process groups over which the parameter is not sharded). Plain tensors
alone (one device, DDP) bring no process group, and there is no collective.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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
class Assumptions:
    """What a plan takes for granted, and other ranks can contradict (:mod:`adai_dist.sharding.comparison`)."""

    copied: dict[Ranks, list[Tensor]]
    """By process group the parameters that every rank of it is taken to hold a copy of, though their tensors do not
    say so."""
    stages: Ranks = ()
    """The ranks of the pipeline, which hold different parameters."""
    of_one_stage: list[Tensor] = field(default_factory=list)
    """The parameters that no other stage is taken to hold."""


@dataclass(frozen=True)
class ShardingPlan:
    """The process groups of the mean, and the weight of every parameter in it."""

    params: tuple[Tensor, ...]
    process_groups: tuple[ProcessGroup, ...]
    """All-reduced one after the other, in this order; the same on all their members. Empty: no collective."""
    weights: dict[Tensor, float]
    """Over all ranks of the process groups, the weights of the copies of an element add up to 1."""
    refusal: str = ""
    """Why the mean cannot be exact, and what to do; empty where it is."""
    assumptions: Assumptions | None = None
    """What was taken for granted; None where the user, or an engine, has said who holds what."""

    def fits(self, params: list[Tensor]) -> bool:
        """Whether the plan was made for exactly these parameters; engines replace them after construction."""
        return len(params) == len(self.params) and all(map(operator.is_, params, self.params))

    @property
    def num_terms(self) -> int:
        """How many terms the sum of a number over the process groups has."""
        return math.prod(dist.get_world_size(process_group) for process_group in self.process_groups)

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
    """What a parameter's own tensor says. Of a mesh without this rank, nothing: see :func:`plan_by_spreads`.

    Raises:
        RuntimeError: it is a part of a parameter, and does not say which ranks hold the others.
        ValueError: it is ``Partial``.
    """
    if getattr(param, "_fsdp_flattened", False):
        raise RuntimeError(
            "the mean over all parameters needs to know which ranks hold what, and FSDP1 parameters do not say it; "
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
        Spread(process_group, not placement.is_replicate())
        for process_group, placement in zip(param.device_mesh.get_all_groups(), param.placements, strict=True)
    ]


def _check_not_marked(param: Tensor) -> None:
    """Refuse a plain parameter that Megatron or DeepSpeed has marked as one that other ranks hold other parts of."""
    marks = {"tensor_model_parallel": True, "model_parallel": True, "allreduce": False}
    for name, value in marks.items():
        if getattr(param, name, None) is value and is_distributed() and dist.get_world_size() > 1:
            raise RuntimeError(
                "the mean over all parameters needs to know which ranks hold what; got a plain parameter of shape "
                f"{tuple(param.shape)} with {name}={value}, as Megatron and DeepSpeed mark what differs between ranks; "
                "call optimizer.configure_sharding(process_group, num_replicas=...) with a function that says of each "
                "parameter how many ranks of the process group hold the same"
            )


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
    num_stages_with: Callable[[Tensor], int] | None = None,
) -> ShardingPlan:
    """The plan for parameters that are spread over process groups.

    Args:
        spreads_of: the process groups of a parameter.
        stages: a process group whose ranks hold different parameters.
        num_stages_with: how many ranks of ``stages`` hold a copy of a parameter; by default one.

    Raises:
        ValueError: the ranks of ``stages`` share parameters.
    """
    ranks_of = _RanksOf()
    all_spreads = {param: [(ranks_of[each.process_group], each) for each in spreads_of(param)] for param in params}
    # By their ranks, those of one rank left out. All ranks have made process groups in the same order, but may list
    # their parameters in different ones.
    process_groups: dict[Ranks, ProcessGroup] = {}
    of_params = {spread.process_group for of_param in all_spreads.values() for _, spread in of_param}
    for process_group in sorted(of_params, key=_order_of_creation):
        if len(ranks := ranks_of[process_group]) > 1:
            process_groups.setdefault(ranks, process_group)

    of_stages = {param: 1 if num_stages_with is None else num_stages_with(param) for param in params}
    weights: dict[Tensor, float] = {}
    copied: dict[Ranks, list[Tensor]] = {}
    refusal = ""
    for param, of_param in all_spreads.items():
        spanned = _spanned(param, of_param, ranks_of)
        for ranks in process_groups:
            if not spanned.issuperset(ranks):
                copied.setdefault(ranks, []).append(param)
                if len(spanned.intersection(ranks)) > 1:
                    refusal = refusal or _refusal(param, f"on ranks {in_words(sorted(spanned))}", in_words(ranks))
        if is_dtensor(param) and not of_param:
            refusal = refusal or _refusal(param, f"on {param.device_mesh}, which lacks this rank", "other ranks")
        weights[param] = _weight(of_param, process_groups) / of_stages[param]

    assumptions = Assumptions(copied)
    if stages is not None and dist.get_world_size(stages) > 1:
        if ranks_of[stages] in process_groups:
            raise ValueError(
                "the ranks of stages must hold different parameters, got the process group of ranks "
                f"{in_words(ranks_of[stages])}, over which parameters are sharded or copied; pass the process group "
                "that connects the stages"
            )
        process_groups[ranks_of[stages]] = stages
        of_one_stage = [param for param in params if of_stages[param] == 1]
        assumptions = Assumptions(copied, ranks_of[stages], of_one_stage)
    return ShardingPlan(params, tuple(process_groups.values()), weights, refusal, assumptions)


def in_words(ranks: Sequence[int]) -> str:
    """Ranks in ascending order for a message, at most a few of them."""
    return str(list(ranks)) if len(ranks) <= 16 else f"[{', '.join(map(str, ranks[:8]))}, ... {ranks[-1]}]"


class _RanksOf(dict[object, Ranks]):
    """The ranks of process groups and meshes, in ascending order, each found once."""

    def __missing__(self, key: Any) -> Ranks:
        found: list[int] = key.mesh.flatten().tolist() if hasattr(key, "mesh") else dist.get_process_group_ranks(key)
        ranks = self[key] = tuple(sorted(found))
        return ranks


def _order_of_creation(process_group: ProcessGroup) -> int:
    known = list(dist.distributed_c10d._world.pg_map)
    return known.index(process_group) if process_group in known else len(known)


def _spanned(param: Tensor, of_param: list[tuple[Ranks, Spread]], ranks_of: _RanksOf) -> frozenset[int]:
    """The ranks of which the parameter itself tells what they hold; this rank alone for a plain tensor."""
    if is_dtensor(param) and of_param:
        return frozenset(ranks_of[param.device_mesh])
    if len(of_param) > 1 and math.prod(len(ranks) for ranks, _ in of_param) == dist.get_world_size():
        return frozenset(range(dist.get_world_size()))  # FSDP1's hybrid strategies
    return frozenset({dist.get_rank()} if is_distributed() else ()).union(*(ranks for ranks, _ in of_param))


def _refusal(param: Tensor, where: str, beyond: object) -> str:
    return (
        "the mean over all parameters needs to know which ranks hold what, and the meshes leave it open; got a "
        f"parameter of shape {tuple(param.shape)} {where}, and others over {beyond}; ranks beyond its mesh may hold "
        "copies of it, other parameters in its place (experts), or nothing; place all parameters on one mesh, or call "
        "optimizer.configure_sharding(process_group, num_replicas=...) with a function that says of each parameter how "
        "many ranks of the process group hold the same local elements, or None where its placements say it and ranks "
        "beyond its mesh hold copies"
    )


def _weight(of_param: list[tuple[Ranks, Spread]], process_groups: dict[Ranks, ProcessGroup]) -> float:
    sharded_over = {ranks for ranks, spread in of_param if spread.is_sharded}
    return 1.0 / math.prod(len(ranks) for ranks in process_groups if ranks not in sharded_over)
