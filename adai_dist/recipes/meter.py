"""The loss and the time of training steps, and the optimizer's part of it, taken without making the host wait."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Reading:
    """What some steps took and gave."""

    loss: float
    """Mean over the steps and over all ranks, in nats."""
    num_timed_steps: int
    seconds: float
    """Of the timed steps, from the data to the new parameters; evaluations and checkpoints are not in it."""
    optimizer_seconds: float
    """Their part in clipping and in the optimizer."""

    @property
    def optimizer_share(self) -> float | None:
        """Part of the time, from 0 to 1; None without a timed step."""
        return self.optimizer_seconds / self.seconds if self.seconds else None

    def units_per_second(self, units_per_step: int) -> float | None:
        """Over all ranks; None without a timed step."""
        return self.num_timed_steps * units_per_step / self.seconds if self.seconds else None


class Meter:
    """Adds up losses on the device, and takes three times per step: its start, before the optimizer, its end.

    On the CPU the times are read off the host's clock. On CUDA they are events in the stream, looked up by `read` only.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._loss_sum = torch.zeros((), device=device)
        self._num_steps = 0
        self._marks: list[Any] = []
        self._is_first = True
        self.total: Reading = Reading(torch.nan, 0, 0.0, 0.0)
        """Of all steps read so far; its loss is that of the last reading."""

    def mark(self) -> None:
        """Notes the time; to be called three times per step."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a step: 0-dim, the mean of this rank's rows."""
        self._loss_sum += loss
        self._num_steps += 1

    def read(self) -> Reading:
        """What the steps since the last call took and gave; waits for the device.

        The very first step is not timed: in it states are made and libraries loaded.

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
        self.total.loss = loss
        self.total.num_timed_steps += len(steps)
        self.total.seconds += seconds
        self.total.optimizer_seconds += optimizer_seconds
        return Reading(loss, len(steps), seconds, optimizer_seconds)

    def _seconds(self, start: Any, end: Any) -> float:
        if not self._on_cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3
