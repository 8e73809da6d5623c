"""`adai-dist soak`: a long run of a tiny model that checks ranks and memory."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from adai_dist.cli.exit import EXIT_FAILURE, report_error, report_missing_package
from adai_dist.cli.parser import Commands, given_options

if TYPE_CHECKING:
    from adai_dist.recipes.job import World
    from adai_dist.tools.soak import Settings


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "soak",
        help="train a tiny model for many steps and check that ranks agree and memory does not grow",
        description="Train a tiny model on the ranks of the launcher and compare the ranks at intervals. Exit with 1 "
        "if the ranks diverge or the memory grows.",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="default: 100000")
    layouts_help = "default: ddp, then fsdp2; local does not reduce gradients and must fail"
    parser.add_argument("--layout", choices=("ddp", "fsdp2", "local"), help=layouts_help)
    parser.add_argument("--check-every", type=int, metavar="N", help="steps between two checks; default: 1000")
    parser.add_argument("--overflow-every", type=int, metavar="N", help="steps between two infinities; default: 997")
    parser.add_argument("--max-growth", type=float, metavar="MIB", help="allowed memory growth per rank; default: 8")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        from adai_dist.recipes.job import join_world
        from adai_dist.recipes.recipe import RecipeError
        from adai_dist.tools.soak import Settings
    except ModuleNotFoundError as error:
        return report_missing_package("soak", error, "train")
    given = given_options(options, "steps", "check_every", "overflow_every", "max_growth")
    logging.getLogger("adai_dist").setLevel(logging.ERROR)  # skipped steps are intended here
    try:
        layouts = [options.layout] if options.layout else ["ddp", "fsdp2"]
        all_settings = [Settings(layout=layout, **given) for layout in layouts]
        with join_world(options.device) as world:
            return EXIT_FAILURE if any(_find_fault(settings, world) for settings in all_settings) else 0
    except (RecipeError, ValueError) as error:
        return report_error(str(error))


def _find_fault(settings: Settings, world: World) -> bool:
    """Print a table row per check and return whether a check failed. Collective: all ranks of the job."""
    from adai_dist.tools.soak import soak, table_row

    def show(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    show(f"\n{settings.layout}, {world.size} ranks, {settings.steps:,} steps\n{table_row(None)}")
    for check in soak(settings, world.device):
        show(table_row(check))
        if check.fault:
            if world.is_main:
                report_error(f"{settings.layout}, step {check.step:,}: {check.fault}")
            return True
    return False
