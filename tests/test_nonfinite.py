"""A non-finite gradient skips the step: nothing changes, the step is counted and logged, and training continues."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2, AdaiW
from tests.problems import THREE_GROUPS, Problem, relative_error, to_numpy

BAD_STEPS = {0: math.inf, 7: math.nan, 8: -math.inf, 30: math.nan}


def bytes_of(parameters: dict[str, Parameter], optimizer: AdaiV2) -> dict[str, bytes]:
    tensors = dict(parameters)
    for name, parameter in parameters.items():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return {name: to_numpy(tensor).tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dampening", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("max_grad_norm", [None, 30.0])
@pytest.mark.parametrize("decoupled", [False, True])
def test_skipped_steps_leave_no_trace_and_training_follows_the_oracle(
    dampening: float, max_grad_norm: float | None, decoupled: bool
) -> None:
    problem = replace(
        THREE_GROUPS.with_all(dampening=dampening, decoupled=decoupled), max_grad_norm=max_grad_norm, steps=40
    )
    parameters, oracle = problem.parameters(), problem.oracle()
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0, max_grad_norm=max_grad_norm)
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        gradients = problem.oracle_gradients(step)
        if step in BAD_STEPS:
            parameters["a.matrix"].grad[2, 1] = BAD_STEPS[step]  # type: ignore[index]
            gradients["a.matrix"][2, 1] = BAD_STEPS[step]  # type: ignore[index]
            before = bytes_of(parameters, optimizer) if step else None
        optimizer.step()
        assert oracle.step(gradients).skipped == (step in BAD_STEPS)
        if step in BAD_STEPS and before:
            assert bytes_of(parameters, optimizer) == before
    assert relative_error(parameters, oracle, problem) < 1e-14
    assert optimizer.num_skipped_steps.item() == len(BAD_STEPS)
    assert optimizer.num_skipped_steps.dtype == torch.int64


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_one_non_finite_element_of_any_dtype_skips_the_step(bad: float, dtype: torch.dtype) -> None:
    parameters = [Parameter(torch.ones(2**16 + 3, dtype=dtype)), Parameter(torch.ones(()))]
    optimizer = AdaiW(parameters, lr=0.1, weight_decay=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    grad = parameters[0].grad
    (torch.view_as_real(grad) if dtype.is_complex else grad).view(-1)[-1] = bad  # type: ignore[union-attr, arg-type]
    optimizer.step()
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in parameters)
    assert optimizer.num_skipped_steps.item() == 1


def test_skips_1_2_4_and_8_are_logged_and_good_steps_are_not(caplog: pytest.LogCaptureFixture) -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1)
    messages: list[int] = []
    with caplog.at_level(logging.DEBUG, logger="adai_dist"):
        for value in (1.0, math.nan, 1.0, 1.0, math.inf, math.inf, 1.0, *[math.nan] * 100):
            parameter.grad = torch.full((3,), value)
            optimizer.step()
            messages.append(len(caplog.records))
    assert messages[:7] == [0, 1, 1, 1, 2, 2, 2]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert {record.name for record in caplog.records} == {"adai_dist"}
    assert [record.args[1] for record in caplog.records] == [1, 2, 4, 8, 16, 32, 64]  # type: ignore[index]
    assert "(skipped so far: 64)" in caplog.records[-1].getMessage()
    assert optimizer.num_skipped_steps.item() == 103


def test_clip_grad_norm_of_a_non_finite_gradient_returns_a_non_finite_norm_and_the_step_is_skipped() -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, math.nan, 1.0])
    assert not math.isfinite(optimizer.clip_grad_norm_(1.0).item())
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))
    assert optimizer.num_skipped_steps.item() == 1


def test_a_non_finite_gradient_of_a_parameter_outside_the_optimizer_does_not_matter() -> None:
    parameter, outside = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    outside.grad = torch.full((3,), math.nan)
    parameter.grad = torch.ones(3)
    optimizer = Adai([parameter], lr=0.1)
    optimizer.step()
    assert optimizer.num_skipped_steps.item() == 0


def test_a_skipped_first_step_still_creates_the_states() -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1)
    parameter.grad = torch.full((3,), math.nan)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["step"].item() == 0
    assert torch.equal(state["exp_avg_sq"], torch.zeros(3))
    assert torch.equal(state["beta1_prod"], torch.ones(3))


def test_a_non_finite_parameter_under_coupled_decay_is_not_hidden() -> None:
    """The gradient is finite and the parameter is not: the other parameter must stay finite in any case."""
    good, bad = Parameter(torch.ones(3)), Parameter(torch.tensor([1.0, math.inf]))
    optimizer = Adai([good, bad], lr=0.1, weight_decay=0.1)
    good.grad, bad.grad = torch.ones(3), torch.ones(2)
    optimizer.step()
    assert torch.isfinite(good).all()


def test_the_mean_before_the_first_step_is_not_a_number() -> None:
    optimizer = Adai([Parameter(torch.ones(3))], lr=0.1)
    assert math.isnan(optimizer.inertia_mean.item())
    assert math.isnan(optimizer.grad_norm.item())
    assert optimizer.num_skipped_steps.item() == 0
    assert optimizer.inertia_mean.dtype == optimizer.grad_norm.dtype == torch.float64


def test_skipped_steps_in_between_do_not_change_the_solution() -> None:
    problem: Problem = replace(THREE_GROUPS, dtype=torch.float32, steps=10)
    disturbed, straight = problem.parameters(), problem.parameters()
    first = AdaiV2(problem.param_groups(disturbed), lr=1.0)
    second = AdaiV2(problem.param_groups(straight), lr=1.0)
    for step in range(problem.steps):
        problem.set_gradients(disturbed, step)
        disturbed["b.large"].grad[-1] = math.inf  # type: ignore[index]
        first.step()
        problem.set_gradients(disturbed, step)
        first.step()
        problem.set_gradients(straight, step)
        second.step()
    assert all(torch.equal(disturbed[name], straight[name]) for name in disturbed)
