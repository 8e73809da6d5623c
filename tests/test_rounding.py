"""Stochastic rounding and the split of master weights, as adai_dist.rounding specifies them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adai_dist.rounding import (
    Origin,
    global_indices,
    join,
    key_of,
    random_words,
    settled_below,
    split,
    stochastically_rounded,
    streams,
)

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BITS_PER_PIECE = 2**24


def words(num: int, seed: int = 0, ordinal: int = 0, t: float = 1.0, word: int = 0, start: int = 0) -> Tensor:
    """Return the random words of the elements of one contiguous parameter."""
    key = torch.tensor([key_of(seed, ordinal)], dtype=torch.int32)
    origin = torch.tensor(list(Origin(start)))
    return random_words(streams(key, torch.tensor([t]))[0, word], global_indices(origin, 0, torch.empty(num)))


# -- random bits -------------------------------------------------------------------------------------------------------


def reference_word(x: int) -> int:
    """Compute lowbias32 in Python's integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def test_a_word_is_the_documented_hash_of_stream_and_index() -> None:
    key = torch.tensor([key_of(7, 3)], dtype=torch.int32)
    stream = streams(key, torch.tensor([5.0]))[0]
    for k in range(2):
        of_stream = reference_word((key_of(7, 3)[k] + 5 * 0x9E3779B9) % 2**32)
        assert stream[k].item() % 2**32 == of_stream
        for index in (0, 1, 2**31, 2**32 - 1, 2**32, 3 * 2**33 + 17):
            found = random_words(stream[k], torch.tensor([index])).item() % 2**32
            assert found == reference_word((index % 2**32) ^ ((index >> 32) * 0x9E3779B9 % 2**32) ^ of_stream)


