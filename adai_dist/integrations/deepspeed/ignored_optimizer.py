"""Says that an engine trains another optimizer than the one that was made for its model."""

from __future__ import annotations

import logging
import weakref

from adai_dist.optimizer.stateful import StatefulOptimizer

logger: logging.Logger = logging.getLogger("adai_dist")

_told: weakref.WeakSet[StatefulOptimizer] = weakref.WeakSet()


def warn_of_ignored_optimizer(given: StatefulOptimizer, trained: str, remedy: str, *, is_main_rank: bool) -> None:
    """Warn once per optimizer that it takes no step. Collective: none.

    Args:
        given: an optimizer of ours.
        trained: what steps the parameters instead.
        remedy: what to do.
    """
    if given in _told:
        return
    _told.add(given)
    if is_main_rank:
        logger.warning(
            "with DeepSpeed %s trains, and not the %s that was made for the same parameters; %s",
            *(trained, type(given).__name__, remedy),
        )
