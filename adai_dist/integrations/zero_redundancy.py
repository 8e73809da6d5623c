"""torch's ``ZeroRedundancyOptimizer``: every parameter is on one rank alone, which its tensor does not show."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from adai_dist.integrations.after_import import after_import
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

_MARK = "_is_of_adai_dist"


def register() -> None:
    """Have ``ZeroRedundancyOptimizer`` tell the optimizers in it over which ranks it spreads the parameters.

    Collective: none.
    """
    after_import("torch.distributed.optim.zero_redundancy_optimizer", _register_with)


def _register_with(module: ModuleType) -> None:
    outer_class = module.ZeroRedundancyOptimizer
    original = outer_class._init_local_optimizer
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def _init_local_optimizer(outer: Any) -> None:
        original(outer)
        if isinstance(outer.optim, AdaptiveInertia):
            outer.optim.configure_sharding(outer.process_group, num_replicas=1)

    setattr(_init_local_optimizer, _MARK, True)
    outer_class._init_local_optimizer = _init_local_optimizer
