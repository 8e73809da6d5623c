"""Pictures as PNG files: the loss and the inertia of a run over time, several runs beside each other, a benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adai_dist.tools.telemetry import horizon_edges

Record = dict[str, Any]
Array = NDArray[np.float64]

# Okabe and Ito: told apart also by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PACKAGE_COLOURS = dict(zip(("adai_dist", "torch", "deepspeed", "pytorch_optimizer"), COLOURS, strict=False))
_LONGEST_BAR = 4.0  # times the reference of a benchmark
_MAX_PANELS = 12
_SMOOTHING_POINTS = 50  # a smoothed curve averages over 1/50 of its length on either side
_INK, _GRID = "#333333", "#dddddd"


def read_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file, in order, without the half line that a killed run may leave at its end."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_summary(folder: Path) -> Record:
    """The summary of a finished run.

    Raises:
        ValueError: the folder holds none.
    """
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"a run must have a readable summary.json; got {str(folder)!r}; name the folder of a finished run"
        ) from error


def plot_loss(folder: Path) -> Path:
    """Draws training and held-out loss of a run into FOLDER/loss.png and returns its path."""
    records = read_records(folder / "metrics.jsonl")
    figure, axes = _new_figure(1, 1, 7.5, 4.5)
    _draw_training(axes[0], records, COLOURS[0], "training (smoothed)")
    _draw_held_out(axes[0], records, COLOURS[1], "held-out text")
    _finish_loss_axis(axes[0], records)
    axes[0].set_title(folder.resolve().name, loc="left", color=_INK)
    axes[0].legend(frameon=False)
    return _save(figure, folder / "loss.png")


def plot_inertia(folder: Path) -> Path | None:
    """Draws the distribution of inertia per layer over time into FOLDER/inertia.png.

    One panel per layer (some of them where there are many). Colour is the share of the layer's elements; the lines are
    the median and the 10 % and 90 % quantiles.

    Returns:
        The path; None if the run has no inertia to show.
    """
    records = read_records(folder / "inertia.jsonl")
    if not records:
        return None
    layers = _spread(list(records[-1]["layers"]), _MAX_PANELS)
    num_columns = min(len(layers), 3 if len(layers) <= 6 else 4)
    num_rows = math.ceil(len(layers) / num_columns)
    figure, panels = _new_figure(num_rows, num_columns, 3.2 * num_columns + 1.2, 2.5 * num_rows + 0.9)
    steps = np.array([record["step"] for record in records], float)
    shares = {layer: np.array([record["layers"][layer] for record in records]) for layer in layers}
    densest = float(np.quantile(np.concatenate(list(shares.values())), 0.99))
    image: Any = None
    for index, panel in enumerate(panels):
        if index >= len(layers):
            panel.set_visible(False)
            continue
        image = _draw_inertia(panel, steps, shares[layers[index]], densest)
        panel.set_title(layers[index], loc="left", fontsize=10, color=_INK)
        panel.tick_params(labelbottom=index + num_columns >= len(layers))
    panels[0].set_ylim(*_horizons_in_use(list(shares.values())))
    bar = figure.colorbar(image, ax=panels, pad=0.015, fraction=0.03, aspect=30)
    bar.set_label("share of the layer's elements", color=_INK)
    figure.supxlabel("step", fontsize=10, color=_INK)
    figure.supylabel(r"horizon of the inertia, $1/(1-\beta_1)$, in steps", fontsize=10, color=_INK)
    name = folder.resolve().name
    figure.suptitle(f"{name}: inertia per layer (line: median; dotted: 10 % and 90 %)", fontsize=11, color=_INK)
    return _save(figure, folder / "inertia.png")


def plot_comparison(folders: Sequence[Path], path: Path) -> list[Record]:
    """Draws the loss of several finished runs on one picture.

    Args:
        folders: of runs.
        path: of the PNG file.

    Returns:
        The summaries of the runs, in the order given.

    Raises:
        ValueError: a folder is no finished run.
    """
    summaries = [read_summary(folder) for folder in folders]
    figure, axes = _new_figure(1, 2, 11.0, 4.6)
    histories = [read_records(folder / "metrics.jsonl") for folder in folders]
    for index, (records, summary) in enumerate(zip(histories, summaries, strict=True)):
        colour, style = COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS) % 3]
        label = f"{summary['run']}, {summary['optimizer']}: {summary['val_loss']:.3f}"
        _draw_held_out(axes[0], records, colour, label, style)
        _draw_training(axes[1], records, colour, "", style)
    for axis, title in zip(axes, ("held-out text", "training (smoothed)"), strict=True):
        _finish_loss_axis(axis, [record for records in histories for record in records])
        axis.set_title(title, loc="left", color=_INK)
    axes[1].set_ylabel("")
    axes[0].legend(frameon=False, title="run, optimizer: final held-out loss", alignment="left")
    _save(figure, path)
    return summaries


def comparison_table(summaries: Sequence[Record]) -> str:
    """The runs for people, one line each: aligned plain text."""
    header = ("run", "optimizer", "engine", "ranks", "steps", "held-out loss", "tokens/s", "optimizer's share")
    rows: list[tuple[str, ...]] = [header]
    for run in summaries:
        speed, share = run["tokens_per_second"], run["optimizer_share"]  # unknown for a run of one step
        numbers = (f"{run['steps']:,}", f"{run['val_loss']:.4f}", f"{speed or 0:,.0f}", f"{share or 0:.1%}")
        rows.append((run["run"], run["optimizer"], run["engine"], str(run["world_size"]), *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def plot_bench(report: Record, path: Path) -> Path:
    """Draws the times of a benchmark as bars with their interquartile ranges; bars that are too long are cut.

    Args:
        report: of :func:`adai_dist.tools.bench.measure`.
        path: of the PNG file.
    """
    rows = [row for row in report["rows"] if row["ratio"] is not None]
    reference = next(row["milliseconds"] for row in rows if row["case"] == report["reference"])
    limit = min(_LONGEST_BAR * reference, 1.05 * max(row["milliseconds"] for row in rows))
    figure, (axis,) = _new_figure(1, 1, 9.0, 0.36 * len(rows) + 1.4)
    for place, row in enumerate(rows):
        time, low, high = (row[name] for name in ("milliseconds", "lower_quartile", "upper_quartile"))
        axis.barh(place, min(time, limit), height=0.7, color=_PACKAGE_COLOURS[row["package"]])
        if time < limit:
            axis.plot([low, min(high, limit)], [place, place], color=_INK, linewidth=1.0)
        label = f"{'» ' * (time > limit)}{time:.2f} ms, {row['ratio']:.2f} x, {row['gigabytes_per_second']:.1f} GB/s"
        end = (min(max(time, high), limit), place)
        axis.annotate(label, end, (4, 0), textcoords="offset points", va="center", fontsize=8, color=_INK)
    axis.axvline(reference, color=_INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.4 * limit)
    axis.set_xlabel(f"milliseconds; dotted: {report['reference']}, 1.00 x", color=_INK)
    machine, size = report["hardware"], f"{report['numel']:,} parameters in {report['num_tensors']} tensors"
    where = f"{machine.get('gpu') or machine['cpu']}, {report['threads']} CPU threads"
    title = f"{size}, {report['dtype']}\n{where}, torch {report['versions']['torch']}"
    axis.set_title(title, loc="left", fontsize=10, color=_INK)
    return _save(figure, path)


def _new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes: list[Axes] = list(grid.flatten())
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=_INK)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw_training(axis: Axes, records: Sequence[Record], colour: str, label: str, style: str = "-") -> None:
    steps, losses = _series(records, "loss")
    axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(steps, _smoothed(losses), color=colour, linewidth=1.6, linestyle=style, label=label)


def _draw_held_out(axis: Axes, records: Sequence[Record], colour: str, label: str, style: str = "-") -> None:
    steps, losses = _series(records, "val_loss")
    axis.plot(steps, losses, color=colour, linewidth=1.6, linestyle=style, marker="o", markersize=3.5, label=label)


def _finish_loss_axis(axis: Axes, records: Sequence[Record]) -> None:
    """Leaves the steep start out of the picture where it would flatten the rest."""
    losses = [value for key in ("loss", "val_loss") for value in _series(records, key)[1] if math.isfinite(value)]
    if losses:
        low, high = min(losses), float(np.quantile(losses, 0.93))
        margin = 0.08 * max(high - low, 1e-3)
        axis.set_ylim(low - margin, high + margin)
    axis.set_xlabel("step", color=_INK)
    axis.set_ylabel("loss (nats per token)", color=_INK)
    axis.grid(True, color=_GRID, linewidth=0.6)
    axis.set_axisbelow(True)


def _smoothed(values: Sequence[float]) -> list[float]:
    """A centred average over about 1/25 of the points, fewer at the ends: it lags behind nothing."""
    reach = len(values) // _SMOOTHING_POINTS
    smooth: list[float] = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        smooth.append(float(np.mean(values[i - side : i + side + 1])))
    return smooth


def _draw_inertia(panel: Axes, steps: Array, shares: Array, densest: float) -> Any:
    edges = np.array(horizon_edges(shares.shape[1]))
    # A record stands in the middle of its column; the first and the last column are as wide as their neighbours.
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
    """The range of horizons that holds all but a few elements of every layer at any time, with some air around it."""
    edges = np.array(horizon_edges(layers[0].shape[1]))
    rows = np.concatenate(layers)
    low = min(_quantile(row, edges, 0.01) for row in rows)
    high = max(_quantile(row, edges, 0.99) for row in rows)
    return max(edges[0], low / 1.3), min(edges[-1], high * 1.3)


def _quantile(shares: Array, edges: Array, level: float) -> float:
    """The horizon below which a share `level` of the elements lies, interpolated on the logarithmic scale."""
    cumulative = np.concatenate([[0.0], np.cumsum(shares)])
    return float(10.0 ** np.interp(level, cumulative, np.log10(edges)))


def _spread(items: list[str], limit: int) -> list[str]:
    """At most `limit` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
