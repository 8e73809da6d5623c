"""Real gradients, recorded on each rank as the optimizer sees them, and the oracle's steps with them.

Except for the mean, the algorithm is element-wise. So the oracle treats the elements of each rank as separate
parameters, whatever the layout; copies are compared and count once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from adai_dist import AdaiV2
from tests.distributed.layouts import full, local
from tests.oracle import Oracle, OracleGroup
from tests.problems import to_numpy

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "dampening", "decoupled", "maximize")
Values = dict[str, np.ndarray[Any, Any]]


@dataclass
class Recording:
    """The record of one rank; names are different for pieces of a parameter, and the same for copies."""

    starts: Values
    groups: list[tuple[dict[str, Any], list[str]]]
    max_grad_norm: float | None
    gradients: list[dict[str, np.ndarray[Any, Any] | None]] = field(default_factory=list)
    ends: Values = field(default_factory=dict)
    means: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradient_dtypes: set[str] = field(default_factory=set)


class Recorder:
    """Records the steps of the optimizers of one rank.

    Args:
        optimizers: optimizers of this rank, each stepped once per step, with one mean.
        names: names of all their parameters; they must differ between ranks for pieces, and not for copies.
    """

    def __init__(self, optimizers: Iterable[AdaiV2], names: dict[Tensor, str]) -> None:
        self.names = names
        self.optimizers = list(optimizers)
        groups = [
            ({key: group[key] for key in HYPERPARAMETERS}, [names[p] for p in group["params"]])
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        starts = {name: real_elements(param, param) for param, name in names.items()}
        self.recording = Recording(starts, groups, self.optimizers[0].max_grad_norm)
        self.optimizers[0].register_step_pre_hook(lambda *_: self._before())
        self.optimizers[-1].register_step_post_hook(lambda *_: self._after())

    def _before(self) -> None:
        self.recording.gradients.append(
            {name: None if p.grad is None else real_elements(p, p.grad) for p, name in self.names.items()}
        )
        self.recording.gradient_dtypes |= {str(p.grad.dtype) for p in self.names if p.grad is not None}

    def _after(self) -> None:
        means = {optimizer.inertia_mean.item() for optimizer in self.optimizers}
        assert len(means) == 1, f"optimizers that share one mean have {means}"
        self.recording.means.append(means.pop())
        self.recording.grad_norms.append(self.optimizers[0].grad_norm.item())

    def finish(self) -> Recording:
        self.recording.ends = {name: real_elements(param, param) for param, name in self.names.items()}
        return self.recording


def real_elements(param: Tensor, tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return this rank's elements of a parameter or gradient, float64, without FSDP1's padding."""
    if isinstance(tensor, DTensor) and isinstance(param, DTensor):
        tensor = tensor.detach().redistribute(param.device_mesh, param.placements)
    tensor = full(local(tensor))
    num_padding = param._shard_numel_padded if getattr(param, "_is_flat_param", False) else 0  # type: ignore[attr-defined]
    return to_numpy(tensor[: tensor.numel() - num_padding] if num_padding else tensor)


def names_of(model: nn.Module) -> dict[Tensor, str]:
    """Name the parameters; DTensor pieces are numbered by their place in the mesh, plain tensors are copies."""
    return {parameter: f"{name}@{_piece(parameter)}" for name, parameter in model.named_parameters()}


def _piece(parameter: Tensor) -> tuple[int, ...]:
    if not isinstance(parameter, DTensor):
        return ()
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    return tuple(
        -1 if placement.is_replicate() else index
        for index, placement in zip(coordinate, parameter.placements, strict=True)
    )


def fsdp1_names_of(model: nn.Module) -> dict[Tensor, str]:
    """Name the parameters of a model that FSDP1 shards, from its handles."""
    pieces: dict[Tensor, int] = {}
    for module in FSDP.fsdp_modules(model):
        handle = module._handle
        if handle is not None:
            rank = dist.get_rank(handle.process_group)
            pieces |= dict.fromkeys([handle.flat_param, *(handle.flat_param._params or ())], rank)
    return {parameter: f"{name}@{pieces[parameter]}" for name, parameter in model.named_parameters()}


def follow(recordings: list[Recording], rounding: float) -> float:
    """Return the largest relative error of a parameter, after the oracle's steps with the same gradients.

    Asserts that copies are bitwise equal, and that means and norms are the oracle's within ``rounding``.
    """
    starts, ends = merged([r.starts for r in recordings]), merged([r.ends for r in recordings])
    groups: list[OracleGroup] = []
    known: set[str] = set()
    for recording in recordings:
        for hyper, names in recording.groups:
            new = tuple(name for name in names if name not in known)
            known |= set(new)
            groups.append(OracleGroup(new, **hyper))
    oracle = Oracle(starts, groups, recordings[0].max_grad_norm)
    for step, (mean, norm) in enumerate(zip(recordings[0].means, recordings[0].grad_norms, strict=True)):
        seen = oracle.step(merged([recording.gradients[step] for recording in recordings]))
        np.testing.assert_allclose(mean, seen.mean, rtol=rounding, err_msg=f"mean of step {step}")
        np.testing.assert_allclose(norm, seen.grad_norm, rtol=rounding, err_msg=f"norm of step {step}")
    for recording in recordings:
        assert recording.means == recordings[0].means, "ranks disagree about the mean"
    errors = [0.0]
    for name, expected in oracle.parameters.items():
        travelled = np.linalg.norm(expected - starts[name])
        if travelled > 0:
            errors.append(float(np.linalg.norm(ends[name] - expected) / travelled))
        else:
            np.testing.assert_array_equal(ends[name], starts[name], err_msg=name)
    return max(errors)


def merged(of_ranks: list[Any]) -> dict[str, Any]:
    """Return the pieces of all ranks, after checking that copies are equal."""
    together: dict[str, Any] = {}
    for of_rank in of_ranks:
        for name, value in of_rank.items():
            np.testing.assert_array_equal(together.setdefault(name, value), value, err_msg=f"copies of {name}")
    return together
