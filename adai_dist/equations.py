"""Adaptive Inertia in plain PyTorch, one function per equation: the specification, and the backend without a compiler.

Z. Xie, X. Wang, H. Zhang, I. Sato, M. Sugiyama: *Adaptive Inertia: Disentangling the Effects of Adaptive Learning Rate
and Momentum*, ICML 2022, https://arxiv.org/abs/2006.15815. AdaiV2 is from the authors' code,
https://github.com/zeke-xie/adaptive-inertia-adai.

One step of one parameter group::

    g      =  c * gradient  (+ weight_decay * theta, coupled)      gradient
    theta <-  theta * (1 - lr * weight_decay)        (decoupled)   decay_
    v     <-  beta2 * v + (1 - beta2) * g^2                        second_moment_
    r      =  v / (1 - beta2^t) / vbar                             bias_correction, inertia
    beta1  =  clamp(1 - beta0 * r^(1 / (3 - 2 d)), 0, 1 - eps)     inertia
    P     <-  P * beta1                                            inertia_product_
    m     <-  beta1 * m + (1 - beta1)^d * g                        first_moment_
    theta <-  theta - lr * beta0^(1 - d) * m / (1 - P)             update_

``vbar`` is the mean of ``v / (1 - beta2^t)`` over all elements of all parameters in all parameter groups on all ranks.
It is known before v is updated, because the sum of v obeys a recursion (:func:`mean_terms`)::

    sum(v) <- beta2 * sum(v) + (1 - beta2) * ||g||^2

Legend:

========  =============  ============================================================================================
symbol    state name     meaning
========  =============  ============================================================================================
theta                    parameter
g                        effective gradient; c is the clip coefficient over the loss scale, negative under maximize
v         exp_avg_sq     second moment
m         exp_avg        first moment, the momentum
P         beta1_prod     product of all inertias so far
t         step           number of steps of this parameter that count
d                        dampening; 1 is Adai
========  =============  ============================================================================================

Differences from the authors' code:

1. While vbar is 0 (only zero gradients so far), inertia is undefined. Such a step applies decoupled decay to theta,
   changes no state and does not count (in the authors' code, every parameter becomes NaN). The same holds for a step
   with zero gradients and zero learning rate before the first step that counts: checkpoint libraries take one to
   initialise the states, and under coupled decay it would otherwise change them.
2. Arithmetic is at least float32, and states are unless requested otherwise; in fewer bits, parameters and states are
   rounded stochastically or keep a remainder, and ``1 - P`` is stored instead of P, which rounds to 1
   (:mod:`adai_dist.storage`).
3. The gradient is never modified. The authors' code adds the coupled decay to it in place.
4. A non-finite gradient on any rank skips the step on all ranks, as does a gradient whose square overflows float32.

All functions take lists of tensors on one device; a trailing underscore marks in-place modification of the first
argument. No function reads a device tensor on the host.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from adai_dist.hyper import Hyper
from adai_dist.rounding import Rounding

Tensors = list[Tensor]

CANCELLED = 1e-6
"""Largest ratio of a float64 sum to its terms that counts as cancellation: half of the digits are lost."""


class LocalTensors(NamedTuple):
    """Local tensors stepped with the same hyperparameters: one entry of equal shapes per shard, in real dtypes.

    All parameters have one floating-point dtype, as have all gradients. In the functions of this file, parameters and
    states have the compute dtype (:func:`compute_dtype`); :mod:`adai_dist.storage` converts those in fewer bits.
    """

    param: Tensors
    grad: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors
    """In 8 bits, records instead of one entry per element (:mod:`adai_dist.eight_bits`)."""
    beta1_prod: Tensors
    """Empty once all products are retired, that is, so small that ``1 - P`` is 1. In bfloat16 and 8 bits, ``1 - P``."""
    remainder: Tensors = []  # noqa: RUF012 a NamedTuple copies no default, and nothing writes to lists of tensors
    """The remainders of master weights, int16 (:func:`adai_dist.rounding.split`); empty without."""


class StepScalars(NamedTuple):
    """Scalar inputs of a step: 0-dim tensors of the compute dtype on the device of the shards."""

    coefficient: Tensor
    """The factor c of every gradient, negative under maximize."""
    lr: Tensor
    is_finite: Tensor
    """Whether all gradients on all ranks are finite; bool."""
    is_live: Tensor
    """Whether gradients are finite and vbar > 0; bool. Otherwise moments, products and inertia do not change."""
    inverse_means: Tensor
    """``1 / (1 - beta2^t) / vbar`` of each shard, shape (number of shards,); 0 if the step is not live."""
    rounding: Rounding | None = None
    """Required by states in fewer bits than float32, and by 16-bit parameters without master weights."""

    def of_shards(self, shards: list[int]) -> StepScalars:
        """Return the scalars for some of the shards, which may repeat."""
        if shards == list(range(len(self.inverse_means))):
            return self
        inverse_means = _selected(self.inverse_means, shards)
        rounding = None if self.rounding is None else Rounding(*(_selected(x, shards) for x in self.rounding))
        return self._replace(inverse_means=inverse_means, rounding=rounding)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype of arithmetic and states for a parameter dtype: float32, or float64 for wider dtypes."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def scalar_tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """Convert ``value`` to a 0-dim tensor with the device and dtype of ``like``, without a read on the host."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().reshape(()).to(like.device, like.dtype)
    return torch.full((), float(value), device=like.device, dtype=like.dtype)


