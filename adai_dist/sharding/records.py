"""Which second moments are stored in 8 bits, and the shape of their records; see :mod:`adai_dist.eight_bits`.

The elements of a record are consecutive in the whole parameter, and a shard has all of them or none. Every layout
therefore has the same records, and the decision is the same on all ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adai_dist.eight_bits import RECORD_BYTES, RECORD_ELEMENTS
from adai_dist.precision import Precision
from adai_dist.sharding.local_tensor import is_dtensor, local_tensor, sharded_like


def records_shape(param: Tensor, precision: Precision) -> tuple[int, ...] | None:
    """Return the global shape of the records of a parameter's second moment, None if it is not in 8 bits.

    It has the leading dimensions of the parameter, one that counts records, and one of the bytes of a record.
    Parameters with fewer than 2 dimensions, not in row-major order, or cut within a record have none: the rows of a
    matrix must have a multiple of 32 elements, and if they are cut, the parts of all ranks equally many.

    Raises:
        ValueError: FSDP1 has flattened the parameter.

    Collective: none.
    """
    if precision.state_dtype != "mixed8" or precision.state_dtype_of(param.dtype) != torch.bfloat16:
        return None
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            "state_dtype must be 'float32' or 'bfloat16' for parameters of FSDP1, which cuts them within the records "
            "of 32 elements that 8-bit states need, got 'mixed8'; use FSDP2 (fully_shard), or state_dtype='bfloat16'"
        )
    shape, num_shards = tuple(param.shape), _num_shards(param)
    if not param.is_contiguous():
        return None
    last_cut = max(num_shards, default=0)
    for first in (last_cut + 1, last_cut):  # the first dimension that is counted in records
        num = num_shards.get(first, 1)
        num_elements = math.prod(shape[first:])
        if 1 <= first < len(shape) and num_elements % (RECORD_ELEMENTS * num) == 0 and shape[first] % num == 0:
            return (*shape[:first], num_elements // RECORD_ELEMENTS, RECORD_BYTES)
    return None


def zero_records(param: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return records of zeros, of a global shape, sharded like ``param``. Collective: none."""
    num_records = local_tensor(param).numel() // RECORD_ELEMENTS
    local = torch.zeros(num_records, RECORD_BYTES, dtype=torch.uint8, device=param.device)
    return records_like(param, shape, local)


def records_like(param: Tensor, shape: tuple[int, ...], local: Tensor) -> Tensor:
    """Return the local records of a parameter in their global shape, as a DTensor if the parameter is one.

    Args:
        local: uint8, shape (number of local records, :data:`adai_dist.eight_bits.RECORD_BYTES`).

    Collective: none.
    """
    first = len(shape) - 2
    local_shape = *local_tensor(param).shape[:first], shape[first] // _num_shards(param).get(first, 1), RECORD_BYTES
    return sharded_like(param, local.view(local_shape), shape)


def check_records(records: Tensor, local_param: Tensor) -> None:
    """Raise ValueError if the local records are not those of a local parameter of this size."""
    num_bytes = local_param.numel() // RECORD_ELEMENTS * RECORD_BYTES
    if records.numel() != num_bytes or not records.is_contiguous():
        raise ValueError(
            f"exp_avg_sq must have contiguous records of {num_bytes} bytes for a parameter of local shape "
            f"{tuple(local_param.shape)}, got shape {tuple(records.shape)}; load it from a state_dict()"
        )


def _num_shards(param: Tensor) -> dict[int, int]:
    """Return the number of shards into which each dimension of a DTensor is cut, if there are several."""
    found: dict[int, int] = {}
    if is_dtensor(param):
        for mesh_dim, placement in enumerate(param.placements):
            dim: int | None = getattr(placement, "dim", None)  # of Shard and _StridedShard
            if dim is not None and param.device_mesh.size(mesh_dim) > 1:
                found[dim % param.ndim] = found.get(dim % param.ndim, 1) * param.device_mesh.size(mesh_dim)
    return found
