"""DeepSpeed as an engine of the recipes. Its JSON file and the recipe must agree on every setting that both have."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adai_dist.hyper import Hyper
from adai_dist.optimizer import AdaptiveInertia
from adai_dist.recipes import optimizers
from adai_dist.recipes.engines import Engine
from adai_dist.recipes.job import World, read_launcher
from adai_dist.recipes.recipe import Recipe, RecipeError, find_config, require
from adai_dist.recipes.task import Rows, Task
from adai_dist.tools.telemetry import MomentOfLayer, horizon_shares, layer_of

Settings = dict[str, Any]

_TAG = "deepspeed"
_AUTO = "auto"  # in files of transformers and accelerate: a value that something else decides
_UNSUPPORTED = {
    "scheduler": "the schedule of the recipe sets the learning rate",
    "tensor_parallel": "every rank of a recipe reads rows of its own",
    "elasticity": "data.batch is fixed",
}


class DeepSpeedEngine(Engine):
    """ZeRO and offload. The optimizer is the recipe's, and DeepSpeed clips."""

    def __init__(self, recipe: Recipe, world: World, settings: Settings, task: Task, model: nn.Module) -> None:
        import deepspeed

        from adai_dist.integrations.deepspeed.registration import register
        from adai_dist.integrations.deepspeed.unsupported_settings import UnsupportedSetting

        register()  # also under ADAI_DIST_REGISTER=0
        launched = read_launcher(os.environ)
        os.environ.setdefault("LOCAL_RANK", str(launched[2] if launched else 0))  # deepspeed insists on it
        # DeepSpeed 0.19 calls what torch 2.13 renamed, several times per step.
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning, "torch.distributed")
        model = model.to(world.device)
        optimizer = optimizers.build(recipe.optimizer, recipe.optimizer_arguments, model, None, recipe.decay_vectors)
        if not isinstance(optimizer, AdaptiveInertia):  # compare with the same optimizer as in other engines
            settings.update(zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
        try:
            # The process group exists. Where a launcher's variables are missing, DeepSpeed would ask MPI for them.
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        except UnsupportedSetting as error:
            raise RecipeError(f"deepspeed.config: {error}; see {recipe.deepspeed.config}") from error
        self._engine: Any = engine[0]
        self._task = task
        self.model = model
        self.optimizer: torch.optim.Optimizer = optimizer
        self.precision: str = precision_of(settings) or "fp32"
        self._world = world
        self._engine.train()

    @property
    def num_parameters(self) -> int:
        return sum(getattr(param, "ds_numel", param.numel()) for param in self.model.parameters())

    def backward(self, rows: Rows, is_last: bool) -> Tensor:
        loss = self._task.losses(self._engine, rows).mean()
        self._engine.backward(loss)  # divides by the number of micro-batches
        if not is_last:
            self._engine.step()  # counts the micro-batch
        return loss.detach()

    def step(self, lr: float) -> Tensor | None:
        optimizers.set_learning_rate(self.optimizer, lr)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def scores(self, rows: Rows) -> dict[str, Tensor]:
        self._engine.eval()
        with torch.no_grad():
            scores = self._task.scores(self._engine, rows)
        self._engine.train()
        return scores

    def inertia(self) -> dict[str, list[float]] | None:
        optimizer, wrapper = self.optimizer, self._engine.optimizer
        if wrapper is optimizer or not isinstance(optimizer, AdaptiveInertia):
            return super().inertia()
        steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
        if not steps:
            return None
        hyper = Hyper.from_param_group(optimizer.param_groups[0])  # a recipe's groups differ in weight decay only
        weight = float(self._world.is_main)  # every rank has the full moments
        moments = [
            MomentOfLayer(layer_of(name), self._full_second_moment(param), torch.tensor(max(steps)), hyper, weight)
            for name, param in self.model.named_parameters()
        ]
        return horizon_shares(moments, float(optimizer.inertia_mean), self._world.device)

    def _full_second_moment(self, param: nn.Parameter) -> Tensor | None:
        """Gather exp_avg_sq of a parameter on every rank. Collective: all ranks of the job."""
        from deepspeed.utils import safe_get_full_optimizer_state

        wrapper = self._engine.optimizer
        if not hasattr(wrapper, "fp32_groups"):
            return safe_get_full_optimizer_state(param, "exp_avg_sq")
        # bf16 without ZeRO: the optimizer holds float32 copies.
        chain = itertools.chain.from_iterable
        pairs = zip(chain(wrapper.fp16_groups), chain(wrapper.fp32_groups), strict=True)
        master = next((copy for low, copy in pairs if low is param), None)
        return self.optimizer.state[master].get("exp_avg_sq") if master is not None else None

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG)

    def load(self, folder: Path) -> None:
        num_parts = len(list((folder / _TAG).glob("*zero_pp_rank_*_optim_states.pt")))
        must = "a DeepSpeed checkpoint is continued by as many ranks as wrote it"
        require(num_parts in (0, self._world.size), must, self._world.size, f"start {num_parts} ranks")
        # DeepSpeed 0.19 would load the parameters of other optimizers, but not their states.
        is_complete = isinstance(self.optimizer, AdaptiveInertia) or not self._engine.zero_nvme_offload_optimizer()
        must = "a run with its states on NVMe is resumed with Adai, AdaiW and AdaiV2 only"
        require(is_complete, must, type(self.optimizer).__name__, 'offload to "cpu", or start from scratch')
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        advice = "delete it, to continue from an older one"
        require(path is not None, "a checkpoint must be complete", str(folder), advice)


