"""The only collective of a step: an all-reduce of the sums from which the global mean is computed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adai_dist.equations import MeanTerms, StepScalars, mean_sum, scalar_tensor
from adai_dist.hyper import Hyper
from adai_dist.sharding.missing_gradients import CHECKSUM_MODULUS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CLIP_EPS = 1e-6
"""Added to the norm in the clip coefficient, as :func:`torch.nn.utils.clip_grad_norm_` does."""

LR_SIGNAL = 2.0**-10
"""Contribution of one optimizer, over all ranks, to the fraction of the signals; up to 512 may share a mean."""

FLOAT64_MAX, FLOAT32_MAX = torch.finfo(torch.float64).max, torch.finfo(torch.float32).max


class Sums(NamedTuple):
    """The 8 numbers (float64, 0-dim: 64 bytes) that are all-reduced; every element of the model counts once.

    The middle five are :class:`adai_dist.equations.MeanTerms`, summed over all shards.
    """

    grad_squared: Tensor
    """Squared norm of the raw gradients, neither unscaled nor clipped; infinite if a gradient scaler found a non-finite
    gradient."""
    carried: Tensor
    quadratic: Tensor
    linear: Tensor
    constant: Tensor
    expected: Tensor
    num_elements: Tensor
    """Number of real elements with a gradient in this step."""
    signals: Tensor
    """Integer part: the checksum of :mod:`adai_dist.sharding.missing_gradients`, which shows gradients that are missing
    on some ranks only; ZeRO's is that of its reduced gradients. Fraction: 0 if all learning rates are 0."""

    @classmethod
    def of_refusal(cls, device: torch.device) -> Sums:
        """Return the sums of a rank that must not step: NaN, so that the other ranks raise instead of waiting."""
        return cls(*torch.full((len(cls._fields),), torch.nan, dtype=torch.float64, device=device).unbind())

    def are_refused(self) -> bool:
        """Return whether a rank has refused to step; the host waits for the device."""
        return bool(self.num_elements.isnan())  # otherwise finite, whatever the gradients are

    def added_up(self, process_groups: tuple[ProcessGroup, ...]) -> Sums:
        """Return the sums over the ranks of the process groups. Collective: as :func:`all_reduce`."""
        return Sums(*all_reduce(torch.stack(self), process_groups).unbind()) if process_groups else self

    def plus(self, other: Sums) -> Sums:
        """Return the sums of both, on the device of ``self``."""
        return Sums(*(a + b.to(a.device) for a, b in zip(self, other, strict=True)))


class GlobalMean(NamedTuple):
    """The result of the collective, the same on every rank; 0-dim float64 tensors unless noted."""

    coefficient: Tensor
    """Factor of every gradient: the clip coefficient over the loss scale."""
    grad_norm: Tensor
    """Global norm of the gradients, unscaled, before clipping."""
    inertia_mean: Tensor
    """vbar: mean over all elements of the bias-corrected second moment, this step's gradient included."""
    is_finite: Tensor
    """bool: the step is taken, as there are none of the faults below."""
    is_live: Tensor
    """bool: finite, and the mean is > 0; otherwise the step does not count."""
    is_undefined: Tensor
    """bool: the mean is 0 because all gradients so far are 0. False in a state-initialisation step (no gradient and no
    learning rate)."""
    faults: Tensor
    """bool, shape (5,): reasons to skip the step. The sum of gradients, of states, or of parameters (under coupled
    decay) is not finite; a gradient is missing on some ranks only, which ZeRO then mixes with others; the sum of
    the new second moments is not finite or overflows float32."""

    def to(self, device: torch.device) -> GlobalMean:
        """Return a copy on ``device``, for models that span several devices."""
        return GlobalMean(*(x.to(device) for x in self))

    def step_scalars(self, hyper: Hyper, correction: Tensor, dtype: torch.dtype) -> StepScalars:
        """Return the scalars of a step for one parameter group, in the dtype of its arithmetic.

        Args:
            correction: ``1 - beta2^t``, float64, shape (number of shards,).
        """
        inverse_means = torch.where(self.is_live, 1.0 / (correction * self.inertia_mean), 0.0)
        # A mean below float32's range would make the factor infinite, and 0 * inf is NaN.
        inverse_means = inverse_means.clamp(max=torch.finfo(dtype).max).to(dtype)
        coefficient = (hyper.sign * self.coefficient).to(dtype)
        return StepScalars(
            coefficient=coefficient,
            lr=scalar_tensor(hyper.lr, coefficient),
            is_finite=self.is_finite,
            is_live=self.is_live,
            inverse_means=inverse_means,
        )


