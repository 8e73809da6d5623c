"""The optimizers that a recipe can name: their arguments, parameter groups and clipping."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adai_dist.optimizer import AdaptiveInertia, variants

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    **{name.lower(): cls for name, cls in variants.OPTIMIZERS.items()},
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}

_SET_ELSEWHERE = ("self", "params", "max_grad_norm")  # max_grad_norm is a key of the recipe, for every optimizer


def argument_defaults(name: str) -> dict[str, Any]:
    """Return the arguments that an optimizer takes, with their defaults."""
    signature = inspect.signature(OPTIMIZERS[name])
    return {key: each.default for key, each in signature.parameters.items() if key not in _SET_ELSEWHERE}


def check(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that the constructor of an optimizer refuses."""
    try:
        OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], **with_tuples(arguments))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"optimizers.{name}: {error}") from error


def build(
    name: str, arguments: Mapping[str, Any], model: nn.Module, max_grad_norm: float | None, decay_vectors: bool
) -> torch.optim.Optimizer:
    """Construct an optimizer for a model that its engine has wrapped.

    Weight decay excludes vectors (norms, biases) unless ``decay_vectors``. :func:`clip_and_step` needs the same
    ``max_grad_norm``, the bound of the global gradient norm or None.
    """
    kind, arguments = OPTIMIZERS[name], with_tuples(arguments)
    if issubclass(kind, AdaptiveInertia):
        arguments["max_grad_norm"] = max_grad_norm
    params = [param for param in model.parameters() if param.requires_grad]
    param_groups: list[dict[str, Any]] = [{"params": params}]
    if {**argument_defaults(name), **arguments}["weight_decay"] and not decay_vectors:
        matrices, vectors = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
        param_groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return kind([param_group for param_group in param_groups if param_group["params"]], **arguments)


def clip_and_step(optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> Tensor | None:
    """Clip the global gradient norm and step, without waiting for the device.

    Adai, AdaiW and AdaiV2 clip inside the step, with the norm that they compute anyway.

    Returns:
        The norm before clipping, 0-dim (a DTensor if the parameters are); None if it was not computed.

    Collective: all ranks of the job.
    """
    if isinstance(optimizer, AdaptiveInertia):
        optimizer.step()
        return optimizer.grad_norm
    norm = None
    if max_grad_norm is not None:
        params: list[Tensor] = [param for param_group in optimizer.param_groups for param in param_group["params"]]
        norm = nn.utils.clip_grad_norm_(params, max_grad_norm)
    optimizer.step()
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr


def with_tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with tuples in place of lists, which YAML has instead."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
