"""AdamW with states and parameters in published formats of few bits, which :mod:`tests.open_loop` measures.

Every format is a function that returns float32 numbers as they are read back after being stored, so that only its
rounding is measured. All of them round to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Format = Callable[[Tensor], Tensor]

_SMALLEST_SCALE = 1e-12


def exact(x: Tensor) -> Tensor:
    return x


def bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


# -- 8 bits with the dynamic map of Dettmers et al., arXiv 2110.02861, as in bitsandbytes and torchao ------------------


def dynamic_map(*, is_signed: bool) -> Tensor:
    """Return the 256 numbers of the map: seven decades up to 1, each divided twice as finely as the one below it."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if is_signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if is_signed else [middles]
    return torch.cat(values).sort().values


_SIGNED_MAP, _UNSIGNED_MAP = dynamic_map(is_signed=True), dynamic_map(is_signed=False)


def signed_dynamic(x: Tensor) -> Tensor:
    return _dynamic(x, _SIGNED_MAP)


def unsigned_dynamic(x: Tensor) -> Tensor:
    return _dynamic(x, _UNSIGNED_MAP)


def _dynamic(x: Tensor, numbers: Tensor) -> Tensor:
    """Round to the nearest number of the map, relative to the largest of a block; small tensors stay in 32 bits."""
    if x.numel() < 4096:
        return x
    blocks = _in_blocks(x, 256)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=_SMALLEST_SCALE)
    nearest = torch.bucketize(blocks / scales, (numbers[:-1] + numbers[1:]) / 2)
    return _as_tensor(numbers[nearest] * scales, x)


# -- FlashOptim, arXiv 2602.23349 --------------------------------------------------------------------------------------


def companded_int8(x: Tensor) -> Tensor:
    """Round the softsign of each number, relative to the largest of 32, to 8 bits; the scale is in float16."""
    blocks = _in_blocks(x, 32)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=_SMALLEST_SCALE)
    relative = blocks / scales
    code = _rounded(127 * 2 * relative / (1 + relative.abs())) / 127
    return _as_tensor(code / (2 - code.abs()) * scales.half().float(), x)


def square_root_uint8(x: Tensor) -> Tensor:
    """Round the square root of each number, relative to the largest of 32, to 8 bits; the scale is in float16."""
    blocks = _in_blocks(x.sqrt(), 32)
    scales = blocks.amax(1, keepdim=True).clamp(min=_SMALLEST_SCALE)
    return _as_tensor((_rounded(255 * blocks / scales) / 255 * scales.half().float()).square(), x)


def with_remainder(num_bits: int) -> Format:
    """Return the format of a bfloat16 number and its error, in units of half its last place, in 8 or 16 bits."""
    largest = 2 ** (num_bits - 1) - 1

    def stored(x: Tensor) -> Tensor:
        rounded = bfloat16(x)
        exponent = torch.frexp(rounded).exponent.clamp(min=-125)  # subnormal numbers have one spacing
        half_place = torch.ldexp(torch.ones_like(x), exponent - 9)
        remainder = _rounded(((x - rounded) / half_place).clamp(-1, 1).abs() * largest) / largest
        return rounded + torch.copysign(remainder, x - rounded) * half_place

    return stored


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor()


def _in_blocks(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)


def _as_tensor(blocks: Tensor, x: Tensor) -> Tensor:
    return blocks.flatten()[: x.numel()].view_as(x)


# -- AdamW -------------------------------------------------------------------------------------------------------------


class Formats(NamedTuple):
    """How parameters and moments are stored."""

    param: Format = exact
    exp_avg: Format = exact
    exp_avg_sq: Format = exact


class AdamW:
    """AdamW with the defaults of torch, of which everything that is stored between steps has a format.

    Args:
        params: in float32; they are copied.
        formats: those of each parameter.
    """

    def __init__(self, params: Sequence[Tensor], formats: Sequence[Formats]) -> None:
        self.formats = formats
        self.params = [x.param(param.detach().clone()) for x, param in zip(formats, params, strict=True)]
        self.moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in self.params]
        self.t = 0

    def step(self, gradients: list[Tensor], lr: float) -> None:
        self.t += 1
        correction1, correction2 = 1 - 0.9**self.t, 1 - 0.999**self.t
        for i, gradient in enumerate(gradients):
            m, v = self.moments[i]
            m = m.lerp(gradient, 0.1)
            v = (0.999 * v).addcmul_(gradient, gradient, value=0.001)
            param = self.params[i] * (1 - lr * 0.01)
            param.addcdiv_(m, (v.sqrt() / math.sqrt(correction2)).add_(1e-8), value=-lr / correction1)
            self.params[i] = self.formats[i].param(param)
            self.moments[i] = self.formats[i].exp_avg(m), self.formats[i].exp_avg_sq(v)

    def values(self) -> list[Tensor]:
        """Return the parameters in float32."""
        return self.params
