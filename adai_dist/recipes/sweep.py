"""A sweep: one recipe with several optimizers and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from adai_dist.recipes.folder import CONFIG
from adai_dist.recipes.job import World
from adai_dist.recipes.journal import Summary
from adai_dist.recipes.recipe import Recipe, RecipeError, load_recipe, require
from adai_dist.recipes.train import train
from adai_dist.tools.plots import read_summary


def plan_sweep(recipe: Recipe, chosen: Sequence[str], num_seeds: int) -> dict[str, list[Recipe]]:
    """Return the runs of a sweep by optimizer: run.seed and the seeds after it, all in the folder OUT/NAME.

    Args:
        chosen: optimizers with a section in the recipe; all of these if empty.
        num_seeds: runs of each optimizer.

    Raises:
        RecipeError: an optimizer without settings, or no runs at all.
    """
    names = list(chosen) or list(recipe.optimizers)
    for name in names:
        must = f"optimizers must be among those of the recipe, {', '.join(recipe.optimizers)}"
        require(name in recipe.optimizers, must, name, f"add a section optimizers.{name}, with its lr")
    require(num_seeds >= 1, "the number of seeds must be at least 1", num_seeds, "3 give a first idea of the spread")
    run = recipe.run
    out = str(Path(run.out) / run.name)
    seeds = range(run.seed, run.seed + num_seeds)
    return {
        name: [recipe.replaced(out=out, name=f"{name}-seed{seed}", seed=seed, optimizer=name) for seed in seeds]
        for name in names
    }


def sweep(plan: dict[str, list[Recipe]], world: World) -> dict[str, list[Summary]]:
    """Execute the runs of a plan one after the other, except those that have finished before.

    Returns:
        The summaries of all runs, by optimizer.

    Raises:
        RecipeError: a run is invalid, or a run with other settings has its place.

    Collective: all ranks of the job.
    """
    for recipe in itertools.chain(*plan.values()):
        folder = Path(recipe.run.out) / recipe.run.name
        recipe.run.resume = folder.exists() and not recipe.run.overwrite  # continue a run that was killed
    finished = {name: [_finished(recipe) for recipe in runs] for name, runs in plan.items()}
    dist.barrier()  # all ranks have looked before one of them writes
    return {
        name: [summary or train(recipe, world) for summary, recipe in zip(finished[name], runs, strict=True)]
        for name, runs in plan.items()
    }


def _finished(recipe: Recipe) -> Summary | None:
    """Return the summary of this run if it has finished."""
    folder = Path(recipe.run.out) / recipe.run.name
    if recipe.run.overwrite or not (folder / "summary.json").exists():
        return None
    if load_recipe(folder / CONFIG).replaced(resume=recipe.run.resume) != recipe:
        must = f"{str(folder)!r} must hold the run that the sweep needs"
        raise RecipeError(f"{must}; got one with other settings; choose another run.name, or set run.overwrite=true")
    return read_summary(folder)
