"""Clipping by the global norm: inside the step and deferred by clip_grad_norm_, both equal to torch's clipping."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2
from tests.problems import THREE_GROUPS, Problem, relative_error

MAX_NORM = 30.0  # the norms of this problem are between 250 and 260, and below 10 without the large parameter
SMALL = replace(
    THREE_GROUPS,
    groups=tuple(
        (hyper, tuple(spec for spec in specs if spec.name != "b.large")) for hyper, specs in THREE_GROUPS.groups
    ),
)


def prepared(problem: Problem, **options: float) -> tuple[dict[str, Parameter], AdaiV2]:
    parameters = problem.parameters()
    return parameters, AdaiV2(problem.param_groups(parameters), lr=1.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_norm", [1e-3, 5.0, 30.0, 1e6])
@pytest.mark.parametrize("decoupled", [False, True])
def test_deferred_clipping_takes_the_same_steps_as_torch_clip_grad_norm(max_norm: float, decoupled: bool) -> None:
    problem = THREE_GROUPS.with_all(decoupled=decoupled, dampening=0.5)
    ours, optimizer = prepared(problem)
    theirs, reference = prepared(problem)
    for step in range(20):
        problem.set_gradients(ours, step)
        problem.set_gradients(theirs, step)
        norm = optimizer.clip_grad_norm_(max_norm)
        expected = torch.nn.utils.clip_grad_norm_(list(theirs.values()), max_norm)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-14)
        assert optimizer.step() is None
        reference.step()
        assert optimizer.grad_norm.item() == norm.item()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("max_norm", [1e-3, 5.0, 1e6, math.inf])
def test_clipping_inside_the_step_equals_deferred_clipping_bitwise(max_norm: float) -> None:
    inside, optimizer = prepared(THREE_GROUPS, max_grad_norm=max_norm)
    deferred, other = prepared(THREE_GROUPS)
    for step in range(20):
        THREE_GROUPS.set_gradients(inside, step)
        THREE_GROUPS.set_gradients(deferred, step)
        optimizer.step()
        other.clip_grad_norm_(max_norm)
        other.step()
    assert all(torch.equal(inside[name], deferred[name]) for name in inside)


def test_some_steps_of_the_problem_are_clipped_and_others_are_not() -> None:
    """Check that the tests above can fail."""
    problem = replace(SMALL, max_grad_norm=7.0)
    oracle, seen = problem.solve()
    assert 5 < sum(observation.grad_norm > 7.0 for observation in seen) < problem.steps - 5
    parameters, optimizer = prepared(problem, max_grad_norm=7.0)
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        optimizer.step()
    assert relative_error(parameters, oracle, problem) < 1e-14
    unclipped, _ = SMALL.solve()
    assert relative_error(parameters, unclipped, problem) > 1e-3


def test_an_infinite_bound_measures_and_changes_nothing() -> None:
    measured, optimizer = prepared(THREE_GROUPS)
    plain, other = prepared(THREE_GROUPS)
    for step in range(5):
        THREE_GROUPS.set_gradients(measured, step)
        THREE_GROUPS.set_gradients(plain, step)
        optimizer.clip_grad_norm_(math.inf)
        optimizer.step()
        other.step()
    assert all(torch.equal(measured[name], plain[name]) for name in measured)


def test_the_bound_of_the_call_overrides_the_constructor_for_one_step() -> None:
    parameters, optimizer = prepared(SMALL, max_grad_norm=1e-3)
    others, other = prepared(SMALL)
    SMALL.set_gradients(parameters, 0)
    SMALL.set_gradients(others, 0)
    optimizer.clip_grad_norm_(math.inf)
    optimizer.step()
    other.step()
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)
    optimizer.step()
    other.clip_grad_norm_(1e-3)
    other.step()
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


def test_the_last_of_two_clippings_applies_to_the_raw_gradients() -> None:
    parameters, optimizer = prepared(SMALL)
    others, other = prepared(SMALL)
    SMALL.set_gradients(parameters, 0)
    SMALL.set_gradients(others, 0)
    first, second = optimizer.clip_grad_norm_(1.0), optimizer.clip_grad_norm_(0.5)
    assert first.item() == second.item()
    optimizer.step()
    other.clip_grad_norm_(0.5)
    other.step()
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


@pytest.mark.parametrize("change", ["in place", "replaced", "removed", "added"])
def test_gradients_that_change_between_clipping_and_step_are_an_error(change: str) -> None:
    parameters = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    parameters[0].grad = torch.ones(3)
    optimizer = Adai(parameters, lr=0.1)
    optimizer.clip_grad_norm_(1.0)
    if change == "in place":
        parameters[0].grad.mul_(2)
    elif change == "replaced":
        parameters[0].grad = torch.full((3,), 2.0)
    elif change == "removed":
        parameters[0].grad = None
    else:
        parameters[1].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_"):
        optimizer.step()
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in parameters)


def test_a_closure_that_recomputes_gradients_after_clipping_is_an_error() -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    closure()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_"):
        optimizer.step(closure)


@pytest.mark.parametrize("closure", ["nothing", "adds", "model.zero_grad"])
def test_a_closure_after_clipping_may_do_anything_except_change_gradients(closure: str) -> None:
    """Lightning's optimizers always pass a closure, which does nothing in manual optimization."""
    model, twin = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    for one in (model, twin):
        one(torch.ones(3)).backward()
    optimizer, expected = Adai(model.parameters(), lr=0.1), Adai(twin.parameters(), lr=0.1)

    def run() -> float:
        if closure == "model.zero_grad":
            model.zero_grad()
        if closure != "nothing":
            model(torch.ones(3)).backward()
        return 1.5

    optimizer.clip_grad_norm_(0.5)
    if closure == "nothing":
        assert optimizer.step(run) == 1.5
        expected.clip_grad_norm_(0.5)
        expected.step()
        assert torch.equal(model.weight, twin.weight)
    else:
        with pytest.raises(RuntimeError, match=r"clip_grad_norm_"):
            optimizer.step(run)
        assert torch.equal(model.weight, twin.weight)


