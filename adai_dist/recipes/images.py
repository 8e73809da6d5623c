"""Image classification: labelled images, small convolutional networks, and the cross entropy of the labels.

All images are held in memory on every rank. Every epoch visits all training images in an order of its own. Batches
cross the borders of epochs: step s takes the images s * batch to (s + 1) * batch of all epochs in a row.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adai_dist.recipes.recipe import CifarData, ImageData, RecipeError, require, require_known
from adai_dist.recipes.task import Rows, Task, share_of_rank

_DIGITS_HELD_OUT = 0.25
_DIGITS_SPLIT_SEED = 0  # the held-out scans do not depend on the seed of the run
_CIFAR = {  # name on the hub, column of the labels, number of classes
    "cifar10": ("uoft-cs/cifar10", "label", 10),
    "cifar100": ("uoft-cs/cifar100", "fine_label", 100),
}
_IMAGE_COLUMN = "img"


class LabelledImages(NamedTuple):
    """Images of shape (number, channels, height, width) and labels of shape (number,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class ImageSplits:
    """Training and held-out images, scaled to mean 0 and deviation 1 of each channel over the training images."""

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
        """Return the scaled images: float32 of the same shape."""
        return (torch.from_numpy(images).float() - self._mean) / self._deviation


class ImageTask(Task):
    """Classification of small images with a convolutional network."""

    unit = "image"

    def __init__(self, data: ImageData, settings: Mapping[str, Any], engine: str, splits: ImageSplits) -> None:
        self._data = data
        self._settings = settings
        self._engine = engine
        self._splits = splits
        self.units_per_step: int = data.batch

    def build_model(self, seed: int) -> nn.Module:
        model = build_convnet(self._settings, self._splits.shape, self._splits.num_classes, seed)
        has_running_means = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        # Each rank has running averages of its own; of the engines, only DDP makes them equal.
        must = "batch normalisation needs engine=ddp"
        require(self._engine == "ddp" or not has_running_means, must, self._engine, "set engine=ddp, or another model")
        return model

    def train_rows(self, seed: int, step: int, rank: int, num_ranks: int) -> Rows:
        data, train = self._data, self._splits.train
        num_rows = data.batch // num_ranks
        mine = slice(rank * num_rows, (rank + 1) * num_rows)
        indices = epoch_indices(len(train.labels), data.batch, seed, step)[mine]
        numbers = np.random.default_rng((seed, step))
        corners = numbers.integers(0, 2 * data.crop_padding + 1, size=(data.batch, 2))[mine]
        mirrored = numbers.random(data.batch)[mine] < 0.5
        images = _cropped(train.images[indices], corners, data.crop_padding)
        if data.flip:
            images = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
        return self._splits.scaled(images), torch.from_numpy(train.labels[indices])

    def val_rows(self, rank: int, num_ranks: int) -> tuple[Rows, Tensor]:
        val = self._splits.val
        mine, weights = share_of_rank(len(val.labels), rank, num_ranks)
        return (self._splits.scaled(val.images[mine]), torch.from_numpy(val.labels[mine])), weights

    def losses(self, model: nn.Module, rows: Rows) -> Tensor:
        inputs, labels = rows
        return nn.functional.cross_entropy(_logits(model, inputs), labels, reduction="none")

    def scores(self, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
        inputs, labels = rows
        logits = _logits(model, inputs)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return {"loss": losses, "error": (logits.argmax(1) != labels).float()}


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    output: Any = model(inputs)
    return getattr(output, "logits", output).float()  # networks of transformers return a record


def epoch_indices(num_images: int, batch: int, seed: int, step: int) -> NDArray[np.int64]:
    """Return the indices of the images in the batch of a step, over all ranks; shape (batch,)."""
    places = range(step * batch, (step + 1) * batch)
    return np.array([_order(num_images, seed, place // num_images)[place % num_images] for place in places])


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 1, epoch)).permutation(num_images)


def _cropped(images: NDArray[np.uint8], corners: NDArray[np.int64], padding: int) -> NDArray[np.uint8]:
    """Pad each image with zeros and crop it at its own corner; shape (rows, channels, height, width)."""
    height, width = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return np.ascontiguousarray(windows[np.arange(len(images)), :, corners[:, 0], corners[:, 1]])


def load_images(data: ImageData) -> ImageSplits:
    """Read the images that the recipe names. See :func:`load_task`."""
    return _load_cifar(data) if isinstance(data, CifarData) else _load_digits()


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
    train, val = (LabelledImages(images[at], labels[at]) for at in (order[num_held_out:], order[:num_held_out]))
    return ImageSplits(train, val, 10)


def _load_cifar(data: CifarData) -> ImageSplits:
    try:
        import datasets
    except ImportError as error:
        must = f"data.source={data.source} needs the package datasets"
        raise RecipeError(f"{must}; got none; run: pip install datasets") from error
    name, label_column, num_classes = _CIFAR[data.source]
    try:
        dataset: Any = datasets.load_from_disk(data.path) if data.path else datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        must = f"{data.source} must be on the hub, or in data.path as written by the save_to_disk of datasets"
        raise RecipeError(f"{must}; got {data.path or name!r}; {' '.join(str(error).split())}") from error
    train, val = (_labelled(dataset, split, label_column, num_classes) for split in ("train", "test"))
    return ImageSplits(train, val, num_classes)


def _labelled(dataset: Any, split: str, label_column: str, num_classes: int) -> LabelledImages:
    columns = dataset[split].column_names if isinstance(dataset, dict) and split in dataset else []
    if not {_IMAGE_COLUMN, label_column} <= set(columns):
        must = f"the dataset must have a split {split!r} with the columns {_IMAGE_COLUMN} and {label_column}"
        raise RecipeError(f"{must}; got {columns}; use uoft-cs/cifar10 or uoft-cs/cifar100 of the hub")
    rows = dataset[split]
    images = np.stack([np.asarray(image, np.uint8) for image in rows[_IMAGE_COLUMN]])
    labels = np.asarray(rows[label_column], np.int64)
    if images.ndim != 4 or labels.min() < 0 or labels.max() >= num_classes:
        must = f"{split!r} must hold colour images of one size and labels below {num_classes}"
        got = f"images of shape {images.shape[1:]}, labels up to {labels.max()}"
        raise RecipeError(f"{must}; got {got}; check data.source")
    return LabelledImages(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels)


def _convnet(
    shape: tuple[int, int, int], num_classes: int, channels: Sequence[int] = (16, 32), hidden: int = 64
) -> nn.Module:
    """3x3 convolutions with ReLU, each but the first followed by 2x2 max pooling, and two linear layers."""
    layers: dict[str, nn.Module] = {}
    num_channels, height, width = shape
    for index, num_outputs in enumerate(channels):
        layers[f"conv{index}"] = nn.Conv2d(num_channels, num_outputs, 3, padding=1)
        layers[f"relu{index}"] = nn.ReLU()
        if index > 0:
            layers[f"pool{index}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        num_channels = num_outputs
    if height == 0 or width == 0:
        raise ValueError(f"an image of {shape[1]}x{shape[2]} pixels is too small for {len(channels)} convolutions")
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(num_channels * height * width, hidden)
    layers["relu"] = nn.ReLU()
    layers["head"] = nn.Linear(hidden, num_classes)
    return nn.Sequential(OrderedDict(layers))


def _resnet(shape: tuple[int, int, int], num_classes: int, depths: Sequence[int], width: int = 64) -> nn.Module:
    """The ResNets of CIFAR: those of transformers, but with a 3x3 convolution without pooling as the first layer.

    Source: He et al., Deep Residual Learning for Image Recognition (2016), arXiv 1512.03385.
    """
    from transformers import ResNetConfig, ResNetForImageClassification
    from transformers.models.resnet.modeling_resnet import ResNetConvLayer

    widths = [width * 2**stage for stage in range(len(depths))]
    settings: dict[str, Any] = {"num_channels": shape[0], "num_labels": num_classes, "layer_type": "basic"}
    config = ResNetConfig(embedding_size=width, hidden_sizes=widths, depths=list(depths), **settings)
    model: Any = ResNetForImageClassification(config)
    model.resnet.embedder.embedder = ResNetConvLayer(shape[0], width, kernel_size=3)
    model.resnet.embedder.pooler = nn.Identity()
    return model


# With the default width ResNet-18 has 11.2 million parameters, ResNet-34 21.3 million.
_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cnn": _convnet,
    "resnet18": functools.partial(_resnet, depths=(2, 2, 2, 2)),
    "resnet34": functools.partial(_resnet, depths=(3, 4, 6, 3)),
}


def build_convnet(settings: Mapping[str, Any], shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """Build a network from `model` of a recipe, for images of ``shape`` (channels, height, width)."""
    given = dict(settings)
    architecture = str(given.pop("architecture"))
    must = f"model.architecture must be one of {', '.join(_NETWORKS)}"
    require(architecture in _NETWORKS, must, architecture, "set model.architecture=cnn, for example")
    network = _NETWORKS[architecture]
    valid = [name for name in inspect.signature(network).parameters if name not in ("shape", "num_classes", "depths")]
    require_known("model.", given, valid, f"for {architecture}")
    torch.manual_seed(seed)
    try:
        return network(shape, num_classes, **given)
    except Exception as error:  # many classes, all about the settings
        must, reason = f"model must describe a {architecture}", " ".join(str(error).split())
        raise RecipeError(f"{must}; got {dict(settings)}; {reason}") from error
