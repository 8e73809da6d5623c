"""States in 8 bits: second moments in records, and products of inertias; the specification in PyTorch.

``csrc/adai_eight_bits.h`` is the same in C++, with the same bits.

**Second moments** are stored in records of 32 consecutive elements: a code of 8 bits for each, and the largest of them
in bfloat16, the scale s. Code k stands for ``s (k / 255)^4``, which is as fine as 1.6 % near s and reaches down to
``2e-10 s``. The scale is rounded stochastically, as bfloat16 states are, and the largest elements have code 255, from
which s is found again in decoded numbers. A scale below 2^-126 is 0.

**Products of inertias** P are stored as ``1 - P`` on a grid of 255 numbers from 2^-10.5 to 1, evenly spaced in the bits
of float32: 24 in every octave. Code 0 is 0, as before the first step.

Both are rounded stochastically to a neighbour on their grid, so that the expected value is exact. Decoded numbers have
the same codes again if they are rounded to the nearest. All functions return new tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adai_dist.rounding import stochastically_rounded

RECORD_ELEMENTS = 32
"""Consecutive elements that share a scale."""
RECORD_BYTES = RECORD_ELEMENTS + 2
"""The codes, and the scale in bfloat16."""

_LARGEST_CODE = 255
_TINY = 2.0**-126
_GRID_STEP = 349525
"""Distance of neighbours on the grid of ``1 - P``, in the bits of float32: an octave over 24."""
_ONE = 0x3F800000
"""Bits of 1.0."""
_GRID_START = _ONE - (_LARGEST_CODE - 1) * _GRID_STEP
SMALLEST_COMPLEMENT = float(torch.tensor(_GRID_START, dtype=torch.int32).view(torch.float32))
"""The smallest ``1 - P`` above 0, 0.00069; the first step leaves at least ``eps``."""


def encoded_moment(v: Tensor, bits: Tensor | int) -> Tensor:
    """Return the records of second moments; uint8, shape (number of records, :data:`RECORD_BYTES`).

    Args:
        v: float32, at least 0; their number is a multiple of :data:`RECORD_ELEMENTS`.
        bits: 16 random bits per element in the lower half, int32; or :data:`adai_dist.rounding.TO_NEAREST`.
    """
    v = v.reshape(-1, RECORD_ELEMENTS)
    bits = torch.full_like(v, bits, dtype=torch.int32) if isinstance(bits, int) else bits.reshape(-1, RECORD_ELEMENTS)
    largest = v.amax(1, keepdim=True)
    stored = stochastically_rounded(largest, torch.bfloat16, bits[:, :1])
    stored = stored.masked_fill(stored < _TINY, 0.0)
    scale = stored.float()
    ratio = v * torch.where(scale > 0, 1.0 / scale, 0.0)
    codes = (ratio.sqrt().sqrt_() * _LARGEST_CODE).to(torch.int32).clamp_(0, _LARGEST_CODE - 1)
    codes += _rounds_up(ratio, _fourth_power(codes), _fourth_power(codes + 1), bits)
    codes.masked_fill_((v >= largest) & (scale > 0), _LARGEST_CODE)
    return torch.cat([codes.to(torch.uint8), stored.view(torch.uint8)], 1)


def decoded_moment(records: Tensor) -> Tensor:
    """Return the second moments of records, float32, shape (number of records, :data:`RECORD_ELEMENTS`).

    Args:
        records: uint8, contiguous, with a last dimension of :data:`RECORD_BYTES`, or flattened.
    """
    records = records.view(-1, RECORD_BYTES)
    scale = records[:, RECORD_ELEMENTS:].contiguous().view(torch.bfloat16).float()
    return _fourth_power(records[:, :RECORD_ELEMENTS]) * scale


def encoded_complement(q: Tensor, bits: Tensor | int) -> Tensor:
    """Return the codes of ``q = 1 - P``, uint8, of the shape of ``q``.

    Args:
        q: float32, in [0, 1].
        bits: 16 random bits per element in the lower half, int32; or :data:`adai_dist.rounding.TO_NEAREST`.
    """
    offset = q.view(torch.int32) - _GRID_START
    below = (offset.float() * (1.0 / _GRID_STEP)).to(torch.int32).clamp_(0, _LARGEST_CODE - 2)
    is_up = _rounds_up(q, _on_grid(below), _on_grid(below + 1), bits)
    return (below + 1 + is_up).masked_fill_(q == 0, 0).to(torch.uint8)


def decoded_complement(codes: Tensor) -> Tensor:
    """Return ``1 - P`` of codes, float32, of the shape of ``codes``."""
    return _on_grid(codes.to(torch.int32) - 1).masked_fill_(codes == 0, 0.0)


def _fourth_power(codes: Tensor) -> Tensor:
    return (codes.float() * (1.0 / _LARGEST_CODE)).square_().square_()


def _on_grid(index: Tensor) -> Tensor:
    return (_GRID_START + index * _GRID_STEP).view(torch.float32)


def _rounds_up(x: Tensor, lower: Tensor, upper: Tensor, bits: Tensor | int) -> Tensor:
    """Return whether x is rounded to its upper neighbour: with a probability of its distance from the lower one."""
    random = (bits & 0xFFFF) * 2.0**-16
    return random * (upper - lower) < x - lower
