"""The global indices of a shard's elements, from which the random bits of their rounding are derived."""

from __future__ import annotations

import math

from torch import Tensor

from adai_dist.rounding import Origin
from adai_dist.sharding.local_tensor import is_dtensor


def origin_of(param: Tensor, starts: dict[Tensor, int]) -> Origin:
    """Return where the local elements of a parameter are in the whole parameter.

    Args:
        starts: global index of the first element of shards whose tensors do not show it; they are contiguous.

    Shards that are cut in several inner dimensions have the right first index, but count on from there as if they were
    contiguous: their bits are the same on all ranks that hold a copy, but depend on the sharding.

    Collective: none.
    """
    if param in starts:
        return Origin(starts[param])
    if not is_dtensor(param):
        return Origin()
    # torch has no public function for the offsets of a shard.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape = tuple(param.shape)
    local, offsets = compute_local_shape_and_global_offset(shape, param.device_mesh, param.placements)
    if math.prod(local) == 0:
        return Origin()
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    start = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    cut = [dim for dim, size in enumerate(local) if size != shape[dim]]
    if not cut or math.prod(local[: cut[-1]]) == 1:
        return Origin(start)
    # The dimensions before the last cut one form the rows of a matrix; of these only the outermost may be cut, too.
    outermost = next(dim for dim, size in enumerate(local) if size != 1)
    if any(dim > outermost for dim in cut[:-1]):
        return Origin(start)
    last = cut[-1]
    return Origin(start, local[last] * strides[last], shape[last] * strides[last])
