"""Skipped steps on a CUDA device, which the host detects late because it does not wait for each step."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch.nn import Parameter

from adai_dist import AdaiV2
from adai_dist.optimizer.skipped_steps import STEPS_BETWEEN_CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # the first step compiles the kernels
]

LIMIT = 3


def optimizer_of(param: Parameter, **options: int) -> AdaiV2:
    optimizer = AdaiV2([param], lr=0.1, **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


def step_often(optimizer: AdaiV2, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.step()


def test_consecutive_skips_raise_at_most_two_checks_later() -> None:
    param = Parameter(torch.ones(1000, device="cuda"))
    optimizer = optimizer_of(param, max_consecutive_skips=LIMIT)
    param.grad = torch.full_like(param, math.nan)
    with pytest.raises(RuntimeError, match=f"max_consecutive_skips={LIMIT} steps in a row"):
        step_often(optimizer, LIMIT + 2 * STEPS_BETWEEN_CHECKS)
    assert bool(param.isfinite().all())


def test_a_skip_is_logged_with_its_cause_once_the_count_has_arrived(caplog: pytest.LogCaptureFixture) -> None:
    param = Parameter(torch.ones(1000, device="cuda"))
    optimizer = optimizer_of(param)
    param.grad = torch.full_like(param, math.inf)
    optimizer.step()
    torch.cuda.synchronize()
    param.grad = torch.ones_like(param)
    with caplog.at_level(logging.WARNING, "adai_dist"):
        optimizer.step()
    assert "a gradient is inf or NaN" in caplog.text
    assert optimizer.num_skipped_steps.item() == 1


def test_a_first_moment_of_nan_skips_the_step() -> None:
    param = Parameter(torch.ones(1000, device="cuda"))
    optimizer = optimizer_of(param)
    before = param.detach().clone()
    optimizer.state[param]["exp_avg"][7] = math.nan
    optimizer.step()
    torch.testing.assert_close(param.detach(), before, rtol=0, atol=0)
    assert optimizer.num_skipped_steps.item() == 1


def test_new_states_are_checked_without_waiting() -> None:
    param = Parameter(torch.ones(1000, device="cuda"))
    optimizer = optimizer_of(param)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
