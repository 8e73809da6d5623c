"""Lightning: gradient clipping under mixed precision.

Lightning refuses to clip for optimizers that torch marks as unscaling in every step, because it would clip scaled
gradients. The optimizers of this package also accept gradients that ``GradScaler.unscale_`` has already unscaled.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from adai_dist.integrations.import_hooks import after_import, wrap_once
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

_MODULES = tuple(
    f"{package}.plugins.precision.{module}"
    for package in ("lightning.fabric", "lightning.pytorch", "lightning_fabric", "pytorch_lightning")
    for module in ("amp", "fsdp")
)
"""Modules that define or import the function; each needs its own replacement."""

_FUNCTION = "_optimizer_handles_unscaling"


def register() -> None:
    """Make Lightning unscale gradients before clipping them.

    Collective: none.
    """
    for name in _MODULES:
        after_import(name, _register_with)


def _register_with(module: ModuleType) -> None:
    def wrap(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def handles_unscaling(optimizer: Any) -> bool:
            return not isinstance(optimizer, AdaptiveInertia) and original(optimizer)

        return handles_unscaling

    if hasattr(module, _FUNCTION):
        wrap_once(module, _FUNCTION, wrap)
