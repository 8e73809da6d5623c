"""The engines that torch itself has."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from adai_dist.recipes import optimizers
from adai_dist.recipes.config import Recipe
from adai_dist.recipes.engine import Engine
from adai_dist.recipes.model import block_modules
from adai_dist.recipes.refusal import require
from adai_dist.recipes.task import Rows, Task
from adai_dist.recipes.world import World


class TorchEngine(Engine):
    """What DDP and FSDP2 have in common."""

    def __init__(self, recipe: Recipe, task: Task, model: nn.Module, world: World) -> None:
        self.model: nn.Module = model.to(world.device)
        self.precision: str = "bf16" if recipe.precision == "bf16" else "fp32"
        self._recipe = recipe
        self._task = task
        self._world = world
        self._wrapped = self._wrap(self.model)
        self._wrapped.train()
        self.optimizer: torch.optim.Optimizer = optimizers.build(recipe, self.model, recipe.max_grad_norm)

    @abstractmethod
    def _wrap(self, model: nn.Module) -> nn.Module: ...

    @abstractmethod
    def _accumulation(self, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass; holds back the exchange of gradients unless `is_last`."""

    def _autocast(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, rows: Rows, is_last: bool) -> Tensor:
        with self._accumulation(is_last):
            with self._autocast():
                loss = self._task.losses(self._wrapped, rows).mean()
            cast(Any, loss / self._recipe.grad_accumulation).backward()
        return loss.detach()

    def step(self, lr: float) -> Tensor | None:
        optimizers.set_learning_rate(self.optimizer, lr)
        norm = optimizers.clip_and_step(self.optimizer, self._recipe.max_grad_norm)
        self.optimizer.zero_grad()
        return norm

    def scores(self, rows: Rows) -> dict[str, Tensor]:
        self._wrapped.eval()
        with torch.no_grad(), self._autocast():
            scores = self._task.scores(self._wrapped, rows)
        self._wrapped.train()
        return scores

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self._wrapped, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self._wrapped, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self._wrapped, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


class DDPEngine(TorchEngine):
    """torch's DistributedDataParallel: the whole model on every rank, gradients averaged."""

    def _wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def save(self, folder: Path) -> None:
        # Running averages of batch normalisation are each rank's own until the next forward pass takes those of rank 0.
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)
        super().save(folder)

    def _accumulation(self, is_last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if is_last else cast(DistributedDataParallel, self._wrapped).no_sync()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._world.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class FSDP2Engine(TorchEngine):
    """torch's fully_shard: parameters, gradients and optimizer state are sharded over all ranks."""

    def scores(self, rows: Rows) -> dict[str, Tensor]:
        scores = super().scores(rows)
        # Without a backward pass the root stays gathered, and its parameters are not those of the optimizer.
        cast(FSDPModule, self._wrapped).reshard()
        return scores

    def _wrap(self, model: nn.Module) -> nn.Module:
        on_cpu = self._world.device.type == "cpu"
        require(
            not on_cpu or torch.__version__ >= "2.9",
            "engine=fsdp2 on the CPU needs torch 2.9 (before, gloo adds gradients up where FSDP2 asks for their mean)",
            torch.__version__,
            "set engine=ddp",
        )
        mesh = init_device_mesh(self._world.device.type, (self._world.size,), mesh_dim_names=("fsdp",))
        policy = MixedPrecisionPolicy()
        if self.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in block_modules(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)  # in place: the module itself becomes an FSDPModule
        return model

    def _accumulation(self, is_last: bool) -> AbstractContextManager[None]:
        cast(FSDPModule, self._wrapped).set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()
