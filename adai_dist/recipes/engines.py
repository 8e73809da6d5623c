"""Engines, which spread a model over ranks, step it and save it: the interface, and the engine of torch.

An engine owns the model and its optimizer, because some engines replace both.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
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
from adai_dist.recipes.job import World
from adai_dist.recipes.recipe import Recipe, require
from adai_dist.recipes.task import Rows, Task
from adai_dist.tools.telemetry import inertia_histogram


class Engine(ABC):
    """A model and its optimizer, spread over ranks. Collective: all methods; all ranks of the job."""

    model: nn.Module
    """Names its parameters like the model that was given, whatever wraps it."""
    optimizer: torch.optim.Optimizer
    precision: str
    """fp32 or bf16."""

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters of the whole model."""
        return sum(param.numel() for param in self.model.parameters())

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Return the global shape of every parameter by name, which identifies the model."""
        named = self.model.named_parameters()
        return {name: list(getattr(param, "ds_shape", param.shape)) for name, param in named}  # DeepSpeed's ZeRO 3

    @abstractmethod
    def backward(self, rows: Rows, is_last: bool) -> Tensor:
        """Add the gradient of one micro-batch.

        Args:
            rows: the micro-batch, on the engine's device.
            is_last: True for the last micro-batch before ``step``; gradients are exchanged only then.

        Returns:
            Mean loss of this rank's rows, in nats; 0-dim, detached.
        """

    @abstractmethod
    def step(self, lr: float) -> Tensor | None:
        """Clip, step and drop the gradients; return the global gradient norm if it is known (0-dim)."""

    @abstractmethod
    def scores(self, rows: Rows) -> dict[str, Tensor]:
        """Return the task's scores of every row, without gradient and dropout."""

    def inertia(self) -> dict[str, list[float]] | None:
        """Return the distribution of inertia per layer; see :func:`inertia_histogram`."""
        return inertia_histogram(self.optimizer, self.model.named_parameters())

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write model and optimizer state below ``folder``."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote, on any number of ranks unless the engine refuses with a RecipeError."""


class TorchEngine(Engine):
    """DistributedDataParallel or fully_shard of torch; both write checkpoints that the other one reads."""

    def __init__(self, recipe: Recipe, world: World, task: Task, model: nn.Module) -> None:
        self.model: nn.Module = model.to(world.device)
        self.precision: str = "bf16" if recipe.precision == "bf16" else "fp32"
        self._recipe = recipe
        self._task = task
        self._device = world.device
        self._ddp = DistributedDataParallel(self.model) if recipe.engine == "ddp" else None
        self._wrapped = self._ddp or _fully_sharded(self.model, self.precision, world)
        self._wrapped.train()
        self.optimizer: torch.optim.Optimizer = optimizers.build(
            recipe.optimizer, recipe.optimizer_arguments, self.model, recipe.max_grad_norm, recipe.decay_vectors
        )

    def backward(self, rows: Rows, is_last: bool) -> Tensor:
        if isinstance(self._wrapped, FSDPModule):
            self._wrapped.set_requires_gradient_sync(is_last)
        with self._ddp.no_sync() if self._ddp and not is_last else contextlib.nullcontext():
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
        if isinstance(self._wrapped, FSDPModule):
            # Without a backward pass the root stays gathered, and its parameters are not those of the optimizer.
            self._wrapped.reshard()
        return scores

    def save(self, folder: Path) -> None:
        # Running averages of batch normalisation differ until DDP's next forward pass broadcasts those of rank 0.
        for buffer in self.model.buffers() if self._ddp else ():
            dist.broadcast(buffer, 0)
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self._wrapped, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def _state(self) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(self._wrapped, self.optimizer), strict=True))

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self._ddp is not None and self.precision == "bf16"  # fully_shard casts by its own policy
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)


def _fully_sharded(model: nn.Module, precision: str, world: World) -> nn.Module:
    must = "engine=fsdp2 on the CPU needs torch 2.9 (before, gloo sums gradients where FSDP2 asks for their mean)"
    is_supported = world.device.type != "cpu" or torch.__version__ >= "2.9"
    require(is_supported, must, torch.__version__, "set engine=ddp")
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("fsdp",))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*repeated_blocks(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy)  # in place: the module itself becomes an FSDPModule
    return model


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a transformers model, the natural units of sharding; none for other models."""
    names: set[str] = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
