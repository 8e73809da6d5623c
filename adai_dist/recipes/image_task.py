"""Image classification."""

from __future__ import annotations

from torch import Tensor, nn

from adai_dist.recipes import images
from adai_dist.recipes.config import Recipe
from adai_dist.recipes.convnets import build_convnet
from adai_dist.recipes.data_config import ImagesConfig
from adai_dist.recipes.refusal import require
from adai_dist.recipes.task import Rows, Task


class ImageTask(Task):
    """A convolutional network, trained to name what is in a small image."""

    unit = "image"

    def __init__(self, recipe: Recipe, data: ImagesConfig) -> None:
        self.units_per_step: int = data.batch
        self._data = data
        self._settings = recipe.model
        self._engine = recipe.engine
        self._splits = images.load_images(data)

    def build_model(self, seed: int) -> nn.Module:
        model = build_convnet(self._settings, self._splits.shape, self._splits.num_classes, seed)
        has_running_means = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        # Every rank has running averages of its own; of the engines, DDP alone makes them one.
        must = "batch normalisation needs engine=ddp"
        require(self._engine == "ddp" or not has_running_means, must, self._engine, "set engine=ddp, or another model")
        return model

    def train_rows(self, seed: int, step: int, rank: int, num_ranks: int) -> Rows:
        return images.train_rows(self._splits, self._data, seed, step, (rank, num_ranks))

    def val_rows(self, rank: int, num_ranks: int) -> tuple[Rows, Tensor]:
        return images.val_rows(self._splits, rank, num_ranks)

    def losses(self, model: nn.Module, rows: Rows) -> Tensor:
        inputs, labels = rows
        return nn.functional.cross_entropy(model(inputs).float(), labels, reduction="none")

    def scores(self, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
        inputs, labels = rows
        logits: Tensor = model(inputs).float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return {"loss": losses, "error": (logits.argmax(1) != labels).float()}
