"""The benchmark's results: what a row says, on what it was measured, and the table for people."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_WIDTH = 30
_COLUMNS = {"ms": 9, "spread": 8, "bytes/param": 13, "GB/s": 8, "of copy": 9, "ratio": 8, "extra MiB": 11}
_HEADER = f"{'case':<{_WIDTH}}" + "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())


@dataclass(frozen=True)
class Row:
    """One case of the benchmark."""

    case: str
    package: str
    """Whose case it is: adai_dist, torch, deepspeed or pytorch_optimizer."""
    milliseconds: float
    """Median of the repetitions."""
    fastest: float
    """Milliseconds of the fastest repetition."""
    lower_quartile: float
    """A quarter of the repetitions took fewer milliseconds."""
    upper_quartile: float
    """A quarter of the repetitions took more milliseconds."""
    bytes_per_parameter: int | None
    """What the algorithm has to move (:mod:`adai_dist.tools.bench.traffic`); None for the copy."""
    gigabytes_per_second: float
    """These bytes over the median time."""
    copy_share: float
    """Their rate over that of the copy."""
    ratio: float | None
    """Time over that of clipped fused AdamW; None for the copy."""
    extra_bytes: int
    """Peak of the memory that the step takes beside parameters, gradients and states."""


def hardware(device: str) -> dict[str, Any]:
    """The processor, and the GPU if that was measured."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "num_cpus": os.cpu_count(), "system": platform.platform()}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str | None]:
    """Of everything that a time depends on; None for what is not there."""
    found: dict[str, str | None] = {"adai_dist": _version("adai-dist"), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    return found | {package: _version(package) for package in ("deepspeed", "pytorch_optimizer")}


def bench_table(report: dict[str, Any]) -> str:
    """The report for people: aligned plain text."""
    lines = [
        f"$ {report['command']}",
        f"{report['numel']:,} parameters in {report['num_tensors']} tensors, {report['dtype']}; "
        f"median of {report['repetitions']} repetitions in turns",
        _where(report),
        f"kernels: {report['kernels']}",
        "",
        _HEADER,
        *(_line(row) for row in report["rows"]),
        "",
        *report["missing"],
        "spread: interquartile range over median. bytes/param: what the algorithm has to move.",
        f"of copy: rate over that of a copy of {report['copy_bytes'] // 2**20} MiB (read and written).",
        f"ratio: time over that of {report['reference']}. extra MiB: peak memory of a step beside its tensors.",
    ]
    return "\n".join(lines)


def _where(report: dict[str, Any]) -> str:
    machine, found = report["hardware"], report["versions"]
    names = {"torch": "torch", "cuda": "CUDA", "deepspeed": "DeepSpeed", "pytorch_optimizer": "pytorch_optimizer"}
    packages = [f"{name} {found[key]}" for key, name in names.items() if found[key]]
    return "; ".join([machine.get("gpu") or machine["cpu"], f"{report['threads']} CPU threads", ", ".join(packages)])


def _line(row: dict[str, Any]) -> str:
    spread = (row["upper_quartile"] - row["lower_quartile"]) / row["milliseconds"]
    cells = (
        f"{row['milliseconds']:.2f}",
        f"{spread:.0%}",
        "-" if row["bytes_per_parameter"] is None else str(row["bytes_per_parameter"]),
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['copy_share']:.0%}",
        "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        f"{row['extra_bytes'] / 2**20:.2f}",
    )
    padded = (f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))
    return f"{row['case']:<{_WIDTH}}{''.join(padded)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """As Linux names it; platform.processor() knows the architecture alone there."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
