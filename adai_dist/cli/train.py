"""`adai-dist train`: training from a recipe, alone or under a launcher."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from adai_dist.cli.exit import EXIT_FAILURE, EXIT_STOPPED, end_process, report_error, report_missing_package
from adai_dist.cli.parser import Commands

if TYPE_CHECKING:
    from adai_dist.recipes.job import World
    from adai_dist.recipes.recipe import Recipe

EXAMPLES = """\
examples:
  adai-dist train --config lm_tiny run.steps=200 optimizers.adaiv2.lr=0.5
  torchrun --standalone --nproc-per-node 2 -m adai_dist train --config lm_tiny engine=ddp
"""


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="train a model from a recipe, alone or under a launcher",
        description="Train the model of a recipe. Metrics, plots, checkpoints and a summary go to run.out/run.name.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint; the same as run.resume=true"
    )
    parser.more_help = _describe_keys
    parser.set_defaults(run=_run)


def add_recipe_arguments(parser: Any) -> None:
    """Add `--config` and the key=value pairs."""
    config_help = "a recipe: a YAML file, or the name of a shipped recipe, such as lm_tiny"
    parser.add_argument("--config", required=True, metavar="RECIPE", help=config_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override those of the recipe")


def run_recipe(
    options: argparse.Namespace, overrides: Sequence[str], work: Callable[[Recipe, World], str], needed_by: str
) -> int:
    """Load the recipe, join the job, and print the result of the work on the main rank.

    Args:
        overrides: key=value pairs in addition to those of the options.
        work: returns the text to print.

    Collective: all ranks of the job.
    """
    try:
        from adai_dist.recipes.checkpoints import CheckpointError
        from adai_dist.recipes.job import Stopped, join_world
        from adai_dist.recipes.recipe import RecipeError, load_recipe

        # Before the rendezvous: this import takes seconds, and not equally many on all ranks.
        importlib.import_module("adai_dist.recipes.sweep")
    except ModuleNotFoundError as error:
        return report_missing_package(needed_by, error, "train")
    try:
        recipe = load_recipe(options.config, [*options.overrides, *overrides])
        with join_world(recipe.device, recipe.run.timeout) as world:
            logging.getLogger("adai_dist").setLevel(logging.WARNING if world.is_main else logging.ERROR)
            result = work(recipe, world)
            if world.is_main:
                print(f"\n{result}", flush=True)
    except RecipeError as error:
        end_process(report_error(str(error)))
    except Stopped as error:
        report_error(str(error))
        end_process(EXIT_STOPPED)
    except CheckpointError as error:  # its traceback would add nothing
        report_error(str(error))
        end_process(EXIT_FAILURE)
    return 0


def _run(options: argparse.Namespace) -> int:
    def work(recipe: Recipe, world: World) -> str:
        from adai_dist.recipes.journal import summary_table
        from adai_dist.recipes.train import train

        return summary_table(train(recipe, world))

    return run_recipe(options, ["run.resume=true"] if options.resume else [], work, "training")


def _describe_keys() -> str:
    try:
        from adai_dist.recipes.recipe import describe_keys
    except ModuleNotFoundError:
        return "keys: to list them here, run: pip install 'adai-dist[train]'"
    return f"keys:\n{describe_keys()}"
