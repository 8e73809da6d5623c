"""The operators of the compiled kernels, as torch sees them: schemas, and what they return where nothing is computed.

``csrc/adai_cpu.cpp`` and ``csrc/adai_cuda.cpp`` bring the implementations when they are loaded
(:mod:`adai_dist.kernels.build`). Tensors of a list are on one device and dense; parameters and gradients are float32,
bfloat16 or float16, each list of one dtype; states are float32. Tensors may be empty; the first list of an operator is
not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adai_dist.equations import Shards, SquaredNorms, StepScalars
from adai_dist.hyper import Hyper

_LIBRARY = torch.library.Library("adai_dist", "DEF")

_LIBRARY.define("observe(Tensor[] grads, Tensor[] params) -> Tensor")
_LIBRARY.define(
    "advance(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] beta1_prods, Tensor inverse_means, Tensor coefficient, Tensor lr, Tensor is_finite, Tensor is_live, "
    "float[] hyper) -> Tensor"
)
_LIBRARY.define("sums(Tensor[] exp_avg_sqs) -> Tensor")


def _observe_fake(grads: list[Tensor], params: list[Tensor]) -> Tensor:
    del params
    return _float64(grads, 3)


def _advance_fake(params: list[Tensor], *_: object) -> Tensor:
    return _float64(params)


def _sums_fake(exp_avg_sqs: list[Tensor]) -> Tensor:
    return _float64(exp_avg_sqs)


def _float64(tensors: list[Tensor], *columns: int) -> Tensor:
    return torch.empty(len(tensors), *columns, dtype=torch.float64, device=tensors[0].device)


torch.library.register_fake("adai_dist::observe", _observe_fake)
torch.library.register_fake("adai_dist::advance", _advance_fake)
torch.library.register_fake("adai_dist::sums", _sums_fake)


def observe(shards: Shards, hyper: Hyper) -> SquaredNorms:
    """:func:`adai_dist.equations.observe` in one read of the gradients, and of the parameters where decay is coupled.

    Numerics: float64; the order of summation depends on the number of elements alone.
    """
    sums = torch.ops.adai_dist.observe(shards.grad, shards.param if hyper.coupled_decay else [])
    return SquaredNorms(*sums.unbind(1))


def advance(shards: Shards, hyper: Hyper, scalars: StepScalars) -> Tensor:
    """:func:`adai_dist.equations.advance` in one pass over memory; the scalars are read on the device.

    Numerics: float32, every operation rounded by itself; the sums as those of :func:`observe`.
    """
    return torch.ops.adai_dist.advance(*shards, *_packed(scalars), packed(hyper))


def sums(exp_avg_sqs: list[Tensor]) -> Tensor:
    """The sum of each tensor, added up in the order of :func:`advance`, so that a resumed run goes on to the bit."""
    return torch.ops.adai_dist.sums(exp_avg_sqs)


def _packed(scalars: StepScalars) -> tuple[Tensor, ...]:
    return scalars.inverse_means, scalars.coefficient, scalars.lr, scalars.is_finite, scalars.is_live


def packed(hyper: Hyper) -> list[float]:
    """The argument ``hyper`` of the operator ``advance``: its order is that of ``hyper_of`` in adai_arguments.h."""
    return [
        hyper.beta0,
        hyper.beta2,
        1.0 - hyper.beta2,
        1.0 - hyper.eps,
        hyper.coupled_decay,
        hyper.decoupled_decay,
        hyper.dampening,
        hyper.inertia_exponent,
        hyper.lr_factor,
    ]
