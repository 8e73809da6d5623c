"""Whether somebody watches if ``step()`` is called, as accelerate does to tell whether a GradScaler skipped it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from adai_dist.optimizer.mean_source import MeanSource, ShardedMean
from adai_dist.optimizer.shared import itself
from adai_dist.optimizer.unsupported import check_one_layout
from adai_dist.sharding.configured import ModelAndStages

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


def is_to_be_left_out(optimizer: AdaptiveInertia) -> bool:
    """Whether a GradScaler that has found an overflow is to leave ``optimizer.step()`` out, instead of calling it.

    That is so where a function in the place of ``step`` waits for the call, and where the scaler finds the same on all
    ranks: where it does not, a rank that leaves the step out would let the others wait for ever.

    Raises:
        RuntimeError: as :func:`check_one_layout`.
    """
    watched = any(_is_watched(one) for one in (optimizer, itself(optimizer)))
    if not watched or not _finds_the_same_on_all_ranks(optimizer.mean_source.between_steps()):
        return False
    check_one_layout(optimizer.params())
    return True


def _is_watched(optimizer: AdaptiveInertia) -> bool:
    step: Any = optimizer.__dict__.get("step")
    if getattr(step, "__globals__", None) is vars(lr_scheduler):
        step = step.__wrapped__  # torch's schedulers wrap a method, to see the order of calls
    return step is not None and getattr(step, "__func__", step) is not type(optimizer).step


def _finds_the_same_on_all_ranks(source: MeanSource) -> bool:
    """Not where ranks have other plain parameters, nor for the parts of a model that are unscaled one by one.

    Under FSDP1, ShardedGradScaler tells all ranks.
    """
    if not isinstance(source, ShardedMean):
        return False
    sharding = source.sharding()
    return sharding is None or (isinstance(sharding, ModelAndStages) and sharding.stages is None)
