"""The operators of the compiled kernels, as torch sees them: schemas, and what they return where nothing is computed.

``csrc/adai_cpu.cpp`` and ``csrc/adai_cuda.cpp`` bring the implementations when they are loaded
(:mod:`adai_dist.kernels.build`). Tensors of a list are on one device and dense; parameters and gradients are float32,
bfloat16 or float16, each list of one dtype; states are float32. Tensors may be empty; the first list of an operator is
not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adai_dist.equations import LocalTensors, SquaredNorms, StepScalars
from adai_dist.hyper import Hyper

_LIBRARY = torch.library.Library("adai_dist", "DEF")

_LIBRARY.define(
    "observe(Tensor[] grads, Tensor[] params, Tensor[] exp_avg_sqs, Tensor kept, Tensor coefficient, "
    "float coupled_decay) -> Tensor"
)
_LIBRARY.define(
    "advance(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] beta1_prods, Tensor inverse_means, Tensor coefficient, Tensor lr, Tensor is_finite, Tensor is_live, "
    "float[] hyper) -> Tensor"
)
_LIBRARY.define("sums(Tensor[] exp_avg_sqs, Tensor kept) -> Tensor")


def _observe_fake(grads: list[Tensor], *_: object) -> Tensor:
    return _float64(grads, 5)


def _advance_fake(params: list[Tensor], *_: object) -> Tensor:
    return _float64(params, 2)


def _sums_fake(exp_avg_sqs: list[Tensor], kept: Tensor) -> Tensor:
    del kept
    return _float64(exp_avg_sqs)


def _float64(tensors: list[Tensor], *columns: int) -> Tensor:
    return torch.empty(len(tensors), *columns, dtype=torch.float64, device=tensors[0].device)


torch.library.register_fake("adai_dist::observe", _observe_fake)
torch.library.register_fake("adai_dist::advance", _advance_fake)
torch.library.register_fake("adai_dist::sums", _sums_fake)


def observe(shards: LocalTensors, hyper: Hyper, c: Tensor, kept: Tensor) -> tuple[SquaredNorms, Tensor]:
    """:func:`adai_dist.equations.observe`, and the sums of exp_avg_sq; one read of the gradients.

    With coupled decay parameters are read, too, and exp_avg_sq where it is not what :func:`advance` has left.

    Args:
        kept: what :func:`advance` returned, or NaN where there is nothing to go by; float64, shape (shards, 2).

    Numerics: float64; the order of summation depends on the number of elements alone.
    """
    params = shards.param if hyper.coupled_decay else []
    columns = torch.ops.adai_dist.observe(shards.grad, params, shards.exp_avg_sq, kept, c, hyper.coupled_decay)
    grad_grad, v_sums, *with_params = columns.unbind(1)
    return SquaredNorms(grad_grad, *with_params), v_sums


def advance(shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> Tensor:
    """:func:`adai_dist.equations.advance` in one pass over memory; the scalars are read on the device.

    Returns:
        For each shard the sum of the new exp_avg_sq, and that of some of its elements, by which the next
        :func:`observe` recognises it; float64, shape (shards, 2).

    Numerics: float32, every operation rounded by itself; the sums as those of :func:`observe`.
    """
    return torch.ops.adai_dist.advance(*shards, *_packed(scalars), packed(hyper))


def sums(exp_avg_sqs: list[Tensor], kept: Tensor) -> Tensor:
    """The sum of each tensor, added up in the order of :func:`advance`, so that a resumed run goes on to the bit.

    Args:
        kept: as for :func:`observe`; where it holds, the tensor is not read.
    """
    return torch.ops.adai_dist.sums(exp_avg_sqs, kept)


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
