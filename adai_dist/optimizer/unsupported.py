"""Ways of stepping in which the mean over all parameters cannot be had: refused or warned about."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adai_dist.sharding.ownership import is_dtensor

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

logger: logging.Logger = logging.getLogger("adai_dist")


def check_not_in_backward() -> None:
    """Raises: RuntimeError: a backward pass is under way, and gradients are missing still."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the mean over all parameters needs all gradients, so step() must follow the backward pass, got a call "
            "from within it (optimizer-in-backward, a gradient hook); make one optimizer for all parameters and step "
            "it after backward()"
        )


def check_not_in_inference_mode() -> None:
    """Raises: RuntimeError: states made in inference mode could not be stepped outside of it."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "step() must be called outside of torch.inference_mode(), got a call within it; leave the block, or use "
            "torch.no_grad() instead"
        )


def check_params_were_given(optimizer: AdaptiveInertia) -> None:
    """Refuse an optimizer whose parameters DeepSpeed has replaced without binding it: they are parts of the model.

    Raises:
        RuntimeError: the mean would be taken over a part of the model.
    """
    replaced = optimizer.replaced_params if "deepspeed.runtime.engine" in sys.modules else []
    if replaced and all(param.dim() == 1 and not is_dtensor(param) for param in replaced):  # flat partitions
        raise RuntimeError(
            f"DeepSpeed must bind {type(optimizer).__name__} before it steps it, or the mean is taken over a part of "
            "the model; got a step with flat parameters that the optimizer was not made with; call "
            "adai_dist.register() before deepspeed.initialize(), or leave ADAI_DIST_REGISTER=0 out of the environment; "
            "where each parameter is whole on every rank, optimizer.configure_sharding(num_replicas=...) says so"
        )


def check_not_held_in_parts(optimizer: AdaptiveInertia) -> None:
    """Refuse an optimizer within a ``ZeroRedundancyOptimizer`` that has not told it so, for want of an import hook.

    Raises:
        RuntimeError: the mean would be taken over a part of the model.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None or hasattr(module.ZeroRedundancyOptimizer._init_local_optimizer, "__wrapped__"):
        return
    for held_by in gc.get_objects():
        if issubclass(type(held_by), module.ZeroRedundancyOptimizer) and held_by.optim is optimizer:
            raise RuntimeError(
                f"{type(optimizer).__name__} within ZeroRedundancyOptimizer must know that every rank holds other "
                "parameters, got a step without; leave ADAI_DIST_REGISTER=0 out of the environment, or call "
                "optimizer.optim.configure_sharding(optimizer.process_group, num_replicas=1)"
            )


def check_one_layout(params: Iterable[Tensor]) -> None:
    """Raises: RuntimeError: DTensors are placed in several ways, and torch.amp.GradScaler reads the first one's only.

    It takes mesh and placements of the first gradient for those of all, so that an inf elsewhere is seen by some ranks
    alone and the loss scales drift apart.
    """
    layouts = {
        (param.device_mesh, tuple(placement.is_replicate() for placement in param.placements))
        for param in params
        if is_dtensor(param)
    }
    if len(layouts) > 1:
        raise RuntimeError(
            "torch.amp.GradScaler finds non-finite gradients on all ranks only where all DTensor parameters have one "
            f"mesh and are placed alike, got {len(layouts)} ways (mesh, replicated?): {sorted(map(str, layouts))}; "
            "train in bfloat16, which needs no GradScaler"
        )


def warn_of_no_gradients(params: Iterable[Tensor], is_main_rank: bool) -> None:
    """Say that nothing is trained, after a first step in which no parameter on this rank had a gradient."""
    if is_main_rank and any(param.requires_grad and param.numel() for param in params):
        logger.warning(
            "no parameter of the optimizer had a gradient in its first step, so that nothing is trained; FSDP1 (with "
            "use_orig_params=False) and FSDP2 replace the parameters of a model: make the optimizer from those of the "
            "wrapped model"
        )