def read_settings(recipe: Recipe, world: World) -> Settings:
    """Return the `config` of `deepspeed.initialize`: the JSON file of the recipe, completed by the recipe.

    Raises:
        RecipeError: the file is no configuration of DeepSpeed, or contradicts the recipe.
    """
    given = recipe.deepspeed.config
    path = str(find_config("deepspeed", given, "deepspeed.config"))
    try:
        settings: Any = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"deepspeed.config must be a readable JSON file; got {given!r}; {error}") from error
    require(isinstance(settings, dict), "deepspeed.config must hold a JSON object", settings, f"see {path}")
    for section, reason in _UNSUPPORTED.items():
        value = settings.get(section)
        require(not value, f"{section} must not be set in {path} for a recipe", value, f"{reason}; drop it there")
    _agree_on_numbers(settings, recipe, world, path)
    _agree_on_precision(settings, recipe, path)
    _agree_on_optimizer(settings, recipe, path)
    _check_with_deepspeed(settings, world, path)
    return settings


def precision_of(settings: Mapping[str, Any]) -> str | None:
    """Return fp32, bf16 or fp16; None if the file leaves it open."""
    found = None
    for section in ("bf16", "fp16"):
        enabled = settings.get(section, {}).get("enabled", _AUTO)
        if enabled is True:
            return section
        found = found if enabled == _AUTO else "fp32"
    autocast = settings.get("torch_autocast", {})
    if autocast.get("enabled") is True:
        return "bf16" if autocast.get("dtype", "bfloat16") == "bfloat16" else "fp16"
    return found


def _agree_on_numbers(settings: Settings, recipe: Recipe, world: World, path: str) -> None:
    batch, parts, norm = recipe.data.batch, recipe.grad_accumulation, recipe.max_grad_norm
    shared = f"data.batch={batch} and grad_accumulation={parts} on {world.size} ranks"
    for key, value, origin in (
        ("train_batch_size", batch, f"data.batch={batch}"),
        ("train_micro_batch_size_per_gpu", batch // (world.size * parts), shared),
        ("gradient_accumulation_steps", parts, f"grad_accumulation={parts}"),
        ("gradient_clipping", norm or 0.0, f"max_grad_norm={norm}"),
    ):
        given = settings.get(key, _AUTO)
        must = f"{key} in {path} must be {value}, as the recipe has {origin}"
        require(given in (_AUTO, value), must, given, "change one of the two, or drop it from the file")
        settings[key] = value


def _agree_on_precision(settings: Settings, recipe: Recipe, path: str) -> None:
    found, wanted = precision_of(settings), recipe.precision
    require(found != "fp16", f"a recipe trains in fp32 or bf16, also with {path}", found, "enable bf16 there")
    must = f"the precision of {path} must be that of the recipe, {wanted}"
    agrees = wanted in (_AUTO, found) or found is None
    require(agrees, must, found, "set precision=auto, or change the file")
    if found is None and wanted == "bf16":
        settings["bf16"] = {"enabled": True}


def _agree_on_optimizer(settings: Settings, recipe: Recipe, path: str) -> None:
    """Compare the file's optimizer with the recipe's and remove it: the recipe builds it, with its parameter groups."""
    block: Any = settings.pop("optimizer", None)
    if block is None:
        return
    kind, name = block.get("type"), recipe.optimizer
    must = f"optimizer.type in {path} must be that of the recipe, {name}"
    advice = f"change one of the two (optimizer={str(kind).lower()}), or drop the optimizer from the file"
    require(str(kind).lower() in (_AUTO, name), must, kind, advice)
    arguments = {**optimizers.argument_defaults(name), **optimizers.with_tuples(recipe.optimizer_arguments)}
    for key, given in optimizers.with_tuples(block.get("params", {})).items():
        if given == _AUTO:
            continue
        require(key in arguments, f"optimizer.params in {path} must be arguments of {name}", key, "drop it there")
        must = f"optimizer.params.{key} in {path} must be that of the recipe, {arguments[key]}"
        advice = f"change one of the two (optimizers.{name}.{key}), or drop it from the file"
        require(given == arguments[key], must, given, advice)


def _check_with_deepspeed(settings: Settings, world: World, path: str) -> None:
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    try:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfig
    except ModuleNotFoundError as error:
        advice = "run: pip install 'adai-dist[deepspeed]'"
        raise RecipeError(f"engine=deepspeed needs the package {error.name}; got none; {advice}") from error
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()  # adopts the existing process group; the check below counts its ranks
    try:
        DeepSpeedConfig(json.loads(json.dumps(settings)))
    except Exception as error:  # many classes, all about the file
        message = " ".join(str(error).split())
        raise RecipeError(f"deepspeed.config must be what DeepSpeed takes; got {path!r}; {message}") from error
