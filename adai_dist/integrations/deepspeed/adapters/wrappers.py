"""The choice of the interface to an engine's optimizer wrapper."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from adai_dist.integrations.deepspeed.adapters.bf16 import BF16
from adai_dist.integrations.deepspeed.adapters.names import check_names
from adai_dist.integrations.deepspeed.adapters.releases import Release
from adai_dist.integrations.deepspeed.adapters.stage_1_and_2 import Stage1And2
from adai_dist.integrations.deepspeed.adapters.stage_3 import Stage3
from adai_dist.integrations.deepspeed.adapters.zero_wrapper import ZeroWrapper

ZERO_WRAPPERS: dict[type, type[ZeroWrapper]] = {
    DeepSpeedZeroOptimizer: Stage1And2,
    DeepSpeedZeroOptimizer_Stage3: Stage3,
    BF16_Optimizer: BF16,
}


def zero_wrapper_of(engine: Any, release: Release) -> ZeroWrapper | None:
    """Return the interface to ``engine.optimizer``, or None without ZeRO.

    Raises:
        RuntimeError: the wrapper's class is not supported, or lacks a name of the tables of the release.
    """
    wrapper = engine.optimizer
    if type(wrapper) in ZERO_WRAPPERS:
        return ZERO_WRAPPERS[type(wrapper)](wrapper, release)
    if wrapper is engine.basic_optimizer:
        return None
    if type(wrapper) is FP16_UnfusedOptimizer:
        check_names(wrapper, release, "FP16_UnfusedOptimizer")
        return None
    raise RuntimeError(
        f"DeepSpeed must step Adai through one of {[cls.__name__ for cls in (*ZERO_WRAPPERS, FP16_UnfusedOptimizer)]}, "
        f"got {type(wrapper).__name__}, which this release of adai_dist does not support; use ZeRO stage 1 to 3"
    )
