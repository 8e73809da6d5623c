"""Rounding to 16 bits: stochastic rounding of states, and the split of master weights; the specification in PyTorch.

``csrc/adai_rounding.h`` is the same in C++, with the same bits.

**Stochastic rounding** rounds a number up with a probability of its distance from the lower neighbour, so that the
expected value is exact. A moment that changes by 0.1 % per step, less than half of a unit in the last place of
bfloat16, would never move under rounding to nearest. The random bits are a function of the seed, the parameter, its
step count and the global index of the element: they need no generator, and are the same for every number of threads,
every instruction set, on every device, after a resume, and for every sharding.

**Master weights** of a 16-bit parameter are the parameter, rounded to nearest, and a 16-bit remainder. For bfloat16 the
two together are a float32 number, exactly; for float16 they are down to a magnitude of 2^-16, and below that the error
is at most 2^-40.

All functions return new tensors on the device of their arguments, and none reads a device tensor on the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOW_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes of parameters whose steps need a remainder or stochastic rounding."""

TO_NEAREST = 0x8000
"""In place of random bits: rounding to the nearest number, and of two to the one away from 0."""

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
"""Of the hash function ``lowbias32`` by C. Wellons, https://nullprogram.com/blog/2018/07/31/."""
_GOLDEN = 0x9E3779B9
"""2^32 over the golden ratio."""
_SETTLED_PRODUCT, _SETTLED_BELOW_16, _SETTLED_BELOW_8 = 2.0**-9, 2.0**-6, 2.0**-4


class Rounding(NamedTuple):
    """Inputs of the rounding in a step, on the device of the shards; n is the number of shards."""

    streams: Tensor
    """Two words per shard from which random bits are derived, see :func:`streams`; int32, shape (n, 2)."""
    origins: Tensor
    """Global indices of the elements of each shard, see :class:`Origin`; int64, shape (n, 3)."""
    settled: Tensor
    """Largest ``1 - Q`` of each shard that counts as 0 from now on, see :func:`settled_below`; float32, shape (n,)."""


class Origin(NamedTuple):
    """Global indices of a shard's elements: local element i is ``start + (i // run) * stride + i % run``.

    A shard that is contiguous in the whole parameter has one run.
    """

    start: int = 0
    run: int = 2**62
    """Number of consecutive elements."""
    stride: int = 0
    """Distance of the first elements of two runs."""


def key_of(seed: int, ordinal: int) -> tuple[int, int]:
    """Return the two words, as signed 32-bit integers, that identify a parameter under a seed.

    Args:
        ordinal: index of the parameter in the parameter groups of the optimizer.
    """
    words = [_mixed(_mixed(seed & 0xFFFFFFFF) ^ (seed >> 32) * _GOLDEN ^ word) for word in (0, 1)]
    first, second = (_mixed(word + ordinal * _GOLDEN) for word in words)
    return _signed(first), _signed(second)


def streams(keys: Tensor, t: Tensor) -> Tensor:
    """Return the words from which the random bits of a step are derived, int32, of the shape of ``keys``.

    Args:
        keys: :func:`key_of` each shard; int32, shape (n, 2).
        t: step count of each shard, after this step; shape (n,).
    """
    return _mix_(keys + t.to(torch.int32).unsqueeze(1) * _signed(_GOLDEN))


def random_words(stream: Tensor, indices: Tensor) -> Tensor:
    """Return 32 random bits per element, int32, of the shape of ``indices``.

    Args:
        stream: one of the two words of the shard; int32, 0-dim.
        indices: global indices of the elements, int64.
    """
    low = indices.to(torch.int32)
    return _mix_(low.bitwise_xor_((indices >> 32).to(torch.int32).mul_(_signed(_GOLDEN))).bitwise_xor_(stream))


