"""States in bfloat16 and in 8 bits, and master weights: arguments, trajectories, retirement, checkpoints."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2, AdaiW, share_mean, storage
from adai_dist.precision import Precision
from adai_dist.rounding import join

STATE_NAMES = ("step", "exp_avg", "exp_avg_sq", "beta1_prod")
KERNELS = pytest.mark.parametrize("kernels", ["require", "off"])
SHAPES = ((3, 5), (), (2000,), (0,), (17, 9), (6, 96))
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "mixed8": {"state_dtype": "mixed8"},
    "rounded": {"master_weights": False},
    "rounded, bfloat16": {"state_dtype": "bfloat16", "master_weights": False},
    "rounded, mixed8": {"state_dtype": "mixed8", "master_weights": False},
}


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    random = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[Parameter], t: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(t)
    for param in params:
        gradient = (torch.randn(param.shape, generator=random) * torch.randn((), generator=random).exp()).to(dtype)
        param.grad_dtype = dtype  # type: ignore[attr-defined] # torch otherwise requires the parameter's
        param.grad = gradient


def train(
    optimizer: torch.optim.Optimizer, params: list[Parameter], start: int, end: int, dtype: torch.dtype | None = None
) -> None:
    for t in range(start, end):
        set_gradients(params, t, dtype or params[0].dtype)
        optimizer.step()


def make(params: list[Parameter], cls: Callable[..., Any] = AdaiV2, **options: Any) -> Any:
    return cls(params, lr=0.2, **{"dampening": 0.0, "weight_decay": 0.01, "max_grad_norm": 50.0} | options)


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# -- arguments ---------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": (
        {"state_dtype": "float16"},
        ValueError,
        "state_dtype must be one of 'float32', 'bfloat16', 'mixed8', got 'float16'",
    ),
    "torch dtype": ({"state_dtype": torch.bfloat16}, ValueError, "got torch.bfloat16"),
    "master": ({"master_weights": "yes"}, ValueError, "master_weights must be 'auto', True or False, got 'yes'"),
    "master is a number": ({"master_weights": 1}, ValueError, "got 1"),
    "seed is a float": ({"seed": 1.0}, TypeError, "seed must be an int, got 1.0"),
    "seed is a bool": ({"seed": True}, TypeError, "seed must be an int, got True"),
    "negative seed": ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    "large seed": ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\*\*64\)"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("cls", [Adai, AdaiW, AdaiV2])
def test_a_wrong_argument_is_refused_with_what_must_hold(cls: Any, name: str) -> None:
    arguments, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        cls(parameters(), lr=0.1, **arguments)


def test_the_mode_is_an_attribute_and_no_key_of_the_parameter_groups() -> None:
    optimizer = AdaiW(parameters(), lr=0.1, state_dtype="bfloat16", seed=3)
    assert optimizer.precision == Precision(state_dtype="bfloat16", seed=3)
    assert not {"state_dtype", "master_weights", "seed", "precision"} & optimizer.param_groups[0].keys()


STATES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "mixed8": (torch.bfloat16, torch.uint8, torch.uint8),
}


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_have_the_requested_dtype_and_low_parameters_a_remainder(dtype: torch.dtype, state_dtype: str) -> None:
    params = parameters(dtype)
    train(make(params, state_dtype=state_dtype), params, 0, 1)
    optimizer = make(params, state_dtype=state_dtype)
    train(optimizer, params, 0, 1)
    for param, state in optimizer.state.items():
        of_param = "bfloat16" if state_dtype == "mixed8" and param.shape != (6, 96) else state_dtype
        expected = dict(zip(STATE_NAMES, (torch.float32, *STATES[of_param]), strict=True))
        if dtype != torch.float32:
            expected["master_param"] = torch.int16
        assert {name: value.dtype for name, value in state.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
def test_float64_and_complex_parameters_keep_their_states_in_full(dtype: torch.dtype) -> None:
    one, other = ([Parameter(torch.arange(7.0).to(dtype))] for _ in range(2))
    train(make(one, state_dtype="bfloat16"), one, 0, 5)
    train(make(other), other, 0, 5)
    assert_same_bits(one, other)


# -- trajectories ------------------------------------------------------------------------------------------------------


@KERNELS
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "mixed8"])
@pytest.mark.parametrize("coupled", [False, True], ids=["decoupled", "coupled"])
def test_bfloat16_parameters_have_the_trajectory_of_float32_master_weights(
    coupled: bool, mode: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    params = parameters(torch.bfloat16)
    masters = [Parameter(param.detach().float()) for param in params]
    options = {**MODES[mode], "decoupled": not coupled}
    optimizer, reference = make(params, **options), make(masters, **options)
    train(optimizer, params, 0, 60, torch.bfloat16)
    train(reference, masters, 0, 60, torch.bfloat16)
    for param, master in zip(params, masters, strict=True):
        state = optimizer.state[param]
        assert torch.equal(join(param.detach(), state["master_param"]), master.detach())
        for name, value in reference.state[master].items():
            assert torch.equal(state[name], value), name
        distance = (param.float() - master).abs()
        assert (distance <= 2.0**-8 * master.abs() + 1e-38).all()


@KERNELS
def test_float16_parameters_follow_float32_master_weights(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    params = parameters(torch.float16)
    masters = [Parameter(param.detach().float()) for param in params]
    optimizer, reference = make(params), make(masters)
    train(optimizer, params, 0, 60, torch.float16)
    train(reference, masters, 0, 60, torch.float16)
    for param, master in zip(params, masters, strict=True):
        joined = join(param.detach(), optimizer.state[param]["master_param"])
        # The remainder is exact down to 2^-16; a parameter below it is off by 2^-40 at most in every step.
        torch.testing.assert_close(joined, master.detach(), rtol=0.0, atol=60 * 2.0**-40)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_far_below_half_a_unit_are_not_lost(
    dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rounding to nearest, a parameter of 1 that is decayed by 1e-4 per step would never move."""
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    num, steps = 4096, 300
    for master_weights, tolerance in (("auto", 2.0**-8), (False, 2e-3)):
        param = Parameter(torch.ones(num, dtype=dtype))
        optimizer = AdaiW([param], lr=1.0, weight_decay=1e-4, master_weights=master_weights)
        gradient = torch.full((num,), 2.0**-24)  # almost no update beside the decay
        for _ in range(steps):
            param.grad = gradient.to(dtype)
            optimizer.step()
        assert param.float().mean().item() == pytest.approx((1 - 1e-4) ** steps, abs=tolerance)


