"""The records of a run: measurements of its steps, metrics.jsonl and TensorBoard, the progress bar, summary.json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from adai_dist.recipes import atomic_files
from adai_dist.recipes.job import World
from adai_dist.tools.plots import read_records

Summary = dict[str, Any]

_BAR_SECONDS = 15.0  # between two updates of the bar where stderr is not a terminal
_FILES = ("metrics.jsonl", "inertia.jsonl")
_IN_TABLE = (
    ("run", "run", "{}"),
    ("val_loss", "held-out loss (nats per {unit})", "{:.4f}"),
    ("val_error", "held-out error", "{:.2%}"),
    ("train_loss", "training loss, last log step", "{:.4f}"),
    ("optimizer", "optimizer", "{}"),
    ("engine", "engine", "{}"),
    ("world_size", "ranks", "{}"),
    ("num_parameters", "parameters", "{:,}"),
    ("steps", "steps", "{:,}"),
    ("{unit}s", "{unit}s seen", "{:,}"),
    ("seconds", "seconds of training", "{:.1f}"),
    ("{unit}s_per_second", "{unit}s per second", "{:,.0f}"),
    ("optimizer_share", "optimizer's share of a step", "{:.1%}"),
    ("skipped_steps", "skipped steps (non-finite gradient)", "{}"),
    ("folder", "folder", "{}"),
)


class Reading(NamedTuple):
    """Loss and time of some steps."""

    loss: float
    """Mean over the steps and all ranks, in nats."""
    num_steps: int
    """Number of timed steps."""
    seconds: float
    """Time of these steps, from the data to the new parameters, without evaluations and checkpoints."""
    optimizer_seconds: float
    """The part of ``seconds`` spent in clipping and in the optimizer."""

    @property
    def optimizer_share(self) -> float | None:
        """The optimizer's part of the time, from 0 to 1; None without a timed step."""
        return self.optimizer_seconds / self.seconds if self.seconds else None

    def units_per_second(self, units_per_step: int) -> float | None:
        """Return the throughput over all ranks; None without a timed step."""
        return self.num_steps * units_per_step / self.seconds if self.seconds else None


class Meter:
    """Sums losses on the device and takes three times per step: its start, before the optimizer, its end.

    On the CPU the times come from the host's clock; on CUDA they are events in the stream, and only ``read`` waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._loss_sum = torch.zeros((), device=device)
        self._num_steps = 0
        self._marks: list[Any] = []
        self._is_first = True
        self.total: Reading = Reading(torch.nan, 0, 0.0, 0.0)
        """Sum of all readings, with the loss of the last one."""

    def mark(self) -> None:
        """Take the time; to be called three times per step."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step: 0-dim, the mean of this rank's rows."""
        self._loss_sum += loss
        self._num_steps += 1

    def read(self) -> Reading:
        """Return loss and time of the steps since the last call; waits for the device.

        The first step is not timed: it creates states and loads libraries.

        Collective: all ranks of the job; one all-reduce of 4 bytes.
        """
        dist.all_reduce(self._loss_sum)
        loss = float(self._loss_sum) / (self._num_steps * dist.get_world_size())
        marks = self._marks[3:] if self._is_first else self._marks
        steps = [marks[i : i + 3] for i in range(0, len(marks), 3)]
        seconds = sum(self._seconds(start, end) for start, _, end in steps)
        optimizer_seconds = sum(self._seconds(middle, end) for _, middle, end in steps)
        self._loss_sum.zero_()
        self._num_steps, self._marks, self._is_first = 0, [], False
        reading = Reading(loss, len(steps), seconds, optimizer_seconds)
        _, num_before, seconds_before, optimizer_before = self.total
        optimizer_total = optimizer_before + optimizer_seconds
        self.total = Reading(loss, num_before + len(steps), seconds_before + seconds, optimizer_total)
        return reading

    def _seconds(self, start: Any, end: Any) -> float:
        if not self._on_cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Journal:
    """Writes metrics as they come and shows the progress; a no-op on ranks other than the main one.

    Everything is flushed line by line, so that a killed run has written all it measured.
    """

    def __init__(self, folder: Path, first_step: int, num_steps: int, world: World) -> None:
        self._folder = folder
        self._is_main = world.is_main
        self._texts: dict[str, str] = {}
        if not self._is_main:
            return
        (folder / "summary.json").unlink(missing_ok=True)  # a run that continues has not finished
        for name in _FILES:
            _truncate(folder / name, first_step, is_done=first_step == num_steps)
        self._events = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
        on_terminal = sys.stderr.isatty()
        style: dict[str, Any] = {"dynamic_ncols": on_terminal, "mininterval": 0.1 if on_terminal else _BAR_SECONDS}
        self._bar = tqdm(total=num_steps, initial=first_step, desc=folder.name, unit="step", **style)

    def close(self) -> None:
        """End the bar and the event file."""
        if self._is_main:
            self._bar.close()
            self._events.close()

    def sync(self) -> None:
        """Wait until the lines are on the disk; a checkpoint must not be newer than they are."""
        if self._is_main:
            for path in filter(Path.exists, (self._folder / name for name in _FILES)):
                atomic_files.sync(path)

    def count_step(self) -> None:
        """Move the bar by one step."""
        if self._is_main:
            self._bar.update()

    def record(self, step: int, **scalars: float | None) -> None:
        """Append scalars to metrics.jsonl and TensorBoard; None is an unknown value."""
        if not self._is_main:
            return
        _append(self._folder / "metrics.jsonl", {"step": step, **scalars})
        for name, value in scalars.items():
            if value is not None:
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def record_inertia(self, step: int, shares: dict[str, list[float]]) -> None:
        """Append the histogram of every layer to inertia.jsonl."""
        if self._is_main:
            rounded = {layer: [float(f"{share:.4g}") for share in row] for layer, row in shares.items()}
            _append(self._folder / "inertia.jsonl", {"step": step, "layers": rounded})

    def show(self, **texts: str) -> None:
        """Update the texts beside the bar."""
        if self._is_main:
            self._texts.update(texts)
            self._bar.set_postfix(self._texts, refresh=False)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _truncate(path: Path, step: int, is_done: bool) -> None:
    """Drop the lines that a resumed run is about to write again, and one that a killed run left incomplete.

    These are all lines after ``step``, and the last evaluation of a run that was killed before its summary.
    """
    if path.exists():
        kept = [record for record in read_records(path) if record["step"] <= step]
        if is_done:
            kept = [record for record in kept if record["step"] < step or "loss" in record]
        atomic_files.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def summary_table(summary: Summary) -> str:
    """Return the summary as aligned plain text."""
    named = [(key.format(**summary), label.format(**summary), form) for key, label, form in _IN_TABLE]
    rows = [(label, form.format(summary[key])) for key, label, form in named if summary.get(key) is not None]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)
