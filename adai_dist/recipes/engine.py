"""The seam between the training loop and the ways to spread a model over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from adai_dist.recipes.task import Rows
from adai_dist.tools.telemetry import inertia_histogram


class Engine(ABC):
    """What the training loop needs of an engine.

    Collective: all methods; all ranks of the job call them alike.
    """

    model: nn.Module
    """Names its parameters as the model that was given, whatever wraps it."""
    optimizer: torch.optim.Optimizer
    precision: str
    """fp32 or bf16."""

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(param.numel() for param in self.model.parameters())

    def parameter_shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter in the whole model, by name: what tells one model from another."""
        named = self.model.named_parameters()
        return {name: list(getattr(param, "ds_shape", param.shape)) for name, param in named}  # DeepSpeed's ZeRO 3

    @abstractmethod
    def backward(self, rows: Rows, is_last: bool) -> Tensor:
        """Adds the gradient of one micro-batch.

        Args:
            rows: of the micro-batch, on the engine's device.
            is_last: True for the last micro-batch before `step`; only then gradients are exchanged.

        Returns:
            Mean loss of this rank's rows, in nats; 0-dim, detached.
        """

    @abstractmethod
    def step(self, lr: float) -> Tensor | None:
        """Clips, steps and drops the gradients; returns the global gradient norm if it is known (0-dim)."""

    @abstractmethod
    def scores(self, rows: Rows) -> dict[str, Tensor]:
        """What the task measures of every row, for evaluation: without gradient and dropout."""

    def inertia(self) -> dict[str, list[float]] | None:
        """The distribution of inertia per layer, as :func:`inertia_histogram` returns it."""
        return inertia_histogram(self.optimizer, self.model.named_parameters())

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes model and optimizer state below `folder`."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; on any number of ranks, unless the engine refuses with a RecipeError."""
