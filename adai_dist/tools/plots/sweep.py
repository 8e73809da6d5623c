"""The picture of a sweep: runs that differ only in optimizer and seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from adai_dist.tools.plots.drawing import COLOURS, GRID, INK, finish_loss_axis, new_figure, save, series
from adai_dist.tools.plots.records import Record, read_records


def plot_sweep(summaries: dict[str, list[Record]], path: Path) -> Path:
    """Draw the held-out loss over time, as mean and range over the seeds, and the final result of every run.

    Args:
        summaries: for each optimizer, those of its finished runs, whose folders must still exist.
        path: PNG file to write.
    """
    figure, (curves, results) = new_figure(1, 2, 11.0, 4.6, shared=False)
    first = next(iter(summaries.values()))[0]
    key = "val_error" if "val_error" in first else "val_loss"
    held_out: list[Record] = []
    for index, (optimizer, runs) in enumerate(summaries.items()):
        colour = COLOURS[index % len(COLOURS)]
        histories = [read_records(Path(run["folder"]) / "metrics.jsonl") for run in runs]
        held_out += [record for record in itertools.chain(*histories) if "val_loss" in record]
        _draw_range(curves, histories, optimizer, colour)
        values = [run[key] for run in runs]
        results.plot(values, [index] * len(values), "o", color=colour, alpha=0.6, markeredgewidth=0.0)
        results.plot(statistics.fmean(values), index, "|", color=INK, markersize=18)
    finish_loss_axis(curves, held_out, first["unit"], log=True)
    curves.set_title("held-out data: mean and range over seeds", loc="left", color=INK)
    curves.legend(frameon=False)
    results.set_yticks(range(len(summaries)), list(summaries))
    results.invert_yaxis()
    if key == "val_error":
        results.set_xlabel("held-out error", color=INK)
        results.xaxis.set_major_formatter(PercentFormatter(1.0))
    else:
        results.set_xlabel(f"held-out loss (nats per {first['unit']})", color=INK)
    results.set_title("final result of each seed (line: mean)", loc="left", color=INK)
    results.grid(True, axis="x", color=GRID, linewidth=0.6)
    return save(figure, path)


def _draw_range(axis: Axes, histories: Sequence[Sequence[Record]], label: str, colour: str) -> None:
    curves = [series(records, "val_loss") for records in histories]
    steps, values = curves[0][0], np.array([losses for _, losses in curves])
    axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0.0)
    axis.plot(steps, values.mean(axis=0), color=colour, linewidth=1.6, label=label)
