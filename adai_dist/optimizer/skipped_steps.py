"""Skipped steps: the reasons, counts and warnings, and the error after too many in a row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adai_dist.optimizer.host_copy import HostCopy
from adai_dist.sharding.mean import GlobalMean

SKIP_REASONS = (
    "a gradient is inf or NaN",
    "an optimizer state is inf, NaN or negative, or its step differs between ranks",
    "a parameter under coupled weight decay is inf or NaN",
    "some ranks have a gradient that others lack: that of a DTensor is taken as zeros from now on, and from the first "
    "step with missing_as_zeros=True; DeepSpeed mixes it with those of other parameters, so let all ranks use the same "
    "parameters in the same order",
    "gradients are finite, but the sum of their squares overflows float32",
)
"""Reasons in the order of :attr:`adai_dist.sharding.mean.GlobalMean.faults`."""

STEPS_BETWEEN_CHECKS = 16
"""Steps between checks for consecutive skips on an accelerator.

The number is fixed, and each check waits for the numbers of the previous one, so that all ranks decide alike in the
same step.
"""

_MISSING_GRADIENT = 3
_OVERFLOW = len(SKIP_REASONS) - 1

logger: logging.Logger = logging.getLogger("adai_dist")


def found_faults(counts: Sequence[int]) -> list[int]:
    """Return the indices of the faults that occurred; the overflow only if nothing else explains it.

    Args:
        counts: number of steps with each of the faults.
    """
    return [fault for fault in range(_OVERFLOW) if counts[fault]] or [_OVERFLOW]


def describe_faults(counts: Sequence[int]) -> str:
    """Describe the faults that occurred, for a message."""
    return ", and ".join(SKIP_REASONS[fault] for fault in found_faults(counts))


class UncountedSteps:
    """Counts and logs the steps that did not count, without making the host wait for the device.

    A step is skipped if something is not finite, and undefined if the mean is 0: see :class:`GlobalMean`.

    On an accelerator the counts are copied to the host in the background and read in a later step. For every reason,
    skipped steps 1, 2, 4, 8, ... are logged.
    """

    def __init__(self) -> None:
        self.counts: Tensor = torch.zeros(2 + len(SKIP_REASONS), dtype=torch.int64)
        """Numbers of skipped steps, of undefined steps, and of skipped steps with each of the faults."""
        self._reported: list[int] = self.counts.tolist()
        self._by_reason = [0] * len(SKIP_REASONS)
        self._copy = HostCopy()
        self.has_lacked_gradients: bool = False
        """Whether a step was skipped because a gradient was missing on some ranks only; known after the step."""

    def record(self, mean: GlobalMean, is_to_be_logged: Callable[[], bool], diagnose: Callable[[], str]) -> None:
        """Count a step, and log the counts that have arrived.

        Args:
            is_to_be_logged: returns whether this rank logs.
            diagnose: returns what this rank finds out about the reason; waits for the device.
        """
        # In place, as a replayed CUDA graph needs it; its skipped steps are logged after the next step outside of it.
        self.counts = self.counts.to(mean.is_finite.device)
        self.counts += torch.stack([~mean.is_finite, mean.is_undefined, *mean.faults.unbind()])
        if self.counts.is_meta or (self.counts.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._report(is_to_be_logged, diagnose)
        if not self._copy.is_under_way:
            self._copy.start(self.counts)
            self._report(is_to_be_logged, diagnose)  # on a CPU the numbers have arrived already

    def _report(self, is_to_be_logged: Callable[[], bool], diagnose: Callable[[], str]) -> None:
        arrived = self._copy.take()
        counts = self._reported if arrived is None else arrived.tolist()
        if counts == self._reported:
            return
        num_skipped, num_undefined, *faults = (now - before for now, before in zip(counts, self._reported, strict=True))
        is_first_undefined = num_undefined and not self._reported[1]
        self._reported = counts
        self.has_lacked_gradients |= faults[_MISSING_GRADIENT] > 0
        is_due = num_skipped > 0 and self._is_due(faults)
        if not (is_due or is_first_undefined) or not is_to_be_logged():
            return
        if is_due:
            logger.warning(
                "step skipped on all ranks: %s (skipped so far: %d); parameters and optimizer states are unchanged; "
                "%sfor each reason, skipped steps 1, 2, 4, 8, ... are logged",
                describe_faults(faults),
                counts[0],
                diagnose(),
            )
        if is_first_undefined:
            logger.warning(
                "step did not count: all gradients so far are 0, which leaves inertia undefined; only decoupled decay "
                "was applied (num_undefined_steps counts such steps, this warning is logged once)"
            )

    def _is_due(self, faults: list[int]) -> bool:
        """Return whether the count of a reason has reached its next power of two.

        Args:
            faults: number of steps with each of the faults since the last report.
        """
        is_due = False
        for fault in found_faults(faults):
            before = self._by_reason[fault]
            self._by_reason[fault] += faults[fault]
            is_due |= self._by_reason[fault].bit_length() > before.bit_length()
        return is_due


class ConsecutiveSkips:
    """Counts consecutive skipped steps while there is a limit, and raises an error at the limit."""

    def __init__(self) -> None:
        self._limit: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._current: Tensor | None = None
        """Consecutive skipped steps up to now, and how many of them had each fault; int64, on the device."""
        self._longest = torch.zeros(0)
        """Maximum of ``_current`` so far, by number of steps."""
        self._copy = HostCopy()
        self._num_steps = 0

    def check(self, mean: GlobalMean, limit: int | None) -> None:
        """Count a step.

        Raises:
            RuntimeError: ``limit`` consecutive steps were skipped; the same on all ranks, in the same step.
            TypeError, ValueError: the limit is not valid.

        Collective: none.
        """
        if limit != self._limit:
            self._limit = skip_limit_in_range(limit)
            self._reset()
        if limit is None:
            return
        is_skipped = ~mean.is_finite
        step = torch.cat([is_skipped.reshape(1), mean.faults]).long()
        if self._current is None:
            self._current, self._longest = torch.zeros_like(step), torch.zeros_like(step)
        # In place, as a replayed CUDA graph needs it.
        self._current.add_(step.to(self._current.device)).mul_(is_skipped.to(self._current.device))
        self._longest.copy_(torch.where(self._current[0] >= self._longest[0], self._current, self._longest))
        if self._current.is_meta or (self._current.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        longest = self._longest_on_host()
        if longest is not None and longest[0] >= limit:
            self._reset()
            raise RuntimeError(
                f"fewer than max_consecutive_skips={limit} steps in a row must be skipped, got {longest[0]}: "
                f"{describe_faults(longest[1:])}; parameters and optimizer states are as before the first of them; "
                "load an older checkpoint, lower the learning rate, or check the data"
            )

    def _longest_on_host(self) -> list[int] | None:
        if self._longest.device.type == "cpu":
            return self._longest.tolist()
        self._num_steps += 1
        if self._num_steps % STEPS_BETWEEN_CHECKS:
            return None
        arrived = self._copy.wait()
        longest = None if arrived is None else arrived.tolist()
        self._copy.start(self._longest.clone())
        return longest


def skip_limit_in_range(limit: Any) -> int | None:
    """Validate a limit of consecutive skips: None, or an integer >= 1."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"max_consecutive_skips must be an integer or None, got {limit!r}")
    if limit < 1:
        raise ValueError(f"max_consecutive_skips must be >= 1 (use None for no limit), got {limit!r}")
    return limit
