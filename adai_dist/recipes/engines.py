"""Which engines there are.

The loop sees a small seam (:class:`Engine`). An engine owns the model and its optimizer, because several of them
replace both.
"""

from __future__ import annotations

from torch import nn

from adai_dist.recipes import deepspeed_file
from adai_dist.recipes.config import Recipe
from adai_dist.recipes.deepspeed_engine import DeepSpeedEngine
from adai_dist.recipes.engine import Engine
from adai_dist.recipes.task import Task
from adai_dist.recipes.torch_engines import DDPEngine, FSDP2Engine
from adai_dist.recipes.world import World

ENGINES: dict[str, type[DDPEngine | FSDP2Engine | DeepSpeedEngine]] = {
    "ddp": DDPEngine,
    "fsdp2": FSDP2Engine,
    "deepspeed": DeepSpeedEngine,
}


def check_engine(recipe: Recipe, world: World) -> None:
    """Refuses what the recipe asks of its engine in vain, before anything is built.

    Raises:
        RecipeError: the engine cannot run this recipe.
    """
    if recipe.engine == "deepspeed":
        deepspeed_file.read(recipe, world)


def build_engine(recipe: Recipe, task: Task, model: nn.Module, world: World) -> Engine:
    """Spreads a model, which every rank holds alike, over the ranks.

    Collective: all ranks of the job.
    """
    return ENGINES[recipe.engine](recipe, task, model, world)
