"""Ends a run in which one step after the other is skipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adai_dist.optimizer.host_copy import HostCopy
from adai_dist.optimizer.reasons import reasons_of
from adai_dist.sharding.mean import GlobalMean

STEPS_BETWEEN_LOOKS = 16
"""On an accelerator. The number is fixed, and each look waits for the numbers of the one before, so that all ranks know
the same in the same step."""


class SkipsInARow:
    """Counts the steps that were skipped one after the other, while there is a limit to them."""

    def __init__(self) -> None:
        self._limit: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._row: Tensor | None = None
        """int64, on the device: skipped steps up to now, and how many of them had each of the faults of a mean."""
        self._longest = torch.zeros(0)
        """The longest row so far."""
        self._copy = HostCopy()
        self._num_steps = 0

    def check(self, mean: GlobalMean, limit: int | None) -> None:
        """Count a step.

        Raises:
            RuntimeError: so many steps in a row were skipped; the same on all ranks, in the same step.
            TypeError, ValueError: there is no such limit.

        Collective: none.
        """
        if limit != self._limit:
            self._limit = skip_limit_in_range(limit)
            self._forget()
        if limit is None:
            return
        is_skipped = ~mean.is_finite
        seen = torch.cat([is_skipped.reshape(1), mean.faults]).long()
        if self._row is None:
            self._row, self._longest = torch.zeros_like(seen), torch.zeros_like(seen)
        # In place, as a replayed CUDA graph needs it.
        self._row.add_(seen.to(self._row.device)).mul_(is_skipped.to(self._row.device))
        self._longest.copy_(torch.where(self._row[0] >= self._longest[0], self._row, self._longest))
        if self._row.is_meta or (self._row.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        longest = self._look()
        if longest is not None and longest[0] >= limit:
            self._forget()
            raise RuntimeError(
                f"fewer than max_consecutive_skips={limit} steps in a row must be skipped, got {longest[0]}: "
                f"{reasons_of(longest[1:])}; parameters and optimizer states are as before the first of them; load an "
                "older checkpoint, lower the learning rate, or look at the data"
            )

    def _look(self) -> list[int] | None:
        if self._longest.device.type == "cpu":
            return self._longest.tolist()
        self._num_steps += 1
        if self._num_steps % STEPS_BETWEEN_LOOKS:
            return None
        arrived = self._copy.wait()
        longest = None if arrived is None else arrived.tolist()
        self._copy.start(self._longest.clone())
        return longest


def skip_limit_in_range(limit: Any) -> int | None:
    """Check a number of steps: None, or an integer >= 1."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"max_consecutive_skips must be an integer or None, got {limit!r}")
    if limit < 1:
        raise ValueError(f"max_consecutive_skips must be >= 1 (use None for no limit), got {limit!r}")
    return limit
