"""PNG pictures and text tables of one run, of several runs, of a sweep, and of a benchmark."""

from adai_dist.tools.plots.bench import plot_bench
from adai_dist.tools.plots.comparison import plot_comparison
from adai_dist.tools.plots.records import Record, read_records, read_summary
from adai_dist.tools.plots.sweep import plot_sweep
from adai_dist.tools.plots.tables import comparison_table, sweep_table
from adai_dist.tools.plots.training import plot_inertia, plot_loss

__all__ = [
    "Record",
    "comparison_table",
    "plot_bench",
    "plot_comparison",
    "plot_inertia",
    "plot_loss",
    "plot_sweep",
    "read_records",
    "read_summary",
    "sweep_table",
]
