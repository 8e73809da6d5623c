"""Convolutional networks for small images: a plain one, and the ResNets of CIFAR.

The ResNets differ from torchvision's in their first layer: a convolution of 3x3 without pooling, for small images.
Source: He et al., Deep Residual Learning for Image Recognition (2016), arXiv 1512.03385.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adai_dist.recipes.refusal import RecipeError, require_choice, require_known


class ConvNet(nn.Sequential):
    """Convolutions of 3x3 with ReLU, each but the first followed by a pooling of 2x2, and two linear layers."""

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int, channels: Sequence[int] = (16, 32), hidden: int = 64
    ) -> None:
        super().__init__()
        num_channels, height, width = shape
        for index, num_outputs in enumerate(channels):
            self.add_module(f"conv{index}", nn.Conv2d(num_channels, num_outputs, 3, padding=1))
            self.add_module(f"relu{index}", nn.ReLU())
            if index > 0:
                self.add_module(f"pool{index}", nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            num_channels = num_outputs
        if height == 0 or width == 0:
            raise ValueError(f"an image of {shape[1]}x{shape[2]} pixels is too small for {len(channels)} convolutions")
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", nn.Linear(num_channels * height * width, hidden))
        self.add_module("relu", nn.ReLU())
        self.add_module("head", nn.Linear(hidden, num_classes))


class BasicBlock(nn.Module):
    """Two convolutions of 3x3 with batch normalisation, and a shortcut around them."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1: nn.Module = nn.Conv2d(num_inputs, num_outputs, 3, stride, padding=1, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(num_outputs)
        self.conv2: nn.Module = nn.Conv2d(num_outputs, num_outputs, 3, padding=1, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(num_outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or num_inputs != num_outputs:
            project = nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of basic blocks of 1, 2, 4 and 8 times `width` channels, for images of any size."""

    def __init__(self, num_blocks: Sequence[int], shape: tuple[int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(shape[0], width, 3, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        num_inputs = width
        for index, num in enumerate(num_blocks):
            num_outputs = width * 2**index
            strides = [1 if index == 0 else 2] + [1] * (num - 1)
            blocks = [BasicBlock(num_inputs if i == 0 else num_outputs, num_outputs, s) for i, s in enumerate(strides)]
            stages.append(nn.Sequential(*blocks))
            num_inputs = num_outputs
        self.stages: nn.Module = nn.Sequential(*stages)
        self.head: nn.Module = nn.Linear(num_inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.norm(self.conv(images))))
        return self.head(x.mean(dim=(2, 3)))


class ResNet18(ResNet):
    """11.2 million parameters at the default width."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int, width: int = 64) -> None:
        super().__init__((2, 2, 2, 2), shape, num_classes, width)


class ResNet34(ResNet):
    """21.3 million parameters at the default width."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int, width: int = 64) -> None:
        super().__init__((3, 4, 6, 3), shape, num_classes, width)


ARCHITECTURES: dict[str, type[ConvNet | ResNet18 | ResNet34]] = {
    "cnn": ConvNet,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
}


def build_convnet(settings: Mapping[str, Any], shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """Makes a network on the CPU, with torch's initial weights, which depend on `seed` alone.

    Args:
        settings: `architecture`, and further arguments of its class.
        shape: channels, height and width of an image.
        num_classes: number of outputs.
        seed: decides the weights.

    Raises:
        RecipeError: an unknown architecture or argument, or one that makes no network.
    """
    given = dict(settings)
    architecture = str(given.pop("architecture"))
    require_choice("model.architecture", architecture, tuple(ARCHITECTURES))
    kind = ARCHITECTURES[architecture]
    valid = [name for name in inspect.signature(kind).parameters if name not in ("shape", "num_classes")]
    require_known("model.", given, valid, f"for {architecture}")
    torch.manual_seed(seed)
    try:
        return kind(shape, num_classes, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"model must describe a {architecture}; {' '.join(str(error).split())}") from error