def bias_correction(beta2: float, t: Tensor) -> Tensor:
    """Return ``1 - beta2^t`` in float64, without cancellation."""
    return -torch.expm1(t.double() * (math.log(beta2) if beta2 > 0 else -math.inf))


def gradient(shards: LocalTensors, hyper: Hyper, c: Tensor) -> Tensors:
    """``g = c * gradient (+ weight_decay * theta)``, as new tensors of the compute dtype, which is that of c."""
    g = list(torch._foreach_mul([grad.to(c.dtype) for grad in shards.grad], c))
    if hyper.coupled_decay:
        torch._foreach_add_(g, [param.to(c.dtype) for param in shards.param], alpha=hyper.coupled_decay)
    return g


def decay_(theta: Tensors, hyper: Hyper, scalars: StepScalars) -> None:
    """``theta <- theta * (1 - lr * weight_decay)``, decoupled; a no-op if a gradient is non-finite."""
    if hyper.decoupled_decay:
        torch._foreach_mul_(theta, 1.0 - scalars.lr * scalars.is_finite * hyper.decoupled_decay)


def second_moment_(v: Tensors, g: Tensors, hyper: Hyper, scalars: StepScalars) -> None:
    """``v <- beta2 * v + (1 - beta2) * g^2``"""
    torch._foreach_mul_(v, _or_one(hyper.beta2, scalars))
    torch._foreach_addcmul_(v, g, g, value=1.0 - hyper.beta2)


def inertia(v: Tensors, hyper: Hyper, scalars: StepScalars) -> Tensors:
    """``beta1 = clamp(1 - beta0 * r^(1 / (3 - 2 d)), 0, 1 - eps)``; 1 if the step is not live, so that m and P stay."""
    beta1 = list(torch._foreach_mul(v, list(scalars.inverse_means.unbind())))
    if hyper.inertia_exponent != 1.0:
        torch._foreach_pow_(beta1, hyper.inertia_exponent)
    torch._foreach_mul_(beta1, -hyper.beta0)
    torch._foreach_add_(beta1, 1.0)
    torch._foreach_clamp_min_(beta1, 0.0)
    torch._foreach_clamp_max_(beta1, 1.0 - hyper.eps)
    _fill_unless_(beta1, scalars.is_live, 1.0)
    return beta1


def inertia_product_(P: Tensors, beta1: Tensors) -> None:
    """``P <- P * beta1``; a no-op if P is retired."""
    if P:
        torch._foreach_mul_(P, beta1)


def first_moment_(m: Tensors, beta1: Tensors, g: Tensors, hyper: Hyper) -> None:
    """``m <- beta1 * m + (1 - beta1)^d * g``"""
    torch._foreach_mul_(m, beta1)
    if hyper.dampening == 0.0:
        torch._foreach_add_(m, g)
        return
    one_minus_beta1 = _one_minus(beta1)
    if hyper.dampening != 1.0:
        torch._foreach_pow_(one_minus_beta1, hyper.dampening)
    torch._foreach_addcmul_(m, one_minus_beta1, g)


def update_(theta: Tensors, m: Tensors, P: Tensors, hyper: Hyper, scalars: StepScalars) -> None:
    """``theta <- theta - lr * beta0^(1 - d) * m / (1 - P)``, with 1 - P = 1 if P is retired; a no-op if not live."""
    step_size = scalars.lr * -hyper.lr_factor
    if P:
        one_minus_P = _one_minus(P)
        # 1 - P >= eps after a step that counted; before the first one, both 1 - P and m are 0.
        torch._foreach_clamp_min_(one_minus_P, torch.finfo(P[0].dtype).tiny)
        update = list(torch._foreach_div(m, one_minus_P))
        torch._foreach_mul_(update, step_size)
    else:
        update = list(torch._foreach_mul(m, step_size))
    _fill_unless_(update, scalars.is_live, 0.0)  # m may be NaN, and 0 * NaN is not 0
    torch._foreach_add_(theta, update)


