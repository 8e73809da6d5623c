"""A warning about optimizers that step in turn with separate means, which is wrong for the parts of one model."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

logger: logging.Logger = logging.getLogger("adai_dist")


class InterleavedSteps:
    """Detects that optimizers of this process step in turn, and warns once; consecutive trainings are not detected."""

    def __init__(self) -> None:
        self._last: weakref.ref[AdaptiveInertia] | None = None
        self._seen: weakref.WeakSet[AdaptiveInertia] = weakref.WeakSet()
        self._has_warned = False

    def record(self, optimizer: AdaptiveInertia) -> None:
        """Record a step; warn if another optimizer has stepped since the last step of this one. Collective: none."""
        last = None if self._last is None else self._last()
        if last is optimizer or self._has_warned or optimizer.independent or _initialises_states(optimizer):
            return
        if last is not None and optimizer in self._seen and _have_separate_means(optimizer, last):
            self._has_warned = True
            if optimizer.sharding_plan.is_main_rank:
                logger.warning(
                    "optimizers step in turn, each with the mean over its own parameters, got %s with %d parameters "
                    "and %s with %d; if they train one model, call adai_dist.share_mean(optimizers) before the first "
                    "step, and if each trains a model of its own, make them with independent=True (this warning is "
                    "logged once)",
                    *(type(optimizer).__name__, len(optimizer.params())),
                    *(type(last).__name__, len(last.params())),
                )
        self._seen.add(optimizer)
        self._last = weakref.ref(optimizer)


def _initialises_states(optimizer: AdaptiveInertia) -> bool:
    """Return whether the learning rate is 0, with which checkpoint libraries step to initialise states."""
    lrs: list[float | Tensor] = [param_group["lr"] for param_group in optimizer.param_groups]
    return all(not isinstance(lr, Tensor) and lr == 0 for lr in lrs)


def _have_separate_means(optimizer: AdaptiveInertia, other: AdaptiveInertia) -> bool:
    if optimizer.mean_source.between_steps() is other.mean_source.between_steps() or other.independent:
        return False
    return set(map(id, optimizer.params())) != set(map(id, other.params()))


interleaved_steps: InterleavedSteps = InterleavedSteps()
"""The detector of this process."""
