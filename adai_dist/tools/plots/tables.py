"""Tables of runs as aligned plain text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from adai_dist.tools.plots.records import Record, unit_of_loss


def comparison_table(summaries: Sequence[Record]) -> str:
    """Return a table with one line per run."""
    unit = unit_of_loss(summaries)
    header = ("run", "optimizer", "engine", "ranks", "steps", "held-out loss", f"{unit}s/s", "optimizer's share")
    rows: list[Sequence[str]] = [header]
    for run in summaries:
        speed, share = run[f"{unit}s_per_second"], run["optimizer_share"]  # None after a single step
        numbers = (f"{run['steps']:,}", f"{run['val_loss']:.4f}", f"{speed or 0:,.0f}", f"{share or 0:.1%}")
        rows.append((run["run"], run["optimizer"], run["engine"], str(run["world_size"]), *numbers))
    return _aligned(rows)


def sweep_table(summaries: dict[str, list[Record]]) -> str:
    """Return a table with one line per optimizer: mean and standard deviation over the seeds.

    Args:
        summaries: for each optimizer, those of its runs.
    """
    has_error = "val_error" in next(iter(summaries.values()))[0]
    rows = [["optimizer", "seeds", "held-out loss", *(["held-out error"] if has_error else []), "seconds"]]
    for optimizer, runs in summaries.items():
        cells = [optimizer, str(len(runs)), _mean_and_deviation([run["val_loss"] for run in runs], "{:.4f}")]
        if has_error:
            cells.append(_mean_and_deviation([100 * run["val_error"] for run in runs], "{:.2f}") + " %")
        rows.append([*cells, f"{statistics.fmean(run['seconds'] for run in runs):.1f}"])
    return _aligned(rows)


def _mean_and_deviation(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
