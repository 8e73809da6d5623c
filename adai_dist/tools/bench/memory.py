"""Peak memory of a step in addition to the memory held before it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the memory that torch allocates during ``run``, beyond what it held before."""
    return _extra_bytes_cuda(run) if device.type == "cuda" else _extra_bytes_cpu(run)


def _extra_bytes_cuda(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _extra_bytes_cpu(run: Callable[[], object]) -> int:
    with (
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
    ):
        run()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    events: list[Any] = results.events() if results else []
    # An allocation is an event with a positive number of bytes, a release one with a negative number.
    changes: list[tuple[int, int]] = [
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ]
    changes.sort(key=lambda change: change[0])
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Generator[None]:
    """Discard what the profiler's C++ code logs to stderr: its start, its end, and allocations that it missed."""
    sys.stderr.flush()
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)
