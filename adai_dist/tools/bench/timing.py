"""Interleaved timing of all cases of the benchmark."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from adai_dist.tools import environment
from adai_dist.tools.bench.cases import COPY, COPY_BYTES, REFERENCE, Case, Model, adai_cases, adamw_cases, copy_case
from adai_dist.tools.bench.memory import extra_bytes
from adai_dist.tools.bench.other_packages import other_cases
from adai_dist.tools.bench.report import Row
from adai_dist.tools.bench.shapes import SHAPES, shapes_of_numel

DEFAULT_NUMEL = 2**25
DEFAULT_REPETITIONS = 25
DTYPES = ("float32", "bfloat16", "float16")
WARM_UP_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a benchmark run.

    Raises:
        ValueError: a value is out of range, or the device is not available.
    """

    device: str = "cpu"
    numel: int = DEFAULT_NUMEL
    """Number of parameters, in tensors of 2^20 elements."""
    shapes: str | None = None
    """Name in :data:`SHAPES`; replaces ``numel``."""
    dtype: str = "float32"
    """Dtype of parameters and gradients."""
    repetitions: int = DEFAULT_REPETITIONS
    """Number of timed runs of every case."""
    threads: int | None = None
    """CPU threads; None for torch's default."""
    others: bool = True
    """Also measure optimizers of other packages, where these are installed."""

    def __post_init__(self) -> None:
        for name in ("numel", "repetitions", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value!r}; give a larger number")
        for name, value, known in (("dtype", self.dtype, DTYPES), ("shapes", self.shapes, (None, *SHAPES))):
            if value not in known:
                names = ", ".join(str(x) for x in known if x)
                raise ValueError(f"{name} must be one of {names}; got {value!r}; choose one of them")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device must be available on this machine; got {self.device!r}; use cpu")

    def command(self) -> str:
        """Return the command line with these settings."""
        words = ["adai-dist bench", f"--device {self.device}"]
        words.append(f"--shapes {self.shapes}" if self.shapes else f"--numel {self.numel}")
        words += [f"--dtype {self.dtype}", f"--repetitions {self.repetitions}"]
        words += [f"--threads {self.threads}"] if self.threads else []
        words += [] if self.others else ["--no-others"]
        return " ".join(words)


def measure(settings: Settings) -> dict[str, Any]:
    """Measure all cases.

    Returns:
        ``rows`` (see :class:`adai_dist.tools.bench.report.Row`) and the environment of the measurement, ready for JSON.
    """
    with _num_threads(settings.threads):
        device = torch.device(settings.device)
        shapes = SHAPES[settings.shapes]() if settings.shapes else shapes_of_numel(settings.numel)
        model = Model.of(shapes, device, getattr(torch, settings.dtype))
        adai, optimizers = adai_cases(model)
        others, missing = other_cases(model) if settings.others else ([], [])
        cases = [copy_case(device), *adai, *adamw_cases(model.copy()), *others]
        times = _times(cases, settings)
        if num_skipped := sum(int(optimizer.num_skipped_steps) for optimizer in optimizers):
            raise RuntimeError(
                f"no timed step may be skipped; got {num_skipped} steps with inf or NaN; report this as a bug"
            )
        return {
            "command": settings.command(),
            "hardware": environment.hardware(settings.device),
            "threads": torch.get_num_threads(),
            "versions": environment.versions("deepspeed", "pytorch_optimizer"),
            "kernels": str(optimizers[0].backends),
            "shapes": settings.shapes,
            "num_tensors": len(shapes),
            "numel": model.numel,
            "dtype": settings.dtype,
            "repetitions": settings.repetitions,
            "copy_bytes": COPY_BYTES[settings.device],
            "reference": REFERENCE,
            "rows": [asdict(row) for row in _rows(cases, times, model)],
            "missing": missing,
        }


def _times(cases: list[Case], settings: Settings) -> dict[str, list[float]]:
    """Return the times of every case in milliseconds.

    Each round runs the cases in a new random order, so that no case always follows the same one.
    """
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    order = random.Random(0)
    gc.collect()
    for repetition in range(WARM_UP_ROUNDS + settings.repetitions):
        for case in order.sample(cases, len(cases)):
            milliseconds = _time(case, settings.device)
            if repetition >= WARM_UP_ROUNDS:
                times[case.name].append(milliseconds)
    return times


def _time(case: Case, device: str) -> float:
    case.prepare()
    if device == "cuda":
        torch.cuda.synchronize()
    gc.disable()
    start = time.perf_counter()
    case.run()
    if device == "cuda":
        torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) * 1e3
    gc.enable()
    return milliseconds


def _rows(cases: list[Case], times: dict[str, list[float]], model: Model) -> Iterator[Row]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    speeds = {case.name: case.num_bytes / medians[case.name] / 1e6 for case in cases}
    for case in cases:
        is_copy = case.name == COPY
        values = sorted(times[case.name])
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        case.prepare()
        yield Row(
            case=case.name,
            package=case.package,
            milliseconds=medians[case.name],
            fastest=values[0],
            lower_quartile=quartiles[0],
            upper_quartile=quartiles[2],
            bytes_per_parameter=None if is_copy else round(case.num_bytes / model.numel, 2),
            state_bytes_per_parameter=None if is_copy else round(case.state_bytes / model.numel, 2),
            gigabytes_per_second=speeds[case.name],
            copy_share=speeds[case.name] / speeds[COPY],
            ratio=None if is_copy else medians[case.name] / medians[REFERENCE],
            extra_bytes=extra_bytes(case.run, model.device),
        )


@contextmanager
def _num_threads(number: int | None) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
