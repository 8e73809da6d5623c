"""The distribution of inertia (beta1) in a model, read from the optimizer's states.

Histograms count inertia on a logarithmic scale of its horizon, 1 / (1 - beta1): the number of steps over which an
element's gradients are averaged, from 1 (no momentum) to 1 / eps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import StepScalars
from adai_dist.hyper import Hyper
from adai_dist.optimizer import AdaptiveInertia
from adai_dist.sharding.local_tensor import is_distributed, local_tensor
from adai_dist.storage import moment_of

BINS_PER_DECADE = 20

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


class MomentOfLayer(NamedTuple):
    """The second moment of a parameter, or of this rank's shard of it, and its layer."""

    layer: str
    exp_avg_sq: Tensor | None
    step: Tensor | None
    """Step count of the parameter, 0-dim."""
    hyper: Hyper
    weight: float
    """1 / (number of ranks that hold the same elements)."""


def layer_of(name: str) -> str:
    """Return a parameter's layer: "block 3" for "model.layers.3.mlp.up_proj.weight", "norm" for "model.norm.weight"."""
    block = _BLOCK.search(name)
    if block:
        return f"block {block[1]}"
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else parts[0]


def horizon_edges(num_bins: int) -> list[float]:
    """Return the `num_bins` + 1 edges of the bins of `inertia_histogram`, in steps."""
    return [10.0 ** (i / BINS_PER_DECADE) for i in range(num_bins + 1)]


@torch.no_grad()
def inertia_histogram(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, list[float]] | None:
    """Return the shares of every layer's elements by the horizon of their inertia.

    The host waits for the device: call it at evaluations, not in every step.

    Args:
        optimizer: any optimizer.
        named_parameters: the model's parameters, with the same names in the same order on every rank.

    Returns:
        For every layer, in order of appearance, the share of its elements in each bin of `horizon_edges`; equal on
        all ranks and for all layouts. None if the optimizer has no adaptive inertia or has not stepped yet.

    Collective: all ranks of the job; one all-reduce of 8 bytes per layer and bin.
    """
    if not isinstance(optimizer, AdaptiveInertia) or not math.isfinite(mean := float(optimizer.inertia_mean)):
        return None
    hypers = {
        p: Hyper.from_param_group(param_group) for param_group in optimizer.param_groups for p in param_group["params"]
    }
    weights = optimizer.sharding_plan.weights
    named = [(layer_of(name), param) for name, param in named_parameters if param in hypers]
    moments = [
        MomentOfLayer(layer, state.get("exp_avg_sq"), state.get("step"), hypers[param], weights[param])
        for layer, param in named
        for state in (optimizer.state[param],)
    ]
    return horizon_shares(moments, mean, local_tensor(named[0][1]).device)


@torch.no_grad()
def horizon_shares(moments: Sequence[MomentOfLayer], mean: float, device: torch.device) -> dict[str, list[float]]:
    """Return the shares as :func:`inertia_histogram` does, for engines that keep states outside ``optimizer.state``.

    Args:
        moments: the second moments of all parameters, with the same layers in the same order on every rank.
        mean: global mean of the bias-corrected second moment in the last step.
        device: device on which to count and communicate.

    Collective: all ranks of the job; one all-reduce of 8 bytes per layer and bin.
    """
    layers = list(dict.fromkeys(moment.layer for moment in moments))
    decades = math.log10(max(1.0 / moment.hyper.eps for moment in moments))
    num_bins = max(1, math.ceil(decades * BINS_PER_DECADE - 1e-6))
    counts = torch.zeros(len(layers), num_bins, dtype=torch.float64, device=device)
    for moment in moments:
        beta1 = _inertia(moment, mean)
        if beta1 is not None:
            bins = ((1.0 - beta1).log10() * -BINS_PER_DECADE).floor().clamp(0, num_bins - 1).long()
            counted = torch.bincount(bins.flatten(), minlength=num_bins)
            counts[layers.index(moment.layer)] += counted.to(counts) * moment.weight
    if is_distributed():
        dist.all_reduce(counts)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1e-300)
    return dict(zip(layers, shares.tolist(), strict=True))


def _inertia(moment: MomentOfLayer, mean: float) -> Tensor | None:
    """Return beta1 of the elements in the last step; None without elements or before the first counted step."""
    if moment.exp_avg_sq is None or moment.step is None or float(moment.step) == 0 or mean == 0:
        return None
    v = moment_of(local_tensor(moment.exp_avg_sq), torch.Size([-1]))
    if v.numel() == 0:
        return None
    one, true = torch.ones((), dtype=v.dtype, device=v.device), torch.ones((), dtype=torch.bool, device=v.device)
    correction = equations.bias_correction(moment.hyper.beta2, moment.step)
    scalars = StepScalars(one, one, true, true, (1.0 / (correction * mean)).to(v).reshape(1))
    return equations.inertia([v], moment.hyper, scalars)[0]
