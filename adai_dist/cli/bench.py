"""`adai-dist bench`: the time of an optimizer step on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from adai_dist.cli.exit import report_error, report_missing_package
from adai_dist.cli.parser import Commands, given_options


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("bench", help="measure an optimizer step on this machine, next to AdamW's")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--numel", type=int, metavar="N", help="number of parameters; default: 33554432")
    shapes_help = "shapes of gpt2-124m or llama-7b-layer, or tiny-148 to measure the time of the host"
    size.add_argument("--shapes", metavar="NAME", help=shapes_help)
    parser.add_argument("--dtype", metavar="NAME", help="of parameters: float32 (default), bfloat16 or float16")
    parser.add_argument("--repetitions", type=int, metavar="N", help="timed runs of every case; default: 25")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument("--no-others", action="store_true", help="leave out DeepSpeed and pytorch_optimizer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, hardware and versions")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a bar chart, a PNG file")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from adai_dist.tools.bench import Settings, bench_table, measure

    plot = None
    if options.plot:
        try:
            from adai_dist.tools.plots import plot_bench as plot
        except ModuleNotFoundError as error:
            return report_missing_package("--plot", error, "train")
    given = given_options(options, "numel", "shapes", "dtype", "repetitions", "threads")
    try:
        settings = Settings(device=options.device, others=not options.no_others, **given)
        for path in filter(None, (options.json, options.plot)):  # fail before measuring for minutes
            path.open("ab").close()
        report = measure(settings)
        print(bench_table(report))
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
        if plot:
            plot(report, options.plot)
    except OSError as error:
        return report_error(f"--json and --plot must name writable files; got {error}; name others")
    except ValueError as error:
        return report_error(str(error))
    return 0
