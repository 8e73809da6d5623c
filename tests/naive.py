"""Naive Adai: the mean over the tensors of one call of step().

In one process, this is the algorithm. Under ZeRO, a call gets one partition of one parameter group, and so does the
mean. The tests of the integrations measure the error of this class, to prove that they can detect it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class NaiveAdai(torch.optim.Optimizer):
    """Adai and AdaiV2 as a torch optimizer; every group contains all hyperparameters."""

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        # The package recognises its optimizers by the keys of their groups, so these keys differ.
        super().__init__([{"params": group["params"], "hyper": group} for group in params], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        pairs = [(group["hyper"], p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        v_hats = [self._second_moment(group, p) for group, p in pairs]
        num_elements = sum(v_hat.numel() for v_hat in v_hats)
        mean = sum(float(v_hat.sum()) for v_hat in v_hats) / max(num_elements, 1)
        for (group, p), v_hat in zip(pairs, v_hats, strict=True):
            if mean > 0:
                self._advance(group, p, v_hat / mean)

    def _second_moment(self, group: dict[str, Any], p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["beta1_prod"] = torch.ones_like(p)
        g, beta2 = self._gradient(group, p), group["betas"][1]
        state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return state["exp_avg_sq"] / (1 - beta2 ** (state["step"] + 1))

    def _advance(self, group: dict[str, Any], p: Tensor, ratio: Tensor) -> None:
        state, g = self.state[p], self._gradient(group, p)
        beta0, d = group["betas"][0], group["dampening"]
        beta1 = (1 - beta0 * ratio ** (1 / (3 - 2 * d))).clamp(0, 1 - group["eps"])
        if group["decoupled"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        state["step"] += 1
        state["beta1_prod"].mul_(beta1)
        state["exp_avg"].mul_(beta1).add_((1 - beta1) ** d * g)
        p.sub_(group["lr"] * beta0 ** (1 - d) * state["exp_avg"] / (1 - state["beta1_prod"]))

    @staticmethod
    def _gradient(group: dict[str, Any], p: Tensor) -> Tensor:
        return p.grad if group["decoupled"] else p.grad + group["weight_decay"] * p