def advance(shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> None:
    """Take one step of all equations above, in place on parameters and states.

    Temporary memory: four tensors of the total size of the shards.
    """
    theta = shards.param
    g = gradient(shards, hyper, scalars.coefficient)
    _fill_unless_(g, scalars.is_live, 0.0)
    decay_(theta, hyper, scalars)
    second_moment_(shards.exp_avg_sq, g, hyper, scalars)
    beta1 = inertia(shards.exp_avg_sq, hyper, scalars)
    inertia_product_(shards.beta1_prod, beta1)
    first_moment_(shards.exp_avg, beta1, g, hyper)
    update_(theta, shards.exp_avg, shards.beta1_prod, hyper, scalars)


class SquaredNorms(NamedTuple):
    """Inner products, one float64 per shard; the last three are 0 without coupled decay."""

    grad_grad: Tensor
    """``<gradient, gradient>`` of the raw gradient."""
    grad_param: Tensor
    param_param: Tensor
    expected: Tensor
    """``<g, g>`` of the effective gradient at the expected coefficient, with the rounding of a step."""


def observe(shards: LocalTensors, hyper: Hyper, c: Tensor) -> SquaredNorms:
    """Return the inner products of the raw gradients, and under coupled decay those with the parameters, per shard.

    Args:
        c: expected coefficient; 0-dim, of the compute dtype.
    """
    grad_grad = _norms(shards.grad, 2).square()
    if not hyper.coupled_decay:
        nothing = torch.zeros_like(grad_grad)
        return SquaredNorms(grad_grad, nothing, nothing, nothing)
    products = [(g.double() * p.double()).sum() for g, p in zip(shards.grad, shards.param, strict=True)]
    expected = _norms(gradient(shards, hyper, c), 2).square()
    return SquaredNorms(grad_grad, torch.stack(products), _norms(shards.param, 2).square(), expected)


def sums(v: Tensors) -> Tensor:
    """Return ``sum(v)`` of non-negative v, one float64 per shard; the order of summation depends only on the shape."""
    return _norms(v, 1)


class MeanTerms(NamedTuple):
    """Contributions of shards to ``sum(v / (1 - beta2^t))``, before c is known; float64. See :func:`mean_sum`."""

    carried: Tensor
    quadratic: Tensor
    linear: Tensor
    constant: Tensor
    expected: Tensor


def mean_terms(
    norms: SquaredNorms, v_sum: Tensor, correction: Tensor, hyper: Hyper, c: Tensor, dtype: torch.dtype
) -> MeanTerms:
    """Return the contribution of each shard to vbar, before v is updated and before c is known.

    Args:
        norms: result of :func:`observe`.
        v_sum: ``sum(v)`` before this step, float64, shape (number of shards,).
        correction: ``1 - beta2^t`` of this step, float64, shape (number of shards,).
        c: expected coefficient, as passed to :func:`observe`; 0-dim, float64.
        dtype: dtype of v, to which a step rounds beta2 and ``1 - beta2``.
    """
    gain = _rounded(1.0 - hyper.beta2, dtype) / correction
    carried, quadratic = _rounded(hyper.beta2, dtype) * v_sum / correction, gain * norms.grad_grad
    decay = hyper.coupled_decay
    if not decay:
        nothing = torch.zeros_like(gain)
        return MeanTerms(carried, quadratic, nothing, nothing, c * c * quadratic)
    linear = gain * (2.0 * decay * hyper.sign) * norms.grad_param
    return MeanTerms(carried, quadratic, linear, gain * decay**2 * norms.param_param, gain * norms.expected)


def mean_sum(terms: MeanTerms, c: Tensor, expected: Tensor) -> Tensor:
    """Return ``sum(v / (1 - beta2^t))`` after this step: ``sum(v) <- beta2 * sum(v) + (1 - beta2) * ||g||^2``.

    ``||g||^2`` is expanded into inner products, because c depends on the norm of all gradients. Near convergence under
    coupled decay, ``c * gradient`` and ``weight_decay * theta`` cancel, and rounding errors would dominate the sum.
    ``||g||^2`` is then expanded around its value at the expected coefficient, which has the rounding of a step.

    Args:
        c: coefficient of the gradients, >= 0; 0-dim, float64.
        expected: expected coefficient, as passed to :func:`observe`; 0-dim, float64.
    """
    squares = c * c * terms.quadratic + terms.constant
    expanded = squares + c * terms.linear
    around_expected = terms.expected + (c - expected) * ((c + expected) * terms.quadratic + terms.linear)
    is_cancelled = expanded <= CANCELLED * squares
    return terms.carried + torch.where(is_cancelled, around_expected.clamp(min=0.0), expanded)


def _selected(x: Tensor, rows: list[int]) -> Tensor:
    return torch.stack([x[row] for row in rows])  # indexing by a list would copy it to the device, and wait


def _norms(tensors: Tensors, order: int) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, order, dtype=torch.float64))


def _one_minus(x: Tensors) -> Tensors:
    y = list(torch._foreach_neg(x))
    torch._foreach_add_(y, 1.0)
    return y


@functools.lru_cache
def _rounded(x: float, dtype: torch.dtype) -> float:
    return torch.tensor(x, dtype=dtype).item()


def _fill_unless_(tensors: Tensors, condition: Tensor, value: float) -> None:
    otherwise = ~condition
    for x in tensors:
        x.masked_fill_(otherwise, value)


def _or_one(factor: float, scalars: StepScalars) -> Tensor:
    one = torch.ones_like(scalars.lr)
    return torch.where(scalars.is_live, factor * one, one)
