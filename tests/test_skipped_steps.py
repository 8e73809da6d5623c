"""Skipped steps are logged with the reason, at growing intervals; too many consecutive ones raise an error."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2, AdaiW, share_mean

KERNELS = pytest.mark.parametrize("kernels", ["auto", "off"])
GRADIENT = "a gradient is inf or NaN"
STATE = "an optimizer state is inf, NaN or negative, or its step differs between ranks"
PARAMETER = "a parameter under coupled weight decay is inf or NaN"
BEYOND = "gradients are finite, but the sum of their squares overflows float32"


def trained(decoupled: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> AdaiV2:
    """Make two groups of two parameters, take one step, and set the gradients of the next one."""
    named = [(f"layer.{k}", Parameter(torch.ones(5, 3, dtype=dtype))) for k in range(4)]
    groups = [{"params": named[:2]}, {"params": named[2:], "lr": 0.2}]
    optimizer = AdaiV2(groups, lr=0.1, weight_decay=0.1, decoupled=decoupled, **options)
    give_gradients(optimizer)
    optimizer.step()
    give_gradients(optimizer)
    return optimizer


def give_gradients(optimizer: Any, value: float = 1.0) -> None:
    for parameter in optimizer.params():
        parameter.grad = torch.full_like(parameter, value)


def corrupt(tensor: Any, value: float = math.nan) -> None:
    tensor.detach().view(-1)[-1] = value


def bits(optimizer: AdaiV2) -> list[bytes]:
    tensors = [(p, *optimizer.state[p].values()) for p in optimizer.params()]
    return [tensor.detach().numpy().tobytes() for of_param in tensors for tensor in of_param]


Fault = Callable[[AdaiV2], None]
FAULTS: dict[str, tuple[bool, Fault, str, str]] = {
    "NaN in a gradient": (True, lambda o: corrupt(o.params()[2].grad), GRADIENT, "grad of 'layer.2'"),
    "inf in two gradients": (
        False,
        lambda o: [corrupt(p.grad, -math.inf) for p in o.params()[1:3]],  # type: ignore[dict-item, return-value]
        GRADIENT,
        "grad of 'layer.1' and 1 more",
    ),
    "NaN in exp_avg_sq": (
        True,
        lambda o: corrupt(o.state[o.params()[3]]["exp_avg_sq"]),
        STATE,
        "exp_avg_sq of 'layer.3'",
    ),
    "inf in exp_avg_sq": (
        False,
        lambda o: corrupt(o.state[o.params()[0]]["exp_avg_sq"], math.inf),
        STATE,
        "exp_avg_sq of 'layer.0'",
    ),
    "inf in a parameter": (False, lambda o: corrupt(o.params()[1], math.inf), PARAMETER, "value of 'layer.1'"),
    "NaN in a parameter": (False, lambda o: corrupt(o.params()[2]), PARAMETER, "value of 'layer.2'"),
    "gradients of 1e20": (True, lambda o: give_gradients(o, 1e20), BEYOND, ""),
    "gradients of -3e38": (False, lambda o: give_gradients(o, -3e38), BEYOND, ""),
}


@KERNELS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_skipped_step_names_what_was_not_finite(
    fault: str, kernels: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    decoupled, make, reason, place = FAULTS[fault]
    optimizer = trained(decoupled)
    make(optimizer)
    before = bits(optimizer)
    caplog.clear()
    optimizer.step()
    assert bits(optimizer) == before
    assert optimizer.num_skipped_steps.item() == 1
    (record,) = caplog.records
    assert f"skipped on all ranks: {reason} (skipped so far: 1)" in record.getMessage()
    assert (f"not finite on this rank: {place}; " in record.getMessage()) == bool(place)
    assert ("not finite on this rank" in record.getMessage()) == bool(place)


def test_a_float64_gradient_that_overflows_float32_is_reported_as_such(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = trained(dtype=torch.float64)
    give_gradients(optimizer, 1e20)
    optimizer.step()
    assert BEYOND in caplog.records[-1].getMessage()


def test_a_diverging_run_is_distinguished_from_a_bad_batch(caplog: pytest.LogCaptureFixture) -> None:
    """An infinite parameter produces NaN gradients; the message names both."""
    parameter = Parameter(torch.full((3,), 1.0))
    optimizer = AdaiW([("weight", parameter)], lr=0.1)
    with torch.no_grad():
        parameter[1] = math.inf
    (parameter - parameter.detach() * 2).square().sum().backward()
    optimizer.step()
    message = caplog.records[-1].getMessage()
    assert GRADIENT in message
    assert "not finite on this rank: grad of 'weight', value of 'weight'; " in message


def test_two_reasons_in_one_step_are_both_named(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = trained(decoupled=False)
    corrupt(optimizer.params()[0].grad)
    corrupt(optimizer.state[optimizer.params()[1]]["exp_avg_sq"])
    optimizer.step()
    assert f"{GRADIENT}, and {STATE} (" in caplog.records[-1].getMessage()


def test_a_new_reason_is_logged_at_once_even_after_many_skips_for_others(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = trained()
    logged: list[str] = []
    for step in range(40):
        give_gradients(optimizer, 1e25 if step in (20, 30, 35) else math.nan)
        caplog.clear()
        optimizer.step()
        logged += [f"{step}: {record.args[0]}" for record in caplog.records]  # type: ignore[index]
    nans, beyond = [0, 1, 3, 7, 15, 33], [20, 30]
    assert logged == sorted(
        [f"{step}: {GRADIENT}" for step in nans] + [f"{step}: {BEYOND}" for step in beyond],
        key=lambda line: int(line.split(":")[0]),
    )
    assert optimizer.num_skipped_steps.item() == 40


def test_a_negative_second_moment_skips_the_step_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = trained()
    for parameter in optimizer.params():
        optimizer.state[parameter]["exp_avg_sq"].fill_(-5.0)
    optimizer.step()
    assert STATE in caplog.records[-1].getMessage()
    assert optimizer.num_skipped_steps.item() == 1


def test_the_message_of_a_scaled_step_names_the_scaler(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    give_gradients(optimizer, math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert "torch.amp.GradScaler lowers its loss scale" in caplog.records[-1].getMessage()
    caplog.clear()
    for _ in range(3):
        optimizer.step()
    assert "GradScaler" not in caplog.records[-1].getMessage()


def test_parameters_without_names_are_numbered_as_in_state_dict(caplog: pytest.LogCaptureFixture) -> None:
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = Adai([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    give_gradients(optimizer)
    corrupt(params[2].grad)
    optimizer.step()
    assert "grad of parameter 2;" in caplog.records[-1].getMessage()


def test_complex_parameters_are_checked(caplog: pytest.LogCaptureFixture) -> None:
    parameter = Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = Adai([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, complex(0.0, math.nan), 1.0])
    optimizer.step()
    assert "grad of parameter 0;" in caplog.records[-1].getMessage()


# -- max_consecutive_skips ---------------------------------------------------------------------------------------------


def steps_until_error(optimizer: AdaiV2, values: list[float]) -> tuple[int, str] | None:
    for step, value in enumerate(values):
        give_gradients(optimizer, value)
        try:
            optimizer.step()
        except RuntimeError as error:
            return step, str(error)
    return None


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_consecutive_skips_end_the_run_and_skips_between_good_steps_do_not(limit: int) -> None:
    optimizer = trained(max_consecutive_skips=limit)
    row = [math.nan] * (limit - 1) + [1.0]
    assert steps_until_error(optimizer, row * 4) is None
    before = bits(optimizer)
    found = steps_until_error(optimizer, [math.nan] * 10)
    assert found is not None
    assert found[0] == limit - 1
    message = f"fewer than max_consecutive_skips={limit} steps in a row must be skipped, got {limit}: {GRADIENT}; "
    assert found[1].startswith(message)
    assert bits(optimizer) == before
    assert steps_until_error(optimizer, row) is None, "the count must restart after the error"


@pytest.mark.parametrize("fault", ["NaN in exp_avg_sq", "inf in a parameter", "gradients of -3e38"])
def test_the_error_names_what_was_not_finite(fault: str) -> None:
    decoupled, make, reason, _ = FAULTS[fault]
    optimizer = trained(decoupled, max_consecutive_skips=3)
    make(optimizer)
    for _ in range(2):
        optimizer.step()
    with pytest.raises(
        RuntimeError, match=re.escape(f"got 3: {reason}; parameters and optimizer states are as before")
    ):
        optimizer.step()


def test_without_a_limit_no_error_is_raised() -> None:
    assert steps_until_error(trained(), [math.nan] * 100) is None


def test_counting_restarts_when_the_limit_changes() -> None:
    optimizer = trained()
    assert steps_until_error(optimizer, [math.nan] * 9) is None
    optimizer.max_consecutive_skips = 4
    assert steps_until_error(optimizer, [math.nan] * 3 + [1.0]) is None
    optimizer.max_consecutive_skips = 2
    found = steps_until_error(optimizer, [math.nan] * 5)
    assert found is not None
    assert found[0] == 1
    optimizer.max_consecutive_skips = None
    assert steps_until_error(optimizer, [math.nan] * 9) is None


def through_pickle(optimizer: AdaiV2) -> AdaiV2:
    return pickle.loads(pickle.dumps(optimizer))


def through_torch_save(optimizer: AdaiV2) -> AdaiV2:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_keeps_the_limit_and_counts_from_0(copied: Callable[[AdaiV2], AdaiV2]) -> None:
    optimizer = trained(max_consecutive_skips=3)
    assert steps_until_error(optimizer, [math.nan] * 2) is None
    copy_of_it = copied(optimizer)
    assert copy_of_it.max_consecutive_skips == 3
    assert copy_of_it.num_skipped_steps.item() == 0
    found = steps_until_error(copy_of_it, [math.nan] * 5)
    assert found is not None
    assert found[0] == 2


@pytest.mark.parametrize("limit", [0, -1, True, 2.0, "3", math.inf, [1]])
def test_the_limit_must_be_a_number_of_steps(limit: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_consecutive_skips must be"):
        AdaiV2([Parameter(torch.ones(2))], lr=0.1, max_consecutive_skips=limit)
    optimizer = trained()
    optimizer.max_consecutive_skips = limit
    with pytest.raises((TypeError, ValueError), match="max_consecutive_skips must be"):
        optimizer.step()


def test_a_scaler_that_searches_for_its_scale_needs_a_larger_limit() -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1, max_consecutive_skips=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**70)
    for value, steps in ((2.0**60, 5), (math.nan, 6)):
        for step in range(steps):
            scaler.scale(torch.zeros(()))
            parameter.grad = torch.full((3,), value) * scaler.get_scale()
            if value != value and step == steps - 1:
                with pytest.raises(RuntimeError, match="max_consecutive_skips=6"):
                    scaler.step(optimizer)
            else:
                scaler.step(optimizer)
                scaler.update()
    assert optimizer.num_skipped_steps.item() == 3 + 6


def test_clipping_by_a_call_counts_the_step_once() -> None:
    optimizer = trained(max_consecutive_skips=2)
    give_gradients(optimizer, math.nan)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="max_consecutive_skips=2"):
        optimizer.step()


def test_optimizers_that_share_a_mean_reach_the_limit_together() -> None:
    optimizers = [trained(max_consecutive_skips=2) for _ in range(2)]
    share_mean(optimizers)
    give_gradients(optimizers[0], math.nan)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        with pytest.raises(RuntimeError, match="max_consecutive_skips=2"):
            optimizer.step()


def test_undefined_steps_do_not_count_as_skipped(caplog: pytest.LogCaptureFixture) -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1, max_consecutive_skips=1)
    assert steps_until_error(optimizer, [0.0] * 5) is None
    assert (optimizer.num_skipped_steps.item(), optimizer.num_undefined_steps.item()) == (0, 5)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
