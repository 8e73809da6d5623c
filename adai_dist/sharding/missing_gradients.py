"""A checksum that shows whether any DTensor parameter has a gradient on some ranks of its mesh but not on all.

The gradient of a DTensor is usually a DTensor too, on all ranks of its mesh. If each rank sets its own local gradient,
as for experts to which no token was routed, it may be missing on some ranks. Their elements would be left out of the
step, their step counts would fall behind, and a checkpoint, which stores one count per parameter, could not record it.

Each rank of a mesh has a checksum term, and the terms of all ranks add up to 0 modulo a prime. A rank sends the sum of
its terms over all parameters that have a gradient, so the sum over ranks is 0 unless a gradient is missing on some
ranks only. A single missing gradient always shows; several cancel with a probability of about 1 in 4,000.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from adai_dist.sharding.local_tensor import is_dtensor
from adai_dist.sharding.plan import ShardingPlan

CHECKSUM_MODULUS = 4093


def checksum_terms(params: Iterable[Tensor], plan: ShardingPlan) -> dict[Tensor, int]:
    """Return this rank's term for each DTensor, below :data:`CHECKSUM_MODULUS`; it is added if there is a gradient.

    DTensors whose mesh has ranks outside the plan's process groups, as when the user names one, have no term.

    Collective: none.
    """
    # A plan that was read from the tensors reaches all of their meshes.
    reached = None if plan.assumptions is not None else _ranks_of(plan)
    found: dict[Tensor, int] = {}
    seen: Counter[str] = Counter()
    for param in params:
        if not is_dtensor(param):
            continue
        mesh = param.device_mesh
        coordinate = mesh.get_coordinate()
        kind = f"{tuple(param.shape)} {param.placements} {mesh.shape}"
        seen[kind] += 1
        is_reached = reached is None or reached.issuperset(mesh.mesh.flatten().tolist())
        if coordinate is not None and mesh.size() > 1 and is_reached:
            index = 0
            for dim, place in enumerate(coordinate):
                index = index * mesh.size(dim) + place
            factor = 1 + zlib.crc32(f"{kind} {seen[kind]}".encode()) % (CHECKSUM_MODULUS - 1)
            found[param] = factor * terms_by_rank(mesh.size())[index] % CHECKSUM_MODULUS
    return found


def _ranks_of(plan: ShardingPlan) -> set[int]:
    return {rank for process_group in plan.process_groups for rank in dist.get_process_group_ranks(process_group)}


@functools.lru_cache
def terms_by_rank(size: int) -> list[int]:
    """Return one term per rank, non-zero if there are several; they add up to 0 modulo CHECKSUM_MODULUS."""
    if size == 1:
        return [0]
    values = [1 + zlib.crc32(str(index).encode()) % (CHECKSUM_MODULUS - 2) for index in range(size - 1)]
    values[0] += sum(values) % CHECKSUM_MODULUS == 0
    return [*values, -sum(values) % CHECKSUM_MODULUS]
