"""Names of the optimizers in a DeepSpeed configuration."""

from __future__ import annotations

from adai_dist.optimizer import Adai, AdaiV2, AdaiW
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

OPTIMIZERS: dict[str, type[AdaptiveInertia]] = {
    spelling: cls for cls in (Adai, AdaiW, AdaiV2) for spelling in (cls.__name__, cls.__name__.lower())
}
"""Optimizer classes by the values of ``"type"`` that select them."""
