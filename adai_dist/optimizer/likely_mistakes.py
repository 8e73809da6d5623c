"""Warnings about legal settings that are probably mistakes, at construction and in the first step."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from adai_dist.hyper import FIELD_NAMES, Hyper
from adai_dist.precision import Precision
from adai_dist.rounding import LOW_DTYPES
from adai_dist.sharding.local_tensor import is_distributed

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

logger: logging.Logger = logging.getLogger("adai_dist")

ADAMS_BETA0 = 0.5
"""Smallest betas[0] that is mistaken for a momentum coefficient."""
ADAMS_LR = 1e-2
"""Bound below which lr, together with such betas, looks like Adam's."""
_CLOSE = 0.8
"""Similarity (of difflib) from which a key is assumed to be a misspelt name."""

_OTHER_NAMES = {"learning_rate": "lr", "wd": "weight_decay", "epsilon": "eps"}
"""Names of hyperparameters in other libraries."""

_warned: set[str] = set()


def warn_of_adams_hyperparameters(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Warn if betas[0] looks like a momentum coefficient, which it is not."""
    for param_group in param_groups:
        hyper = Hyper.from_param_group(param_group)
        if hyper.beta0 < ADAMS_BETA0 or not _is_main_process():
            continue
        lr = "" if isinstance(hyper.lr, Tensor) or not 0 < hyper.lr < ADAMS_LR else _LR_OF_ADAM.format(lr=hyper.lr)
        logger.warning(
            "betas[0] (beta0) scales 1 - inertia and is not a momentum coefficient, got betas=%r, which look like "
            "Adam's; leave betas out, or pass betas=%r%s",
            *(hyper.betas, Hyper.betas, lr),
        )
        return


_LR_OF_ADAM = "; lr={lr!r} looks like Adam's, too, but Adai uses the lr of SGD: start at 0.1 or above"


def warn_of_misspelt_keys(param_group: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> None:
    """Warn about keys of a parameter group that look like misspelt hyperparameters, as they have no effect.

    Schedulers, trainers and models add their own keys, some of which contain a name: ``no_weight_decay``.

    Args:
        others: groups whose keys have been checked before.
    """
    seen = {key for other in others for key in other}
    for key in param_group:
        name = _meant_by(key)
        if name is not None and key not in seen and _is_main_process():
            logger.warning(
                "a parameter group has the key %r, which is not a hyperparameter and has no effect; did you mean %r?",
                *(key, name),
            )


def _meant_by(key: str) -> str | None:
    """Return the hyperparameter of which a key is probably a misspelling."""
    if key in FIELD_NAMES or key == "params":
        return None
    plain = str(key).lower().replace("-", "_")
    if plain in FIELD_NAMES:
        return plain
    if plain in _OTHER_NAMES:
        return _OTHER_NAMES[plain]
    close = difflib.get_close_matches(plain, FIELD_NAMES, n=1, cutoff=_CLOSE)
    return close[0] if close and close[0] not in plain else None


def warn_at_first_step(optimizer: AdaptiveInertia, params: list[Tensor]) -> None:
    """Warn about parameters that are rounded, meta parameters, and processes that do not communicate.

    Args:
        params: parameters with a gradient.

    Collective: none.
    """
    low = [param for param in params if param.dtype in LOW_DTYPES]
    master_weights = optimizer.precision.master_weights
    if low and master_weights is False and optimizer.sharding_plan.is_main_rank:
        logger.warning(
            "parameters are stepped in %s without master weights, %d of %d on this rank: every step rounds them "
            "stochastically, which adds noise; master_weights='auto' keeps their float32 values for 2 bytes per "
            "parameter",
            *(str(low[0].dtype).removeprefix("torch."), len(low), len(params)),
        )
    if params and not low and master_weights is True and optimizer.sharding_plan.is_main_rank:
        logger.warning(
            "master_weights=True has no effect, as no parameter of the optimizer is in bfloat16 or float16: parameters "
            "in float32, and those of which an engine keeps float32 copies, need none; leave it out"
        )
    if any(param.is_meta for param in params) and optimizer.sharding_plan.is_main_rank:
        logger.warning(
            "parameters are on the meta device and have no values, so nothing is trained; call "
            "model.to_empty(device=...), initialise or load the model, and make the optimizer from its parameters"
        )
    _warn_of_missing_process_group()


def _warn_of_missing_process_group() -> None:
    value = os.environ.get("WORLD_SIZE", "")
    if "WORLD_SIZE" in _warned or is_distributed() or not value.isdecimal() or int(value) <= 1:
        return
    _warned.add("WORLD_SIZE")
    if _is_main_process():
        logger.warning(
            "WORLD_SIZE is %s in the environment, but torch.distributed is not initialised, so every process trains a "
            "separate model; call torch.distributed.init_process_group() first",
            value,
        )


def warn_of_other_precision(precision: Precision, state_dict: Mapping[str, Any]) -> None:
    """Warn about a checkpoint in another mode, or with another seed."""
    differences = precision.differences(state_dict.get("precision", {}))
    if differences and _is_main_process():
        logger.warning(
            "the checkpoint was trained with %s; its states are converted, and the run continues with other rounding; "
            "pass the same arguments to continue it exactly",
            ", ".join(differences),
        )


def warn_of_no_gradients(params: Iterable[Tensor], is_main_rank: bool) -> None:
    """Warn that nothing is trained, after a first step in which no parameter on this rank had a gradient."""
    if is_main_rank and any(param.requires_grad and param.numel() for param in params):
        logger.warning(
            "no parameter of the optimizer had a gradient in its first step, so nothing is trained; FSDP1 (with "
            "use_orig_params=False) and FSDP2 replace the parameters of a model: make the optimizer from those of the "
            "wrapped model"
        )


def _is_main_process() -> bool:
    """Return whether this is rank 0 of the job; the ranks that share the mean may not be known yet."""
    return dist.get_rank() == 0 if is_distributed() else os.environ.get("RANK", "0") == "0"
