"""The error of a trajectory by what is stored in 16 bits: all modes step with the gradients of one float32 run.

A byte-level language model is trained on the sources of Python's standard library. The distance between the parameters
of a mode and those of the float32 run, relative to the distance that the latter have travelled, is the error of the
mode. In closed loop, where each run has its own gradients, a perturbation of 1e-6 grows until it hides the differences.

    python -m tests.open_loop  # prints a table
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adai_dist import Adai, AdaiV2
from adai_dist.recipes.language import LanguageTask, load_tokens
from adai_dist.recipes.recipe import load_recipe
from adai_dist.rounding import join

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
    Mode("bfloat16 parameters, master weights", torch.bfloat16, {}),
    Mode("bfloat16 parameters, master weights, bfloat16 states", torch.bfloat16, {"state_dtype": "bfloat16"}),
    Mode("bfloat16 parameters, rounded", torch.bfloat16, {"master_weights": False}),
    Mode(
        "bfloat16 parameters, rounded, bfloat16 states",
        torch.bfloat16,
        {"master_weights": False, "state_dtype": "bfloat16"},
    ),
)


class Follower:
    """One mode, which steps with gradients from elsewhere."""

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
        """Return the parameters, or their master weights, in float32."""
        remainders = [self.optimizer.state[param].get("master_param") for param in self.params]
        pairs = zip(self.params, remainders, strict=True)
        return [param.detach().float() if r is None else join(param.detach(), r) for param, r in pairs]


def errors(name: str, num_steps: int = NUM_STEPS) -> dict[str, float]:
    """Return the error of every mode for one optimizer."""
    optimizer_class, options = OPTIMIZERS[name]
    recipe = load_recipe("lm_tiny")
    task = LanguageTask(recipe.data, recipe.model, load_tokens(recipe.data))
    model = task.build_model(seed=0)
    params = list(model.parameters())
    with torch.no_grad():  # a start that bfloat16 has, too, so that all modes begin at one point
        for param in params:
            param.copy_(param.bfloat16())
    start = [param.detach().clone() for param in params]
    leader = optimizer_class(params, max_grad_norm=1.0, independent=True, **options)
    followers = {mode.name: Follower(mode, optimizer_class, options, params) for mode in MODES}
    for t in range(num_steps):
        lr = options["lr"] * 0.5 * (1 + math.cos(math.pi * t / num_steps))
        loss = task.losses(model, task.train_rows(0, t, 0, 1)).mean()
        leader.zero_grad()
        loss.backward()
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
