"""Steps that were skipped because of a non-finite gradient: counted on the device, reported on the host."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger: logging.Logger = logging.getLogger("adai_dist")


class SkipCounter:
    """Counts skipped steps and logs them once each, without making the host wait for the device.

    On an accelerator the count is copied to the host in the background and looked at in a later step.
    """

    def __init__(self) -> None:
        self.num_skipped_steps: Tensor = torch.zeros((), dtype=torch.int64)
        self._num_reported = 0
        self._in_flight: tuple[Tensor, torch.Event] | None = None

    def record(self, is_finite: Tensor, is_main_rank: bool) -> None:
        """Count a step (``is_finite``: 0-dim bool), and log, on the main rank, what is known by now."""
        # In place, as a replayed CUDA graph needs it; what it skips is logged after the next step outside of a graph.
        self.num_skipped_steps = self.num_skipped_steps.to(is_finite.device)
        self.num_skipped_steps += ~is_finite
        is_capturing = is_finite.is_cuda and torch.cuda.is_current_stream_capturing()
        if not is_main_rank or is_capturing:
            return
        if is_finite.device.type == "cpu":
            self._report(int(self.num_skipped_steps))
            return
        if self._in_flight is not None:
            host_copy, copied = self._in_flight
            if not copied.query():
                return
            self._report(int(host_copy))
        host_copy = torch.empty((), dtype=torch.int64, pin_memory=True)
        host_copy.copy_(self.num_skipped_steps, non_blocking=True)
        copied = torch.Event(is_finite.device)
        copied.record()
        self._in_flight = host_copy, copied

    def _report(self, num_skipped_steps: int) -> None:
        if num_skipped_steps > self._num_reported:
            logger.warning(
                "step skipped on all ranks: a gradient is inf or NaN (skipped so far: %d); parameters and optimizer "
                "states are as before",
                num_skipped_steps,
            )
        self._num_reported = num_skipped_steps