@KERNELS
@pytest.mark.parametrize("mode", ["bfloat16", "mixed8"])
def test_the_sum_in_the_mean_is_that_of_what_is_stored(
    mode: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    params, others = parameters(), parameters()
    optimizer, reference = make(params, **MODES[mode]), make(others)
    train(optimizer, params, 0, 100)
    train(reference, others, 0, 100)
    moments = [storage.moment_of(optimizer.state[p]["exp_avg_sq"], p.shape) for p in params]
    stored = math.fsum(x for v in moments for x in v.double().flatten().tolist())
    true = math.fsum(x for p in others for x in reference.state[p]["exp_avg_sq"].double().flatten().tolist())
    assert stored == pytest.approx(true, rel=3e-3)
    set_gradients(params, 100, torch.float32)
    shards = optimizer.owned_shards()
    carried = optimizer.observe(shards).carried.item()
    correction = 1 - 0.99**101
    assert carried == pytest.approx(0.99 * stored / correction, rel=1e-7)


@KERNELS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_gradients_neither_move_a_parameter_nor_make_nan(
    dtype: torch.dtype, mode: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    params = parameters(dtype)
    before = [param.detach().clone() for param in params]
    optimizer = make(params, weight_decay=0.0, **MODES[mode])
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same_bits([param.detach() for param in params], before)
    train(optimizer, params, 0, 5)
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_seed_decides_about_rounded_bits_and_about_nothing_else(dtype: torch.dtype, mode: str) -> None:
    runs: list[list[Tensor]] = []
    for seed in (0, 0, 1):
        params = parameters(dtype)
        optimizer = make(params, seed=seed, **MODES[mode])
        train(optimizer, params, 0, 5)
        states = [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq")]
        runs.append([*(p.detach() for p in params), *states])
    assert_same_bits(runs[0], runs[1])
    differs = any(not torch.equal(x, y) for x, y in zip(runs[0], runs[2], strict=True))
    assert differs == (mode != "float32" and (mode != "rounded" or dtype == torch.bfloat16))


def test_optimizers_of_one_model_have_different_random_bits() -> None:
    params = [Parameter(torch.ones(2000)) for _ in range(2)]
    optimizers = [AdaiV2([param], lr=0.1, state_dtype="bfloat16") for param in params]
    share_mean(optimizers)
    for param in params:
        param.grad = torch.linspace(0.1, 1.0, 2000)
    for optimizer in optimizers:
        optimizer.step()
    one, other = (optimizer.state[param]["exp_avg"] for optimizer, param in zip(optimizers, params, strict=True))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=2.0**-7, atol=0.0)


# -- retirement --------------------------------------------------------------------------------------------------------


@KERNELS
def test_the_product_of_bfloat16_states_settles_by_its_step_count_and_retires(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At eps=0.1, (1 - eps)^60 is at most 2^-9, and that of one step less is not."""
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    monkeypatch.setattr("adai_dist.optimizer.retirement.STEPS_BETWEEN_CHECKS", 1)
    param = Parameter(torch.zeros(2**14))
    optimizer = AdaiV2([param], lr=0.1, eps=0.1, betas=(1e-9, 0.99), state_dtype="bfloat16")
    random = torch.Generator().manual_seed(0)
    largest: list[float] = []
    for _ in range(61):
        param.grad = torch.randn(2**14, generator=random)
        optimizer.step()
        product = optimizer.state[param].get("beta1_prod")
        largest.append(0.0 if product is None else (1 - product.float()).max().item())
    assert largest[58] > 0.0
    assert largest[59] == 0.0
    assert "beta1_prod" not in optimizer.state[param]
    saved = optimizer.state_dict()["state"][0]["beta1_prod"]
    assert saved.dtype == torch.float32
    assert not saved.any()


@KERNELS
def test_the_product_in_8_bits_retires_soon_after_it_has_settled(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2^14 elements, a few are still above the bound, which is three steps of the grid."""
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    monkeypatch.setattr("adai_dist.optimizer.retirement.STEPS_BETWEEN_CHECKS", 1)
    param = Parameter(torch.zeros(2**7, 2**7))
    optimizer = AdaiV2([param], lr=0.1, eps=0.1, betas=(1e-9, 0.99), state_dtype="mixed8")
    random = torch.Generator().manual_seed(0)
    shares: list[float] = []
    for _ in range(90):
        param.grad = torch.randn(param.shape, generator=random)
        optimizer.step()
        product = optimizer.state[param].get("beta1_prod")
        shares.append(0.0 if product is None else (product != 255).float().mean().item())
    assert shares[58] > 0.02
    assert shares[59] < 0.02
    assert "beta1_prod" not in optimizer.state[param]
    assert not optimizer.state_dict()["state"][0]["beta1_prod"].any()


def test_a_retired_product_does_not_change_the_order_of_the_saved_states() -> None:
    """Ranks retire their shards separately, and gather their states in order."""
    param = Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = make([param])
    train(optimizer, [param], 0, 1)
    before = list(optimizer.state_dict()["state"][0])
    del optimizer.state[param]["beta1_prod"]
    assert list(optimizer.state_dict()["state"][0]) == before == [*STATE_NAMES, "master_param"]


def test_a_product_that_is_still_large_does_not_settle_when_eps_is_raised() -> None:
    param = Parameter(torch.zeros(1000))
    optimizer = AdaiV2([param], lr=0.1, eps=1e-3, betas=(1e-9, 0.99), state_dtype="bfloat16")
    for t in range(80):
        if t == 70:
            optimizer.param_groups[0]["eps"] = 0.1
        param.grad = torch.ones(1000)
        optimizer.step()
    expected = 0.999**70 * 0.9**10
    found = (1 - optimizer.state[param]["beta1_prod"].double()).mean().item()
    assert found == pytest.approx(expected, rel=0.05)


# -- checkpoints -------------------------------------------------------------------------------------------------------

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


# The products of mixed8 do not reach an eps as small as 2^-24.
MODES_AND_EPS = [(mode, eps) for mode in MODES for eps in (1e-3, 2.0**-24) if eps == 1e-3 or "mixed8" not in mode]


@DTYPES
@pytest.mark.parametrize(("mode", "eps"), MODES_AND_EPS)
def test_a_resumed_run_has_the_same_bits(eps: float, mode: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = make(params, eps=eps, **MODES[mode])
    train(optimizer, params, 0, 7)
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, 7, 14)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = [Parameter(x) for x in loaded["params"]]
    other = make(resumed, eps=eps, **MODES[mode])
    other.load_state_dict(loaded["optimizer"])
    train(other, resumed, 7, 14)
    assert_same_bits(params, resumed)
    for one, two in zip(params, resumed, strict=True):
        assert optimizer.state[one].keys() == other.state[two].keys()
        for name, value in optimizer.state[one].items():
            assert torch.equal(value, other.state[two][name]), name


@pytest.mark.parametrize("is_model_first", [True, False], ids=["model first", "optimizer first"])
def test_master_weights_are_restored_whatever_is_loaded_first(is_model_first: bool) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(params)
    train(optimizer, params, 0, 7)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [Parameter(torch.zeros_like(param)) for param in params]
    other = make(others)

    def load_model() -> None:
        for param, twin in zip(params, others, strict=True):
            twin.data.copy_(param.data)

    for load in [load_model, lambda: other.load_state_dict(saved)][:: 1 if is_model_first else -1]:
        load()
    train(optimizer, params, 7, 10)
    train(other, others, 7, 10)
    assert_same_bits(params, others)


@pytest.mark.parametrize("theirs", MODES)
@pytest.mark.parametrize("ours", MODES)
def test_every_mode_loads_the_checkpoint_of_every_mode(ours: str, theirs: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(params, **MODES[theirs])
    train(optimizer, params, 0, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    other = make(params, **MODES[ours])
    other.load_state_dict(saved)
    fresh = make(parameters(torch.bfloat16), **MODES[ours])
    fresh.create_states(fresh.params())
    for index, (param, twin) in enumerate(zip(params, fresh.params(), strict=True)):
        state, of_saved = other.state[param], saved["state"][index]
        assert {name: value.dtype for name, value in state.items()} == {
            name: value.dtype for name, value in fresh.state[twin].items()
        }
        is_coarse = state["beta1_prod"].dtype == torch.uint8
        product = storage.product_of(state["beta1_prod"])
        torch.testing.assert_close(product, of_saved["beta1_prod"], rtol=0.0, atol=2.0 ** -(6 if is_coarse else 9))
        torch.testing.assert_close(state["exp_avg"].float(), of_saved["exp_avg"].float(), rtol=2.0**-8, atol=0.0)
        v, saved_v = storage.moment_of(state["exp_avg_sq"], param.shape), of_saved["exp_avg_sq"].float()
        tolerance = 2.0**-8 * saved_v
        if is_coarse:  # half of a step of the fourth root
            tolerance = tolerance + 4 * (saved_v / saved_v.max()) ** 0.75 * 0.5 / 255 * saved_v.max() + 1e-9
        assert ((v - saved_v).abs() <= tolerance).all()
        if "master_param" in state:
            expected = of_saved.get("master_param", param.detach().float())
            assert torch.equal(join(param.detach(), state["master_param"]), expected)
    train(other, params, 5, 8)
    assert all(param.isfinite().all() for param in params)


def test_a_checkpoint_without_a_mode_is_loaded_into_bfloat16_states(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 0, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["precision"]
    for state in saved["state"].values():
        state["step"] = int(state["step"])  # as in the authors' code
    other = make(params, state_dtype="bfloat16")
    other.load_state_dict(saved)
    train(other, params, 5, 8)
    assert all(param.isfinite().all() for param in params)
    assert not caplog.records


CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "state_dtype": ({}, {"state_dtype": "bfloat16"}, "state_dtype='float32' instead of 'bfloat16'"),
    "master weights": ({}, {"master_weights": False}, "master_weights='auto' instead of False"),
    "seed": (
        {"state_dtype": "bfloat16", "seed": 1},
        {"state_dtype": "bfloat16", "seed": 2},
        "seed=1 instead of 2",
    ),
    "a seed without effect": ({"seed": 1}, {"seed": 2}, None),
    "nothing": ({"state_dtype": "bfloat16"}, {"state_dtype": "bfloat16"}, None),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_mode_or_seed_in_a_checkpoint_is_said_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours, message = CHANGED[name]
    params = parameters()
    optimizer = make(params, **theirs)
    train(optimizer, params, 0, 2)
    make(params, **ours).load_state_dict(optimizer.state_dict())
    found = [record.getMessage() for record in caplog.records if "checkpoint" in record.getMessage()]
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


DAMAGED: dict[str, tuple[Any, type[Exception], str]] = {
    "not a dict": ("bfloat16", TypeError, r"state_dict\['precision'\] must be a dict"),
    "unknown dtype": (
        {**Precision().as_saved(), "state_dtype": "int3"},
        ValueError,
        r"state_dict\['precision'\]: state_dtype must be one of",
    ),
    "seed": ({**Precision().as_saved(), "seed": "x"}, TypeError, r"state_dict\['precision'\]: seed must be an int"),
    "unknown key": ({"block": 32}, ValueError, r"state_dict\['precision'\] must have the keys"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_mode_in_a_checkpoint_is_refused(name: str) -> None:
    value, error, message = DAMAGED[name]
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 0, 1)
    saved = optimizer.state_dict() | {"precision": value}
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)


def test_wrong_master_weights_in_a_checkpoint_are_refused() -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(params)
    train(optimizer, params, 0, 1)
    for value, message in ((torch.ones(4), "must have the shape"), (torch.full((3, 5), math.nan), "must be finite")):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["master_param"] = value
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_and_a_pickle_continue_in_the_same_mode(mode: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(params, seed=5, **MODES[mode])
    train(optimizer, params, 0, 3)
    twin, twins = copy.deepcopy((optimizer, params))
    assert twin.precision == optimizer.precision
    train(optimizer, params, 3, 6)
    train(twin, twins, 3, 6)
    assert_same_bits(params, twins)
