"""Labelled images in memory, on every rank, and batches that are a pure function of (seed, step).

Every epoch goes through all training images in an order of its own. Batches run on across the borders of epochs: step s
has the images s * batch to (s + 1) * batch of all epochs in a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adai_dist.recipes.data_config import ImagesConfig
from adai_dist.recipes.refusal import RecipeError

_DIGITS_HELD_OUT = 0.25
_DIGITS_SPLIT_SEED = 0  # which scans are held out does not depend on the seed of the run
_CIFAR = {  # name on the hub, column of the labels, number of classes
    "cifar10": ("uoft-cs/cifar10", "label", 10),
    "cifar100": ("uoft-cs/cifar100", "fine_label", 100),
}
_IMAGE_COLUMN = "img"


@dataclass(frozen=True)
class LabelledImages:
    """Some images."""

    images: NDArray[np.uint8]
    """Shape (number, channels, height, width)."""
    labels: NDArray[np.int64]
    """Shape (number,)."""


class ImageSplits:
    """Images for training and held-out ones, scaled to mean 0 and deviation 1 of each channel over the former."""

    def __init__(self, train: LabelledImages, val: LabelledImages, num_classes: int) -> None:
        self.train = train
        self.val = val
        self.num_classes = num_classes
        axes = (0, 2, 3)
        self._mean = torch.from_numpy(train.images.mean(axes)).float()[:, None, None]
        self._deviation = torch.from_numpy(train.images.std(axes).clip(min=1e-3)).float()[:, None, None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.train.images.shape[1:]

    def scaled(self, images: NDArray[np.uint8]) -> Tensor:
        """Returns float32 of the same shape."""
        return (torch.from_numpy(images).float() - self._mean) / self._deviation


def load_images(config: ImagesConfig) -> ImageSplits:
    """Reads the images that the recipe names.

    Raises:
        RecipeError: they are not there, or a package that reads them is missing.

    Collective: none; every rank reads the same images.
    """
    return _load_digits() if config.source == "digits" else _load_cifar(config)


def train_rows(
    splits: ImageSplits, config: ImagesConfig, seed: int, step: int, part: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """A rank's rows of the batch of a step.

    Args:
        part: (rank, number of ranks).

    Returns:
        Images, float32 of shape (rows, channels, height, width), and labels, int64 of shape (rows,); together the rows
        of all ranks do not depend on their number.
    """
    rank, num_ranks = part
    num_rows = config.batch // num_ranks
    mine = slice(rank * num_rows, (rank + 1) * num_rows)
    indices = epoch_indices(len(splits.train.labels), config.batch, seed, step)
    images = splits.train.images[indices[mine]]
    numbers = np.random.default_rng((seed, step))
    corners = numbers.integers(0, 2 * config.crop_padding + 1, size=(config.batch, 2))[mine]
    mirrored = numbers.random(config.batch)[mine] < 0.5
    images = _cropped(images, corners, config.crop_padding)
    if config.flip:
        images = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    return splits.scaled(images), torch.from_numpy(splits.train.labels[indices[mine]])


def val_rows(splits: ImageSplits, rank: int, num_ranks: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """A rank's part of the held-out images, and weights: 0 for the repeated ones that fill up the last ranks."""
    num_images = len(splits.val.labels)
    num_rows = -(-num_images // num_ranks)
    mine = np.arange(rank * num_rows, (rank + 1) * num_rows)
    weights = torch.from_numpy((mine < num_images).astype(np.float64))
    mine = mine.clip(max=num_images - 1)
    return (splits.scaled(splits.val.images[mine]), torch.from_numpy(splits.val.labels[mine])), weights


def epoch_indices(num_images: int, batch: int, seed: int, step: int) -> NDArray[np.int64]:
    """Which images the batch of a step consists of, over all ranks; shape (batch,)."""
    places = range(step * batch, (step + 1) * batch)
    return np.array([_order(num_images, seed, place // num_images)[place % num_images] for place in places])


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 1, epoch)).permutation(num_images)


def _cropped(images: NDArray[np.uint8], corners: NDArray[np.int64], padding: int) -> NDArray[np.uint8]:
    """Cuts each image, padded with zeros, to its size at its own corner; shape (rows, channels, height, width)."""
    height, width = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return np.ascontiguousarray(windows[np.arange(len(images)), :, corners[:, 0], corners[:, 1]])


def _load_digits() -> ImageSplits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        must = "data.source=digits needs the package scikit-learn"
        raise RecipeError(f"{must}; got none; run: pip install scikit-learn") from error
    digits: Any = load_digits()
    images = digits.images.astype(np.uint8)[:, None]  # from 0 to 16
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(_DIGITS_SPLIT_SEED).permutation(len(labels))
    num_held_out = int(len(labels) * _DIGITS_HELD_OUT)
    val, train = order[:num_held_out], order[num_held_out:]
    return ImageSplits(LabelledImages(images[train], labels[train]), LabelledImages(images[val], labels[val]), 10)


def _load_cifar(config: ImagesConfig) -> ImageSplits:
    try:
        import datasets
    except ImportError as error:
        must = f"data.source={config.source} needs the package datasets"
        raise RecipeError(f"{must}; got none; run: pip install datasets") from error
    name, label_column, num_classes = _CIFAR[config.source]
    try:
        dataset: Any = datasets.load_from_disk(config.path) if config.path else datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        must = f"{config.source} must be on the hub, or in data.path, where datasets' save_to_disk put it"
        raise RecipeError(f"{must}; got {config.path or name!r}; {' '.join(str(error).split())}") from error
    train, val = (_labelled(dataset, part, label_column, num_classes) for part in ("train", "test"))
    return ImageSplits(train, val, num_classes)


def _labelled(dataset: Any, part: str, label_column: str, num_classes: int) -> LabelledImages:
    columns = dataset[part].column_names if isinstance(dataset, dict) and part in dataset else []
    if not {_IMAGE_COLUMN, label_column} <= set(columns):
        must = f"the dataset must have a part {part!r} with the columns {_IMAGE_COLUMN} and {label_column}"
        raise RecipeError(f"{must}; got {columns}; take uoft-cs/cifar10 or uoft-cs/cifar100 of the hub")
    rows = dataset[part]
    images = np.stack([np.asarray(image, np.uint8) for image in rows[_IMAGE_COLUMN]])
    labels = np.asarray(rows[label_column], np.int64)
    if images.ndim != 4 or labels.min() < 0 or labels.max() >= num_classes:
        must = f"{part!r} must hold colour images of one size and labels below {num_classes}"
        raise RecipeError(
            f"{must}; got images of shape {images.shape[1:]}, labels to {labels.max()}; check data.source"
        )
    return LabelledImages(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels)
