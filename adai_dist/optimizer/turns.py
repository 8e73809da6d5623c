"""Several optimizers that step in turn, each with a mean of its own: wrong for the parts of one model."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

logger: logging.Logger = logging.getLogger("adai_dist")


class Turns:
    """Notices once that optimizers of this process take turns; one training after the other is none."""

    def __init__(self) -> None:
        self._last: weakref.ref[AdaptiveInertia] | None = None
        self._seen: weakref.WeakSet[AdaptiveInertia] = weakref.WeakSet()
        self._is_over = False

    def note(self, optimizer: AdaptiveInertia) -> None:
        """Note a step, and warn where another optimizer has stepped since the last one of this. Collective: none."""
        last = None if self._last is None else self._last()
        if last is optimizer or self._is_over or optimizer.independent or _is_idle(optimizer):
            return
        if last is not None and optimizer in self._seen and _have_two_means(optimizer, last):
            self._is_over = True
            if optimizer.sharding_plan.is_main_rank:
                logger.warning(
                    "optimizers step in turn, and each takes the mean over its own parameters alone, got %s with %d "
                    "parameters and %s with %d; if they train one model, call adai_dist.share_mean(optimizers) before "
                    "the first step, and if each trains a model of its own, make them with independent=True (this is "
                    "said once)",
                    *(type(optimizer).__name__, len(optimizer.params())),
                    *(type(last).__name__, len(last.params())),
                )
        self._seen.add(optimizer)
        self._last = weakref.ref(optimizer)


def _is_idle(optimizer: AdaptiveInertia) -> bool:
    """Checkpoint libraries step with a learning rate of 0 to have states created."""
    lrs: list[float | Tensor] = [param_group["lr"] for param_group in optimizer.param_groups]
    return all(not isinstance(lr, Tensor) and lr == 0 for lr in lrs)


def _have_two_means(optimizer: AdaptiveInertia, other: AdaptiveInertia) -> bool:
    if optimizer.mean_source.between_steps() is other.mean_source.between_steps() or other.independent:
        return False
    return set(map(id, optimizer.params())) != set(map(id, other.params()))


turns: Turns = Turns()
"""Those of this process."""
