"""One recipe with several optimizers and seeds: what a comparison needs, in one command."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from adai_dist.recipes.config import Recipe
from adai_dist.recipes.recipe_file import load_recipe
from adai_dist.recipes.refusal import RecipeError, require
from adai_dist.recipes.summary import Summary
from adai_dist.recipes.train import train
from adai_dist.recipes.world import World
from adai_dist.tools.plots import read_summary


def plan_sweep(recipe: Recipe, chosen: Sequence[str], num_seeds: int) -> dict[str, list[Recipe]]:
    """The runs of a sweep, by optimizer: run.seed and the seeds after it, all into the folder OUT/NAME.

    Args:
        recipe: whose settings all runs share.
        chosen: optimizers, of those with a section in the recipe; all of them if empty.
        num_seeds: runs of each.

    Raises:
        RecipeError: an optimizer without settings, or no runs at all.
    """
    names = list(chosen) or list(recipe.optimizers)
    for name in names:
        must = f"optimizers must be among those of the recipe, {', '.join(recipe.optimizers)}"
        require(name in recipe.optimizers, must, name, f"add a section optimizers.{name}, with its lr")
    require(num_seeds >= 1, "the number of seeds must be at least 1", num_seeds, "3 show how much they leave open")
    run = recipe.run
    out = str(Path(run.out) / run.name)

    def member(name: str, seed: int) -> Recipe:
        own = dataclasses.replace(run, out=out, name=f"{name}-seed{seed}", seed=seed)
        return dataclasses.replace(recipe, run=own, optimizer=name)

    return {name: [member(name, run.seed + index) for index in range(num_seeds)] for name in names}


def sweep(plan: dict[str, list[Recipe]], world: World) -> dict[str, list[Summary]]:
    """Runs what a plan names, one after the other. What has finished before is not run again.

    Returns:
        The summaries of all runs, by optimizer.

    Raises:
        RecipeError: a run cannot be done, or another one has its place.

    Collective: all ranks of the job.
    """
    for recipe in itertools.chain(*plan.values()):
        folder = Path(recipe.run.out) / recipe.run.name
        recipe.run.resume = folder.exists() and not recipe.run.overwrite  # killed in the middle
    finished = {name: [_finished(recipe) for recipe in runs] for name, runs in plan.items()}
    dist.barrier()  # all ranks have looked before one of them writes
    return {
        name: [summary or train(recipe, world) for summary, recipe in zip(finished[name], runs, strict=True)]
        for name, runs in plan.items()
    }


def _finished(recipe: Recipe) -> Summary | None:
    """The summary of this run, if it is there."""
    folder = Path(recipe.run.out) / recipe.run.name
    if recipe.run.overwrite or not (folder / "summary.json").exists():
        return None
    before = load_recipe(folder / "config.yaml")
    if dataclasses.replace(before, run=dataclasses.replace(before.run, resume=recipe.run.resume)) != recipe:
        must = f"{str(folder)!r} must hold the run that the sweep needs"
        raise RecipeError(f"{must}; got one with other settings; choose another run.name, or set run.overwrite=true")
    return read_summary(folder)
