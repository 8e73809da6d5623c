"""torch.amp.GradScaler: scaled gradients are unscaled inside the step, overflows are skipped, the scale is updated."""

from __future__ import annotations

import math

import pytest
import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2
from tests.problems import THREE_GROUPS, Problem

SCALE = 2.0**10


def scaled_step(
    problem: Problem, parameters: dict[str, Parameter], optimizer: AdaiV2, scaler: GradScaler, step: int, how: str
) -> None:
    problem.set_gradients(parameters, step)
    # GradScaler creates its scale when it scales a tensor; this replaces a backward pass.
    scaler.scale(torch.zeros(()))
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad = parameter.grad * scaler.get_scale()
    if how == "unscaled first":
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(20.0)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("how", ["unscaled in the step", "unscaled first"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_scaled_gradients_take_the_same_steps_as_unscaled_ones(how: str, decoupled: bool) -> None:
    problem = THREE_GROUPS.with_all(decoupled=decoupled, dampening=0.5)
    ours, theirs = problem.parameters(), problem.parameters()
    optimizer = AdaiV2(problem.param_groups(ours), lr=1.0, max_grad_norm=20.0)
    reference = AdaiV2(problem.param_groups(theirs), lr=1.0, max_grad_norm=20.0)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=7)
    for step in range(20):
        scaled_step(problem, ours, optimizer, scaler, step, how)
        problem.set_gradients(theirs, step)
        reference.step()
        # The scale is a power of two, so scaling does not round.
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-15, atol=0)
    assert scaler.get_scale() == SCALE * 4
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_is_skipped_and_halves_the_scale(bad: float) -> None:
    problem = THREE_GROUPS
    ours, theirs = problem.parameters(), problem.parameters()
    optimizer = AdaiV2(problem.param_groups(ours), lr=1.0)
    reference = AdaiV2(problem.param_groups(theirs), lr=1.0)
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(10):
        problem.set_gradients(ours, step)
        scaler.scale(torch.zeros(()))
        for parameter in ours.values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad * scaler.get_scale()
        if step == 4:
            ours["a.vector"].grad[3] = bad  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        if step != 4:
            problem.set_gradients(theirs, step)
            reference.step()
    assert scaler.get_scale() == SCALE / 2
    assert optimizer.num_skipped_steps.item() == 1
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-13, atol=1e-14)


def test_deferred_clipping_of_scaled_gradients_bounds_the_unscaled_norm() -> None:
    """clip_grad_norm_ before unscale_ sees scaled gradients; the step that follows must still be correct."""
    parameter, other = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer, reference = Adai([parameter], lr=0.1), Adai([other], lr=0.1)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0]) * SCALE
    other.grad = torch.tensor([3.0, 0.0, 4.0])
    scaler.unscale_(optimizer)
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(5.0)
    scaler.step(optimizer)
    scaler.update()
    reference.clip_grad_norm_(1.0)
    reference.step()
    assert torch.equal(parameter, other)


def test_a_disabled_scaler_changes_nothing() -> None:
    parameter, other = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer, reference = Adai([parameter], lr=0.1), Adai([other], lr=0.1)
    scaler = GradScaler("cpu", enabled=False)
    for p in (parameter, other):
        p.grad = torch.tensor([1.0, 2.0, 3.0])
    scaler.step(optimizer)
    scaler.update()
    reference.step()
    assert torch.equal(parameter, other)


def test_the_scaler_leaves_nothing_behind_on_the_optimizer() -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.full((3,), math.inf)
    scaler.step(optimizer)
    scaler.update()
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.num_skipped_steps.item() == 1
    assert not torch.equal(parameter.detach(), torch.ones(3))


def test_a_mixed_precision_training_loop_learns() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = AdaiV2(model.parameters(), lr=0.5, dampening=0.5, max_grad_norm=1.0)
    scaler = GradScaler("cpu", init_scale=SCALE)
    inputs = torch.randn(64, 8)
    targets = inputs.sum(dim=1, keepdim=True).tanh()
    losses: list[float] = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(inputs) - targets).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_an_overflow_that_the_scaler_found_counts_even_if_the_gradient_was_repaired() -> None:
    """torch's own optimizers skip such a step, and the scale is halved."""
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.tensor([1.0, math.inf, 1.0])
    scaler.unscale_(optimizer)
    parameter.grad.fill_(1.0)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert optimizer.num_skipped_steps.item() == 1
    assert scaler.get_scale() == SCALE / 2
