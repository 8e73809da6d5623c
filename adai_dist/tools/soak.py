"""A soak: many steps of a tiny model on the ranks at hand, to see that ranks do not drift apart and memory stays.

The model is a ridge regression, whose optimum every start is drawn to: rounding does not grow over the steps, faults
do. The main rank also trains a copy on the data of all ranks, without communication, to compare the layout with. Now
and then one rank's data hold an infinity, so that a step is skipped. The states beta1_prod retire on the way, with
`eps=1e-2` after 1,725 steps at the latest.
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
_MAX_DEVIATION = 1e-5  # relative, in float32; it was 1.9e-7 at most over 100,000 steps
_WARM_UP = 0.1  # share of the steps after which memory must not grow


@dataclass(frozen=True)
class Soak:
    """What is run.

    Raises:
        ValueError: a setting is out of range.
    """

    layout: str = "ddp"
    """ddp; fsdp2; local: gradients stay on their rank, to see that drift is found."""
    steps: int = 100_000
    check_every: int = 1_000
    """Steps between two checks."""
    overflow_every: int = 997
    """Steps between two infinities; they go round the ranks."""
    max_growth: float = 8.0
    """MiB by which the resident memory of a rank may grow after the first tenth of the steps."""

    def __post_init__(self) -> None:
        _require(self.layout in LAYOUTS, f"layout must be one of {', '.join(LAYOUTS)}", self.layout, "take ddp")
        for name in ("steps", "check_every", "overflow_every"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1", value, "give a larger number")
        _require(self.max_growth > 0, "max_growth must be positive", self.max_growth, "8 MiB is the default")


class Check(NamedTuple):
    """What a check found; the same on all ranks."""

    step: int
    num_skipped: int
    num_retired: int
    """Parameters whose beta1_prod the main rank has freed."""
    deviation: float
    """Distance of the parameters from those of the copy, over the norm of these."""
    mebibytes: float
    """Resident memory of the largest rank."""
    growth: float
    """Largest growth of it on any rank since the warm-up, MiB."""
    fault: str | None
    """What is wrong, in words."""


class _Findings(NamedTuple):
    """What one rank tells the others."""

    digest: str
    num_skipped: int
    num_retired: int
    deviation: float | None
    """Where there is a copy to compare with."""
    mebibytes: float
    growth: float


class _Ridge(nn.Module):
    """A linear map in two parts, so that FSDP2 has two units to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(_NUM_INPUTS, _NUM_OUTPUTS)
        self.second = nn.Linear(_NUM_INPUTS, _NUM_OUTPUTS, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.first(inputs) + self.second(inputs.flip(1))


_COLUMNS = {"step": 9, "skipped": 9, "retired": 9, "deviation": 11, "MiB": 9, "growth": 8}


def row(check: Check | None) -> str:
    """A line of the table for people; its header for None."""
    if check is None:
        return "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())
    cells = (f"{check.step:,}", str(check.num_skipped), str(check.num_retired), f"{check.deviation:.1e}")
    cells += (f"{check.mebibytes:.1f}", f"{check.growth:.1f}")
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))


def soak(settings: Soak, device: torch.device) -> Iterator[Check]:
    """Trains, and yields what every check finds; ends early where one finds a fault.

    Args:
        device: on which this rank trains.

    Raises:
        ValueError: the layout does not run here.

    Collective: all ranks of the job, which take all checks.
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
    """Model, layout and copy. Collective: all methods; all ranks of the job."""

    def __init__(self, settings: Soak, device: torch.device) -> None:
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
        """The rows of any rank: a noisy linear map, and an infinity where it is that rank's turn."""
        self._generator.manual_seed(step * self._num_ranks + rank)
        numbers = torch.randn(_NUM_ROWS, _NUM_INPUTS + _NUM_OUTPUTS, generator=self._generator)
        inputs, noise = numbers.split((_NUM_INPUTS, _NUM_OUTPUTS), dim=1)
        inputs = inputs * torch.linspace(0.1, 1.0, _NUM_INPUTS)  # so that inertia differs
        targets = inputs[:, :_NUM_OUTPUTS] + noise
        num_before, remainder = divmod(step, self._settings.overflow_every)
        if remainder == 0 and num_before % self._num_ranks == rank:
            targets[0, 0] = torch.inf
        return inputs.to(self._device), targets.to(self._device)

    def check(self, step: int) -> Check:
        tensors = self._whole_tensors()
        gc.collect()
        mebibytes = _resident_mebibytes()
        if self._first_mebibytes is None and step >= _WARM_UP * self._settings.steps:
            self._first_mebibytes = mebibytes
        growth = 0.0 if self._first_mebibytes is None else mebibytes - self._first_mebibytes
        num_retired = sum("beta1_prod" not in state for state in self._optimizer.state.values())
        num_skipped, deviation = int(self._optimizer.num_skipped_steps), self._deviation(tensors)
        own = _Findings(_digest(tensors), num_skipped, num_retired, deviation, mebibytes, growth)
        ranks: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(ranks, own)
        return self._judge(step, ranks)

    def _judge(self, step: int, ranks: list[_Findings]) -> Check:
        main = ranks[0]
        deviation = main.deviation if main.deviation is not None else math.nan
        growth, expected = max(of.growth for of in ranks), step // self._settings.overflow_every
        wrong = {
            "parameters or states differ between ranks": len({of.digest for of in ranks}) > 1,
            f"skipped steps must be {expected}, got {[of.num_skipped for of in ranks]}": any(
                of.num_skipped != expected for of in ranks
            ),
            f"the parameters are {deviation:.1e} away from those of one process": not deviation <= _MAX_DEVIATION,
            f"memory has grown by {growth:.1f} MiB": growth > self._settings.max_growth,
        }
        fault = "; ".join(words for words, holds in wrong.items() if holds) or None
        mebibytes = max(of.mebibytes for of in ranks)
        return Check(step, main.num_skipped, main.num_retired, deviation, mebibytes, growth, fault)

    def _whole_tensors(self) -> list[Tensor]:
        """Parameters first, states and the mean, all the same on all ranks; gathered where they are sharded."""
        state_dict = self._optimizer.state_dict()["state"]  # in which retired products are zeros
        states = [state[name] for _, state in sorted(state_dict.items()) for name in sorted(state)]
        tensors = [_whole(tensor) for tensor in (*self._model.parameters(), *states)]
        return [*tensors, self._optimizer.inertia_mean, self._optimizer.grad_norm]

    def _deviation(self, tensors: list[Tensor]) -> float | None:
        if self._copy is None:
            return None
        copies = [param.detach() for param in self._copy.parameters()]
        distance = sum(float((a - b).square().sum()) for a, b in zip(tensors, copies, strict=False))
        return math.sqrt(distance / sum(float(b.square().sum()) for b in copies))


def _wrap(model: nn.Module, layout: str, device: torch.device) -> nn.Module:
    if layout == "local":
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    must = "layout fsdp2 on the CPU needs torch 2.9 (before, gloo adds gradients up where FSDP2 asks for their mean)"
    _require(device.type != "cpu" or torch.__version__ >= "2.9", must, torch.__version__, "take ddp")
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


def _whole(tensor: Any) -> Tensor:
    with torch.no_grad():
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _digest(tensors: list[Tensor]) -> str:
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _resident_mebibytes() -> float:
    """Of this process; where the system does not say it, the most that it ever was."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
