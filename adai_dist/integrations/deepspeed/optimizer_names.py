"""Names of the optimizers in a DeepSpeed configuration."""

from __future__ import annotations

from adai_dist.optimizer import variants
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

OPTIMIZERS: dict[str, type[AdaptiveInertia]] = {
    spelling: cls for name, cls in variants.OPTIMIZERS.items() for spelling in (name, name.lower())
}
"""Optimizer classes by the values of ``"type"`` that select them."""
