"""Parameters on a device other than the current one, and on two devices of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai
from adai_dist.optimizer.host_copy import HostCopy
from adai_dist.optimizer.retirement import STEPS_BETWEEN_CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # the first step compiles the kernels
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
LONG = 500_000_000
"""Cycles of a sleep that is long enough for the host to query events."""


@pytest.fixture(autouse=True)
def _current_device() -> Iterator[None]:
    with torch.cuda.device(0):
        yield


def busy(device: str) -> None:
    with torch.cuda.device(device):
        torch.cuda._sleep(LONG)


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=needs_two)])
def test_nothing_is_read_before_it_has_arrived(device: str) -> None:
    copy = HostCopy()
    for number in (1.0, 2.0):  # the second pass reuses memory and event
        tensor = torch.zeros(3, device=device)
        busy(device)
        tensor += number
        copy.start(tensor)
        assert copy.take() is None
        torch.cuda.synchronize(device)
        arrived = copy.take()
        assert arrived is not None
        assert arrived.tolist() == [number] * 3


@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=needs_two)])
def test_a_copy_follows_the_stream_that_was_current(device: str) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            tensor = torch.zeros(3, device=device)
            torch.cuda._sleep(LONG)
            tensor += 1.0
            copy = HostCopy()
            copy.start(tensor)
    assert copy.take() is None
    stream.synchronize()
    assert copy.take() is not None


@needs_two
def test_products_that_are_large_stay_where_the_current_device_is_another() -> None:
    """An event of the current device would complete at once, and the host would read zeros."""
    param = Parameter(torch.linspace(-1, 1, 1000, device="cuda:1"))
    optimizer = Adai([param], lr=0.05, eps=1e-3)
    for number in range(STEPS_BETWEEN_CHECKS + 2):
        param.grad = torch.sin(torch.arange(1000, device="cuda:1") + number)
        if number >= STEPS_BETWEEN_CHECKS - 1:
            busy("cuda:1")
        optimizer.step()
    torch.cuda.synchronize("cuda:1")
    optimizer.step()
    assert "beta1_prod" in optimizer.state[param]


@needs_two
def test_a_model_over_two_devices_retires_on_both() -> None:
    params = [Parameter(torch.linspace(-1, 1, 1000, device=f"cuda:{index}")) for index in range(2)]
    optimizer = Adai(params, lr=0.05, eps=0.1)
    on_cpu = [Parameter(param.detach().cpu()) for param in params]
    reference = Adai(on_cpu, lr=0.05, eps=0.1)
    for number in range(STEPS_BETWEEN_CHECKS + 1):
        for param, other in zip(params, on_cpu, strict=True):
            other.grad = torch.sin(torch.arange(1000.0) + number)
            param.grad = other.grad.to(param.device)
        optimizer.step()
        reference.step()
    for index in range(2):
        torch.cuda.synchronize(index)
    optimizer.step()
    reference.step()
    assert all("beta1_prod" not in optimizer.state[param] for param in params)
    for param, other in zip(params, on_cpu, strict=True):
        torch.testing.assert_close(param.detach().cpu(), other.detach(), rtol=1e-4, atol=1e-4)


@needs_two
def test_skips_on_another_device_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    param = Parameter(torch.ones(3, device="cuda:1"))
    optimizer = Adai([param], lr=0.1)
    for value in (torch.inf, 1.0):
        param.grad = torch.full((3,), value, device="cuda:1")
        optimizer.step()
        torch.cuda.synchronize("cuda:1")
    assert "skipped so far: 1" in caplog.text
