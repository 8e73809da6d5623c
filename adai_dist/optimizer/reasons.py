"""Why steps were skipped, in words."""

from __future__ import annotations

from collections.abc import Sequence

WORDS = (
    "a gradient is inf or NaN",
    "an optimizer state is inf, NaN or negative, or its step differs between ranks",
    "a parameter, which decays through the gradient, is inf or NaN",
    "a DTensor parameter has its gradient on some ranks of its mesh alone; ranks without one take it as zeros from now "
    "on, and from the start with missing_as_zeros=True",
    "gradients are finite, but float32 cannot hold the sum of their squares",
)
"""In the order of :attr:`adai_dist.sharding.mean.GlobalMean.faults`."""

MISSING = 3
_BEYOND = len(WORDS) - 1


def reasons(counts: Sequence[int]) -> list[int]:
    """The indices of the faults that were found; sums are beyond float32 for their own sake, or because of the others.

    Args:
        counts: how many steps had each of the faults.
    """
    return [fault for fault in range(_BEYOND) if counts[fault]] or [_BEYOND]


def reasons_of(counts: Sequence[int]) -> str:
    """The same in words."""
    return ", and ".join(WORDS[fault] for fault in reasons(counts))
