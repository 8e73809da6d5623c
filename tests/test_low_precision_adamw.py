"""The formats of AdamW that tests.open_loop measures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import low_precision_adamw
from tests.low_precision_adamw import AdamW, Format, Formats

# The largest error of a number, relative to the largest of its block: half the widest gap between two numbers.
LARGEST_ERRORS = {
    "signed_dynamic": (0.45 / 64 + 0.45 / 128, True),
    "unsigned_dynamic": (0.45 / 128 + 0.45 / 256, False),
    "companded_int8": (1 / 127, True),
    "square_root_uint8": (1 / 255, False),
}


def heavy_tailed(num: int) -> torch.Tensor:
    normal = torch.randn(2, num, generator=torch.Generator().manual_seed(0))
    return normal[0] * torch.exp(2 * normal[1])


def test_without_rounding_the_steps_are_those_of_torch() -> None:
    start = heavy_tailed(1000)
    expected = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([expected], lr=0.1)
    found = AdamW([start], [Formats()])
    for t in range(20):
        expected.grad = heavy_tailed(1000 + t)[:1000]
        found.step([expected.grad], 0.1)
        optimizer.step()
    torch.testing.assert_close(found.values(), [expected.detach()], rtol=1e-6, atol=1e-6)


def test_a_map_has_256_numbers() -> None:
    for is_signed in (False, True):
        numbers = low_precision_adamw.dynamic_map(is_signed=is_signed)
        assert len(numbers.unique()) == 256
        assert numbers[-1] == 1.0
        assert (numbers < 0).sum() == (127 if is_signed else 0)


@pytest.mark.parametrize("name", LARGEST_ERRORS)
def test_the_error_of_a_state_is_at_most_half_a_gap(name: str) -> None:
    stored: Format = getattr(low_precision_adamw, name)
    bound, is_signed = LARGEST_ERRORS[name]
    x = heavy_tailed(256 * 32 + 5)
    x = x if is_signed else x.square()
    errors = low_precision_adamw._in_blocks(stored(x) - x, 256 if "dynamic" in name else 32).abs().amax(1)
    largest = low_precision_adamw._in_blocks(x, 256 if "dynamic" in name else 32).abs().amax(1)
    assert (errors <= (bound + 2**-10) * largest).all()  # a scale in float16 has an error of 2^-11, squared twice that
    assert (errors > 0).any()


@pytest.mark.parametrize("num_bits", [8, 16])
def test_a_remainder_holds_all_but_its_own_rounding(num_bits: int) -> None:
    x = torch.cat([heavy_tailed(1000), torch.tensor([0.0, -1.0, 1e-39, 3e38, 255.5, 256.5])])
    error = (low_precision_adamw.with_remainder(num_bits)(x) - x).abs()
    spacing = torch.finfo(torch.bfloat16).eps * x.abs().clamp(min=torch.finfo(torch.bfloat16).smallest_normal)
    assert (error <= spacing / 4 / (2 ** (num_bits - 1) - 1) + x.abs() * 2**-24).all()
