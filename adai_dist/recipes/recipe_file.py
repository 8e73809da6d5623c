"""Reading a recipe: a YAML file and `key=value` overrides, put together by OmegaConf and checked key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from adai_dist.recipes.config import Recipe
from adai_dist.recipes.data_config import data_schema
from adai_dist.recipes.refusal import RecipeError, require
from adai_dist.recipes.shipped import find_config


def load_recipe(given: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `key=value` overrides.

    Args:
        given: a YAML file, or the name of a shipped recipe, such as "lm_tiny".
        overrides: such as "run.steps=100"; later ones win.

    Returns:
        The validated recipe; `run.name` is filled in.

    Raises:
        RecipeError: for a file that cannot be read, an unknown key, or a value that cannot be.
    """
    for override in overrides:
        require("=" in override, "an override must read key=value", override, "write run.steps=100, for example")
    try:
        path = find_config("recipes", given, "the recipe")
        from_file = OmegaConf.load(path)
        from_overrides = OmegaConf.from_dotlist(list(overrides))
        source = _source_of_data(from_file, from_overrides)
        for mapping, origin in ((from_file, str(path)), (from_overrides, "the command line")):
            _refuse_unknown_keys(cast("Any", OmegaConf.to_container(mapping)), Recipe, "", origin, source)
        schema = OmegaConf.structured(Recipe)
        schema.data = data_schema(source)
        recipe = cast(Recipe, OmegaConf.to_object(OmegaConf.merge(schema, from_file, from_overrides)))
    except OSError as error:
        raise RecipeError(f"the recipe must be a readable file; got {str(given)!r}; {error.strerror}") from error
    except YAMLError as error:
        raise RecipeError(f"the recipe must be YAML; got {str(given)!r}; {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        key, what = error.full_key or "recipe", str(error).splitlines()[0]
        if "value 'None'" in what:  # of `key=` as well as of `key: null`
            raise RecipeError(f"{key} must have a value; got none; give it one, or leave the key out") from error
        raise RecipeError(f"{key} must have the type of its default; {what}; change the value") from error
    _refuse_idle_overrides(recipe, overrides)
    recipe.run.name = recipe.run.name or path.stem
    return recipe


def _source_of_data(*given: Any) -> object:
    """data.source as the last of the given mappings has it; text of some kind where none has."""
    sources = [OmegaConf.select(mapping, "data.source") for mapping in given if OmegaConf.is_dict(mapping)]
    return next((source for source in reversed(sources) if source is not None), None)


def _refuse_unknown_keys(given: Any, schema: type, prefix: str, origin: str, source: object) -> None:
    """The merge would refuse them too, but without saying what the valid keys are."""
    _require_mapping(prefix.rstrip(".") or "a recipe", given, origin)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key, value in cast("dict[Any, Any]", given).items():
        if key not in fields:
            raise RecipeError(
                f"unknown key {f'{prefix}{key}'!r} in {origin}; valid keys are {', '.join(prefix + f for f in fields)}"
            )
        section = data_schema(source) if fields[key].name == "data" else fields[key].default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            _refuse_unknown_keys(value, section, f"{prefix}{key}.", origin, source)
        elif str(fields[key].type).startswith("dict"):  # free keys, for models and optimizers
            _require_mapping(f"{prefix}{key}", value, origin)
            if key == "optimizers":
                for name, arguments in value.items():
                    _require_mapping(f"{prefix}{key}.{name}", {} if arguments is None else arguments, origin)


def _require_mapping(key: str, given: Any, origin: str) -> None:
    require(isinstance(given, dict), f"{key} must be a mapping of keys to values", given, f"see {origin}")


def _refuse_idle_overrides(recipe: Recipe, overrides: Sequence[str]) -> None:
    for override in overrides:
        section, _, rest = override.partition("=")[0].partition(".")
        name = rest.partition(".")[0]
        if section == "deepspeed" and recipe.engine != "deepspeed":
            raise RecipeError(f"{override!r} has no effect; the engine is {recipe.engine!r}; add engine=deepspeed")
        if section == "optimizers" and name != recipe.optimizer:
            raise RecipeError(
                f"{override!r} has no effect; the optimizer is {recipe.optimizer!r}; add optimizer={name} or drop it"
            )
