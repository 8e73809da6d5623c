"""What a step has found out, and the steps that did not count: on the device, reported on the host."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from adai_dist.optimizer.host_copy import HostCopy
from adai_dist.optimizer.reasons import MISSING, WORDS, reasons, reasons_of
from adai_dist.optimizer.shared import Shared
from adai_dist.optimizer.skips_in_a_row import SkipsInARow
from adai_dist.sharding.mean import GlobalMean

_UNKNOWN = torch.tensor(torch.nan, dtype=torch.float64)

logger: logging.Logger = logging.getLogger("adai_dist")


class UncountedSteps:
    """Counts and logs the steps that did not count, without making the host wait for the device.

    A step is skipped where something is not finite, and undefined where the mean is 0: see :class:`GlobalMean`.

    On an accelerator the counts are copied to the host in the background and looked at in a later step. For every
    reason the 1st, 2nd, 4th, 8th ... step that was skipped is logged.
    """

    def __init__(self) -> None:
        self.counts: Tensor = torch.zeros(2 + len(WORDS), dtype=torch.int64)
        """Skipped, undefined, and the faults of the skipped ones."""
        self._reported: list[int] = self.counts.tolist()
        self._by_reason = [0] * len(WORDS)
        self._copy = HostCopy()
        self.has_lacked_gradients: bool = False
        """Whether a step was skipped as a parameter lacked its gradient on some ranks alone; known after the step."""

    def record(self, mean: GlobalMean, is_to_be_logged: Callable[[], bool], look_closer: Callable[[], str]) -> None:
        """Count a step, and log what is known by now, where it ``is_to_be_logged`` on this rank.

        Args:
            look_closer: says what this rank can see of the reason; waits for the device.
        """
        # In place, as a replayed CUDA graph needs it; what it skips is logged after the next step outside of a graph.
        self.counts = self.counts.to(mean.is_finite.device)
        self.counts += torch.stack([~mean.is_finite, mean.is_undefined, *mean.faults.unbind()])
        if self.counts.is_meta or (self.counts.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        self._report(is_to_be_logged, look_closer)
        if not self._copy.is_under_way:
            self._copy.start(self.counts)
            self._report(is_to_be_logged, look_closer)  # on a CPU the numbers are there at once

    def _report(self, is_to_be_logged: Callable[[], bool], look_closer: Callable[[], str]) -> None:
        arrived = self._copy.take()
        counts = self._reported if arrived is None else arrived.tolist()
        if counts == self._reported:
            return
        num_skipped, num_undefined, *faults = (now - before for now, before in zip(counts, self._reported, strict=True))
        is_first_undefined = num_undefined and not self._reported[1]
        self._reported = counts
        self.has_lacked_gradients |= faults[MISSING] > 0
        is_due = num_skipped > 0 and self._is_due(faults)
        if not (is_due or is_first_undefined) or not is_to_be_logged():
            return
        if is_due:
            logger.warning(
                "step skipped on all ranks: %s (skipped so far: %d); parameters and optimizer states are as before; "
                "%sthis is said of the 1st, 2nd, 4th, 8th ... such step",
                reasons_of(faults),
                counts[0],
                look_closer(),
            )
        if is_first_undefined:
            logger.warning(
                "step did not count: all gradients so far are 0, so that inertia is undefined; only decoupled decay "
                "was applied (num_undefined_steps counts such steps, this is said once)"
            )

    def _is_due(self, faults: list[int]) -> bool:
        """Whether a reason has reached its next power of two.

        Args:
            faults: those of the steps that were skipped since the last report.
        """
        is_due = False
        for reason in reasons(faults):
            before = self._by_reason[reason]
            self._by_reason[reason] += faults[reason]
            is_due |= self._by_reason[reason].bit_length() > before.bit_length()
        return is_due


class ReportsSteps:
    """What users can read of the steps of an optimizer."""

    _last_mean: Shared[GlobalMean | None] = Shared()

    def __init__(self) -> None:
        self._uncounted = UncountedSteps()
        self._skips_in_a_row = SkipsInARow()
        self._last_mean = None

    def _report(self, mean: GlobalMean, is_to_be_logged: Callable[[], bool], look_closer: Callable[[], str]) -> None:
        self._uncounted.record(mean, is_to_be_logged, look_closer)
        self._last_mean = mean

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradients, unscaled, before clipping; 0-dim float64, NaN before any step."""
        return _UNKNOWN.clone() if self._last_mean is None else self._last_mean.grad_norm

    @property
    def inertia_mean(self) -> Tensor:
        """Global mean of the bias-corrected second moment in the last step; 0-dim float64, NaN before any step."""
        return _UNKNOWN.clone() if self._last_mean is None else self._last_mean.inertia_mean

    @property
    def num_skipped_steps(self) -> Tensor:
        """Steps skipped since this object was made, as something was not finite; 0-dim int64."""
        return self._uncounted.counts[0].clone()

    @property
    def num_undefined_steps(self) -> Tensor:
        """Steps that did not count since this object was made, as all gradients so far were 0; 0-dim int64.

        A step with neither gradient nor learning rate, as checkpoint libraries make to have states created, is none.
        """
        return self._uncounted.counts[1].clone()
