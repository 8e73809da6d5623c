"""The optimizer in one process, compared with the float64 oracle, and with plain PyTorch for rounding errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2, AdaiW
from adai_dist.optimizer import AdaptiveInertia
from adai_dist.optimizer.variants import OPTIMIZERS
from tests.problems import THREE_GROUPS, Problem, Spec, as_pairs, relative_error, to_numpy
from tests.trajectories import TRAJECTORIES, Trajectory
from tests.variants import FLOAT64_TOLERANCE, VARIANTS, solve, solve_plainly


@pytest.mark.parametrize("name", VARIANTS)
def test_sixty_float64_steps_follow_the_oracle_to_rounding(name: str) -> None:
    problem = VARIANTS[name]
    parameters = problem.parameters()
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0, max_grad_norm=problem.max_grad_norm)
    oracle = problem.oracle()
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        optimizer.step()
        seen = oracle.step(problem.oracle_gradients(step))
        assert optimizer.inertia_mean.item() == pytest.approx(seen.mean, rel=1e-13)
        assert optimizer.grad_norm.item() == pytest.approx(seen.grad_norm, rel=1e-13)
    assert relative_error(parameters, oracle, problem) < FLOAT64_TOLERANCE
    for spec in problem.specs():
        state, expected = optimizer.state[parameters[spec.name]], oracle.states[spec.name]
        assert state["step"].item() == expected.step
        for part in ("exp_avg", "exp_avg_sq", "beta1_prod"):
            np.testing.assert_allclose(to_numpy(state[part]), getattr(expected, part), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kernels", ["require", "off"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_errors_are_at_most_twice_those_of_plain_pytorch(
    name: str, dtype: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    problem = replace(VARIANTS[name], dtype=dtype)
    oracle, _ = problem.solve()
    error = relative_error(solve(problem), oracle, problem)
    plain_error = relative_error(solve_plainly(problem), oracle, problem)
    assert error <= 2 * plain_error
    assert 0 < plain_error < (1e-5 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_foreach_and_loop_agree_bit_for_bit(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", "off")
    problem = replace(VARIANTS[name], dtype=dtype, steps=25)
    together, one_by_one = solve(problem, foreach=True), solve(problem, foreach=False)
    default = solve(problem)
    for spec in problem.specs():
        assert torch.equal(together[spec.name], one_by_one[spec.name]), spec.name
        assert torch.equal(together[spec.name], default[spec.name]), spec.name


@pytest.mark.parametrize("name", ["l2", "dampening-0", "clipping"])
def test_low_precision_gradients_of_float32_parameters_are_stepped_in_float32(name: str) -> None:
    """torch refuses assignment of a gradient with another dtype than the parameter; engines set grad_dtype."""
    problem = replace(VARIANTS[name], dtype=torch.float32, grad_dtype=torch.bfloat16)
    oracle, _ = problem.solve()
    parameters = problem.parameters()
    for parameter in parameters.values():
        parameter.grad_dtype = torch.bfloat16
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0, max_grad_norm=problem.max_grad_norm)
    for step in range(problem.steps):
        for spec in problem.specs():
            parameters[spec.name].grad = problem.gradient(spec, step)
        optimizer.step()
    assert relative_error(parameters, oracle, problem) <= 2 * relative_error(solve_plainly(problem), oracle, problem)


@pytest.mark.parametrize("name", ["l2", "dampening-0", "clipping", "mixed-groups", "maximize"])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
def test_complex_parameters_are_stepped_as_pairs_of_real_ones(name: str, dtype: torch.dtype) -> None:
    problem = replace(VARIANTS[name], dtype=dtype, steps=30)
    oracle, _ = problem.solve()
    error = relative_error(solve(problem), oracle, problem)
    if dtype == torch.complex128:
        assert error < FLOAT64_TOLERANCE
    else:
        assert error <= 2 * relative_error(solve_plainly(problem), oracle, problem)


def test_parameters_of_different_dtypes_share_one_mean() -> None:
    dtypes = {"a": torch.float64, "b": torch.float32, "c": torch.bfloat16, "d": torch.complex64}
    starts = {name: torch.linspace(0.5, 1.5, 6).to(dtype) for name, dtype in dtypes.items()}
    problem = Problem((({"lr": 0.1, "dampening": 0.5}, tuple(Spec(name, (6,)) for name in dtypes)),))
    parameters = {name: Parameter(start.clone()) for name, start in starts.items()}
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0)
    oracle = replace_starts(problem, starts)
    for step in range(30):
        gradients = {
            spec.name: replace(problem, dtype=dtypes[spec.name]).gradient(spec, step) for spec in problem.specs()
        }
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
        optimizer.step()
        seen = oracle.step({name: to_numpy(g) for name, g in gradients.items() if g is not None})
        assert optimizer.inertia_mean.item() == pytest.approx(seen.mean, rel=1e-6)
    for name, dtype in dtypes.items():
        tolerance = {torch.float64: 1e-7, torch.float32: 1e-6, torch.complex64: 1e-6, torch.bfloat16: 3e-2}[dtype]
        expected = oracle.parameters[name]
        np.testing.assert_allclose(as_pairs(to_numpy(parameters[name])), expected, rtol=tolerance, atol=tolerance)


def replace_starts(problem: Problem, starts: dict[str, torch.Tensor]) -> Any:
    oracle = problem.oracle()
    return type(oracle)({name: to_numpy(start) for name, start in starts.items()}, oracle.groups)


@pytest.mark.parametrize(
    ("optimizer_class", "expected"),
    [
        (Adai, {"dampening": 1.0, "decoupled": False}),
        (AdaiW, {"dampening": 1.0, "decoupled": True}),
        (AdaiV2, {"dampening": 1.0, "decoupled": True}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_class_runs_the_algorithm_with_its_own_defaults(optimizer_class: Any, expected: dict[str, Any]) -> None:
    problem = Problem((({"lr": 0.3, "weight_decay": 0.05, **expected}, (Spec("a", (7,)), Spec("b", (3, 2)))),))
    parameters = problem.parameters()
    optimizer = optimizer_class(list(parameters.values()), 0.3, weight_decay=0.05)
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        optimizer.step()
    oracle, _ = problem.solve()
    assert relative_error(parameters, oracle, problem) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("cls", OPTIMIZERS.values())
def test_positional_arguments_are_in_the_order_of_the_reference(cls: type[AdaptiveInertia]) -> None:
    group = cls([Parameter(torch.ones(2))], 0.5, (0.2, 0.9), 1e-2, 0.1).param_groups[0]
    assert tuple(group[key] for key in ("lr", "betas", "eps", "weight_decay")) == (0.5, (0.2, 0.9), 1e-2, 0.1)


@pytest.mark.parametrize("cls", OPTIMIZERS.values())
def test_arguments_that_the_reference_orders_inconsistently_are_keyword_only(cls: type[AdaptiveInertia]) -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        cls([Parameter(torch.ones(2))], 0.5, (0.2, 0.9), 1e-2, 0.1, True)  # type: ignore[misc]
    group = cls([Parameter(torch.ones(2))], 0.5, dampening=0.25, decoupled=True).param_groups[0]
    assert (group["dampening"], group["decoupled"]) == (0.25, True)


@pytest.mark.parametrize("trajectory", TRAJECTORIES, ids=lambda case: case.name)
def test_float64_follows_the_recorded_reference_to_rounding(trajectory: Trajectory) -> None:
    parameters = {name: Parameter(torch.tensor(value)) for name, value in trajectory.init.items()}
    groups = [
        trajectory.hyperparameters(k) | {"params": [parameters[name] for name in trajectory.names_of(k)]}
        for k in range(len(trajectory.groups))
    ]
    optimizer = {"Adai": Adai, "AdaiV2": AdaiV2}[trajectory.settings["optimizer"]](groups, lr=1.0)
    for gradients, expected in zip(trajectory.gradients, trajectory.parameters, strict=True):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name]) if name in gradients else None
        optimizer.step()
        for name, value in expected.items():
            # Measured: at most 2e-17, on parameters that move by 0.02.
            np.testing.assert_allclose(to_numpy(parameters[name]), value, rtol=0, atol=1e-16)
    for name, parameter in parameters.items():
        assert optimizer.state[parameter]["step"].item() == trajectory.final["step"][name]
        for part in ("exp_avg", "exp_avg_sq", "beta1_prod"):
            state = to_numpy(optimizer.state[parameter][part])
            np.testing.assert_allclose(state, trajectory.final[part][name], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["l2", "clipping", "maximize-decoupled"])
def test_gradients_are_never_written_to(name: str, dtype: torch.dtype) -> None:
    problem = replace(VARIANTS[name], dtype=dtype)
    parameters = problem.parameters()
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0, max_grad_norm=problem.max_grad_norm)
    for step in range(3):
        problem.set_gradients(parameters, step)
        before = {k: (p.grad, p.grad.clone(), p.grad._version) for k, p in parameters.items() if p.grad is not None}
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        for key, (grad, copy, version) in before.items():
            assert parameters[key].grad is grad
            assert grad._version == version
            assert torch.equal(grad, copy)


@pytest.mark.parametrize("name", ["l2", "dampening-0", "clipping", "mixed-groups", "clipping-l2-strong"])
def test_the_mean_is_that_of_the_states_after_the_step(name: str) -> None:
    """A step computes the mean before it updates the second moments, each of which float32 rounds."""
    problem = replace(VARIANTS[name], dtype=torch.float32, steps=30)
    parameters = problem.parameters()
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0, max_grad_norm=problem.max_grad_norm)
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        optimizer.step()
        total, count = 0.0, 0
        for group in optimizer.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = optimizer.state[p]
                total += state["exp_avg_sq"].double().sum().item() / (1 - group["betas"][1] ** state["step"].item())
                count += p.numel()
        assert optimizer.inertia_mean.item() == pytest.approx(total / count, rel=1e-6)


def test_the_mean_survives_the_cancellation_at_a_minimum_with_coupled_decay() -> None:
    """The gradient is the negative of the decay there, and their sum is rounding error only."""
    generator = torch.Generator().manual_seed(0)
    parameter = Parameter(torch.randn(50, generator=generator))
    target = torch.randn(50, generator=generator)
    optimizer = Adai([parameter], lr=0.5, weight_decay=0.1)
    for step in range(1500):
        parameter.grad = parameter.detach() - target
        optimizer.step()
        exp_avg_sq = optimizer.state[parameter]["exp_avg_sq"].double().sum().item()
        assert optimizer.inertia_mean.item() == pytest.approx(exp_avg_sq / 50 / (1 - 0.99 ** (step + 1)), rel=1e-3)
    torch.testing.assert_close(parameter.detach(), target / 1.1, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dampening", [1.0, 0.5, 0.0])
def test_three_thousand_steps_follow_the_oracle(dampening: float) -> None:
    groups = tuple(
        (hyper | {"dampening": dampening}, tuple(spec for spec in specs if spec.name != "b.large"))
        for hyper, specs in THREE_GROUPS.groups
    )
    problem = Problem(groups, steps=3000, dtype=torch.float32)
    oracle, _ = problem.solve()
    assert relative_error(solve(problem), oracle, problem) <= 2 * relative_error(
        solve_plainly(problem), oracle, problem
    )
