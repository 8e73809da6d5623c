"""The configuration of DeepSpeed for a run: the user's file, with what the recipe decides written into it.

Whatever both say must be the same in both. A recipe that ran with two opinions would not say which one it followed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from adai_dist.recipes import optimizers
from adai_dist.recipes.config import Recipe
from adai_dist.recipes.refusal import RecipeError, require
from adai_dist.recipes.shipped import find_config
from adai_dist.recipes.world import World

Settings = dict[str, Any]

_AUTO = "auto"  # what the files of transformers and accelerate say where something else decides
_NOT_HERE = {
    "scheduler": "the schedule of the recipe sets the learning rate",
    "tensor_parallel": "every rank of a recipe reads rows of its own",
    "elasticity": "data.batch is fixed",
}


def read(recipe: Recipe, world: World) -> Settings:
    """Reads the file that the recipe names, and completes it.

    Args:
        recipe: with engine=deepspeed; its batch can be split evenly.
        world: the ranks that will train.

    Returns:
        What `deepspeed.initialize` takes as `config`, next to a client optimizer.

    Raises:
        RecipeError: the file is no configuration of DeepSpeed, or contradicts the recipe.
    """
    given = recipe.deepspeed.config
    try:
        path = str(find_config("deepspeed", given, "deepspeed.config"))
        settings: Any = json.loads(Path(path).read_text())
    except OSError as error:
        raise RecipeError(f"deepspeed.config must be a readable file; got {given!r}; {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"deepspeed.config must be JSON; got {given!r}; {error}") from error
    require(isinstance(settings, dict), "deepspeed.config must hold a JSON object", settings, f"see {path}")
    settings = cast("Settings", settings)
    for section, reason in _NOT_HERE.items():
        given = settings.get(section)
        require(not given, f"{section} must not be set in {path} for a recipe", given, f"{reason}; drop it there")
    _agree_on_numbers(settings, recipe, world, path)
    _agree_on_precision(settings, recipe, path)
    _agree_on_optimizer(settings, recipe, path)
    _check(settings, world, path)
    return settings


def precision_of(settings: Mapping[str, Any]) -> str | None:
    """fp32, bf16 or fp16; None where the file does not say it."""
    said = None
    for section in ("bf16", "fp16"):
        enabled = settings.get(section, {}).get("enabled", _AUTO)
        if enabled is True:
            return section
        said = said if enabled == _AUTO else "fp32"
    autocast = settings.get("torch_autocast", {})
    if autocast.get("enabled") is True:
        return "bf16" if autocast.get("dtype", "bfloat16") == "bfloat16" else "fp16"
    return said


def _agree_on_numbers(settings: Settings, recipe: Recipe, world: World, path: str) -> None:
    batch, parts = recipe.data.batch, recipe.grad_accumulation
    shared = f"data.batch={batch} and grad_accumulation={parts} on {world.size} ranks"
    decided = (
        ("train_batch_size", batch, f"data.batch={batch}"),
        ("train_micro_batch_size_per_gpu", batch // (world.size * parts), shared),
        ("gradient_accumulation_steps", parts, f"grad_accumulation={parts}"),
        ("gradient_clipping", recipe.max_grad_norm or 0.0, f"max_grad_norm={recipe.max_grad_norm}"),
    )
    for key, value, origin in decided:
        given = settings.get(key, _AUTO)
        must = f"{key} in {path} must be {value}, as the recipe has {origin}"
        require(given in (_AUTO, value), must, given, "change one of the two, or drop it from the file")
        settings[key] = value


def _agree_on_precision(settings: Settings, recipe: Recipe, path: str) -> None:
    said = precision_of(settings)
    require(said != "fp16", f"a recipe trains in fp32 or bf16, also with {path}", said, "enable bf16 there")
    wanted = recipe.precision
    must = f"the precision of {path} must be that of the recipe, {wanted}"
    require(_AUTO in (wanted, said or _AUTO) or wanted == said, must, said, "set precision=auto, or change the file")
    if said is None and wanted == "bf16":
        settings["bf16"] = {"enabled": True}


def _agree_on_optimizer(settings: Settings, recipe: Recipe, path: str) -> None:
    """Takes the file's optimizer out, after it has been compared: the recipe builds it, with its parameter groups."""
    block: Any = settings.pop("optimizer", None)
    if block is None:
        return
    kind, name = block.get("type"), recipe.optimizer
    must = f"optimizer.type in {path} must be that of the recipe, {name}"
    advice = f"change one of the two (optimizer={str(kind).lower()}), or drop the optimizer from the file"
    require(str(kind).lower() in (_AUTO, name), must, kind, advice)
    arguments = optimizers.all_arguments(name, recipe.optimizer_arguments)
    for key, given in block.get("params", {}).items():
        if given == _AUTO:
            continue
        require(key in arguments, f"optimizer.params in {path} must be arguments of {name}", key, "drop it there")
        value = arguments[key]
        must = f"optimizer.params.{key} in {path} must be that of the recipe, {value}"
        advice = f"change one of the two (optimizers.{name}.{key}), or drop it from the file"
        require(_plain(given) == _plain(value), must, given, advice)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _check(settings: Settings, world: World, path: str) -> None:
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    try:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfig
    except ModuleNotFoundError as error:
        advice = "run: pip install 'adai-dist[deepspeed]'"
        raise RecipeError(f"engine=deepspeed needs the package {error.name}; got none; {advice}") from error
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()  # takes the process group that is there; the check below counts its ranks
    try:
        DeepSpeedConfig(json.loads(json.dumps(settings)))
    except Exception as error:  # of many classes, and all about the file
        message = " ".join(str(error).split())
        raise RecipeError(f"deepspeed.config must be what DeepSpeed takes; got {path!r}; {message}") from error
