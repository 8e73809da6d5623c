"""Comparison of the oracle with recorded runs of the reference implementation and with closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracle import Array, Observation, Oracle, OracleGroup
from tests.trajectories import TRAJECTORIES, Trajectory

STEPS = 40


def oracle_of(trajectory: Trajectory) -> Oracle:
    groups = [
        OracleGroup(trajectory.names_of(k), **trajectory.hyperparameters(k)) for k in range(len(trajectory.groups))
    ]
    return Oracle(trajectory.init, groups)


def single(theta: Array, **hyperparameters: object) -> Oracle:
    return Oracle({"w": theta}, [OracleGroup(("w",), **hyperparameters)])  # type: ignore[arg-type]


@pytest.mark.parametrize("trajectory", TRAJECTORIES, ids=lambda case: case.name)
def test_the_oracle_follows_the_reference_to_rounding(trajectory: Trajectory) -> None:
    oracle = oracle_of(trajectory)
    for gradients, parameters in zip(trajectory.gradients, trajectory.parameters, strict=True):
        oracle.step(gradients)
        for name, expected in parameters.items():
            # Measured: 1.0e-17 at worst, on parameters that move by 0.02.
            np.testing.assert_allclose(oracle.parameters[name], expected, rtol=0, atol=5e-17)
    for name, state in oracle.states.items():
        assert state.step == trajectory.final["step"][name]
        for part in ("exp_avg", "exp_avg_sq", "beta1_prod"):
            np.testing.assert_allclose(getattr(state, part), trajectory.final[part][name], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dampening", [1.0, 0.5, 0.0])
def test_alternating_gradients_give_constant_inertia_and_a_closed_form(dampening: float) -> None:
    """If g_t = (-1)^(t-1) G, the corrected second moment is G^2 for all t, so beta1 is constant."""
    size = np.array([0.1, 1.0, 2.0, 3.0])
    lr, beta0, eps = 0.3, 0.1, 1e-3
    oracle = single(np.zeros(4), lr=lr, betas=(beta0, 0.99), eps=eps, dampening=dampening)
    beta1 = np.clip(1 - beta0 * (size**2 / np.mean(size**2)) ** (1 / (3 - 2 * dampening)), 0, 1 - eps)
    theta = np.zeros(4)
    for t in range(1, STEPS + 1):
        seen = oracle.step({"w": (-1) ** (t - 1) * size})
        # m_t = (1 - beta1)^d * G * sum over s of beta1^(t-s) (-1)^(s-1), a geometric series.
        m = (1 - beta1) ** dampening * size * ((-1) ** (t - 1) + beta1**t) / (1 + beta1)
        theta = theta - lr * beta0 ** (1 - dampening) * m / (1 - beta1**t)
        assert seen.mean == pytest.approx(np.mean(size**2), rel=1e-14)
        np.testing.assert_allclose(oracle.states["w"].beta1_prod, beta1**t, rtol=1e-13)
        np.testing.assert_allclose(oracle.states["w"].exp_avg, m, rtol=0, atol=1e-15)
        np.testing.assert_allclose(oracle.parameters["w"], theta, rtol=0, atol=1e-14)


def test_the_largest_second_moment_gets_the_least_inertia() -> None:
    """An inverted ratio would fail this test."""
    oracle = single(np.zeros(2), lr=1.0)
    oracle.step({"w": np.array([0.5, 2.0])})
    slow, fast = oracle.states["w"].beta1_prod
    assert slow > 0.97
    assert fast < 0.85


def test_initial_steps_with_zero_gradients_have_no_effect() -> None:
    gradient = np.array([1.0, -2.0, 3.0])
    with_zeros, without = single(np.ones(3), lr=0.5), single(np.ones(3), lr=0.5)
    for _ in range(3):
        assert with_zeros.step({"w": np.zeros(3)}) == Observation(0.0, 0.0, undefined=True)
    for _ in range(5):
        with_zeros.step({"w": gradient})
        without.step({"w": gradient})
    assert with_zeros.states["w"].step == 5
    np.testing.assert_array_equal(with_zeros.parameters["w"], without.parameters["w"])


def test_a_step_of_zero_gradients_still_decays_when_decoupled() -> None:
    oracle = single(np.ones(3), lr=0.5, weight_decay=0.1, decoupled=True)
    oracle.step({"w": np.zeros(3)})
    np.testing.assert_array_equal(oracle.parameters["w"], np.full(3, 0.95))


def test_zero_gradients_after_real_ones_count_as_steps() -> None:
    oracle = single(np.ones(3), lr=0.5)
    oracle.step({"w": np.ones(3)})
    assert not oracle.step({"w": np.zeros(3)}).undefined
    assert oracle.states["w"].step == 2


def test_a_non_finite_gradient_leaves_everything_as_it_was() -> None:
    oracle = single(np.ones(3), lr=0.5, weight_decay=0.1, decoupled=True)
    assert oracle.step({"w": np.array([1.0, np.inf, 0.0])}).skipped
    np.testing.assert_array_equal(oracle.parameters["w"], np.ones(3))
    assert oracle.states["w"].step == 0


def test_a_parameter_without_gradient_is_left_out_of_sum_and_count() -> None:
    groups = [OracleGroup(("a", "b"), lr=0.1)]
    oracle = Oracle({"a": np.zeros(2), "b": np.zeros(6)}, groups)
    assert oracle.step({"a": np.array([1.0, 3.0])}).mean == pytest.approx(5.0)
    assert oracle.step({"a": np.array([1.0, 3.0]), "b": np.zeros(6)}).mean == pytest.approx(10 / 8)
    assert (oracle.states["a"].step, oracle.states["b"].step) == (2, 1)


def test_observing_changes_nothing() -> None:
    oracle = single(np.ones(3), lr=0.5, weight_decay=0.1)
    gradients = {"w": np.array([1.0, 2.0, 3.0])}
    seen = oracle.observe(gradients)
    assert oracle.states["w"].step == 0
    np.testing.assert_array_equal(oracle.parameters["w"], np.ones(3))
    assert oracle.step(gradients) == seen


def test_clipping_scales_the_gradient_but_not_the_decay() -> None:
    gradient = np.array([3.0, 4.0])
    clipped = single(np.ones(2), lr=0.5, weight_decay=0.1)
    clipped.max_grad_norm = 1.0
    scaled = single(np.ones(2), lr=0.5, weight_decay=0.1)
    assert clipped.step({"w": gradient}).grad_norm == 5.0
    scaled.step({"w": gradient * (1.0 / (5.0 + 1e-6))})
    np.testing.assert_array_equal(clipped.parameters["w"], scaled.parameters["w"])
    np.testing.assert_array_equal(gradient, [3.0, 4.0])


def test_maximize_climbs_where_the_default_descends() -> None:
    down, up = single(np.zeros(3), lr=0.5), single(np.zeros(3), lr=0.5, maximize=True)
    for step in range(4):
        gradient = np.array([1.0, 2.0, step])
        down.step({"w": gradient})
        up.step({"w": gradient})
    np.testing.assert_array_equal(up.parameters["w"], -down.parameters["w"])


def test_complex_numbers_are_pairs_of_real_ones() -> None:
    oracle = single(np.array([1.0 + 2.0j, 3.0 - 1.0j]), lr=0.5)  # type: ignore[arg-type]
    assert oracle.parameters["w"].shape == (2, 2)
    assert oracle.step({"w": np.array([1.0 + 1.0j, 0.0 + 2.0j])}).mean == pytest.approx(6 / 4)
