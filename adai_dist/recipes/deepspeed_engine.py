"""DeepSpeed as an engine of the recipes; what it does is in the JSON file that the recipe names."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adai_dist.hyper import Hyper
from adai_dist.optimizer import AdaptiveInertia
from adai_dist.recipes import deepspeed_file, optimizers
from adai_dist.recipes.config import Recipe
from adai_dist.recipes.engine import Engine
from adai_dist.recipes.refusal import RecipeError, require
from adai_dist.recipes.task import Rows, Task
from adai_dist.recipes.world import World, read_launcher
from adai_dist.tools.telemetry import MomentOfLayer, horizon_shares, layer_of

_TAG = "deepspeed"


class DeepSpeedEngine(Engine):
    """ZeRO and offload. The optimizer is the recipe's, and DeepSpeed clips."""

    def __init__(self, recipe: Recipe, task: Task, model: nn.Module, world: World) -> None:
        settings = deepspeed_file.read(recipe, world)
        import deepspeed

        from adai_dist.integrations.deepspeed.registration import register
        from adai_dist.integrations.deepspeed.unsupported_settings import UnsupportedSetting

        register()  # also under ADAI_DIST_REGISTER=0
        launched = read_launcher(os.environ)
        os.environ.setdefault("LOCAL_RANK", str(launched[2] if launched else 0))  # deepspeed insists on it
        # DeepSpeed 0.19 calls what torch 2.13 renamed, several times per step.
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning, "torch.distributed")
        model = model.to(world.device)
        optimizer = optimizers.build(recipe, model, max_grad_norm=None)
        if not isinstance(optimizer, AdaptiveInertia):  # for the comparison: the same optimizer as in other engines
            settings.update(zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
        try:
            # The process group is there. Where a launcher's variables are missing, DeepSpeed would ask MPI for them.
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        except UnsupportedSetting as error:
            raise RecipeError(f"deepspeed.config: {error}; see {recipe.deepspeed.config}") from error
        self._engine: Any = engine[0]
        self._task = task
        self.model = model
        self.optimizer: torch.optim.Optimizer = optimizer
        self.precision: str = deepspeed_file.precision_of(settings) or "fp32"
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
        hyper = Hyper.from_param_group(optimizer.param_groups[0])  # in a recipe they differ in weight decay only
        weight = float(self._world.is_main)  # every rank has got the whole of it
        moments = [
            MomentOfLayer(layer_of(name), self._second_moment(param), torch.tensor(max(steps)), hyper, weight)
            for name, param in self.model.named_parameters()
        ]
        return horizon_shares(moments, float(optimizer.inertia_mean), self._world.device)

    def _second_moment(self, param: nn.Parameter) -> Tensor | None:
        """The whole of it, on every rank. Collective: all ranks of the job."""
        from deepspeed.utils import safe_get_full_optimizer_state

        wrapper = self._engine.optimizer
        if not hasattr(wrapper, "fp32_groups"):
            return safe_get_full_optimizer_state(param, "exp_avg_sq")
        # bf16 without ZeRO: the optimizer knows the float32 copies alone.
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
        # Of other optimizers DeepSpeed 0.19 would read the parameters alone.
        is_complete = isinstance(self.optimizer, AdaptiveInertia) or not self._engine.zero_nvme_offload_optimizer()
        must = "a run with its states on NVMe is resumed with Adai, AdaiW and AdaiV2 only"
        require(is_complete, must, type(self.optimizer).__name__, 'offload to "cpu", or start anew')
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        require(
            path is not None, "a checkpoint must be complete", str(folder), "delete it, to continue from an older one"
        )
