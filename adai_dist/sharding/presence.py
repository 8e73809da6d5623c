"""Whether every DTensor parameter has a gradient on all ranks of its mesh or on none: told by one number that travels.

A DTensor's gradient is a DTensor, too. But where a rank makes it by itself, as for experts to which no token was sent,
it may be missing on some ranks. Their elements would be left out of the step, their counts of steps would fall behind,
and a checkpoint, which has one count per parameter, could not say so.

Each rank of a mesh has a share, and the shares of all ranks add up to 0 modulo a prime. A rank sends the sum of its
shares of all parameters that have a gradient, so that what is added up over the ranks is 0 if none is missing on some
ranks alone. One that is missing always shows; several can cancel, once in about four thousand times.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from adai_dist.sharding.ownership import is_dtensor
from adai_dist.sharding.plan import ShardingPlan

MODULUS = 4093


def shares(params: Iterable[Tensor], plan: ShardingPlan) -> dict[Tensor, int]:
    """What this rank adds for each DTensor that has a gradient, below :data:`MODULUS`.

    Nothing for one whose mesh has ranks that the plan does not add up over, as where a user names the process group.

    Collective: none.
    """
    reached = None if plan.assumptions is not None else _ranks_of(plan)  # what tensors say reaches all of their meshes
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
            factor = 1 + zlib.crc32(f"{kind} {seen[kind]}".encode()) % (MODULUS - 1)
            found[param] = factor * _of_ranks(mesh.size())[index] % MODULUS
    return found


def _ranks_of(plan: ShardingPlan) -> set[int]:
    return {rank for process_group in plan.process_groups for rank in dist.get_process_group_ranks(process_group)}


@functools.lru_cache
def _of_ranks(size: int) -> list[int]:
    """None is 0, and all together are 0 modulo MODULUS."""
    values = [1 + zlib.crc32(str(index).encode()) % (MODULUS - 2) for index in range(size - 1)]
    values[0] += sum(values) % MODULUS == 0
    return [*values, -sum(values) % MODULUS]
