"""`adai-dist to-universal`: conversion of DeepSpeed checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from adai_dist.cli.exit import report_error, report_missing_package
from adai_dist.cli.parser import Commands


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "to-universal", help="convert a DeepSpeed checkpoint for another number of ranks or another ZeRO stage"
    )
    parser.add_argument("input", type=Path, metavar="IN", help="folder of one checkpoint, such as run/global_step100")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--num-workers", type=int, default=1, metavar="N", help="number of converting processes; default: %(default)s"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        from adai_dist.integrations.deepspeed.universal import to_universal
    except ModuleNotFoundError as error:
        return report_missing_package("to-universal", error, "deepspeed")
    try:
        to_universal(options.input, options.output, num_workers=options.num_workers)
    except (ValueError, OSError, RuntimeError) as error:
        return report_error(str(error))
    print(options.output)
    return 0
