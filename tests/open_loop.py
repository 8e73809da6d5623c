"""The error of a trajectory by what is stored in few bits: all modes step with the gradients of one float32 run.

A byte-level language model is trained on the sources of Python's standard library. The distance between the parameters
of a mode and those of the float32 run, relative to the distance that the latter have travelled, is the error of the
mode. In closed loop, where each run has its own gradients, a perturbation of 1e-6 grows until it hides the differences.

    python -m tests.open_loop  # prints a table

AdamW is measured in the same way, with the gradients of a float32 run of torch's. Its rows are torch's own with
bfloat16 parameters, formats of :mod:`tests.low_precision_adamw`, and the 8-bit AdamW of torchao and of bitsandbytes
where these are installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adai_dist import Adai, AdaiV2
from adai_dist.recipes.language import LanguageTask, load_tokens
from adai_dist.recipes.recipe import load_recipe
from adai_dist.rounding import join
from tests import low_precision_adamw
from tests.low_precision_adamw import Formats

NUM_STEPS = 900
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaiV2 d=0, lr 2": (AdaiV2, {"lr": 2.0, "dampening": 0.0}),
    "Adai (d=1), lr 0.5": (Adai, {"lr": 0.5}),
}


class Mode(NamedTuple):
    """What is stored in 16 bits."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]


MODES = (
    Mode("bfloat16 states", torch.float32, {"state_dtype": "bfloat16"}),
    Mode("mixed8 states", torch.float32, {"state_dtype": "mixed8"}),
    Mode("bfloat16 parameters, master weights", torch.bfloat16, {}),
    Mode("bfloat16 parameters, master weights, bfloat16 states", torch.bfloat16, {"state_dtype": "bfloat16"}),
    Mode("bfloat16 parameters, master weights, mixed8 states", torch.bfloat16, {"state_dtype": "mixed8"}),
    Mode("bfloat16 parameters, rounded", torch.bfloat16, {"master_weights": False}),
    Mode(
        "bfloat16 parameters, rounded, bfloat16 states",
        torch.bfloat16,
        {"master_weights": False, "state_dtype": "bfloat16"},
    ),
    Mode(
        "bfloat16 parameters, rounded, mixed8 states",
        torch.bfloat16,
        {"master_weights": False, "state_dtype": "mixed8"},
    ),
)


class Follower(Protocol):
    """One mode, which steps with gradients from elsewhere."""

    def step(self, gradients: list[Tensor], lr: float) -> None: ...

    def values(self) -> list[Tensor]:
        """Return the parameters, or their master weights, in float32."""
        ...


class AdaiFollower:
    """One mode of our optimizers."""

    def __init__(self, mode: Mode, optimizer: Any, options: dict[str, Any], params: list[Tensor]) -> None:
        self.params = [nn.Parameter(param.detach().clone().to(mode.dtype)) for param in params]
        for param in self.params:
            param.grad_dtype = torch.float32  # type: ignore[attr-defined] # torch otherwise requires the parameter's
        self.optimizer = optimizer(self.params, max_grad_norm=1.0, independent=True, **options, **mode.options)

    def step(self, gradients: list[Tensor], lr: float) -> None:
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        remainders = [self.optimizer.state[param].get("master_param") for param in self.params]
        pairs = zip(self.params, remainders, strict=True)
        return [param.detach().float() if r is None else join(param.detach(), r) for param, r in pairs]


class AdamWFollower:
    """The AdamW of torch or another package, with its defaults; gradients have the dtype of the parameters."""

    def __init__(self, optimizer: Any, dtype: torch.dtype, params: list[Tensor]) -> None:
        self.params = [nn.Parameter(param.detach().clone().to(dtype)) for param in params]
        self.optimizer = optimizer(self.params)

    def step(self, gradients: list[Tensor], lr: float) -> None:
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient.to(param.dtype)
        group = self.optimizer.param_groups[0]
        group["lr"] = torch.tensor(lr) if isinstance(group["lr"], Tensor) else lr
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        return [param.detach().float() for param in self.params]


