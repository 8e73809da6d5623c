"""Ways of stepping in which the mean over all parameters cannot be had: refused or warned about."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from adai_dist.sharding.ownership import is_dtensor

logger: logging.Logger = logging.getLogger("adai_dist")


def check_not_in_backward() -> None:
    """Raises: RuntimeError: a backward pass is under way, and gradients are missing still."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the mean over all parameters needs all gradients, so step() must follow the backward pass, got a call "
            "from within it (optimizer-in-backward, a gradient hook); make one optimizer for all parameters and step "
            "it after backward()"
        )


def check_not_a_part(name: str) -> None:
    """Refuse a step within a ``ZeroRedundancyOptimizer`` that has not said so: its hook is missing.

    Args:
        name: of the optimizer's class.

    Raises:
        RuntimeError: the mean would be taken over this rank's part of the model.
    """
    if "torch.distributed.optim.zero_redundancy_optimizer" in modules_of_callers():
        raise RuntimeError(
            f"{name} within ZeroRedundancyOptimizer must know that every rank holds other parameters, or the mean is "
            "taken over a part of the model; got a step without that; leave ADAI_DIST_REGISTER=0 out of the "
            "environment, or call optimizer.optim.configure_sharding(num_replicas=1) after making the optimizer"
        )


def refuse_unregistered_deepspeed(optimizer: torch.optim.Optimizer) -> bool:
    """Keep DeepSpeed from stepping an optimizer while nothing is registered with it; returns False otherwise."""
    *_, caller = modules_of_callers()
    if caller.startswith("deepspeed.runtime."):
        raise RuntimeError(
            f"DeepSpeed must bind {type(optimizer).__name__} before it steps it, or the mean is taken over a part of "
            f"the model; got a step from {caller} with nothing registered; call adai_dist.register() before "
            "deepspeed.initialize(), or leave ADAI_DIST_REGISTER=0 out of the environment"
        )
    return False


def modules_of_callers() -> Iterator[str]:
    """Names of the calling modules, from the inside: those of this package and of torch, and the first other one."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        name: str = frame.f_globals.get("__name__", "")
        yield name
        if name.split(".")[0] not in ("adai_dist", "torch"):
            return
    yield ""


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
