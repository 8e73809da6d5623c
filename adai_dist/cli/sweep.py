"""`adai-dist sweep`: a recipe with several optimizers and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from adai_dist.cli.parser import Commands
from adai_dist.cli.train import add_recipe_arguments, run_recipe

if TYPE_CHECKING:
    from adai_dist.recipes.job import World
    from adai_dist.recipes.recipe import Recipe


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "sweep",
        help="train a recipe with each of its optimizers and several seeds, and compare them",
        description="Train a recipe once per optimizer and seed, into OUT/NAME/OPTIMIZER-seedSEED (OUT is run.out, "
        "NAME is run.name); finished runs are not repeated. Draw OUT/NAME/sweep.png and print a table. "
        "`adai-dist train --help` lists the keys.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--optimizers", default="", metavar="A,B", help="default: all that the recipe configures")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per optimizer; default: %(default)s")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    def work(recipe: Recipe, world: World) -> str:
        from adai_dist.recipes.sweep import plan_sweep, sweep
        from adai_dist.tools.plots import plot_sweep, sweep_table

        optimizers = [name for name in options.optimizers.split(",") if name]
        summaries = sweep(plan_sweep(recipe, optimizers, options.seeds), world)
        picture = Path(recipe.run.out) / recipe.run.name / "sweep.png"
        if world.is_main:
            plot_sweep(summaries, picture)
        return f"{sweep_table(summaries)}\n\n{picture}"

    return run_recipe(options, [], work, "training")
