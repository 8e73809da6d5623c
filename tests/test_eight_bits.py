"""States in 8 bits: the formats that adai_dist.eight_bits specifies, and which parameters have them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adai_dist import AdaiV2
from adai_dist.eight_bits import (
    RECORD_BYTES,
    RECORD_ELEMENTS,
    SMALLEST_COMPLEMENT,
    decoded_complement,
    decoded_moment,
    encoded_complement,
    encoded_moment,
)
from adai_dist.precision import Precision
from adai_dist.rounding import TO_NEAREST
from adai_dist.sharding.records import records_shape

NUM = 2**16
EVERY_CODE = torch.arange(256).to(torch.uint8)


def random_bits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**16, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(num_records: int) -> Tensor:
    random = torch.Generator().manual_seed(1)
    normal, tails = (torch.randn(num_records, RECORD_ELEMENTS, generator=random) for _ in range(2))
    return normal.square() * torch.exp(4 * tails)


# -- second moments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-126, 3.1e-20, 1.0, 2.5e10, 3.0e38])
def test_code_k_stands_for_the_fourth_power_of_k_over_255_times_the_scale(scale: float) -> None:
    stored = torch.tensor([scale]).bfloat16()
    records = torch.cat([EVERY_CODE.view(8, -1), stored.view(torch.uint8).expand(8, 2)], 1)
    expected = (torch.arange(256).double() / 255) ** 4 * stored.double()
    # Ten roundings of float32, as those of the root count four times.
    torch.testing.assert_close(decoded_moment(records).double().flatten(), expected, rtol=10 * 2.0**-24, atol=2.0**-149)


@pytest.mark.parametrize("power", [0, -60, 60])
def test_decoded_moments_have_the_same_records_again(power: int) -> None:
    records = encoded_moment(heavy_tailed(2000) * 2.0**power, random_bits(2000, RECORD_ELEMENTS))
    assert torch.equal(encoded_moment(decoded_moment(records), TO_NEAREST), records)


def test_a_moment_is_rounded_to_a_neighbour_and_its_mean_is_exact() -> None:
    """The largest number is rounded as in bfloat16, and the others on the grid of the rounded scale."""
    v = heavy_tailed(1).expand(NUM, RECORD_ELEMENTS)
    found = decoded_moment(encoded_moment(v, random_bits(NUM, RECORD_ELEMENTS))).double()
    exact = v[0].double()
    sigma = found.std(0) / math.sqrt(NUM)
    # The random number has 16 bits, so that the probability is off by up to 2^-16 of the distance of two neighbours.
    assert ((found.mean(0) - exact).abs() <= 4 * sigma + 2.0**-16 * exact.max()).all()
    largest = exact.argmax()
    assert found[:, largest].unique().numel() == 2
    roots = (found / found[:, largest : largest + 1]) ** 0.25 * 255
    steps = (exact / exact[largest]) ** 0.25 * 255
    assert ((roots - steps).abs() <= 1.6).all()  # one step, and what the scale is off


def test_the_sum_of_stored_moments_is_that_of_the_moments() -> None:
    v = heavy_tailed(4096)
    found = decoded_moment(encoded_moment(v, random_bits(4096, RECORD_ELEMENTS)))
    assert found.double().sum().item() == pytest.approx(v.double().sum().item(), rel=3e-3)


def test_zeros_stay_and_a_scale_below_the_normal_numbers_is_zero() -> None:
    v = torch.zeros(3, RECORD_ELEMENTS)
    v[1, 3], v[2] = 2.0**-127, 2.0**-140
    records = encoded_moment(v, random_bits(3, RECORD_ELEMENTS))
    assert not records.any()
    assert not decoded_moment(records).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_makes_the_sum_of_its_record_so(value: float) -> None:
    v = torch.ones(2, RECORD_ELEMENTS)
    v[0, 5] = value
    found = decoded_moment(encoded_moment(v, TO_NEAREST))
    assert not found[0].sum().isfinite()
    assert torch.equal(found[1], v[1])


# -- products of inertias ----------------------------------------------------------------------------------------------


def test_the_grid_of_complements_has_24_numbers_per_octave_up_to_1() -> None:
    grid = decoded_complement(EVERY_CODE)
    assert grid[0] == 0.0
    assert grid[1].item() == SMALLEST_COMPLEMENT
    assert grid[-1] == 1.0
    ratios = grid[2:].double() / grid[1:-1].double()
    assert ratios.min() > 1 + 1 / 48 - 1e-6
    assert ratios.max() < 1 + 1 / 24 + 1e-6
    assert math.isclose(math.log2(1 / SMALLEST_COMPLEMENT), 10.5, abs_tol=0.01)
    assert SMALLEST_COMPLEMENT < 1e-3, "the default eps"


def test_decoded_complements_have_the_same_codes_again_also_by_way_of_the_product() -> None:
    q = decoded_complement(EVERY_CODE)
    assert torch.equal(encoded_complement(q, TO_NEAREST), EVERY_CODE)
    assert torch.equal(encoded_complement(1.0 - (1.0 - q), TO_NEAREST), EVERY_CODE)
    for seed in range(3):
        assert torch.equal(encoded_complement(q, random_bits(256, seed=seed)), EVERY_CODE)


@pytest.mark.parametrize("q", [0.00075, 0.001, 0.0313, 0.3, 0.499, 0.51, 0.97, 0.9999])
def test_a_complement_is_rounded_to_a_neighbour_and_its_mean_is_exact(q: float) -> None:
    value = torch.tensor(q)
    codes = encoded_complement(value.expand(NUM).clone(), random_bits(NUM))
    found = decoded_complement(codes).double()
    upper = (decoded_complement(EVERY_CODE) < value).sum().item()
    assert set(codes.unique().tolist()) == {upper - 1, upper}
    distance = found.max() - found.min()
    assert abs(found.mean() - value.double()) <= 4 * found.std() / math.sqrt(NUM) + 2.0**-16 * distance


def test_a_complement_below_the_grid_is_not_zero_unless_it_is() -> None:
    codes = encoded_complement(torch.tensor([0.0, 1e-30, 1e-5, SMALLEST_COMPLEMENT]), random_bits(4))
    assert codes.tolist() == [0, 1, 1, 1]


# -- which parameters --------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "matrix": ((5, 64), (5, 2, RECORD_BYTES)),
    "convolution": ((4, 32, 3, 3), (4, 9, RECORD_BYTES)),
    "stack": ((3, 5, 64), (3, 10, RECORD_BYTES)),
    "rows that divide together": ((3, 8, 4), (3, 1, RECORD_BYTES)),
    "nothing": ((0, 64), (0, 2, RECORD_BYTES)),
    "rows that do not divide": ((64, 5), None),
    "vector": ((64,), None),
    "scalar": ((), None),
    "empty rows": ((4, 0), (4, 0, RECORD_BYTES)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_parameter_is_in_8_bits_if_its_rows_have_whole_records(name: str) -> None:
    shape, expected = SHAPES[name]
    param = Parameter(torch.zeros(shape))
    assert records_shape(param, Precision(state_dtype="mixed8")) == expected
    assert records_shape(param, Precision(state_dtype="bfloat16")) is None
    optimizer = AdaiV2([param], lr=0.1, state_dtype="mixed8")
    optimizer.create_states([param])
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == torch.bfloat16
    if expected is None:
        assert {x.dtype for name, x in state.items() if name != "step"} == {torch.bfloat16}
        assert state["exp_avg_sq"].shape == shape
    else:
        assert (state["exp_avg_sq"].dtype, tuple(state["exp_avg_sq"].shape)) == (torch.uint8, expected)
        assert (state["beta1_prod"].dtype, tuple(state["beta1_prod"].shape)) == (torch.uint8, shape)


def test_parameters_in_another_order_of_memory_have_states_in_bfloat16() -> None:
    convolution = torch.zeros(4, 32, 3, 3).to(memory_format=torch.channels_last)
    for param in (convolution, torch.zeros(64, 32).t()):
        assert records_shape(param, Precision(state_dtype="mixed8")) is None


# -- refusals ----------------------------------------------------------------------------------------------------------


def stepped(**options: Any) -> tuple[Parameter, AdaiV2]:
    param = Parameter(torch.ones(4, 32))
    optimizer = AdaiV2([param], lr=0.1, state_dtype="mixed8", **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    return param, optimizer


def test_an_eps_below_the_grid_is_refused() -> None:
    stepped(eps=SMALLEST_COMPLEMENT)
    with pytest.raises(ValueError, match=r"eps must be at least 0\.00069 for state_dtype='mixed8'.*got 0\.0001"):
        stepped(eps=1e-4)
    param, optimizer = stepped()
    optimizer.param_groups[0]["eps"] = 1e-4
    with pytest.raises(ValueError, match=r"eps must be at least 0\.00069"):
        optimizer.step()
    vector = Parameter(torch.ones(32))
    vector.grad = torch.ones(32)
    AdaiV2([vector], lr=0.1, eps=1e-4, state_dtype="mixed8", independent=True).step()
    assert param.isfinite().all()


def test_records_of_another_size_are_refused() -> None:
    param, optimizer = stepped()
    optimizer.state[param]["exp_avg_sq"] = torch.zeros(2, 1, RECORD_BYTES, dtype=torch.uint8)
    with pytest.raises(ValueError, match="exp_avg_sq must have contiguous records of 136 bytes"):
        optimizer.step()
    optimizer.state[param]["exp_avg_sq"] = torch.zeros(4, 32)
    with pytest.raises(TypeError, match=r"exp_avg_sq must be torch\.uint8.*got torch\.float32"):
        optimizer.step()


def test_a_record_that_is_not_finite_skips_steps_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    param, optimizer = stepped()
    before = param.detach().clone()
    optimizer.state[param]["exp_avg_sq"][2, 0, -2:] = torch.tensor([0xC0, 0x7F], dtype=torch.uint8)  # a scale of NaN
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert torch.equal(param, before)
    assert "exp_avg_sq of parameter 0" in caplog.text
