"""The only collective of a step: the sums behind the global mean, added up over the ranks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adai_dist.equations import MeanTerms, StepScalars, mean_sum, scalar_tensor
from adai_dist.hyper import Hyper
from adai_dist.sharding.presence import MODULUS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CLIP_EPS = 1e-6
"""Added to the norm in the clip coefficient, as :func:`torch.nn.utils.clip_grad_norm_` does."""

MOVING = 2.0**-10
"""What an optimizer adds to the fraction of the signals, over all ranks: up to 512 may share a mean."""

FLOAT64_MAX, FLOAT32_MAX = torch.finfo(torch.float64).max, torch.finfo(torch.float32).max


class Sums(NamedTuple):
    """What travels: 8 float64 (64 bytes), each 0-dim, weighted so that every element of the model counts once.

    The five in the middle are sums over all shards of :class:`adai_dist.equations.MeanTerms`.
    """

    grad_squared: Tensor
    """Squared norm of the gradients as they are: neither unscaled nor clipped; infinite where a gradient scaler found a
    non-finite gradient."""
    carried: Tensor
    quadratic: Tensor
    linear: Tensor
    constant: Tensor
    expected: Tensor
    num_elements: Tensor
    """Number of real elements with a gradient in this step."""
    signals: Tensor
    """A whole number that tells whether a parameter lacks its gradient on some ranks alone
    (:mod:`adai_dist.sharding.presence`), plus a fraction that is 0 where all learning rates are."""

    @classmethod
    def of_refusal(cls, device: torch.device) -> Sums:
        """What a rank that must not step adds, so that the others learn of it and are not left waiting."""
        return cls(*torch.full((len(cls._fields),), torch.nan, dtype=torch.float64, device=device).unbind())

    def are_refused(self) -> bool:
        """Whether a rank has refused to step; the host waits for the device."""
        return bool(self.num_elements.isnan())  # a sum of sizes, and finite whatever the gradients are

    def added_up(self, process_groups: tuple[ProcessGroup, ...]) -> Sums:
        """Those of all ranks together. Collective: as :func:`all_reduce`."""
        return Sums(*all_reduce(torch.stack(self), process_groups).unbind()) if process_groups else self

    def plus(self, other: Sums) -> Sums:
        """Both together, on the device of the first."""
        return Sums(*(a + b.to(a.device) for a, b in zip(self, other, strict=True)))


class GlobalMean(NamedTuple):
    """What every rank knows after the collective; 0-dim float64 tensors unless said otherwise."""

    coefficient: Tensor
    """Factor of every gradient: the clip coefficient over the loss scale."""
    grad_norm: Tensor
    """Global norm of the gradients, unscaled and not clipped."""
    inertia_mean: Tensor
    """vbar: mean over all elements of the bias-corrected second moment, this step's gradient included."""
    is_finite: Tensor
    """bool: the step is taken: none of the faults below."""
    is_live: Tensor
    """bool: finite, and the mean is > 0; otherwise the step does not count."""
    is_undefined: Tensor
    """bool: the mean is 0, as all gradients so far are. Not so in a step without any learning rate, which is idle."""
    faults: Tensor
    """bool, shape (5,): why the step is not taken. What is not finite is the sum of gradients, of states, of parameters
    (where decay is coupled); a parameter lacks its gradient on some ranks alone; the new second moments are not finite,
    maybe by themselves, beyond float32. None of them if it is taken."""

    def to(self, device: torch.device) -> GlobalMean:
        """The same on another device, for models that span several."""
        return GlobalMean(*(x.to(device) for x in self))

    def step_scalars(self, hyper: Hyper, correction: Tensor, dtype: torch.dtype) -> StepScalars:
        """The scalars of a step for one parameter group, in the dtype of its arithmetic.

        Args:
            correction: ``1 - beta2^t``, float64, shape (number of shards,).
        """
        inverse_means = torch.where(self.is_live, 1.0 / (correction * self.inertia_mean), 0.0)
        # A mean that only float64 can hold would make the factor infinite, and 0 * inf is NaN.
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
    """Add up the sums of all ranks and evaluate clip coefficient and mean from them, alike on every rank.

    Args:
        local_sums: of this rank; where it holds nothing, zeros, and it still takes part.
        process_groups: see :class:`adai_dist.sharding.plan.ShardingPlan`.
        max_norm: bound of the global gradient norm.
        grad_scale: loss scale by which the gradients are still multiplied; 0-dim.
        expected: the coefficient that the sums were made for; by default 1 over the loss scale.

    Collective: all ranks of each process group, in order; one all-reduce of 64 bytes per process group.

    Numerics: float64.
    """
    sums = local_sums.added_up(process_groups)
    unscaling = unscaling_coefficient(grad_scale, sums.signals.device)
    grad_norm = sums.grad_squared.sqrt() * unscaling
    c = unscaling if max_norm is None else unscaling * (max_norm / (grad_norm + CLIP_EPS)).clamp(max=1.0)
    return evaluate(sums, grad_norm, c, unscaling if expected is None else expected)


def unscaling_coefficient(grad_scale: Tensor | None, device: torch.device) -> Tensor:
    """1 over the loss scale: the coefficient of gradients that are not clipped; 0-dim float64, on ``device``."""
    if grad_scale is None:
        return torch.ones((), dtype=torch.float64, device=device)
    return 1.0 / grad_scale.to(device, torch.float64).reshape(())


def evaluate(sums: Sums, grad_norm: Tensor, c: Tensor, expected: Tensor) -> GlobalMean:
    """The mean from sums over all ranks.

    Args:
        grad_norm: global norm to report; 0-dim float64.
        c: factor of every gradient, clip coefficient over loss scale; 0-dim float64.
        expected: the factor that the sums were made for, see :func:`adai_dist.equations.mean_sum`.

    Collective: none.
    """
    total = mean_sum(MeanTerms(*sums[1:6]), c, expected)
    # No gradient so far and no learning rate: nobody trains, somebody wants the states created.
    is_idle = ~torch.stack([sums.grad_squared, sums.carried, sums.signals.frac()]).any()
    is_undefined = (total == 0) & ~is_idle
    total = torch.where(is_idle, 0.0, total)
    mean = total / sums.num_elements.clamp(min=1.0)
    # A second moment beyond float32 would be inf for ever.
    seen = torch.stack([sums.grad_squared, sums.carried, sums.constant, sums.signals % MODULUS, total])
    faults = seen.clamp(*_bounds(seen.device)) != seen  # NaN differs from all
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
    """The sum over the ranks of every process group, one after the other; a new tensor on the device of ``packed``.

    Collective: all ranks of each process group, in order.
    """
    for process_group in process_groups:
        # With CPU-offloaded parameters the sums are on the CPU, and the process group may serve the GPU only.
        device_types = [device.type for device in process_group._device_types]
        device = packed.device if packed.device.type in device_types else process_group._device_types[0]
        travelling = packed.to(device, copy=True)
        dist.all_reduce(travelling, group=process_group)
        packed = travelling.to(packed.device)
    return packed
