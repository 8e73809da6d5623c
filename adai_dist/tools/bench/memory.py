"""How much memory a step takes beside what is there before it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak of the memory that torch allocates during ``run``, in Python and in C++, above what it held before."""
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
        _no_notes_of_the_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
    ):
        run()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    events: list[Any] = results.events() if results else []
    # Every allocation is an event of so many bytes, every release one of so many less.
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
def _no_notes_of_the_profiler() -> Generator[None]:
    """Its C++ code notes on stderr that it starts and stops, and what it did not see being allocated."""
    sys.stderr.flush()
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
