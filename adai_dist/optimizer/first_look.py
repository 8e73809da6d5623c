"""What is legal and seldom meant: told once, when an optimizer is made or takes its first step."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from adai_dist.hyper import FIELD_NAMES, Hyper
from adai_dist.sharding.ownership import is_distributed

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

logger: logging.Logger = logging.getLogger("adai_dist")

ADAMS_BETA0 = 0.5
"""From here on, betas[0] is taken for a momentum coefficient."""
ADAMS_LR = 1e-2
"""Below, and together with such betas, lr is taken for that of Adam."""
_CLOSE = 0.8
"""Similarity of a key to the name that it is taken for, as difflib has it."""

_OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay", "epsilon": "eps"}
"""What other libraries call hyperparameters."""

_said: set[str] = set()


def warn_of_adams_hyperparameters(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Say that betas[0] is no momentum coefficient, where it looks like one."""
    for param_group in param_groups:
        hyper = Hyper.from_param_group(param_group)
        if hyper.beta0 < ADAMS_BETA0 or not _is_main_process():
            continue
        lr = "" if isinstance(hyper.lr, Tensor) or not 0 < hyper.lr < ADAMS_LR else _LR_OF_ADAM.format(lr=hyper.lr)
        logger.warning(
            "betas[0] (beta0) scales 1 - inertia and is no momentum coefficient, got betas=%r, which look like Adam's; "
            "leave betas out, or pass betas=%r%s",
            *(hyper.betas, Hyper.betas, lr),
        )
        return


_LR_OF_ADAM = "; lr={lr!r} looks like Adam's, too, while Adai's is that of SGD: start at 0.1 or above"


def warn_of_misspelt_keys(param_group: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> None:
    """Say that a key of a parameter group has no effect, where it is almost a name of a hyperparameter.

    Schedulers, trainers and models have keys of their own there, also such as contain a name: ``no_weight_decay``.

    Args:
        others: groups, the keys of which have been looked at.
    """
    seen = {key for other in others for key in other}
    for key in param_group:
        name = _meant_by(key)
        if name is not None and key not in seen and _is_main_process():
            logger.warning(
                "a parameter group has the key %r, which is no hyperparameter and has no effect; %r is one, if that is "
                "what is meant",
                *(key, name),
            )


def _meant_by(key: str) -> str | None:
    if key in FIELD_NAMES or key == "params":
        return None
    plain = str(key).lower().replace("-", "_")
    if plain in FIELD_NAMES:
        return plain
    if plain in _OTHER_NAMES:
        return _OTHER_NAMES[plain]
    close = difflib.get_close_matches(plain, FIELD_NAMES, n=1, cutoff=_CLOSE)
    return close[0] if close and close[0] not in plain else None


def look_at_first_step(optimizer: AdaptiveInertia, params: list[Tensor]) -> None:
    """Say what makes a run less than it seems.

    Args:
        params: those that have a gradient.

    Collective: none.
    """
    low = [param for param in params if param.dtype in (torch.bfloat16, torch.float16)]
    if low and optimizer.sharding_plan.is_main_rank:
        logger.warning(
            "parameters are stepped in %s, %d of %d on this rank: every step rounds them, and what is too small for "
            "their last digit is lost; keep float32 parameters, and compute in low precision by torch.autocast, by the "
            "mixed precision of FSDP, or by DeepSpeed",
            *(str(low[0].dtype).removeprefix("torch."), len(low), len(params)),
        )
    if any(param.is_meta for param in params) and optimizer.sharding_plan.is_main_rank:
        logger.warning(
            "parameters are on the meta device and have no values, so that nothing is trained; call "
            "model.to_empty(device=...), initialise or load the model, and make the optimizer from its parameters"
        )
    _warn_of_processes_apart()


def _warn_of_processes_apart() -> None:
    value = os.environ.get("WORLD_SIZE", "")
    if "WORLD_SIZE" in _said or is_distributed() or not value.isdecimal() or int(value) <= 1:
        return
    _said.add("WORLD_SIZE")
    if _is_main_process():
        logger.warning(
            "WORLD_SIZE is %s in the environment, but torch.distributed has no process group, so that every process "
            "trains a model of its own; call torch.distributed.init_process_group() before",
            value,
        )


def _is_main_process() -> bool:
    """Of the job, before it is known who shares the mean."""
    return dist.get_rank() == 0 if is_distributed() else os.environ.get("RANK", "0") == "0"
