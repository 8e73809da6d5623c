"""How long a step takes, in milliseconds and in bytes per second, beside torch's AdamW and a plain copy.

All cases are run in turns, so that a machine that slows down slows all of them; the medians are reported.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adai_dist.optimizer import Adai, AdaiV2

MAX_NORM = 1.0
TENSOR_ELEMENTS = 2**20  # the parameters are cut into tensors of this size, as in a model

# What a step has to move if every phase touches each of its tensors once: (tensors of the parameters' dtype, of the
# states'). AdamW reads p, g, m, v and writes p, m, v. Clipping reads g for the norm, then reads and writes it. Adai
# reads and writes P besides, and reads g once more for its mean, which gives the norm too.
TENSORS_TOUCHED = {"copy": (2, 0), "Adai": (4, 6), "AdamW": (3, 4), "AdamW, clipped": (6, 4)}

REFERENCE = "AdamW fused, clipped"


@dataclass
class Row:
    """One case of the benchmark."""

    case: str
    milliseconds: float
    """Median time of a step."""
    bytes_per_parameter: int
    """What the algorithm has to move, as counted above; not what an implementation does move."""
    gigabytes_per_second: float
    """These bytes over the time."""
    ratio: float
    """Time over that of clipped fused AdamW."""


def measure(device: str, numel: int, dtype: str, repetitions: int) -> dict[str, Any]:
    """Measures all cases.

    Args:
        device: cpu or cuda.
        numel: number of parameters.
        dtype: of parameters and gradients, such as float32.
        repetitions: steps timed per case.

    Returns:
        `rows`, and on what they were measured.

    Raises:
        ValueError: an argument that cannot be.
    """
    for name, value in (("numel", numel), ("repetitions", repetitions)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value!r}; give a larger number")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be one that is there; got {device!r}; use cpu")
    cases = _cases(torch.device(device), numel, getattr(torch, dtype))
    times: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    for repetition in range(repetitions + 2):  # the first two make states and warm up
        for name, step, _ in cases:
            milliseconds = _time(step, device)
            if repetition >= 2:
                times[name].append(milliseconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        Row(name, medians[name], count, count * numel / medians[name] / 1e6, medians[name] / medians[REFERENCE])
        for name, _, count in cases
    ]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numel": numel,
        "dtype": dtype,
        "repetitions": repetitions,
        "rows": [asdict(row) for row in rows],
    }


def bench_table(report: dict[str, Any]) -> str:
    """The report for people: aligned plain text."""
    where = f"{report['device']}, {report['threads']} threads, torch {report['torch']}"
    lines = [f"{report['numel']:,} parameters, {report['dtype']}, median of {report['repetitions']}; {where}", ""]
    lines.append(f"{'case':<28}{'ms':>10}{'bytes/param':>13}{'GB/s':>8}{'ratio':>8}")
    for row in report["rows"]:
        numbers = f"{row['milliseconds']:>10.2f}{row['bytes_per_parameter']:>13}"
        lines.append(f"{row['case']:<28}{numbers}{row['gigabytes_per_second']:>8.1f}{row['ratio']:>8.2f}")
    return "\n".join(
        [*lines, "", f"ratio: time over that of {REFERENCE}. bytes/param: what the algorithm has to move."]
    )


Case = tuple[str, Callable[[], Any], int]


def _cases(device: torch.device, numel: int, dtype: torch.dtype) -> list[Case]:
    source = _tensors(device, numel, dtype)
    target = [torch.empty_like(tensor) for tensor in source]

    def ours(**arguments: Any) -> Callable[[], Any]:
        kind = AdaiV2 if "dampening" in arguments else Adai
        return kind(_parameters(device, numel, dtype), lr=1e-3, **arguments).step

    def adamw(clipped: bool, **arguments: Any) -> Callable[[], Any]:
        params = _parameters(device, numel, dtype)
        optimizer = torch.optim.AdamW(params, lr=1e-3, **arguments)

        def step() -> None:
            if clipped:
                nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        return step

    size = dtype.itemsize
    our_size = max(size, 4)  # our states are float32 at least; AdamW's have the dtype of the parameter

    def count(kind: str, state_size: int) -> int:
        parameters, states = TENSORS_TOUCHED[kind]
        return parameters * size + states * state_size

    return [
        ("copy", lambda: torch._foreach_copy_(target, source), count("copy", size)),
        ("Adai", ours(), count("Adai", our_size)),
        ("Adai, clipped", ours(max_grad_norm=MAX_NORM), count("Adai", our_size)),
        ("AdaiV2 d=0, clipped", ours(dampening=0.0, max_grad_norm=MAX_NORM), count("Adai", our_size)),
        ("AdamW foreach, clipped", adamw(True, foreach=True), count("AdamW, clipped", size)),
        ("AdamW fused", adamw(False, fused=True), count("AdamW", size)),
        (REFERENCE, adamw(True, fused=True), count("AdamW, clipped", size)),
    ]


def _tensors(device: torch.device, numel: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = [TENSOR_ELEMENTS] * (numel // TENSOR_ELEMENTS) + [numel % TENSOR_ELEMENTS]
    return [torch.randn(size, device=device, dtype=dtype) for size in sizes if size]


def _parameters(device: torch.device, numel: int, dtype: torch.dtype) -> list[nn.Parameter]:
    params = [nn.Parameter(tensor) for tensor in _tensors(device, numel, dtype)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def _time(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3