def global_mean(
    local_sums: Sums,
    process_groups: tuple[ProcessGroup, ...],
    *,
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    expected: Tensor | None = None,
) -> GlobalMean:
    """All-reduce the sums and compute clip coefficient and mean from them, identically on every rank.

    Args:
        local_sums: the sums of this rank; zeros if it holds no elements, as every rank must take part.
        process_groups: see :class:`adai_dist.sharding.plan.ShardingPlan`.
        max_norm: bound of the global gradient norm.
        grad_scale: loss scale by which the gradients are still multiplied; 0-dim.
        expected: the coefficient for which the sums were computed; by default 1 over the loss scale.

    Collective: all ranks of each process group, in order; one all-reduce of 64 bytes per process group.

    Numerics: float64.
    """
    sums = local_sums.added_up(process_groups)
    unscaling = unscaling_coefficient(grad_scale, sums.signals.device)
    grad_norm = sums.grad_squared.sqrt() * unscaling
    c = unscaling if max_norm is None else unscaling * (max_norm / (grad_norm + CLIP_EPS)).clamp(max=1.0)
    return evaluate(sums, grad_norm, c, unscaling if expected is None else expected)


def unscaling_coefficient(grad_scale: Tensor | None, device: torch.device) -> Tensor:
    """Return 1 over the loss scale, the coefficient of unclipped gradients; 0-dim float64, on ``device``."""
    if grad_scale is None:
        return torch.ones((), dtype=torch.float64, device=device)
    return 1.0 / grad_scale.to(device, torch.float64).reshape(())


def evaluate(sums: Sums, grad_norm: Tensor, c: Tensor, expected: Tensor) -> GlobalMean:
    """Compute the mean from sums over all ranks.

    Args:
        grad_norm: global norm to report; 0-dim float64.
        c: factor of every gradient, clip coefficient over loss scale; 0-dim float64.
        expected: the factor for which the sums were computed, see :func:`adai_dist.equations.mean_sum`.

    Collective: none.
    """
    total = mean_sum(MeanTerms(*sums[1:6]), c, expected)
    # Neither gradients so far nor a learning rate: a state-initialisation step (DCP makes one), not training.
    is_idle = ~torch.stack([sums.grad_squared, sums.carried, sums.signals.frac()]).any()
    is_undefined = (total == 0) & ~is_idle
    total = torch.where(is_idle, 0.0, total)
    mean = total / sums.num_elements.clamp(min=1.0)
    # A second moment that overflows float32 would stay inf.
    checked = torch.stack([sums.grad_squared, sums.carried, sums.constant, sums.signals % CHECKSUM_MODULUS, total])
    faults = checked.clamp(*_bounds(checked.device)) != checked  # NaN differs from everything
    is_finite = ~faults.any()
    return GlobalMean(
        coefficient=c,
        grad_norm=grad_norm,
        inertia_mean=mean,
        is_finite=is_finite,
        is_live=is_finite & (mean > 0),
        is_undefined=is_undefined,
        faults=faults,
    )


@functools.lru_cache
def _bounds(device: torch.device) -> tuple[Tensor, Tensor]:
    upper = torch.tensor([FLOAT64_MAX] * 3 + [0.5, FLOAT32_MAX], dtype=torch.float64, device=device)
    return torch.zeros_like(upper), upper


def all_reduce(packed: Tensor, process_groups: tuple[ProcessGroup, ...]) -> Tensor:
    """Sum ``packed`` over the ranks of each process group in turn; returns a new tensor on its device.

    Collective: all ranks of each process group, in order.
    """
    for process_group in process_groups:
        # With CPU-offloaded parameters the sums are on the CPU, but the process group may support the GPU only.
        device_types = [device.type for device in process_group._device_types]
        device = packed.device if packed.device.type in device_types else process_group._device_types[0]
        buffer = packed.to(device, copy=True)
        dist.all_reduce(buffer, group=process_group)
        packed = buffer.to(packed.device)
    return packed
