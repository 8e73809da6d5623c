"""torch's ``ZeroRedundancyOptimizer``, which steps each parameter on one rank without marking its tensor."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from adai_dist.integrations.import_hooks import after_import, wrap_once
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


def register() -> None:
    """Make ``ZeroRedundancyOptimizer`` configure the sharding of the optimizers that it creates.

    Collective: none.
    """
    after_import("torch.distributed.optim.zero_redundancy_optimizer", _register_with)


def _register_with(module: ModuleType) -> None:
    def wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def _init_local_optimizer(outer: Any) -> None:
            original(outer)
            if isinstance(outer.optim, AdaptiveInertia):
                outer.optim.configure_sharding(outer.process_group, num_replicas=1)

        return _init_local_optimizer

    wrap_once(module.ZeroRedundancyOptimizer, "_init_local_optimizer", wrap)
