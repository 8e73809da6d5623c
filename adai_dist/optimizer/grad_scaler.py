"""Cooperation with torch.amp.GradScaler: whether it skips ``step()`` after an overflow, or the step skips itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from adai_dist.optimizer.mean_source import MeanSource, ShardedMean
from adai_dist.optimizer.proxies import unproxied
from adai_dist.optimizer.unsupported import check_same_placements
from adai_dist.sharding.planners import ModelPlanner

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


def scaler_skips_step(optimizer: AdaptiveInertia) -> bool:
    """Return whether a GradScaler that has found an overflow must not call ``optimizer.step()``.

    True if ``step`` has been replaced by a function that records the call, from which accelerate infers that a step was
    not skipped, and if the scaler finds the same overflows on all ranks: otherwise a rank that skips the call would
    leave the others waiting.

    Raises:
        RuntimeError: as :func:`check_same_placements`.
    """
    is_replaced = any(_is_step_replaced(each) for each in (optimizer, unproxied(optimizer)))
    if not is_replaced or not _finds_same_overflows(optimizer.mean_source.between_steps()):
        return False
    check_same_placements(optimizer.params())
    return True


def _is_step_replaced(optimizer: AdaptiveInertia) -> bool:
    step: Any = optimizer.__dict__.get("step")
    if getattr(step, "__globals__", None) is vars(lr_scheduler):
        step = step.__wrapped__  # torch's schedulers wrap the method to check the order of calls
    return step is not None and getattr(step, "__func__", step) is not type(optimizer).step


def _finds_same_overflows(source: MeanSource) -> bool:
    """Return whether the scaler of every rank finds the overflows of all ranks.

    False if ranks hold different plain parameters, or for parts of a model that are unscaled separately. Under FSDP1,
    ShardedGradScaler communicates.
    """
    if not isinstance(source, ShardedMean):
        return False
    planner = source.sharding()
    return planner is None or (isinstance(planner, ModelPlanner) and planner.stages is None)
