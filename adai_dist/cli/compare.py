"""`adai-dist compare`: several finished runs in one picture and one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from adai_dist.cli.exit import report_error, report_missing_package
from adai_dist.cli.parser import Commands


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("compare", help="draw the losses of finished runs in one picture and list the runs")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders such as runs/lm_tiny")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), metavar="FILE", help="default: %(default)s")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        from adai_dist.tools.plots import comparison_table, plot_comparison
    except ModuleNotFoundError as error:
        return report_missing_package("compare", error, "train")
    try:
        summaries = plot_comparison(options.runs, options.out)
    except (ValueError, OSError) as error:
        return report_error(str(error))
    print(f"{comparison_table(summaries)}\n\n{options.out}")
    return 0