DIFFERENT = {
    "seed": {"seed": 1},
    "high bits of the seed": {"seed": 2**40},
    "parameter": {"ordinal": 1},
    "step": {"t": 2.0},
    "word": {"word": 1},
    "elements": {"start": 1},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_words_depend_on_every_input_and_are_uncorrelated(name: str) -> None:
    num = 2**16
    one, other = (x.double() / 2**31 for x in (words(num), words(num, **DIFFERENT[name])))
    correlation = (one * other).mean() / one.square().mean()
    assert abs(correlation) < 4 / math.sqrt(num)


@pytest.mark.parametrize("shift", [0, 16])
def test_each_half_of_a_word_is_uniform(shift: int) -> None:
    num = 2**20
    scattered = torch.arange(num) * 2654435761 % 2**40  # consecutive ones are more even than random numbers
    key = torch.tensor([key_of(0, 0)], dtype=torch.int32)
    halves = (random_words(streams(key, torch.ones(1))[0, 0], scattered) >> shift) & 0xFFFF
    counts = torch.bincount(halves >> 8, minlength=256).double()
    chi_squared = ((counts - num / 256).square() / (num / 256)).sum().item()
    assert abs(chi_squared - 255) < 4 * math.sqrt(2 * 255)


def test_indices_follow_runs_pieces_and_memory() -> None:
    origin = torch.tensor(list(Origin(3, 2, 7)))
    assert global_indices(origin, 0, torch.empty(5)).tolist() == [3, 4, 10, 11, 17]
    assert global_indices(origin, 3, torch.empty(2)).tolist() == [11, 17]
    transposed = torch.empty(3, 2).t()
    assert global_indices(torch.tensor(list(Origin())), 0, transposed).tolist() == [[0, 2, 4], [1, 3, 5]]


# -- stochastic rounding -----------------------------------------------------------------------------------------------


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the numbers of a dtype around x, by way of their bits."""
    nearest = torch.tensor(x).to(dtype)
    bits = nearest.view(torch.int16)
    step = -1 if abs(nearest.item()) > abs(x) else 1
    other = (bits + step).view(dtype)
    lower, upper = sorted((nearest.double().item(), other.double().item()))
    return lower, upper


VALUES = (1.001, -0.3337, 3e-5, 1e-7, 1e3 + 0.1, -6e-8)


@LOW
@pytest.mark.parametrize("x", VALUES)
def test_a_number_is_rounded_to_a_neighbour_and_its_mean_is_exact(dtype: torch.dtype, x: float) -> None:
    num = 2**18
    value = torch.tensor(x).double().item()
    found = stochastically_rounded(torch.full((num,), x), dtype, words(num)).double()
    lower, upper = neighbours(value, dtype)
    assert set(found.unique().tolist()) <= {lower, upper}
    share = (value - lower) / (upper - lower)
    sigma = (upper - lower) * math.sqrt(share * (1 - share) / num)
    # Noise below a unit of 2^-14 of the spacing, to which float16 rounds the probability.
    assert abs(found.mean().item() - value) <= 4 * sigma + (upper - lower) * 2**-13


@LOW
def test_representable_numbers_zeros_and_infinities_stay(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    every = every[~every.isnan()]
    for t in range(3):
        rounded = stochastically_rounded(every.float(), dtype, words(len(every), t=t + 1.0))
        assert torch.equal(rounded.view(torch.int16), every.view(torch.int16))


@LOW
def test_nan_stays_nan_whatever_its_payload(dtype: torch.dtype) -> None:
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    bits = torch.full((4,), 0xFFFF, dtype=torch.int32)
    assert stochastically_rounded(nan, dtype, bits).isnan().all()


def test_finite_numbers_that_float16_can_hold_do_not_become_infinite() -> None:
    x = torch.tensor([65504.0, 65510.0, 65519.996, -65519.996, 65520.0, 1e6])
    bits = torch.full((len(x),), 0xFFFF, dtype=torch.int32)
    found = stochastically_rounded(x, torch.float16, bits).tolist()
    assert found == [65504.0, 65504.0, 65504.0, -65504.0, math.inf, math.inf]


@pytest.mark.parametrize(("eps", "t"), [(1e-3, 6236), (1e-2, 621), (1e-4, 62381)])
def test_the_product_of_inertias_settles_when_it_is_two_to_the_minus_nine(eps: float, t: int) -> None:
    for dtype, bound in ((torch.bfloat16, 2.0**-6), (torch.uint8, 2.0**-4)):
        found = settled_below(eps, torch.tensor([t - 1.0, float(t), 10.0 * t]), dtype)
        assert found.tolist() == [0.0, bound, bound]
    assert (1 - eps) ** t <= 2.0**-9 < (1 - eps) ** (t - 1)


# -- master weights ----------------------------------------------------------------------------------------------------


def check_split_and_join(bits: Tensor, dtype: torch.dtype) -> None:
    """Check numbers by their bits: exact in bfloat16; in float16 exact from 2^-16 on and within 2^-40 below."""
    x = bits.view(torch.float32)
    rounded, remainder = split(x, dtype)
    joined = join(rounded, remainder)
    is_nan = x.isnan()
    assert torch.equal(rounded.isnan(), is_nan)
    assert joined[is_nan].isnan().all()
    if dtype == torch.bfloat16:
        assert torch.equal(joined.view(torch.int32)[~is_nan], bits[~is_nan])
        return
    fits = x.abs() < 65520.0
    exact = fits & (x.abs() >= 2.0**-16)
    assert torch.equal(joined[exact], x[exact])
    assert ((joined - x).abs()[fits] <= 2.0**-40).all()


@LOW
def test_a_sample_of_numbers_survives_split_and_join(dtype: torch.dtype) -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    exponents = (0, 1, 110, 111, 112, 113, 126, 127, 128, 141, 142, 143, 254, 255)
    powers = np.array([sign | exponent << 23 for sign in (0, 2**31) for exponent in exponents])
    around_powers = (powers[:, None] + np.arange(-70_000, 70_000)).astype(np.uint32).flatten()
    check_split_and_join(torch.from_numpy(np.concatenate([random, around_powers]).view(np.int32)), dtype)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LOW
def test_all_numbers_survive_split_and_join(dtype: torch.dtype) -> None:
    for first in range(-(2**31), 2**31, BITS_PER_PIECE):
        check_split_and_join(torch.arange(first, first + BITS_PER_PIECE, dtype=torch.int32), dtype)


@LOW
def test_a_split_number_is_rounded_to_nearest(dtype: torch.dtype) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(2**18).astype(np.float32))
    rounded = split(x, dtype)[0]
    is_tie = x.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(rounded[~is_tie], x.to(dtype)[~is_tie])
    tie = torch.tensor([1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8])
    assert split(tie, torch.bfloat16)[0].tolist() == [1 + 2**-7, -1 - 2**-7, 1 + 2**-6]