ADAMW_LR = 3e-3
_EIGHT_BITS = Formats(exp_avg=low_precision_adamw.signed_dynamic, exp_avg_sq=low_precision_adamw.unsigned_dynamic)
_FLASH = Formats(exp_avg=low_precision_adamw.companded_int8, exp_avg_sq=low_precision_adamw.square_root_uint8)
ADAMW_FORMATS = {
    "bfloat16 states": Formats(exp_avg=low_precision_adamw.bfloat16, exp_avg_sq=low_precision_adamw.bfloat16),
    "8-bit states": _EIGHT_BITS,
    "bfloat16 parameters, 8-bit states": _EIGHT_BITS._replace(param=low_precision_adamw.bfloat16),
    "8-bit states, embedding in 32 bits": _EIGHT_BITS,
    "bfloat16 parameters, 8-bit states, embedding in 32 bits": _EIGHT_BITS._replace(param=low_precision_adamw.bfloat16),
    "FlashOptim, 8-bit remainder": _FLASH._replace(param=low_precision_adamw.with_remainder(8)),
    "FlashOptim, 16-bit remainder": _FLASH._replace(param=low_precision_adamw.with_remainder(16)),
}
PACKAGES = {"torchao": "torchao.optim", "bitsandbytes": "bitsandbytes.optim"}
"""Modules that have an AdamW8bit."""


def errors(name: str, num_steps: int = NUM_STEPS) -> dict[str, float]:
    """Return the error of every mode for one optimizer."""
    optimizer_class, options = OPTIMIZERS[name]

    def lead(params: list[Tensor]) -> torch.optim.Optimizer:
        return optimizer_class(params, max_grad_norm=1.0, independent=True, **options)

    def follow(params: list[Tensor]) -> Mapping[str, Follower]:
        return {mode.name: AdaiFollower(mode, optimizer_class, options, params) for mode in MODES}

    return _errors(lead, follow, num_steps, max_grad_norm=None)


def errors_of_adamw(num_steps: int = NUM_STEPS) -> dict[str, float]:
    """Return the error of every format of AdamW, with the gradients of torch's, clipped, in float32."""

    def lead(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=ADAMW_LR)

    def follow(params: list[Tensor]) -> Mapping[str, Follower]:
        followers: dict[str, Follower] = {}
        for name, formats in ADAMW_FORMATS.items():
            of_params = [formats] * len(params)
            if name.endswith("embedding in 32 bits"):
                of_params[0] = Formats(param=formats.param)  # the embedding is the first parameter
            followers[name] = low_precision_adamw.AdamW(params, of_params)
        fused = partial(torch.optim.AdamW, fused=True)
        followers["torch, bfloat16 parameters and states"] = AdamWFollower(fused, torch.bfloat16, params)
        for package, module in PACKAGES.items():
            if find_spec(package) is not None:
                optimizer = import_module(module).AdamW8bit
                followers[f"{package}, 8-bit states"] = AdamWFollower(optimizer, torch.float32, params)
                low = AdamWFollower(optimizer, torch.bfloat16, params)
                followers[f"{package}, bfloat16 parameters, 8-bit states"] = low
        return followers

    return _errors(lead, follow, num_steps, max_grad_norm=1.0)


def _errors(
    lead: Callable[[list[Tensor]], torch.optim.Optimizer],
    follow: Callable[[list[Tensor]], Mapping[str, Follower]],
    num_steps: int,
    max_grad_norm: float | None,
) -> dict[str, float]:
    """Return the error of every follower; the optimizers clip gradients themselves if `max_grad_norm` is None."""
    recipe = load_recipe("lm_tiny")
    task = LanguageTask(recipe.data, recipe.model, load_tokens(recipe.data))
    model = task.build_model(seed=0)
    params: list[Tensor] = list(model.parameters())
    with torch.no_grad():  # a start that bfloat16 has, too, so that all modes begin at one point
        for param in params:
            param.copy_(param.bfloat16())
    start = [param.detach().clone() for param in params]
    leader, followers = lead(params), follow(params)
    highest_lr = leader.param_groups[0]["lr"]
    for t in range(num_steps):
        lr = highest_lr * 0.5 * (1 + math.cos(math.pi * t / num_steps))
        loss = task.losses(model, task.train_rows(0, t, 0, 1)).mean()
        leader.zero_grad()
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(params, max_grad_norm)
        gradients = [param.grad for param in params if param.grad is not None]
        leader.param_groups[0]["lr"] = lr
        for follower in followers.values():
            follower.step(gradients, lr)
        leader.step()
    travelled = _distance(params, start)
    return {mode: _distance(follower.values(), params) / travelled for mode, follower in followers.items()}


def _distance(ones: list[Tensor], others: list[Tensor]) -> float:
    return math.sqrt(
        sum((x.detach() - y.detach()).double().square().sum().item() for x, y in zip(ones, others, strict=True))
    )


if __name__ == "__main__":
    for each in OPTIMIZERS:
        for mode, error in errors(each).items():
            print(f"{each:20} {mode:55} {error:.4f}")
    for mode, error in errors_of_adamw().items():
        print(f"{f'AdamW, lr {ADAMW_LR}':20} {mode:55} {error:.4f}")
