"""What a step has found out, and the steps that did not count: on the device, reported on the host."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from adai_dist.optimizer.host_copy import HostCopy
from adai_dist.optimizer.shared import Shared
from adai_dist.sharding.mean import GlobalMean

_UNKNOWN = torch.tensor(torch.nan, dtype=torch.float64)

logger: logging.Logger = logging.getLogger("adai_dist")


class UncountedSteps:
    """Counts and logs the steps that did not count, without making the host wait for the device.

    A step is skipped where a gradient is not finite, and undefined where the mean is 0: see :class:`GlobalMean`.

    On an accelerator the counts are copied to the host in the background and looked at in a later step.
    """

    def __init__(self) -> None:
        self.counts: Tensor = torch.zeros(2, dtype=torch.int64)
        """Skipped, undefined."""
        self._reported = [0, 0]
        self._copy = HostCopy()

    def record(self, mean: GlobalMean, is_to_be_logged: Callable[[], bool]) -> None:
        """Count a step, and log what is known by now, where it ``is_to_be_logged`` on this rank."""
        # In place, as a replayed CUDA graph needs it; what it skips is logged after the next step outside of a graph.
        self.counts = self.counts.to(mean.is_finite.device)
        self.counts += torch.stack([~mean.is_finite, mean.is_undefined])
        if self.counts.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._report(is_to_be_logged)
        if not self._copy.is_under_way:
            self._copy.start(self.counts)
            self._report(is_to_be_logged)  # on a CPU the numbers are there at once

    def _report(self, is_to_be_logged: Callable[[], bool]) -> None:
        arrived = self._copy.take()
        counts = self._reported if arrived is None else arrived.tolist()
        if counts == self._reported:
            return
        (num_skipped, num_undefined), reported = counts, self._reported
        self._reported = counts
        if not is_to_be_logged():
            return
        if num_skipped > reported[0]:
            logger.warning(
                "step skipped on all ranks: a gradient is inf or NaN (skipped so far: %d); parameters and optimizer "
                "states are as before",
                num_skipped,
            )
        if num_undefined and not reported[1]:
            logger.warning(
                "step did not count: all gradients so far are 0, so that inertia is undefined; only decoupled decay "
                "was applied (num_undefined_steps counts such steps, this is said once)"
            )


class ReportsSteps:
    """What users can read of the steps of an optimizer."""

    _last_mean: Shared[GlobalMean | None] = Shared()

    def __init__(self) -> None:
        self._uncounted = UncountedSteps()
        self._last_mean = None

    def _report(self, mean: GlobalMean, is_to_be_logged: Callable[[], bool]) -> None:
        self._uncounted.record(mean, is_to_be_logged)
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
        """Steps skipped because of a non-finite gradient since this object was made; 0-dim int64."""
        return self._uncounted.counts[0].clone()

    @property
    def num_undefined_steps(self) -> Tensor:
        """Steps that did not count since this object was made, as all gradients so far were 0; 0-dim int64.

        A step with neither gradient nor learning rate, as checkpoint libraries make to have states created, is none.
        """
        return self._uncounted.counts[1].clone()
