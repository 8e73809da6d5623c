"""The report of the benchmark: its rows, the environment of the measurement, and the text table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WIDTH = 41
_COLUMNS = {
    "ms": 9,
    "spread": 8,
    "bytes/param": 13,
    "state/param": 13,
    "GB/s": 8,
    "of copy": 9,
    "ratio": 8,
    "extra MiB": 11,
}
_HEADER = f"{'case':<{_WIDTH}}" + "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())


@dataclass(frozen=True)
class Row:
    """The measurement of one case."""

    case: str
    package: str
    """Package whose code was timed: adai_dist, torch, deepspeed or pytorch_optimizer."""
    milliseconds: float
    """Median time of the repetitions."""
    fastest: float
    """Time of the fastest repetition, milliseconds."""
    lower_quartile: float
    """First quartile of the time, milliseconds."""
    upper_quartile: float
    """Third quartile of the time, milliseconds."""
    bytes_per_parameter: float | None
    """Bytes that the algorithm has to move (:mod:`adai_dist.tools.bench.traffic`); None for the copy."""
    state_bytes_per_parameter: float | None
    """Bytes of the states, including the remainders of master weights; None for the copy."""
    gigabytes_per_second: float
    """Bytes moved divided by the median time."""
    copy_share: float
    """Rate relative to that of the copy."""
    ratio: float | None
    """Median time relative to that of clipped fused AdamW; None for the copy."""
    extra_bytes: int
    """Peak memory of the step in addition to parameters, gradients and states."""


def bench_table(report: dict[str, Any]) -> str:
    """Return the report as aligned plain text."""
    lines = [
        f"$ {report['command']}",
        f"{report['numel']:,} parameters in {report['num_tensors']} tensors, {report['dtype']}; "
        f"median of {report['repetitions']} interleaved repetitions",
        _environment_line(report),
        f"kernels: {report['kernels']}",
        "",
        _HEADER,
        *(_row_line(row) for row in report["rows"]),
        "",
        *report["missing"],
        "spread: interquartile range / median. bytes/param: bytes that the algorithm has to move.",
        "state/param: bytes of the states, including the remainders of master weights.",
        f"of copy: rate / rate of a copy of {report['copy_bytes'] // 2**20} MiB (read and written).",
        f"ratio: time / time of {report['reference']}. extra MiB: peak memory of a step in addition to its tensors.",
        f"AdamW keeps {report['dtype']} states. {_note_on_modes(report['dtype'])}",
    ]
    return "\n".join(lines)


def _note_on_modes(dtype: str) -> str:
    if dtype == "float32":
        return "torch has no AdamW with bfloat16 or 8-bit states of float32 parameters."
    return "Adai keeps master weights, except in the case without (no master: master_weights=False)."


def _environment_line(report: dict[str, Any]) -> str:
    machine, installed = report["hardware"], report["versions"]
    names = {"torch": "torch", "cuda": "CUDA", "deepspeed": "DeepSpeed", "pytorch_optimizer": "pytorch_optimizer"}
    packages = [f"{name} {installed[key]}" for key, name in names.items() if installed[key]]
    return "; ".join([machine.get("gpu") or machine["cpu"], f"{report['threads']} CPU threads", ", ".join(packages)])


def _row_line(row: dict[str, Any]) -> str:
    spread = (row["upper_quartile"] - row["lower_quartile"]) / row["milliseconds"]
    cells = (
        f"{row['milliseconds']:.2f}",
        f"{spread:.0%}",
        *(
            "-" if row[name] is None else f"{row[name]:g}"
            for name in ("bytes_per_parameter", "state_bytes_per_parameter")
        ),
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['copy_share']:.0%}",
        "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        f"{row['extra_bytes'] / 2**20:.2f}",
    )
    padded = (f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True))
    return f"{row['case']:<{_WIDTH}}{''.join(padded)}"
