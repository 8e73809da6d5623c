"""The equations one by one, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import LocalTensors, StepScalars
from adai_dist.hyper import Hyper

HYPER = Hyper(lr=0.3, betas=(0.1, 0.97), eps=0.01, weight_decay=0.2, dampening=0.4)


def scalars(num_shards: int, live: bool = True, finite: bool = True, inverse_mean: float = 2.0) -> StepScalars:
    like = torch.zeros((), dtype=torch.float64)
    factor = inverse_mean if live else 0.0
    return StepScalars(
        coefficient=torch.full_like(like, 0.5),
        lr=torch.full_like(like, 0.3),
        is_finite=torch.tensor(finite),
        is_live=torch.tensor(live),
        inverse_means=torch.full((num_shards,), factor, dtype=torch.float64),
    )


def tensors(*seeds: int) -> list[Tensor]:
    return [torch.from_numpy(np.random.default_rng(seed).standard_normal(5)) for seed in seeds]


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99, 0.999999])
@pytest.mark.parametrize("t", [1, 2, 1000, 10**6])
def test_the_bias_correction_does_not_cancel(beta2: float, t: int) -> None:
    value = equations.bias_correction(beta2, torch.tensor(float(t))).item()
    exact = 1.0 if beta2 == 0 else -math.expm1(t * math.log(beta2))
    assert value == pytest.approx(exact, rel=1e-14)


def test_the_effective_gradient_leaves_gradient_and_parameter_unchanged() -> None:
    shards = LocalTensors(tensors(1), tensors(2), [], [], [])
    (g,) = equations.gradient(shards, HYPER, scalars(1).coefficient)
    np.testing.assert_allclose(g, 0.5 * tensors(2)[0] + 0.2 * tensors(1)[0], rtol=1e-15)
    assert torch.equal(shards.grad[0], tensors(2)[0])
    assert torch.equal(shards.param[0], tensors(1)[0])


def test_a_step_that_is_not_live_ignores_non_finite_gradients() -> None:
    bad = [torch.tensor([1.0, math.nan, math.inf], dtype=torch.float64)]
    shards = LocalTensors(*([torch.full((3,), 0.5, dtype=torch.float64)] for _ in range(5)))._replace(grad=bad)
    equations.advance(shards, Hyper(lr=0.3), scalars(1, live=False))
    for tensor in (*shards.param, *shards.exp_avg, *shards.exp_avg_sq, *shards.beta1_prod):
        assert torch.equal(tensor, torch.full_like(tensor, 0.5))


def test_inertia_is_the_papers_formula_and_stays_in_its_bounds() -> None:
    v = [torch.tensor([0.0, 1e-9, 0.3, 1.0, 1e9], dtype=torch.float64)]
    (beta1,) = equations.inertia(v, HYPER, scalars(1))
    expected = np.clip(1 - 0.1 * (2.0 * v[0].numpy()) ** (1 / (3 - 2 * 0.4)), 0, 1 - 0.01)
    np.testing.assert_allclose(beta1, expected, rtol=1e-15)
    assert beta1[0] == 0.99
    assert beta1[-1] == 0.0


def test_first_moment_product_and_update_are_the_papers_formulas() -> None:
    (beta1, m, g, theta, product) = (x.sigmoid() for x in tensors(1, 2, 3, 4, 5))
    new_m, new_theta, new_product = m.clone(), theta.clone(), product.clone()
    equations.inertia_product_([new_product], [beta1])
    equations.first_moment_([new_m], [beta1], [g], HYPER)
    equations.update_([new_theta], [new_m], [new_product], HYPER, scalars(1))
    np.testing.assert_allclose(new_product, product * beta1, rtol=1e-15)
    np.testing.assert_allclose(new_m, beta1 * m + (1 - beta1) ** 0.4 * g, rtol=1e-14)
    np.testing.assert_allclose(new_theta, theta - 0.3 * 0.1**0.6 * new_m / (1 - new_product), rtol=1e-14)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_that_is_not_live_changes_no_bit_of_the_states(decoupled: bool) -> None:
    hyper = Hyper(lr=0.3, weight_decay=0.2, decoupled=decoupled)
    shards = LocalTensors(*([x.abs()] for x in tensors(1, 2, 3, 4, 5)))
    before = [x[0].clone() for x in shards[:5]]
    equations.advance(shards, hyper, scalars(1, live=False, finite=False))
    assert all(torch.equal(x[0], y) for x, y in zip(shards[:5], before, strict=True))


@pytest.mark.parametrize("foresight", ["none", "of last step", "perfect"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_sum_of_v_follows_from_inner_products_alone(decay: float, maximize: bool, foresight: str) -> None:
    """The recursion behind the single pass holds over 2,000 steps with clipping, decay and heavy-tailed gradients."""
    hyper = Hyper(lr=0.1, betas=(0.1, 0.99), weight_decay=decay, maximize=maximize)
    rng = np.random.default_rng(0)
    theta = torch.from_numpy(rng.standard_normal(300).astype(np.float32))
    v = torch.zeros(300)
    worst, c = 0.0, torch.ones((), dtype=torch.float64)
    for t in range(1, 2001):
        gradient = torch.from_numpy(rng.standard_t(2, 300).astype(np.float32))
        last, c = c, torch.full_like(c, 0.25 + 0.5 * (t % 2))
        expected = {"none": torch.ones_like(c), "of last step": last, "perfect": c}[foresight]
        correction = equations.bias_correction(0.99, torch.tensor([float(t)]))
        norms = equations.observe(LocalTensors([theta], [gradient], [], [], []), hyper, (hyper.sign * expected).float())
        terms = equations.mean_terms(norms, equations.sums([v]), correction, hyper, expected, torch.float32)
        predicted = equations.mean_sum(terms, c, expected)
        g = hyper.sign * c.float() * gradient + decay * theta
        v.mul_(0.99).addcmul_(g, g, value=0.01)
        direct = v.double().sum() / correction
        worst = max(worst, abs(predicted / direct - 1).item())
    assert worst < 1.5e-7  # one float32 rounding of v; measured: 3e-8


@pytest.mark.parametrize("c", [1.0, 0.7, 0.7 + 1e-9])
def test_the_sum_is_expanded_around_the_expected_coefficient_if_gradient_and_decay_cancel(c: float) -> None:
    """Gradients leave 1e-9 of the products in float64; expanded into products, half of these digits are noise."""
    hyper = Hyper(lr=0.1, betas=(0.1, 0.0), weight_decay=0.5)
    theta = torch.from_numpy(np.random.default_rng(0).standard_normal(1000))
    rest = 1e-9 * torch.from_numpy(np.random.default_rng(1).standard_normal(1000))
    gradient = (rest - 0.5 * theta) / 0.7
    expected, coefficient = (torch.tensor(x, dtype=torch.float64) for x in (0.7, c))
    norms = equations.observe(LocalTensors([theta], [gradient], [], [], []), hyper, expected)
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    terms = equations.mean_terms(norms, nothing, one, hyper, expected, torch.float64)
    found = equations.mean_sum(terms, coefficient, expected).item()
    assert found == pytest.approx((c * gradient + 0.5 * theta).square().sum().item(), rel=1e-6)
