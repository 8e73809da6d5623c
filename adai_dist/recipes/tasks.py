"""Which tasks there are; the section `data` of a recipe decides."""

from __future__ import annotations

from adai_dist.recipes.config import Recipe
from adai_dist.recipes.data_config import ImagesConfig, TextConfig
from adai_dist.recipes.task import Task


def load_task(recipe: Recipe) -> Task:
    """Reads the data that a recipe names.

    Raises:
        RecipeError: they are not there.

    Collective: none; every rank reads the same data.
    """
    data = recipe.data
    if isinstance(data, ImagesConfig):
        from adai_dist.recipes.image_task import ImageTask

        return ImageTask(recipe, data)
    from adai_dist.recipes.language_task import LanguageTask

    assert isinstance(data, TextConfig)
    return LanguageTask(recipe, data)
