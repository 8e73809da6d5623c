"""The torch operators of the compiled kernels: schemas, fake implementations, and typed wrappers.

Loading ``csrc/adai_cpu.cpp`` or ``csrc/adai_cuda.cpp`` registers the implementations (:mod:`adai_dist.kernels.build`).
The tensors of a list are dense and on one device; parameters and gradients are float32, bfloat16 or float16, with one
dtype per list; states are all float32 or all bfloat16, or exp_avgs bfloat16 and the others uint8, as
:mod:`adai_dist.eight_bits` defines. Tensors may be empty, but the first list of an operator has at least one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adai_dist.equations import LocalTensors, SquaredNorms, StepScalars
from adai_dist.hyper import KERNEL_SCALARS, Hyper

_LIBRARY = torch.library.Library("adai_dist", "DEF")

_LIBRARY.define(
    "observe(Tensor[] grads, Tensor[] params, Tensor[] remainders, Tensor[] exp_avg_sqs, Tensor kept, "
    "Tensor coefficient, float coupled_decay) -> Tensor"
)
_LIBRARY.define(
    "advance(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] beta1_prods, Tensor(e!)[] remainders, Tensor inverse_means, Tensor coefficient, Tensor lr, "
    "Tensor is_finite, Tensor is_live, Tensor[] rounding, float[] hyper) -> Tensor"
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
    """Run :func:`adai_dist.equations.observe` and sum each exp_avg_sq, in one read of the gradients.

    Parameters are read under coupled decay only, and an exp_avg_sq only if it has changed since :func:`advance`.

    Args:
        kept: the result of :func:`advance`, or NaN to read every exp_avg_sq; float64, shape (shards, 2).

    Numerics: float64; the order of summation depends only on the number of elements.
    """
    params, remainders = (shards.param, shards.remainder) if hyper.coupled_decay else ([], [])
    columns = torch.ops.adai_dist.observe(
        shards.grad, params, remainders, shards.exp_avg_sq, kept, c, hyper.coupled_decay
    )
    grad_grad, v_sums, *with_params = columns.unbind(1)
    return SquaredNorms(grad_grad, *with_params), v_sums


def advance(shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> Tensor:
    """Run :func:`adai_dist.equations.advance` in one pass over memory, reading the scalars on the device.

    Returns:
        The sum of each new exp_avg_sq, and the sum of samples of it, by which the next :func:`observe` detects a
        change; float64, shape (shards, 2).

    Numerics: float32, every operation rounded separately; sums of what is stored, as in :func:`observe`.
    """
    return torch.ops.adai_dist.advance(*shards, *operator_order(scalars), kernel_scalars(hyper))


def sums(exp_avg_sqs: list[Tensor], kept: Tensor) -> Tensor:
    """Return the sum of each tensor, added in the order of :func:`advance`, so that a resumed run is bitwise the same.

    Args:
        kept: see :func:`observe`; a tensor that has not changed is not read.
    """
    return torch.ops.adai_dist.sums(exp_avg_sqs, kept)


def operator_order(scalars: StepScalars) -> tuple[Tensor | list[Tensor], ...]:
    """Return the scalars of a step as the arguments of the operator ``advance``."""
    rounding = [] if scalars.rounding is None else list(scalars.rounding)
    return scalars.inverse_means, scalars.coefficient, scalars.lr, scalars.is_finite, scalars.is_live, rounding


def kernel_scalars(hyper: Hyper) -> list[float]:
    """Return the argument ``hyper`` of the operator ``advance``."""
    return [getattr(hyper, name) for name in KERNEL_SCALARS]
