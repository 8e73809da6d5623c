"""The picture of a benchmark."""

from __future__ import annotations

from pathlib import Path

from adai_dist.tools.plots.drawing import COLOURS, INK, new_figure, save
from adai_dist.tools.plots.records import Record

_PACKAGE_COLOURS = dict(zip(("adai_dist", "torch", "deepspeed", "pytorch_optimizer"), COLOURS, strict=False))
_LONGEST_BAR = 4.0  # times the length of the reference's bar


def plot_bench(report: Record, path: Path) -> Path:
    """Draw the times of a benchmark as bars with interquartile ranges, and truncate very long bars.

    Args:
        report: the result of :func:`adai_dist.tools.bench.measure`.
        path: PNG file to write.
    """
    rows = [row for row in report["rows"] if row["ratio"] is not None]
    reference = next(row["milliseconds"] for row in rows if row["case"] == report["reference"])
    limit = min(_LONGEST_BAR * reference, 1.05 * max(row["milliseconds"] for row in rows))
    figure, (axis,) = new_figure(1, 1, 9.0, 0.36 * len(rows) + 1.4)
    for index, row in enumerate(rows):
        time, low, high = (row[name] for name in ("milliseconds", "lower_quartile", "upper_quartile"))
        axis.barh(index, min(time, limit), height=0.7, color=_PACKAGE_COLOURS[row["package"]])
        if time < limit:
            axis.plot([low, min(high, limit)], [index, index], color=INK, linewidth=1.0)
        label = f"{'» ' * (time > limit)}{time:.2f} ms, {row['ratio']:.2f} x, {row['gigabytes_per_second']:.1f} GB/s"
        end = (min(max(time, high), limit), index)
        axis.annotate(label, end, (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axis.axvline(reference, color=INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.4 * limit)
    axis.set_xlabel(f"milliseconds; dotted: {report['reference']}, 1.00 x", color=INK)
    machine, size = report["hardware"], f"{report['numel']:,} parameters in {report['num_tensors']} tensors"
    where = f"{machine.get('gpu') or machine['cpu']}, {report['threads']} CPU threads"
    title = f"{size}, {report['dtype']}\n{where}, torch {report['versions']['torch']}"
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    return save(figure, path)
