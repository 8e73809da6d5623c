"""Parameters and states in 16 or 8 bits: read as float32 for the equations, and rounded when written back."""

from __future__ import annotations

import torch
from torch import Tensor

from adai_dist import eight_bits, equations
from adai_dist.equations import LocalTensors, StepScalars, Tensors
from adai_dist.hyper import Hyper
from adai_dist.rounding import (
    LOW_DTYPES,
    global_indices,
    join,
    random_words,
    split,
    stochastically_rounded,
)


def is_low(shards: LocalTensors) -> bool:
    """Return whether parameters or states are stored in 16 or 8 bits."""
    return any(tensors and tensors[0].dtype in LOW_DTYPES for tensors in (shards.param, shards.exp_avg))


def advance(shards: LocalTensors, hyper: Hyper, scalars: StepScalars, starts: list[int] | None = None) -> None:
    """Run :func:`adai_dist.equations.advance` on shards in any dtype.

    Args:
        starts: index of the first element of each tensor in its shard, if the tensors are pieces of shards.

    Temporary memory: beyond that of the equations, eleven tensors of the size of one shard, and float32 copies of what
    is stored in fewer bits.
    """
    if not is_low(shards):
        equations.advance(shards, hyper, scalars)
        return
    wide = LocalTensors(
        param=wide_params(shards),
        grad=shards.grad,
        exp_avg=[x.float() for x in shards.exp_avg],
        exp_avg_sq=[moment_of(x, m.shape) for x, m in zip(shards.exp_avg_sq, shards.exp_avg, strict=True)],
        beta1_prod=[product_of(x) for x in shards.beta1_prod],
    )
    equations.advance(wide, hyper, scalars)
    for i in range(len(shards.param)):
        _store_(shards, wide, i, scalars, 0 if starts is None else starts[i])


def wide_params(shards: LocalTensors) -> Tensors:
    """Return the parameters in the compute dtype, with their remainders: themselves or new tensors."""
    if not shards.remainder:
        return [param.to(equations.compute_dtype(param.dtype)) for param in shards.param]
    return [join(param, remainder) for param, remainder in zip(shards.param, shards.remainder, strict=True)]


def moment_of(stored: Tensor, shape: torch.Size) -> Tensor:
    """Return a second moment as float32, or itself in float64; one in 8 bits has ``shape``."""
    if stored.dtype == torch.uint8:
        return eight_bits.decoded_moment(stored).view(shape)
    return stored.to(equations.compute_dtype(stored.dtype))


def stored_moment(v: Tensor, dtype: torch.dtype, bits: Tensor | int) -> Tensor:
    """Return float32 second moments as bfloat16, of the same shape, or as records of 8 bits.

    Args:
        bits: 16 random bits per element in the lower half, int32; or :data:`adai_dist.rounding.TO_NEAREST`.
    """
    if dtype == torch.uint8:
        return eight_bits.encoded_moment(v, bits)
    return stochastically_rounded(v, dtype, bits)


def product_of(stored: Tensor) -> Tensor:
    """Return the product of inertias P of a stored one, which is ``1 - P`` in bfloat16 and in 8 bits."""
    if stored.dtype == torch.uint8:
        return 1.0 - eight_bits.decoded_complement(stored)
    return 1.0 - stored.float() if stored.dtype == torch.bfloat16 else stored


def stored_product(q: Tensor, dtype: torch.dtype, bits: Tensor | int) -> Tensor:
    """Return float32 ``q = 1 - P`` as bfloat16 or in 8 bits; see :func:`stored_moment`."""
    if dtype == torch.uint8:
        return eight_bits.encoded_complement(q, bits)
    return stochastically_rounded(q, dtype, bits)


def _store_(shards: LocalTensors, wide: LocalTensors, i: int, scalars: StepScalars, start: int) -> None:
    """Write the wide tensors of shard i back to those in fewer bits."""
    param, rounding = shards.param[i], scalars.rounding
    has_low_states = shards.exp_avg[i].dtype in LOW_DTYPES
    is_rounded = param.dtype in LOW_DTYPES and not shards.remainder
    if shards.remainder:
        for tensor, part in zip((param, shards.remainder[i]), split(wide.param[i], param.dtype), strict=True):
            tensor.copy_(part)
    if not (has_low_states or is_rounded):
        return
    assert rounding is not None
    of_states, of_param = rounding.streams[i].unbind()
    indices = global_indices(rounding.origins[i], start, param)
    if is_rounded:
        param.copy_(stochastically_rounded(wide.param[i], param.dtype, random_words(of_param, indices)))
    if not has_low_states:
        return
    words = random_words(of_states, indices)
    shards.exp_avg[i].copy_(stochastically_rounded(wide.exp_avg[i], torch.bfloat16, words))
    v = shards.exp_avg_sq[i]
    v.copy_(stored_moment(wide.exp_avg_sq[i], v.dtype, words >> 16).view(v.shape))
    if shards.beta1_prod:
        P = wide.beta1_prod[i]
        q = torch.where(rounding.settled[i] * scalars.is_live < P, 1.0 - P, 1.0)
        shards.beta1_prod[i].copy_(stored_product(q, shards.beta1_prod[i].dtype, words ^ (words >> 16)))
