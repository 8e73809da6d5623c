"""Checkpoints of the authors' code are continued here, and can be loaded there again."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai
from tests.oracle import Oracle, OracleGroup
from tests.test_state_dict import SHAPES, STATES, gradient, parameters


def reference_checkpoint(decoupled: bool, steps: int) -> tuple[Oracle, dict[str, Any]]:
    """Return a checkpoint of the authors' Adai: Python numbers as steps, groups without our extra keys."""
    shapes = SHAPES[:3]
    starts = {str(k): parameters(torch.float64)[k].detach().numpy() for k in range(3)}
    hyper = {"lr": 0.2, "betas": (0.1, 0.99), "eps": 1e-3, "weight_decay": 0.1, "decoupled": decoupled}
    oracle = Oracle(starts, [OracleGroup(tuple(starts), **hyper)], None)
    for step in range(steps):
        oracle.step({str(k): gradient(step, k, shape).numpy() for k, shape in enumerate(shapes)})
    state: dict[int, dict[str, Any]] = {}
    for k in range(3):
        values = oracle.states[str(k)]
        moments = {name: torch.tensor(getattr(values, name)) for name in STATES}
        state[k] = {"step": values.step, **moments}
    return oracle, {"state": state, "param_groups": [{**hyper, "params": [0, 1, 2]}]}


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_checkpoint_of_the_reference_continues_where_it_stopped(decoupled: bool) -> None:
    oracle, checkpoint = reference_checkpoint(decoupled, steps=6)
    params = [Parameter(torch.tensor(oracle.parameters[str(k)])) for k in range(3)]
    optimizer = Adai(params, lr=9.0)
    optimizer.load_state_dict(checkpoint)
    for step in range(6, 20):
        gradients = {str(k): gradient(step, k, SHAPES[k]).numpy() for k in range(3)}
        oracle.step(gradients)
        for k, parameter in enumerate(params):
            parameter.grad = torch.from_numpy(np.array(gradients[str(k)]))
        optimizer.step()
    for k, parameter in enumerate(params):
        np.testing.assert_allclose(parameter.detach(), oracle.parameters[str(k)], rtol=1e-12, atol=1e-12)
        assert optimizer.state[parameter]["step"].item() == 20
    assert optimizer.param_groups[0]["dampening"] == 1.0
    assert optimizer.param_groups[0]["decoupled"] is decoupled


class WithStatesOfTheReference(torch.optim.Optimizer):
    """A replacement for the authors' Adai, in plain PyTorch, that loads with torch's own load_state_dict."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0, "betas": (0.1, 0.99), "eps": 1e-3, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        pairs = [(group, p, self.state[p]) for group in self.param_groups for p in group["params"]]
        total, count = 0.0, 0
        for group, p, state in pairs:
            state["step"] += 1
            state["g"] = p.grad if group["decoupled"] else p.grad + group["weight_decay"] * p
            beta2 = group["betas"][1]
            state["exp_avg_sq"].mul_(beta2).addcmul_(state["g"], state["g"], value=1 - beta2)
            total += float((state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))).sum())
            count += p.numel()
        for group, p, state in pairs:
            if group["decoupled"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            beta1 = (1 - group["betas"][0] * v_hat / (total / count)).clamp(0, 1 - group["eps"])
            state["beta1_prod"].mul_(beta1)
            state["exp_avg"].mul_(beta1).add_((1 - beta1) * state.pop("g"))
            p.sub_(group["lr"] * state["exp_avg"] / (1 - state["beta1_prod"]))


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_checkpoint_moves_from_the_reference_to_us_and_back(decoupled: bool) -> None:
    oracle, checkpoint = reference_checkpoint(decoupled, steps=6)
    params = [Parameter(torch.tensor(oracle.parameters[str(k)])) for k in range(3)]
    ours, theirs = Adai(params, lr=9.0), WithStatesOfTheReference(params)
    ours.load_state_dict(checkpoint)
    for step in range(6, 24):
        oracle.step({str(k): gradient(step, k, SHAPES[k]).numpy() for k in range(3)})
        for k, parameter in enumerate(params):
            parameter.grad = gradient(step, k, SHAPES[k])
        if step == 12:
            theirs.load_state_dict(through_torch_save(ours.state_dict()))
        if step == 18:
            ours.load_state_dict(through_torch_save(theirs.state_dict()))
        (theirs if 12 <= step < 18 else ours).step()
    for k, parameter in enumerate(params):
        np.testing.assert_allclose(parameter.detach(), oracle.parameters[str(k)], rtol=1e-12, atol=1e-12)
        assert ours.state[parameter]["step"].item() == 24


def through_torch_save(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
