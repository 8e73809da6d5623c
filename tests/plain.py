"""Adaptive inertia in straightforward PyTorch, in two passes: the reference for rounding errors.

Arithmetic and states are at least float32, and 0/0 is handled as in the package; no other precautions are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class PlainAdai:
    """Optimizer of plain local tensors; each of `groups` is a dictionary with "params" and every hyperparameter."""

    def __init__(self, groups: Sequence[dict[str, Any]], max_grad_norm: float | None = None) -> None:
        self.groups = groups
        self.max_grad_norm = max_grad_norm
        self.states: dict[Tensor, dict[str, Any]] = {}

    @torch.no_grad()
    def step(self) -> None:
        pairs = [(group, p) for group in self.groups for p in group["params"] if p.grad is not None]
        grads = [_real(p.grad).to(_wide(p.dtype)) for _, p in pairs]
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = 1.0 if self.max_grad_norm is None else (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        v_hats: list[Tensor] = []
        for k, (group, p) in enumerate(pairs):
            state = self.states.setdefault(
                p, {"t": 0, "v": torch.zeros_like(grads[k]), "m": torch.zeros_like(grads[k])}
            )
            state.setdefault("P", torch.ones_like(grads[k]))
            grads[k] = grads[k] * (-scale if group["maximize"] else scale)
            if not group["decoupled"]:
                grads[k] = grads[k] + group["weight_decay"] * _real(p)
            v = group["betas"][1] * state["v"] + (1 - group["betas"][1]) * grads[k] ** 2
            v_hats.append(v / (1 - group["betas"][1] ** (state["t"] + 1)))
            state["new_v"] = v
        mean = sum(v_hat.sum() for v_hat in v_hats) / sum(v_hat.numel() for v_hat in v_hats)
        for (group, p), g, v_hat in zip(pairs, grads, v_hats, strict=True):
            state, theta = self.states[p], _real(p).to(g.dtype)
            if group["decoupled"]:
                theta = theta * (1 - group["lr"] * group["weight_decay"])
            if mean > 0:
                beta0, d = group["betas"][0], group["dampening"]
                beta1 = (1 - beta0 * (v_hat / mean) ** (1 / (3 - 2 * d))).clamp(0, 1 - group["eps"])
                state.update(t=state["t"] + 1, v=state["new_v"], P=state["P"] * beta1)
                state["m"] = beta1 * state["m"] + (1 - beta1) ** d * g
                theta = theta - group["lr"] * beta0 ** (1 - d) * state["m"] / (1 - state["P"])
            _real(p).copy_(theta)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
