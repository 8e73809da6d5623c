"""A soak test: many steps of a tiny model, to check that ranks do not diverge and memory does not grow.

The model is a ridge regression, which converges to the same optimum from every start: rounding errors do not grow over
the steps, faults do. The main rank also trains a reference copy on the data of all ranks, without communication. At
intervals one rank's data contain an infinity, so that all ranks skip a step. The states beta1_prod retire during the
run; with `eps=1e-2`, after 1,725 steps at the latest.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adai_dist.optimizer import AdaiW

LAYOUTS = ("ddp", "fsdp2", "local")

_NUM_INPUTS, _NUM_OUTPUTS, _NUM_ROWS = 16, 5, 4
_MAX_DEVIATION = 1e-5  # relative, in float32; at most 1.9e-7 was measured over 100,000 steps
_WARM_UP = 0.1  # share of the steps during which memory may grow


@dataclass(frozen=True)
class Settings:
    """The settings of a soak test.

    Raises:
        ValueError: a setting is out of range.
    """

    layout: str = "ddp"
    """ddp, fsdp2, or local, which does not reduce gradients and shows that divergence is detected."""
    steps: int = 100_000
    check_every: int = 1_000
    """Steps between two checks."""
    overflow_every: int = 997
    """Steps between two infinities, which the ranks get in turn."""
    max_growth: float = 8.0
    """Allowed growth of a rank's resident memory after the first tenth of the steps, MiB."""

    def __post_init__(self) -> None:
        _require(self.layout in LAYOUTS, f"layout must be one of {', '.join(LAYOUTS)}", self.layout, "use ddp")
        for name in ("steps", "check_every", "overflow_every"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1", value, "give a larger number")
        _require(self.max_growth > 0, "max_growth must be positive", self.max_growth, "8 MiB is the default")


class Check(NamedTuple):
    """The result of a check; the same on all ranks."""

    step: int
    num_skipped: int
    num_retired: int
    """Number of parameters whose beta1_prod the main rank has freed."""
    deviation: float
    """Distance of the parameters from the reference copy, relative to the norm of the copy."""
    mebibytes: float
    """Resident memory of the largest rank, MiB."""
    growth: float
    """Largest growth of a rank's resident memory since the warm-up, MiB."""
    fault: str | None
    """Description of the fault, if there is one."""


class _Ridge(nn.Module):
    """A linear map in two modules, so that FSDP2 shards two units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(_NUM_INPUTS, _NUM_OUTPUTS)
        self.second = nn.Linear(_NUM_INPUTS, _NUM_OUTPUTS, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.first(inputs) + self.second(inputs.flip(1))


_COLUMNS = {"step": 9, "skipped": 9, "retired": 9, "deviation": 11, "MiB": 9, "growth": 8}


def table_row(check: Check | None) -> str:
    """Return the check as a line of the table, or the header for None."""
    if check is None:
        return "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())
    cells = (f"{check.step:,}", str(check.num_skipped), str(check.num_retired), f"{check.deviation:.1e}")
    cells += (f"{check.mebibytes:.1f}", f"{check.growth:.1f}")
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))


def soak(settings: Settings, device: torch.device) -> Iterator[Check]:
    """Train, and yield the result of every check, up to the first that finds a fault.

    Args:
        device: device on which this rank trains.

    Raises:
        ValueError: the layout does not run with this device and version of torch.

    Collective: all ranks of the job, each of which must consume all checks.
    """
    runner = _Runner(settings, device)
    for step in range(1, settings.steps + 1):
        runner.take_step(step)
        if step % settings.check_every == 0 or step == settings.steps:
            check = runner.check(step)
            yield check
            if check.fault:
                return


def _require(condition: bool, must: str, got: object, advice: str) -> None:
    if not condition:
        raise ValueError(f"{must}; got {got!r}; {advice}")


class _Runner:
    """The model, its optimizer and the reference copy. Collective: all methods; all ranks of the job."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(0)
        self._model = _Ridge().to(device)
        self._copy = copy.deepcopy(self._model) if self._rank == 0 else None
        self._wrapped = _wrap(self._model, settings.layout, device)
        self._optimizer = _optimizer(self._model)
        self._copy_optimizer = None if self._copy is None else _optimizer(self._copy)
        self._generator = torch.Generator()
        self._first_mebibytes: float | None = None

    def take_step(self, step: int) -> None:
        _step(self._wrapped, self._optimizer, *self._data(step, self._rank))
        if self._copy is not None and self._copy_optimizer is not None:
            parts = [self._data(step, rank) for rank in range(self._num_ranks)]
            inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            _step(self._copy, self._copy_optimizer, inputs, targets)

    def _data(self, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Return the rows of any rank: a noisy linear map, with an infinity when it is that rank's turn."""
        self._generator.manual_seed(step * self._num_ranks + rank)
        numbers = torch.randn(_NUM_ROWS, _NUM_INPUTS + _NUM_OUTPUTS, generator=self._generator)
        inputs, noise = numbers.split((_NUM_INPUTS, _NUM_OUTPUTS), dim=1)
        inputs = inputs * torch.linspace(0.1, 1.0, _NUM_INPUTS)  # so that inertia differs between elements
        targets = inputs[:, :_NUM_OUTPUTS] + noise
        num_overflows, remainder = divmod(step, self._settings.overflow_every)
        if remainder == 0 and num_overflows % self._num_ranks == rank:
            targets[0, 0] = torch.inf
        return inputs.to(self._device), targets.to(self._device)

    def check(self, step: int) -> Check:
        tensors = self._full_tensors()
        gc.collect()
        mebibytes = _resident_mebibytes()
        if self._first_mebibytes is None and step >= _WARM_UP * self._settings.steps:
            self._first_mebibytes = mebibytes
        growth = 0.0 if self._first_mebibytes is None else mebibytes - self._first_mebibytes
        num_retired = sum("beta1_prod" not in state for state in self._optimizer.state.values())
        num_skipped, deviation = int(self._optimizer.num_skipped_steps), self._deviation(tensors)
        own = Check(step, num_skipped, num_retired, deviation, mebibytes, growth, fault=None)
        ranks: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(ranks, (own, _digest(tensors)))
        return self._merge([check for check, _ in ranks], has_diverged=len({digest for _, digest in ranks}) > 1)

    def _merge(self, checks: list[Check], has_diverged: bool) -> Check:
        """Merge the checks of all ranks into one and describe its faults."""
        main, growth = checks[0], max(check.growth for check in checks)
        skipped, expected = [check.num_skipped for check in checks], checks[0].step // self._settings.overflow_every
        deviates = not main.deviation <= _MAX_DEVIATION  # also if it is NaN
        faults = {
            "parameters or states differ between ranks": has_diverged,
            f"each rank must have skipped {expected} steps; got {skipped}": set(skipped) != {expected},
            f"the parameters deviate by {main.deviation:.1e} from those of one process": deviates,
            f"memory has grown by {growth:.1f} MiB": growth > self._settings.max_growth,
        }
        fault = "; ".join(description for description, is_present in faults.items() if is_present) or None
        return main._replace(mebibytes=max(check.mebibytes for check in checks), growth=growth, fault=fault)

    def _full_tensors(self) -> list[Tensor]:
        """Return parameters, states, inertia_mean and grad_norm, all-gathered where they are sharded."""
        state_dict = self._optimizer.state_dict()["state"]  # retired beta1_prod are zeros in it
        states = [state[name] for _, state in sorted(state_dict.items()) for name in sorted(state)]
        tensors = [_full(tensor) for tensor in (*self._model.parameters(), *states)]
        return [*tensors, self._optimizer.inertia_mean, self._optimizer.grad_norm]

    def _deviation(self, tensors: list[Tensor]) -> float:
        if self._copy is None:
            return math.nan
        copies = [param.detach() for param in self._copy.parameters()]
        distance = sum(float((a - b).square().sum()) for a, b in zip(tensors, copies, strict=False))
        return math.sqrt(distance / sum(float(b.square().sum()) for b in copies))


def _wrap(model: nn.Module, layout: str, device: torch.device) -> nn.Module:
    if layout == "local":
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    must = "layout fsdp2 on the CPU needs torch 2.9 (gloo in earlier versions sums gradients that FSDP2 wants averaged)"
    _require(device.type != "cpu" or torch.__version__ >= "2.9", must, torch.__version__, "use ddp")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*model.children(), model):
        fully_shard(module, mesh=mesh)
    return model


def _optimizer(model: nn.Module) -> AdaiW:
    return AdaiW(model.parameters(), lr=0.01, eps=1e-2, weight_decay=1e-2, max_grad_norm=10.0)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    loss: Any = (model(inputs) - targets).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _full(tensor: Any) -> Tensor:
    with torch.no_grad():
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _digest(tensors: list[Tensor]) -> str:
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _resident_mebibytes() -> float:
    """Return the resident memory of this process, or its peak on systems that do not report the current value."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
