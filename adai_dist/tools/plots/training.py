"""The pictures of one training run: loss and inertia over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from adai_dist.tools.plots.drawing import COLOURS, INK, draw_held_out, draw_training, finish_loss_axis, new_figure, save
from adai_dist.tools.plots.records import read_records
from adai_dist.tools.telemetry import horizon_edges

Array = NDArray[np.float64]

_MAX_PANELS = 12


def plot_loss(folder: Path, unit: str = "token") -> Path:
    """Draw training and held-out loss of a run, in nats per `unit`, into FOLDER/loss.png and return its path."""
    records = read_records(folder / "metrics.jsonl")
    figure, axes = new_figure(1, 1, 7.5, 4.5)
    draw_training(axes[0], records, COLOURS[0], "training (smoothed)")
    draw_held_out(axes[0], records, COLOURS[1], "held-out data")
    finish_loss_axis(axes[0], records, unit)
    axes[0].set_title(folder.resolve().name, loc="left", color=INK)
    axes[0].legend(frameon=False)
    return save(figure, folder / "loss.png")


def plot_inertia(folder: Path) -> Path | None:
    """Draw the distribution of inertia per layer over time into FOLDER/inertia.png.

    Each panel shows one layer, at most 12 in all. Colour is the share of the layer's elements; the lines are the median
    and the 10 % and 90 % quantiles.

    Returns:
        The path; None if the run recorded no inertia.
    """
    records = read_records(folder / "inertia.jsonl")
    if not records:
        return None
    layers = _evenly_spaced(list(records[-1]["layers"]), _MAX_PANELS)
    num_columns = min(len(layers), 3 if len(layers) <= 6 else 4)
    num_rows = math.ceil(len(layers) / num_columns)
    figure, panels = new_figure(num_rows, num_columns, 3.2 * num_columns + 1.2, 2.5 * num_rows + 0.9)
    steps = np.array([record["step"] for record in records], float)
    shares = {layer: np.array([record["layers"][layer] for record in records]) for layer in layers}
    densest = float(np.quantile(np.concatenate(list(shares.values())), 0.99))
    image: Any = None
    for index, (panel, layer) in enumerate(zip(panels, layers, strict=False)):
        image = _draw_inertia(panel, steps, shares[layer], densest)
        panel.set_title(layer, loc="left", fontsize=10, color=INK)
        panel.tick_params(labelbottom=index + num_columns >= len(layers))
    for panel in panels[len(layers) :]:
        panel.set_visible(False)
    panels[0].set_ylim(*_horizons_in_use(list(shares.values())))
    bar = figure.colorbar(image, ax=panels, pad=0.015, fraction=0.03, aspect=30)
    bar.set_label("share of the layer's elements", color=INK)
    figure.supxlabel("step", fontsize=10, color=INK)
    figure.supylabel(r"horizon of the inertia, $1/(1-\beta_1)$, in steps", fontsize=10, color=INK)
    name = folder.resolve().name
    figure.suptitle(f"{name}: inertia per layer (line: median; dotted: 10 % and 90 %)", fontsize=11, color=INK)
    return save(figure, folder / "inertia.png")


def _draw_inertia(panel: Axes, steps: Array, shares: Array, densest: float) -> Any:
    edges = np.array(horizon_edges(shares.shape[1]))
    # Each record is the centre of its column; the first and the last column are as wide as their neighbours.
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (2 * steps[0] - middles[0], 2 * steps[-1] - middles[-1]) if len(middles) else steps[0] + (-0.5, 0.5)
    borders = np.concatenate([[first], middles, [last]])
    image = panel.pcolormesh(borders, edges, shares.T, cmap="Blues", vmin=0.0, vmax=densest, rasterized=True)
    for share, style, width in ((0.5, "-", 1.6), (0.1, ":", 1.1), (0.9, ":", 1.1)):
        quantiles = [_quantile(row, edges, share) for row in shares]
        panel.plot(steps, quantiles, color=COLOURS[1], linestyle=style, linewidth=width)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    return image


def _horizons_in_use(layers: Sequence[Array]) -> tuple[float, float]:
    """Return the range of horizons that holds 98 % of every layer's elements at any time, with a margin."""
    edges = np.array(horizon_edges(layers[0].shape[1]))
    rows = np.concatenate(layers)
    low = min(_quantile(row, edges, 0.01) for row in rows)
    high = max(_quantile(row, edges, 0.99) for row in rows)
    return max(edges[0], low / 1.3), min(edges[-1], high * 1.3)


def _quantile(shares: Array, edges: Array, level: float) -> float:
    """Return the horizon below which a share `level` of the elements lies, interpolated on a logarithmic scale."""
    cumulative = np.concatenate([[0.0], np.cumsum(shares)])
    return float(10.0 ** np.interp(level, cumulative, np.log10(edges)))


def _evenly_spaced(items: list[str], limit: int) -> list[str]:
    """Return at most `limit` of the items, evenly spaced, including the first and the last."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
