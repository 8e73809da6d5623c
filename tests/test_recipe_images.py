"""Image classification: data sets, batches and augmentation, and networks with the architectures of their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adai_dist.recipes.images import (
    ImageSplits,
    ImageTask,
    LabelledImages,
    build_convnet,
    epoch_indices,
    load_images,
)
from adai_dist.recipes.recipe import CifarData, DigitsData, RecipeError, load_recipe
from adai_dist.recipes.train import load_task
from tests.recipe_runs import ROOT, losses
from tests.spawn import run_ranks

RECIPES = ROOT / "configs" / "recipes"


def some_images(num: int = 23, channels: int = 3, size: int = 6, num_classes: int = 5) -> LabelledImages:
    numbers = np.random.default_rng(7)
    images = numbers.integers(0, 256, (num, channels, size, size), dtype=np.uint8)
    return LabelledImages(images, np.arange(num) % num_classes)


SPLITS = ImageSplits(some_images(), some_images(num=7), 5)
DATA = CifarData(source="cifar10", batch=8, crop_padding=2, flip=True)
TASK = ImageTask(DATA, {}, "ddp", SPLITS)


def save_cifar(folder: Path, source: str = "cifar10", num: int = 40, **changes: Any) -> Path:
    """Save random images with the shape and columns of CIFAR on the hub, using the package `datasets`."""
    import datasets

    numbers = np.random.default_rng(0)
    columns = {"cifar10": ("label", 10), "cifar100": ("fine_label", 100)}
    label, num_classes = columns[source]
    features = datasets.Features({"img": datasets.Image(), label: datasets.ClassLabel(num_classes=num_classes)})
    parts = {}
    for part in changes.get("parts", ("train", "test")):
        images = list(numbers.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8))
        labels = [int(value) for value in numbers.integers(0, num_classes, num)]
        parts[part] = datasets.Dataset.from_dict({"img": images, label: labels}, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_ranks_share_one_batch_whatever_their_number(num_ranks: int) -> None:
    whole = TASK.train_rows(3, 4, 0, 1)
    parts = [TASK.train_rows(3, 4, rank, num_ranks) for rank in range(num_ranks)]
    for column in (0, 1):
        assert torch.equal(torch.cat([part[column] for part in parts]), whole[column])
    assert whole[0].shape == (8, 3, 6, 6)
    assert whole[0].dtype == torch.float32


def test_every_epoch_has_every_image_once_in_a_new_order() -> None:
    num_images, batch = 23, 8
    indices = np.concatenate([epoch_indices(num_images, batch, 1, step) for step in range(6)])
    first, second = indices[:num_images], indices[num_images : 2 * num_images]
    assert sorted(first) == sorted(second) == list(range(num_images))
    assert list(first) != list(second)
    assert list(epoch_indices(num_images, batch, 2, 0)) != list(first[:batch]), "the seed has no effect"


def test_crops_and_flips_are_pieces_of_the_padded_image_and_all_of_them_occur() -> None:
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 1, 3, 3)
    splits = ImageSplits(LabelledImages(image, np.zeros(1, np.int64)), some_images(), 5)
    task = ImageTask(DATA.model_copy(update={"crop_padding": 1, "batch": 4}), {}, "ddp", splits)
    padded = np.pad(image[0, 0], 1)
    pieces = [padded[y : y + 3, x : x + 3] for y in range(3) for x in range(3)]
    allowed = {splits.scaled(p[None].copy()).numpy().tobytes() for piece in pieces for p in (piece, piece[:, ::-1])}
    seen = {row.numpy().tobytes() for step in range(100) for row in task.train_rows(0, step, 0, 1)[0]}
    assert seen == allowed
    assert len(seen) == 18
    plain = ImageTask(DATA.model_copy(update={"crop_padding": 0, "flip": False}), {}, "ddp", splits)
    assert torch.equal(plain.train_rows(0, 0, 0, 1)[0][0], splits.scaled(image)[0])


def test_images_are_scaled_to_mean_0_and_deviation_1_of_every_channel() -> None:
    scaled = SPLITS.scaled(SPLITS.train.images).double()
    assert scaled.mean((0, 2, 3)).abs().max() < 1e-6
    assert scaled.std((0, 2, 3), correction=0) == pytest.approx(torch.ones(3), abs=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_held_out_images_are_seen_once_over_all_ranks(num_ranks: int) -> None:
    shares = [TASK.val_rows(rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(weights) for _, weights in shares}) == 1
    assert sum(float(weights.sum()) for _, weights in shares) == 7
    seen = torch.cat([rows[0][weights > 0] for rows, weights in shares])
    assert torch.equal(seen, SPLITS.scaled(SPLITS.val.images))


def test_the_digits_are_split_into_training_and_held_out_scans() -> None:
    splits = load_images(DigitsData(source="digits"))
    assert splits.shape == (1, 8, 8)
    assert splits.num_classes == 10
    assert (len(splits.train.labels), len(splits.val.labels)) == (1348, 449)
    assert set(splits.val.labels) == set(range(10))
    again = load_images(DigitsData(source="digits"))
    assert np.array_equal(again.val.images, splits.val.images)


@pytest.mark.parametrize(("source", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_through_datasets(tmp_path: Path, source: str, num_classes: int) -> None:
    import datasets

    folder = save_cifar(tmp_path / "saved", source)
    splits = load_images(CifarData(source=source, path=str(folder)))
    assert splits.shape == (3, 32, 32)
    assert splits.num_classes == num_classes
    row = datasets.load_from_disk(str(folder))["test"][3]
    assert np.array_equal(splits.val.images[3], np.asarray(row["img"]).transpose(2, 0, 1))
    assert splits.val.labels[3] == row["label" if source == "cifar10" else "fine_label"]


def test_a_dataset_that_is_not_cifar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cifar10 must be on the hub, or in data.path.*; got '.*nowhere'"):
        load_images(CifarData(source="cifar10", path=str(tmp_path / "nowhere")))
    half = save_cifar(tmp_path / "half", parts=("train",))
    with pytest.raises(RecipeError, match=r"must have a split 'test' with the columns img and label; got \[\]"):
        load_images(CifarData(source="cifar10", path=str(half)))
    other = save_cifar(tmp_path / "other", "cifar100")
    with pytest.raises(RecipeError, match=r"with the columns img and label; got \['img', 'fine_label'\]"):
        load_images(CifarData(source="cifar10", path=str(other)))


@pytest.mark.parametrize(
    ("architecture", "num_classes", "num_parameters"),
    # Sizes of the networks that are commonly trained on CIFAR under these names.
    [("resnet18", 10, 11_173_962), ("resnet34", 100, 21_328_292)],
)
def test_the_resnets_have_the_usual_sizes_for_cifar(architecture: str, num_classes: int, num_parameters: int) -> None:
    with torch.device("meta"):
        model = build_convnet({"architecture": architecture}, (3, 32, 32), num_classes, seed=0)
        assert model(torch.empty(2, 3, 32, 32)).logits.shape == (2, num_classes)
    assert sum(param.numel() for param in model.parameters()) == num_parameters


def test_the_seed_decides_the_weights() -> None:
    settings = {"architecture": "resnet18", "width": 4}
    a, b, c = (build_convnet(settings, (3, 8, 8), 10, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    name = next(name for name in a if name.endswith("convolution.weight"))
    assert not torch.equal(a[name], c[name])


WRONG = {
    "lenet": ({"architecture": "lenet"}, r"model.architecture must be one of cnn, resnet18, resnet34; got 'lenet'"),
    "key": (
        {"architecture": "cnn", "depth": 3},
        r"unknown key 'model.depth' for cnn; valid keys are model.channels, ",
    ),
    "value": ({"architecture": "resnet18", "width": "wide"}, r"model must describe a resnet18; got .*'wide'"),
    "size": (
        {"architecture": "cnn", "channels": [4] * 6},
        r"model must describe a cnn; got .*; an image of 8x8 pixels is too small",
    ),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_an_impossible_network_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_convnet(settings, (1, 8, 8), 10, seed=0)


Curves = tuple[dict[int, float], dict[int, float], dict[int, float]]


def run_images(recipe: Path, *overrides: str) -> Curves:
    """Train on the ranks of the existing process group; return losses, held-out losses and held-out errors by step."""
    from tests.test_recipe_engines import run

    run(str(recipe), *overrides)
    given = dict(override.split("=", 1) for override in overrides)
    folder = Path(given["run.out"], given["run.name"])
    return losses(folder), losses(folder, "val_loss"), losses(folder, "val_error")


def train_on_two_ranks(out: str, cifar: str) -> dict[str, Curves]:
    small = ("run.log_every=1", "run.eval_every=2", f"run.out={out}", "device=cpu")
    digits = RECIPES / "digits_cnn.yaml"
    ways = {
        engine: run_images(digits, *small, "run.steps=30", f"engine={engine}", f"run.name={engine}")
        for engine in ("ddp", "fsdp2")
    }
    resnet = (*small, f"data.path={cifar}", "data.batch=8", "model.width=4", "run.checkpoint_every=2")
    for shipped in ("cifar10_resnet18", "cifar100_resnet34"):
        path = [f"data.path={cifar}100"] if "100" in shipped else []
        ways[shipped] = run_images(RECIPES / f"{shipped}.yaml", *resnet, *path, "run.steps=4", f"run.name={shipped}")
    cut = RECIPES / "cifar10_resnet18.yaml"
    run_images(cut, *resnet, "run.steps=2", "run.name=cut")
    ways["resumed"] = run_images(cut, *resnet, "run.steps=4", "run.name=cut", "run.resume=true")
    return ways


@pytest.mark.distributed
def test_the_recipes_on_images_train_on_two_ranks_and_resume_with_the_same_bits(tmp_path: Path) -> None:
    cifar = save_cifar(tmp_path / "cifar")
    save_cifar(tmp_path / "cifar100", "cifar100")
    ways, on_rank_one = run_ranks(train_on_two_ranks, 2, str(tmp_path / "runs"), str(cifar))
    assert ways == on_rank_one
    assert ways["ddp"][0] == pytest.approx(ways["fsdp2"][0], rel=1e-5)
    assert ways["ddp"][0][30] < ways["ddp"][0][1] - 0.5
    for name in ("cifar10_resnet18", "cifar100_resnet34"):
        training, _, errors = ways[name]
        assert list(training) == [1, 2, 3, 4]
        assert list(errors) == [2, 4]
        assert all(0 <= error <= 1 for error in errors.values())
    # This includes the running averages of batch normalisation, which the held-out loss uses.
    assert ways["resumed"] == ways["cifar10_resnet18"]


def test_batch_normalisation_needs_ddp(tmp_path: Path) -> None:
    cifar = save_cifar(tmp_path / "cifar")
    recipe = load_recipe(RECIPES / "cifar10_resnet18.yaml", ["engine=fsdp2", f"data.path={cifar}"])
    with pytest.raises(RecipeError, match=r"batch normalisation needs engine=ddp; got 'fsdp2'"):
        load_task(recipe).build_model(0)
