"""Runs that differ in their optimizer and seed, and nothing else: a picture and a table of what seeds leave open."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from adai_dist.tools.plots.comparison import aligned
from adai_dist.tools.plots.drawing import COLOURS, GRID, INK, finish_loss_axis, new_figure, save, series
from adai_dist.tools.plots.records import Record, read_records

Groups = dict[str, list[Record]]
"""For each optimizer the summaries of its runs, one per seed."""


def plot_seeds(groups: Groups, path: Path) -> Path:
    """Draws the held-out loss over time, as mean and range over the seeds, and the outcome of every run.

    Args:
        groups: of finished runs whose folders are still there.
        path: of the PNG file.
    """
    figure, (curves, outcomes) = new_figure(1, 2, 11.0, 4.6, shared=False)
    key, label = _outcome(groups)
    for place, (optimizer, runs) in enumerate(groups.items()):
        colour = COLOURS[place % len(COLOURS)]
        _draw_range(curves, runs, optimizer, colour)
        values = [run[key] for run in runs]
        outcomes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markeredgewidth=0.0)
        outcomes.plot(statistics.fmean(values), place, "|", color=INK, markersize=18)
    first = next(iter(groups.values()))[0]
    records = [read_records(Path(run["folder"]) / "metrics.jsonl") for runs in groups.values() for run in runs]
    held_out = [record for record in itertools.chain(*records) if "val_loss" in record]
    finish_loss_axis(curves, held_out, first["unit"], log=True)
    curves.set_title("held-out data: mean and range over seeds", loc="left", color=INK)
    curves.legend(frameon=False)
    outcomes.set_yticks(range(len(groups)), list(groups))
    outcomes.invert_yaxis()
    outcomes.set_xlabel(label, color=INK)
    if key == "val_error":
        outcomes.xaxis.set_major_formatter(PercentFormatter(1.0))
    outcomes.set_title("each seed at the end (line: mean)", loc="left", color=INK)
    outcomes.grid(True, axis="x", color=GRID, linewidth=0.6)
    return save(figure, path)


def seeds_table(groups: Groups) -> str:
    """The optimizers for people, one line each, with mean and standard deviation over the seeds: aligned plain text."""
    has_error = _outcome(groups)[0] == "val_error"
    header = ["optimizer", "seeds", "held-out loss", *(["held-out error"] if has_error else []), "seconds"]
    rows: list[Sequence[str]] = [header]
    for optimizer, runs in groups.items():
        cells = [optimizer, str(len(runs)), _spread([run["val_loss"] for run in runs], "{:.4f}")]
        if has_error:
            cells.append(_spread([100 * run["val_error"] for run in runs], "{:.2f}") + " %")
        rows.append([*cells, f"{statistics.fmean(run['seconds'] for run in runs):.1f}"])
    return aligned(rows)


def _outcome(groups: Groups) -> tuple[str, str]:
    """What the runs are judged by at the end, and its name."""
    first = next(iter(groups.values()))[0]
    return ("val_error", "share named wrongly") if "val_error" in first else ("val_loss", "held-out loss")


def _draw_range(axis: Axes, runs: Sequence[Record], label: str, colour: str) -> None:
    curves = [series(read_records(Path(run["folder"]) / "metrics.jsonl"), "val_loss") for run in runs]
    steps, values = curves[0][0], np.array([losses for _, losses in curves])
    axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0.0)
    axis.plot(steps, values.mean(axis=0), color=colour, linewidth=1.6, label=label)


def _spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation; of one value, the value."""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean
