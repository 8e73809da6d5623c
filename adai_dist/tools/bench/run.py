"""Times all cases of a setting, taking turns."""

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

from adai_dist.tools.bench.cases import COPY, COPY_BYTES, REFERENCE, Case, Model, adamw_cases, copy_case, our_cases
from adai_dist.tools.bench.memory import extra_bytes
from adai_dist.tools.bench.others import other_cases
from adai_dist.tools.bench.report import Row, hardware, versions
from adai_dist.tools.bench.shapes import SHAPES, of_numel

DEFAULT_NUMEL = 2**25
DEFAULT_REPETITIONS = 25
DTYPES = ("float32", "bfloat16", "float16")
WARM_UP_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What to measure.

    Raises:
        ValueError: a value that cannot be, or a device that is not there.
    """

    device: str = "cpu"
    numel: int = DEFAULT_NUMEL
    """Number of parameters, in tensors of 2^20 elements."""
    shapes: str | None = None
    """A name of :data:`SHAPES`, in place of ``numel``."""
    dtype: str = "float32"
    """Of parameters and gradients."""
    repetitions: int = DEFAULT_REPETITIONS
    """How often every case is timed."""
    threads: int | None = None
    """CPU threads; None for what torch takes by itself."""
    others: bool = True
    """Measure optimizers of other packages too, where they are installed."""

    def __post_init__(self) -> None:
        for name in ("numel", "repetitions", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value!r}; give a larger number")
        for name, value, known in (("dtype", self.dtype, DTYPES), ("shapes", self.shapes, (None, *SHAPES))):
            if value not in known:
                names = ", ".join(str(x) for x in known if x)
                raise ValueError(f"{name} must be one of {names}; got {value!r}; use one of these")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device must be one that is there; got {self.device!r}; use cpu")

    def command(self) -> str:
        """The command line that measures it."""
        words = ["adai-dist bench", f"--device {self.device}"]
        words.append(f"--shapes {self.shapes}" if self.shapes else f"--numel {self.numel}")
        words += [f"--dtype {self.dtype}", f"--repetitions {self.repetitions}"]
        words += [f"--threads {self.threads}"] if self.threads else []
        words += [] if self.others else ["--no-others"]
        return " ".join(words)


def measure(setting: Setting) -> dict[str, Any]:
    """Measures all cases of a setting.

    Returns:
        ``rows`` (see :class:`adai_dist.tools.bench.report.Row`), and on what they were measured; fit for JSON.
    """
    with _threads(setting.threads):
        device = torch.device(setting.device)
        shapes = SHAPES[setting.shapes]() if setting.shapes else of_numel(setting.numel)
        model = Model.of(shapes, device, getattr(torch, setting.dtype))
        ours, optimizer = our_cases(model)
        others, missing = other_cases(model) if setting.others else ([], [])
        cases = [copy_case(device), *ours, *adamw_cases(model.for_another()), *others]
        times = _times(cases, setting)
        if num_skipped := int(optimizer.num_skipped_steps):
            raise RuntimeError(
                f"no step must be skipped while it is timed, got {num_skipped} with inf or NaN; report it"
            )
        return {
            "command": setting.command(),
            "hardware": hardware(setting.device),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "kernels": str(optimizer.backends),
            "shapes": setting.shapes,
            "num_tensors": len(shapes),
            "numel": model.numel,
            "dtype": setting.dtype,
            "repetitions": setting.repetitions,
            "copy_bytes": COPY_BYTES[setting.device],
            "reference": REFERENCE,
            "rows": [asdict(row) for row in _rows(cases, times, model)],
            "missing": missing,
        }


def _times(cases: list[Case], setting: Setting) -> dict[str, list[float]]:
    """Milliseconds of every case. Each round has an order of its own, so that no case always follows the same one."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    order = random.Random(0)
    gc.collect()
    for repetition in range(WARM_UP_ROUNDS + setting.repetitions):
        for case in order.sample(cases, len(cases)):
            milliseconds = _time(case, setting.device)
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
            bytes_per_parameter=None if is_copy else case.num_bytes // model.numel,
            gigabytes_per_second=speeds[case.name],
            copy_share=speeds[case.name] / speeds[COPY],
            ratio=None if is_copy else medians[case.name] / medians[REFERENCE],
            extra_bytes=extra_bytes(case.run, model.device),
        )


@contextmanager
def _threads(number: int | None) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
