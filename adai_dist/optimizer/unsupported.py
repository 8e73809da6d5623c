"""Checks that refuse uses of the optimizer in which the mean over all parameters cannot be computed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adai_dist.sharding.local_tensor import is_dtensor

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


def check_not_in_backward() -> None:
    """Raise RuntimeError during a backward pass, when gradients are still missing."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the mean over all parameters needs all gradients, so step() must follow the backward pass, got a call "
            "from within it (optimizer-in-backward, a gradient hook); make one optimizer for all parameters and step "
            "it after backward()"
        )


def check_not_in_inference_mode() -> None:
    """Raise RuntimeError in inference mode, as states made there could not be stepped outside of it."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "step() must be called outside of torch.inference_mode(), got a call within it; leave the block, or use "
            "torch.no_grad() instead"
        )


def check_params_were_given(optimizer: AdaptiveInertia) -> None:
    """Refuse an optimizer whose parameters DeepSpeed has replaced by flat partitions without binding it.

    Raises:
        RuntimeError: the mean would be taken over a part of the model.
    """
    replaced = optimizer.replaced_params if "deepspeed.runtime.engine" in sys.modules else []
    if replaced and all(param.dim() == 1 and not is_dtensor(param) for param in replaced):  # flat partitions
        raise RuntimeError(
            f"DeepSpeed must bind {type(optimizer).__name__} before it steps it, or the mean is taken over a part of "
            "the model; got a step with flat parameters that the optimizer was not made with; call "
            "adai_dist.register() before deepspeed.initialize(), or leave ADAI_DIST_REGISTER=0 out of the environment; "
            "if every rank holds all elements of each parameter, call optimizer.configure_sharding(num_replicas=...)"
        )


def check_not_in_zero_redundancy(optimizer: AdaptiveInertia) -> None:
    """Refuse an optimizer in a ``ZeroRedundancyOptimizer`` that has not configured it, as the import hook is off.

    Raises:
        RuntimeError: the mean would be taken over a part of the model.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None or hasattr(module.ZeroRedundancyOptimizer._init_local_optimizer, "__wrapped__"):
        return
    for owner in gc.get_objects():
        if issubclass(type(owner), module.ZeroRedundancyOptimizer) and owner.optim is optimizer:
            raise RuntimeError(
                f"{type(optimizer).__name__} in a ZeroRedundancyOptimizer must be configured, as every rank holds "
                "different parameters, got a step without; leave ADAI_DIST_REGISTER=0 out of the environment, or call "
                "optimizer.optim.configure_sharding(optimizer.process_group, num_replicas=1)"
            )


def check_same_placements(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError if DTensors differ in mesh or placements, which torch.amp.GradScaler does not support.

    It takes mesh and placements of the first gradient for those of all, so only some ranks see an inf elsewhere, and
    the loss scales of the ranks diverge.
    """
    found = {
        (param.device_mesh, tuple(placement.is_replicate() for placement in param.placements))
        for param in params
        if is_dtensor(param)
    }
    if len(found) > 1:
        raise RuntimeError(
            "with torch.amp.GradScaler, all DTensor parameters must have the same mesh and placements, or it does not "
            f"find non-finite gradients on all ranks; got {len(found)} different (mesh, is replicated): "
            f"{sorted(map(str, found))}; train in bfloat16, which needs no GradScaler"
        )
