"""Lightning: clipping under mixed precision, which it refuses to optimizers that know how to unscale.

It concludes from torch's mark of such optimizers that they unscale in every step, and would clip scaled gradients. But
an optimizer of ours takes gradients that ``GradScaler.unscale_`` has unscaled as it finds them.
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
"""Each has the function under its name, and most have taken it from another one of them."""

_FUNCTION = "_optimizer_handles_unscaling"


def register() -> None:
    """Have Lightning unscale the gradients before it clips them.

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
