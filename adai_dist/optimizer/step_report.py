"""Properties of the optimizer that report on its steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adai_dist.optimizer.proxies import SharedAttribute
from adai_dist.optimizer.skipped_steps import ConsecutiveSkips, UncountedSteps
from adai_dist.sharding.mean import GlobalMean

_UNKNOWN = torch.tensor(torch.nan, dtype=torch.float64)


class StepReport:
    """A mixin with the norm and mean of the last step, and the numbers of steps that did not count."""

    _last_mean: SharedAttribute[GlobalMean | None] = SharedAttribute()

    def __init__(self) -> None:
        self._uncounted = UncountedSteps()
        self._consecutive_skips = ConsecutiveSkips()
        self._last_mean = None

    def _report(self, mean: GlobalMean, is_to_be_logged: Callable[[], bool], diagnose: Callable[[], str]) -> None:
        self._uncounted.record(mean, is_to_be_logged, diagnose)
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
        """Number of steps skipped since this object was made, as something was not finite; 0-dim int64."""
        return self._uncounted.counts[0].clone()

    @property
    def num_undefined_steps(self) -> Tensor:
        """Number of steps since this object was made that did not count, as all gradients so far were 0; 0-dim int64.

        State-initialisation steps of checkpoint libraries (no gradient and no learning rate) are not included.
        """
        return self._uncounted.counts[1].clone()
