"""The losses of several runs in one picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from adai_dist.tools.plots.drawing import COLOURS, INK, draw_held_out, draw_training, finish_loss_axis, new_figure, save
from adai_dist.tools.plots.records import Record, read_records, read_summary, unit_of_loss


def plot_comparison(folders: Sequence[Path], path: Path) -> list[Record]:
    """Draw the losses of several finished runs, all of text or all of images.

    Args:
        folders: folders of the runs.
        path: PNG file to write.

    Returns:
        The summaries of the runs, in the order given.

    Raises:
        ValueError: a folder holds no finished run, or the losses have different units.
    """
    summaries = [read_summary(folder) for folder in folders]
    unit = unit_of_loss(summaries)
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
