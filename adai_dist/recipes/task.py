"""The seam between the training loop and what is learnt: data, model, loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Rows = tuple[Tensor, ...]
"""Columns of some sequences or images: tensors whose first dim counts them."""


class Task(ABC):
    """A data set, a model for it, and the losses of that model. Rows are a pure function of seed, step and rank.

    Collective: none; every rank reads the same data and takes its own rows.
    """

    unit: str
    """The unit of throughput and of the mean loss: token or image."""
    units_per_step: int
    """Units per optimizer step, over all ranks."""

    @abstractmethod
    def build_model(self, seed: int) -> nn.Module:
        """Build the model on the CPU, with initial weights that depend on ``seed`` alone; nothing is downloaded.

        Raises:
            RecipeError: an unknown architecture or setting, or contradictory settings.
        """

    @abstractmethod
    def train_rows(self, seed: int, step: int, rank: int, num_ranks: int) -> Rows:
        """Return this rank's rows of the batch of a step; the whole batch does not depend on the number of ranks."""

    @abstractmethod
    def val_rows(self, rank: int, num_ranks: int) -> tuple[Rows, Tensor]:
        """Return this rank's part of the held-out rows, equally many on every rank, and their weights.

        Weights are float64, of shape (rows,): 1, or 0 for repeated rows that fill up the last ranks.
        """

    @abstractmethod
    def losses(self, model: nn.Module, rows: Rows) -> Tensor:
        """Return the loss of every row, in nats per unit: float32, shape (rows,), with its graph."""

    def scores(self, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
        """Return what is measured of held-out rows, by name, each of shape (rows,); `loss` is one of them."""
        return {"loss": self.losses(model, rows)}


def share_of_rank(num_items: int, rank: int, num_ranks: int) -> tuple[NDArray[np.int64], Tensor]:
    """Return the indices of a rank's part of some items, equally many on every rank, and the weights of `val_rows`."""
    num_rows = -(-num_items // num_ranks)
    mine = np.arange(rank * num_rows, (rank + 1) * num_rows)
    return mine.clip(max=num_items - 1), torch.from_numpy((mine < num_items).astype(np.float64))