def global_indices(origin: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the global indices of elements, int64, of the shape of ``like``.

    Args:
        origin: the :class:`Origin` of the shard; int64, shape (3,).
        start: index in the shard of the first element.
        like: the elements; of a dense tensor, they are counted in the order of memory.
    """
    local = torch.arange(start, start + like.numel(), device=like.device)
    if not like.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(like):
        local = local.as_strided(like.shape, like.stride())
    else:
        local = local.view(like.shape)
    first, run, stride = origin.unbind()
    return (local // run).mul_(stride).add_(local.remainder(run)).add_(first)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, bits: Tensor | int) -> Tensor:
    """Round float32 numbers to bfloat16 or float16, up with a probability of the distance from the lower neighbour.

    Up means away from 0. Finite numbers that float16 rounds to at most its largest number stay finite.

    Args:
        bits: 16 random bits per element in the lower half, int32; or :data:`TO_NEAREST`.
    """
    bits = bits & 0xFFFF
    if dtype == torch.bfloat16:
        rounded = ((x.view(torch.int32) + bits) >> 16).to(torch.int16).view(torch.bfloat16)
    else:
        rounded = _to_float16(x, bits)
    return torch.where(x.isnan(), torch.nan, rounded)


def _to_float16(x: Tensor, bits: Tensor | int) -> Tensor:
    magnitude = x.abs()
    normal = (((magnitude.view(torch.int32) - (112 << 23)) + (bits >> 3)) >> 13).clamp_(max=0x7BFF)
    subnormal = (magnitude * 2.0**24 + (bits >> 3) * 2.0**-13).to(torch.int32)
    rounded = torch.where(magnitude < 2.0**-14, subnormal, normal)
    rounded = torch.where(magnitude >= 65520.0, 0x7C00, rounded).to(torch.int16).view(torch.float16)
    return torch.where(x.signbit(), -rounded, rounded)


def settled_below(eps: float, t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bound of ``1 - Q`` up to which it is set to 0: from the step on in which ``(1 - eps)^t <= 2^-9``, 2^-4
    in 8 bits and 2^-6 in bfloat16; before that step, 0.

    From that step on the product of inertias is at most 2^-9, and a step changes by at most 0.2 % if it is taken as 0.
    The stored products are spread around it in multiples of 2^-8 or 2^-5.6; those above the bound decay further.

    Args:
        t: step counts after this step.
        dtype: of the stored products; uint8 or a wider one.
    """
    is_settled = t.double() * math.log1p(-eps) <= math.log(_SETTLED_PRODUCT)
    return torch.where(is_settled, _SETTLED_BELOW_8 if dtype == torch.uint8 else _SETTLED_BELOW_16, 0.0).float()


def split(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into a bfloat16 or float16 tensor and a remainder, int16.

    bfloat16: the low 16 bits, signed; ties are rounded away from 0, as ties to even would lose numbers.
    float16: the error in units of 2^-15 of the spacing of float16.
    """
    if dtype == torch.bfloat16:
        bits = master.view(torch.int32)
        is_nan = master.isnan()
        rounded = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
        remainder = (((bits & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16)
        return torch.where(is_nan, torch.nan, rounded), remainder.masked_fill_(is_nan, 0)
    rounded = master.to(torch.float16)
    error = (master - rounded.float()) / _remainder_unit(rounded)
    is_finite = rounded.isfinite()
    return rounded, torch.where(is_finite, error, 0.0).round_().to(torch.int16)


def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 numbers of :func:`split`."""
    if rounded.dtype == torch.bfloat16:
        return ((rounded.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)
    return rounded.float() + remainder * _remainder_unit(rounded)


def _remainder_unit(rounded: Tensor) -> Tensor:
    exponent = ((rounded.view(torch.int16).to(torch.int32) >> 10) & 0x1F).clamp_(1, 30)
    return ((exponent + 87) << 23).view(torch.float32)


def _mix_(x: Tensor) -> Tensor:
    """Hash 32-bit words in place; int32 arithmetic wraps around."""
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_signed(multiplier))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _mixed(x: int) -> int:
    x &= 0xFFFFFFFF
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        x = (x ^ x >> shift) * multiplier & 0xFFFFFFFF
    return x ^ x >> 16


def _signed(word: int) -> int:
    return (word & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
