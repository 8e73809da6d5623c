"""Copies to the host use the stream of their device, and reuse memory and events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from adai_dist.optimizer.first_moment_check import FirstMomentCheck
from adai_dist.optimizer.host_copy import HostCopy
from adai_dist.optimizer.retirement import STEPS_BETWEEN_CHECKS, Retirement
from adai_dist.optimizer.skipped_steps import SKIP_REASONS, ConsecutiveSkips
from adai_dist.optimizer.skipped_steps import STEPS_BETWEEN_CHECKS as STEPS_BETWEEN_LIMITS
from adai_dist.optimizer.step_report import UncountedSteps
from adai_dist.sharding.mean import GlobalMean


@dataclass
class FakeEvent:
    """An event whose completion the test controls."""

    device: torch.device
    streams: list[Any] = field(default_factory=list)
    is_complete: bool = False

    def record(self, stream: Any = None) -> None:
        self.streams.append(stream)
        self.is_complete = False

    def query(self) -> bool:
        return self.is_complete

    def synchronize(self) -> None:
        self.is_complete = True


@dataclass
class FakeDevice:
    """Record of operations on devices that do not exist."""

    events: list[FakeEvent] = field(default_factory=list)
    num_buffers: int = 0


class OnDevice(torch.Tensor):
    """A CPU tensor that reports another device."""

    where: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    def to(self, *_: Any, **__: Any) -> torch.Tensor:
        return self


class OnDevice0(OnDevice):
    where = torch.device("cuda", 0)


class OnDevice1(OnDevice):
    where = torch.device("cuda", 1)


def on_device(values: Any, index: int = 1) -> torch.Tensor:
    return torch.as_tensor(values).as_subclass((OnDevice0, OnDevice1)[index])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Replace torch's device functions; cuda:0 is the current device."""
    seen, real_empty = FakeDevice(), torch.empty

    def make_event(device: Any = "cuda:0") -> FakeEvent:
        seen.events.append(FakeEvent(torch.device(device)))
        return seen.events[-1]

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        seen.num_buffers += pin_memory
        return real_empty(*size, **options)

    monkeypatch.setattr(torch, "Event", make_event)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        torch.accelerator, "current_stream", lambda device=None: f"stream of {torch.device(device or 'cuda:0')}"
    )
    return seen


def test_on_a_cpu_the_numbers_arrive_at_once() -> None:
    copy = HostCopy()
    assert copy.take() is None
    copy.start(torch.tensor([1.0, 2.0]))
    assert copy.is_under_way
    assert torch.equal(copy.take(), torch.tensor([1.0, 2.0]))  # type: ignore[arg-type]
    assert not copy.is_under_way


@pytest.mark.parametrize("index", [0, 1])
def test_an_event_is_recorded_on_the_stream_of_the_tensors_device(fake: FakeDevice, index: int) -> None:
    copy = HostCopy()
    copy.start(on_device([1.0], index))
    (event,) = fake.events
    assert event.device == torch.device("cuda", index)
    assert event.streams == [f"stream of cuda:{index}"]
    assert copy.take() is None, "nothing is read before it has arrived"
    event.is_complete = True
    assert copy.take() == torch.tensor([1.0])


def test_memory_and_event_are_reused(fake: FakeDevice) -> None:
    copy = HostCopy()
    for number in range(5):
        copy.start(on_device([float(number)]))
        fake.events[-1].is_complete = True
        assert copy.take() == torch.tensor([float(number)])
    assert (len(fake.events), fake.num_buffers) == (1, 1)


def test_two_devices_in_one_process_have_an_event_each(fake: FakeDevice) -> None:
    products = {index: on_device(torch.zeros(3), index) for index in (0, 1)}
    states = [{"beta1_prod": product, "exp_avg": product} for product in products.values()]
    retirement = Retirement()
    for _ in range(STEPS_BETWEEN_CHECKS):
        retirement.after_step(states, torch.device("cpu"))
    assert [(event.device.index, event.streams) for event in fake.events] == [
        (0, ["stream of cuda:0"]),
        (1, ["stream of cuda:1"]),
    ]
    assert all("beta1_prod" in state for state in states)
    fake.events[1].is_complete = True
    retirement.after_step(states, torch.device("cpu"))
    assert ["beta1_prod" in state for state in states] == [True, False]


