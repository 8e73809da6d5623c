"""The style and the curves shared by all pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adai_dist.tools.plots.records import Record

# Okabe and Ito's palette, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GRID = "#333333", "#dddddd"
_SMOOTHING_POINTS = 50  # smoothing averages over 1/50 of the curve's length on either side


def new_figure(rows: int, columns: int, width: float, height: float, shared: bool = True) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its panels, row by row.

    Args:
        width, height: size in inches.
        shared: give all panels the same axes.
    """
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False)
    axes: list[Axes] = list(grid.flatten())
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG file, creating its folder if necessary, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of the records that have this key."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw_training(axis: Axes, records: Sequence[Record], colour: str, label: str, style: str = "-") -> None:
    """Draw the training loss as a smoothed curve over the faint recorded one."""
    steps, losses = series(records, "loss")
    axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smoothed(losses), color=colour, linewidth=1.6, linestyle=style, label=label)


def draw_held_out(axis: Axes, records: Sequence[Record], colour: str, label: str, style: str = "-") -> None:
    """Draw the held-out loss."""
    steps, losses = series(records, "val_loss")
    axis.plot(steps, losses, color=colour, linewidth=1.6, linestyle=style, marker="o", markersize=3.5, label=label)


def finish_loss_axis(axis: Axes, records: Sequence[Record], unit: str, log: bool = False) -> None:
    """Label the axes, and cut off the steep first steps where they would flatten the rest of the curve."""
    losses = [value for key in ("loss", "val_loss") for value in series(records, key)[1] if math.isfinite(value)]
    if log and losses and min(losses) > 0:
        axis.set_yscale("log")
        axis.set_ylim(0.8 * min(losses), 1.25 * float(np.quantile(losses, 0.97)))
    elif losses:
        low, high = min(losses), float(np.quantile(losses, 0.93))
        margin = 0.08 * max(high - low, 1e-3)
        axis.set_ylim(low - margin, high + margin)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel(f"loss (nats per {unit})", color=INK)
    axis.grid(True, color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the centred moving average over about 1/25 of the points, fewer at the ends, which does not lag."""
    reach = len(values) // _SMOOTHING_POINTS
    smooth: list[float] = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        smooth.append(float(np.mean(values[i - side : i + side + 1])))
    return smooth
