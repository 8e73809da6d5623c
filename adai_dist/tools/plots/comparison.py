"""Several runs on one picture and in one table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from adai_dist.tools.plots.drawing import COLOURS, INK, draw_held_out, draw_training, finish_loss_axis, new_figure, save
from adai_dist.tools.plots.records import Record, read_records, read_summary


def plot_comparison(folders: Sequence[Path], path: Path) -> list[Record]:
    """Draws the loss of several finished runs on one picture.

    Args:
        folders: of runs, of text or of images.
        path: of the PNG file.

    Returns:
        The summaries of the runs, in the order given.

    Raises:
        ValueError: a folder is no finished run, or the runs do not belong on one scale.
    """
    summaries = [read_summary(folder) for folder in folders]
    unit = _unit_of(summaries)
    figure, axes = new_figure(1, 2, 11.0, 4.6)
    histories = [read_records(folder / "metrics.jsonl") for folder in folders]
    for index, (records, summary) in enumerate(zip(histories, summaries, strict=True)):
        colour, style = COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS) % 3]
        label = f"{summary['run']}, {summary['optimizer']}: {summary['val_loss']:.3f}"
        draw_held_out(axes[0], records, colour, label, style)
        draw_training(axes[1], records, colour, "", style)
    for axis, title in zip(axes, ("held-out data", "training (smoothed)"), strict=True):
        finish_loss_axis(axis, list(itertools.chain(*histories)), unit)
        axis.set_title(title, loc="left", color=INK)
    axes[1].set_ylabel("")
    axes[0].legend(frameon=False, title="run, optimizer: final held-out loss", alignment="left")
    save(figure, path)
    return summaries


def comparison_table(summaries: Sequence[Record]) -> str:
    """The runs for people, one line each: aligned plain text."""
    unit = _unit_of(summaries)
    header = ("run", "optimizer", "engine", "ranks", "steps", "held-out loss", f"{unit}s/s", "optimizer's share")
    rows: list[Sequence[str]] = [header]
    for run in summaries:
        speed, share = run[f"{unit}s_per_second"], run["optimizer_share"]  # unknown for a run of one step
        numbers = (f"{run['steps']:,}", f"{run['val_loss']:.4f}", f"{speed or 0:,.0f}", f"{share or 0:.1%}")
        rows.append((run["run"], run["optimizer"], run["engine"], str(run["world_size"]), *numbers))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells each as lines of plain text, whose columns stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _unit_of(summaries: Sequence[Record]) -> str:
    units = sorted({summary["unit"] for summary in summaries})
    if len(units) != 1:
        raise ValueError(
            f"runs must be compared on one scale; got losses per {' and per '.join(units)}; drop some runs"
        )
    return units[0]
