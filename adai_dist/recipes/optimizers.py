"""The optimizers that a recipe can name, how they clip, and which parameters they decay."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adai_dist.optimizer import Adai, AdaiV2, AdaiW, AdaptiveInertia

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adaiv2": AdaiV2,
    "adai": Adai,
    "adaiw": AdaiW,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class Settings(Protocol):
    """What a recipe says about its optimizer (config.py has the meanings)."""

    optimizer: str
    decay_vectors: bool

    @property
    def optimizer_arguments(self) -> dict[str, Any]: ...


_SET_ELSEWHERE = ("self", "params", "max_grad_norm")  # the last one is a setting of the recipe, for every optimizer


def check(name: str, arguments: Mapping[str, Any]) -> None:
    """Tries whether an optimizer takes these arguments. Names, ranges and defaults are those of its constructor.

    Args:
        name: a key of OPTIMIZERS.
        arguments: keyword arguments, without the parameters and max_grad_norm.

    Raises:
        ValueError: an unknown name, an unknown argument, or a value that the constructor refuses.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown key 'optimizers.{name}'; valid keys are {', '.join(OPTIMIZERS)}")
    valid = [key for key in _signature(name) if key not in _SET_ELSEWHERE]
    for key in arguments:
        if key not in valid:
            raise ValueError(f"unknown key 'optimizers.{name}.{key}'; valid keys are {', '.join(valid)}")
    try:
        OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], **_as_arguments(arguments))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"optimizers.{name}: {error}") from error


def all_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments, and the defaults of those that an optimizer takes but were not given."""
    defaults = {key: argument.default for key, argument in _signature(name).items() if key not in _SET_ELSEWHERE}
    return {**defaults, **_as_arguments(arguments)}


def build(settings: Settings, model: nn.Module, max_grad_norm: float | None) -> torch.optim.Optimizer:
    """Makes the optimizer. Weight decay leaves vectors (norms, biases) out, unless the recipe says otherwise.

    Args:
        settings: whose optimizer, of arguments that `check` let pass.
        model: after the engine has wrapped it.
        max_grad_norm: bound of the global gradient norm, or None; `clip_and_step` needs the same one.
    """
    kind, arguments = OPTIMIZERS[settings.optimizer], _as_arguments(settings.optimizer_arguments)
    if issubclass(kind, AdaptiveInertia):
        arguments["max_grad_norm"] = max_grad_norm
    params = [param for param in model.parameters() if param.requires_grad]
    param_groups: list[dict[str, Any]] = [{"params": params}]
    decays = arguments.get("weight_decay", _signature(settings.optimizer)["weight_decay"].default)
    if decays and not settings.decay_vectors:
        matrices, vectors = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
        param_groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return kind([param_group for param_group in param_groups if param_group["params"]], **arguments)


def clip_and_step(optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> Tensor | None:
    """Clips the global gradient norm and steps, without waiting for the device.

    Ours clip inside the step, with the norm that they need anyway.

    Returns:
        The norm before clipping, 0-dim (a DTensor where the parameters are); None if nobody computed it.

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
    """Sets the learning rate of every parameter group."""
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr


def _signature(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(OPTIMIZERS[name]).parameters


def _as_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
