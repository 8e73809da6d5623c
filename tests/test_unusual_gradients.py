"""Gradients that are zero, missing, tiny or huge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2, AdaiW
from tests.problems import Problem, Spec
from tests.variants import VARIANTS, solve


@pytest.mark.parametrize("zeros", [1, 3])
@pytest.mark.parametrize("dampening", [1.0, 0.5, 0.0])
def test_zero_gradients_before_training_leave_no_trace(zeros: int, dampening: float) -> None:
    problem = Problem((({"lr": 0.3, "dampening": dampening}, (Spec("a", (7,)), Spec("b", ()))),), steps=10)
    expected = solve(problem)
    parameters = problem.parameters()
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(zeros):
        optimizer.step()
        assert optimizer.inertia_mean.item() == 0.0
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        optimizer.step()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name])
        assert optimizer.state[parameter]["step"].item() == problem.steps


def test_a_step_with_zero_gradients_decays_only_if_the_decay_is_decoupled() -> None:
    parameter = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = AdaiW([parameter], lr=0.5, weight_decay=0.1)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((3,), 0.95, dtype=torch.float64))
    assert optimizer.state[parameter]["step"].item() == 0
    assert torch.equal(optimizer.state[parameter]["beta1_prod"], torch.ones(3, dtype=torch.float64))


def test_a_step_without_any_gradient_changes_nothing() -> None:
    parameters = [Parameter(torch.ones(3)), Parameter(torch.ones(()))]
    optimizer = AdaiW(parameters, lr=0.5, weight_decay=0.1)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(p.detach(), torch.ones(p.shape)) for p in parameters)
    assert optimizer.num_skipped_steps.item() == 0
    for parameter in parameters:
        assert optimizer.state[parameter]["step"].item() == 0
        assert not optimizer.state[parameter]["exp_avg_sq"].any()


def test_states_are_created_for_every_parameter_that_requires_a_gradient() -> None:
    used, unused, frozen = Parameter(torch.ones(2)), Parameter(torch.ones(3)), Parameter(torch.ones(4), False)
    optimizer = Adai([used, unused, frozen], lr=0.1)
    assert not optimizer.state
    used.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state) == {used, unused}
    assert set(optimizer.state[unused]) == {"step", "exp_avg", "exp_avg_sq", "beta1_prod"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_states_are_at_least_float32(dtype: torch.dtype) -> None:
    parameter = Parameter(torch.ones(4, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer = AdaiV2([parameter], lr=0.1)
    for _ in range(3):
        optimizer.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {optimizer.state[parameter][k].dtype for k in ("exp_avg", "exp_avg_sq", "beta1_prod")} == {wide}
    assert optimizer.state[parameter]["step"].dtype == torch.float32
    assert torch.isfinite(parameter).all()


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e3])
def test_the_trajectory_scales_with_the_gradients(scale: float) -> None:
    """Inertia is a ratio; a lower bound of the mean, below which real gradients fall, would fail this test."""
    base = Problem((({"lr": 0.1}, (Spec("a", (31,)), Spec("b", (4, 5), scale=0.1))),), steps=20)
    scaled = Problem(
        (({"lr": 0.1 / scale}, (Spec("a", (31,), scale=scale), Spec("b", (4, 5), scale=0.1 * scale))),), steps=20
    )
    expected, parameters = solve(base), solve(scaled)
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e-25, 1e-18, 1e12])
def test_very_small_and_very_large_gradients_give_finite_steps(size: float) -> None:
    parameter = Parameter(torch.ones(5))
    optimizer = AdaiV2([parameter], lr=1e-3, dampening=0.5)
    for step in range(4):
        parameter.grad = torch.arange(5.0) * size * (-1) ** step
        optimizer.step()
        assert torch.isfinite(parameter).all()
        assert all(torch.isfinite(value).all() for value in optimizer.state[parameter].values())


def test_a_large_gradient_is_clipped_before_its_square_can_overflow() -> None:
    """The square of 1e25 overflows float32."""
    gradient = torch.tensor([1e25, -2e25, 3e24])
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1, max_grad_norm=1.0)
    parameter.grad = gradient
    optimizer.step()
    assert optimizer.num_skipped_steps.item() == 0
    assert optimizer.grad_norm.item() == pytest.approx(np.linalg.norm(gradient.double().numpy()), rel=1e-6)
    unit = (gradient.double() / gradient.double().norm()).float()
    reference = Parameter(torch.ones(3))
    reference.grad = unit
    Adai([reference], lr=0.1).step()
    torch.testing.assert_close(parameter, reference, rtol=1e-6, atol=1e-6)


def test_a_gradient_whose_square_overflows_does_not_affect_later_steps() -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=1e-3)
    for size in (1.0, 1e25, 1.0, 1.0):
        parameter.grad = torch.tensor([1.0, -0.5, 2.0]) * size
        before = parameter.detach().clone()
        optimizer.step()
        assert all(torch.isfinite(value).all() for value in optimizer.state[parameter].values())
    assert torch.isfinite(parameter).all()
    assert not torch.equal(parameter.detach(), before)


def test_a_step_copies_nothing_to_the_host() -> None:
    """Meta tensors have no values, so any read raises an error."""
    problem = replace(VARIANTS["clipping"], dtype=torch.float32)
    parameters = {
        name: Parameter(torch.empty_like(value, device="meta")) for name, value in problem.parameters().items()
    }
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0, max_grad_norm=1.0)
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    assert optimizer.inertia_mean.device.type == optimizer.num_skipped_steps.device.type == "meta"
