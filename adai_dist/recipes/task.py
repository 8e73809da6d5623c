"""The seam between the training loop and what is learnt: text or images."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

Rows = tuple[Tensor, ...]
"""What belongs to some sequences or images: tensors whose first dim counts them."""


class Task(ABC):
    """The data, the model, and how a model is judged. Rows are a pure function of seed, step and rank.

    Collective: none; every rank reads the same data and cuts out its own rows.
    """

    unit: str
    """What throughput counts and what the loss is a mean of: token or image."""
    units_per_step: int
    """Over all ranks."""

    @abstractmethod
    def build_model(self, seed: int) -> nn.Module:
        """Makes the model on the CPU, with weights that depend on `seed` alone.

        Raises:
            RecipeError: no such model can be made.
        """

    @abstractmethod
    def train_rows(self, seed: int, step: int, rank: int, num_ranks: int) -> Rows:
        """This rank's rows of the batch of a step; those of all ranks together do not depend on their number."""

    @abstractmethod
    def val_rows(self, rank: int, num_ranks: int) -> tuple[Rows, Tensor]:
        """This rank's part of the held-out rows, as many on every rank, and their weights.

        Weights are float64, of shape (rows,): 1, or 0 for the repeated rows that fill up the last ranks.
        """

    @abstractmethod
    def losses(self, model: nn.Module, rows: Rows) -> Tensor:
        """The loss of every row, in nats per unit: float32, shape (rows,), with its graph."""

    @abstractmethod
    def scores(self, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
        """What is measured on held-out rows, by name, each of shape (rows,); `loss` is one of them."""