def test_after_the_error_new_gradients_can_be_clipped_and_stepped() -> None:
    parameter = Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = Adai([parameter], lr=0.1)
    optimizer.clip_grad_norm_(1.0)
    parameter.grad.mul_(2)
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert not torch.equal(parameter.detach(), torch.ones(3))


def test_gradients_of_different_dtypes_have_one_float64_norm() -> None:
    parameters = [
        Parameter(torch.zeros(3, dtype=dtype))
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    ]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0 + 2.0j if parameter.is_complex() else 2.0)
    norm = Adai(parameters, lr=0.1).clip_grad_norm_(1.0)
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    assert norm.item() == pytest.approx(math.sqrt(4 * 9 + 8 * 3), rel=1e-15)


def test_the_norm_without_any_gradient_is_zero() -> None:
    assert Adai([Parameter(torch.ones(3))], lr=0.1).clip_grad_norm_(1.0).item() == 0.0


@pytest.mark.parametrize("bound", [0, -1.0, math.nan, "1", None, True])
def test_a_bound_that_is_not_a_positive_number_is_refused(bound: object) -> None:
    optimizer = Adai([Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises((ValueError, TypeError), match=r"max_norm.*" + (repr(bound) if bound != 0 else "0")):
        optimizer.clip_grad_norm_(bound)  # type: ignore[arg-type]


def test_max_grad_norm_may_be_changed_between_steps() -> None:
    parameters, optimizer = prepared(SMALL, max_grad_norm=1.0)
    others, other = prepared(SMALL)
    for step, bound in enumerate((1.0, 2.0, None)):
        SMALL.set_gradients(parameters, step)
        SMALL.set_gradients(others, step)
        optimizer.max_grad_norm = bound
        optimizer.step()
        if bound is not None:
            other.clip_grad_norm_(bound)
        other.step()
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)