def test_large_products_are_kept_while_the_copy_is_in_progress(fake: FakeDevice) -> None:
    """The buffer holds zeros before the copy, and zeros would retire all products."""
    state = {"beta1_prod": on_device(torch.full((3,), 0.5)), "exp_avg": torch.zeros(3)}
    retirement = Retirement()
    for _ in range(2 * STEPS_BETWEEN_CHECKS + 1):
        retirement.after_step([state], torch.device("cpu"))
    fake.events[0].is_complete = True
    retirement.after_step([state], torch.device("cpu"))
    assert "beta1_prod" in state


def test_skips_are_logged_once_their_number_has_arrived(fake: FakeDevice, caplog: pytest.LogCaptureFixture) -> None:
    counter = UncountedSteps()
    counter.counts = on_device(torch.zeros_like(counter.counts))
    nan, no = on_device(torch.nan), on_device(False)
    faults = on_device([True, *[False] * (len(SKIP_REASONS) - 1)])
    skipped = GlobalMean(
        nan,
        nan,
        nan,
        is_finite=no,
        is_live=no,
        is_undefined=no,
        faults=faults,
    )
    counter.record(skipped, lambda: True, str)
    assert not caplog.records
    fake.events[0].is_complete = True
    counter.record(skipped, lambda: True, str)
    assert "skipped so far: 1" in caplog.text
    assert fake.events[0].streams == ["stream of cuda:1"] * 2, "and another copy is on its way"


def mean_of(*, is_finite: bool) -> GlobalMean:
    nan, no = on_device(torch.nan), on_device(False)
    faults = on_device([not is_finite, *[False] * (len(SKIP_REASONS) - 1)])
    return GlobalMean(nan, nan, nan, is_finite=on_device(is_finite), is_live=no, is_undefined=no, faults=faults)


@pytest.mark.parametrize("first_bad", [1, 13, 14, 15, 16, 20])
def test_consecutive_skips_end_ranks_in_the_same_step_whatever_the_speed_of_copies(
    fake: FakeDevice, first_bad: int
) -> None:
    ends: list[int] = []
    errors: list[str] = []
    for is_fast in (True, False):
        skips = ConsecutiveSkips()
        for step in range(1, 100):
            try:
                skips.check(mean_of(is_finite=not first_bad <= step < first_bad + 3), 3)
            except RuntimeError as error:
                errors.append(str(error))
                ends.append(step)
                break
            for event in fake.events:
                event.is_complete |= is_fast
    assert len(ends) == 2
    assert ends[0] == ends[1]
    assert errors[0] == errors[1]
    assert "max_consecutive_skips=3 steps in a row must be skipped, got 3: a gradient is inf or NaN;" in errors[0]
    assert 16 <= ends[0] - (first_bad + 2) <= 2 * STEPS_BETWEEN_LIMITS - 1


def test_two_skips_between_good_steps_never_end_a_run_with_a_limit_of_three(fake: FakeDevice) -> None:
    skips = ConsecutiveSkips()
    for step in range(100):
        skips.check(mean_of(is_finite=step % 3 == 0), 3)
    assert len(fake.events) == 1


def test_a_written_state_is_checked_until_the_host_knows_that_it_is_finite(fake: FakeDevice) -> None:
    unread, device = FirstMomentCheck(), OnDevice1.where
    assert unread.check(device) is None
    momentum = on_device(torch.ones(3))
    unread.add("a", [momentum])
    for _ in range(3):
        assert unread.check(device) == 0
    fake.events[0].is_complete = True
    assert unread.check(device) is None
    unread.add("a", [momentum])
    assert unread.check(device) == 0
    unread.add("a", [momentum.fill_(torch.nan)])  # while the copy is in progress
    fake.events[0].is_complete = True
    for _ in range(3):
        assert unread.check(device).isnan()  # type: ignore[union-attr]
        fake.events[0].is_complete = True
    momentum.zero_()
    assert unread.check(device) == 0
    fake.events[0].is_complete = True
    assert unread.check(device) is None
