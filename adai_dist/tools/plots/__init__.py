"""Pictures as PNG files: the loss and the inertia of a run over time, several runs beside each other, a benchmark."""

from adai_dist.tools.plots.bench import plot_bench
from adai_dist.tools.plots.comparison import comparison_table, plot_comparison
from adai_dist.tools.plots.records import Record, read_records, read_summary
from adai_dist.tools.plots.run import plot_inertia, plot_loss
from adai_dist.tools.plots.seeds import plot_seeds, seeds_table

__all__ = [
    "Record",
    "comparison_table",
    "plot_bench",
    "plot_comparison",
    "plot_inertia",
    "plot_loss",
    "plot_seeds",
    "read_records",
    "read_summary",
    "seeds_table",
]
