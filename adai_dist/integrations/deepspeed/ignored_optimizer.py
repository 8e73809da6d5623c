"""A warning that DeepSpeed ignores an optimizer of this package and trains with another one."""

from __future__ import annotations

import logging
import weakref

from adai_dist.optimizer.stateful import StatefulOptimizer

logger: logging.Logger = logging.getLogger("adai_dist")

_warned: weakref.WeakSet[StatefulOptimizer] = weakref.WeakSet()


def warn_of_ignored_optimizer(ignored: StatefulOptimizer, used: str, remedy: str, *, is_main_rank: bool) -> None:
    """Warn, once per optimizer, that it takes no steps.

    Args:
        ignored: the optimizer of this package.
        used: description of the optimizer that steps the parameters.
        remedy: what the user can do.
        is_main_rank: whether this rank logs the warning.

    Collective: none.
    """
    if ignored in _warned:
        return
    _warned.add(ignored)
    if is_main_rank:
        logger.warning(
            "DeepSpeed trains with %s and ignores the %s that was created for the same parameters; %s",
            *(used, type(ignored).__name__, remedy),
        )
