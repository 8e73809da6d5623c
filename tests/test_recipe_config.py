"""Recipes: the files that are shipped can be read, and what is wrong with one is said in one line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from adai_dist.recipes import config, data_config, engines
from adai_dist.recipes.config import Recipe, ScheduleConfig
from adai_dist.recipes.optimizers import OPTIMIZERS
from adai_dist.recipes.recipe_file import load_recipe
from adai_dist.recipes.refusal import RecipeError
from adai_dist.recipes.shipped import find_config
from tests.recipe_runs import ROOT, TINY_RECIPE

SHIPPED = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TINY_RECIPE.format(out="runs", text="texts", model="architecture: llama"))
    return path


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.stem)
def test_every_shipped_recipe_runs_with_every_optimizer(shipped: Path, optimizer: str) -> None:
    recipe = load_recipe(shipped, [f"optimizer={optimizer}"])
    assert recipe.run.name == shipped.stem
    assert recipe.learning_rate(recipe.schedule.warmup) == recipe.optimizer_arguments["lr"] > 0


def test_there_are_recipes_to_ship() -> None:
    names = {"lm_tiny", "lm_124m", "lm_1b", "cifar10_resnet18", "cifar100_resnet34", "digits_cnn"}
    assert {path.stem for path in SHIPPED} == names


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.stem)
def test_every_shipped_recipe_states_its_clipping_precision_and_batch(shipped: Path) -> None:
    given = yaml.safe_load(shipped.read_text())
    assert {"max_grad_norm", "precision", "engine"} <= given.keys()
    assert "batch" in given["data"]


def test_the_learning_rate_falls_at_milestones() -> None:
    schedule = ScheduleConfig(warmup=2, shape="multistep", milestones=[4, 6], gamma=0.5)
    assert [schedule.factor(step, 8) for step in range(8)] == [0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_a_saved_recipe_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["run.steps=17", "optimizers.adaiv2.betas=[0.2,0.9]", "max_grad_norm=null"])
    recipe.save(tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == recipe
    assert recipe.run.steps == 17
    assert recipe.run.name == "mine"
    assert recipe.optimizer_arguments["betas"] == [0.2, 0.9]
    assert recipe.max_grad_norm is None


WRONG = {
    "run.stesp=3": r"unknown key 'run.stesp' in the command line; valid keys are run.name, run.out, .*run.steps",
    "engin=ddp": r"unknown key 'engin' in the command line; valid keys are run, model, data, engine, deepspeed",
    "run.steps=0": r"run.steps must be at least 1; got 0; ",
    "run.steps=many": r"run.steps must have the type of its default; .*many",
    "run.name=a/b": r"run.name must be the name of one folder; got 'a/b'; use run.out",
    "run=5": r"run must be a mapping of keys to values; got 5",
    "engine=horovod": r"engine must be one of ddp, fsdp2, deepspeed; got 'horovod'",
    "precision=fp8": r"precision must be one of auto, fp32, bf16; got 'fp8'",
    "data.source=web": r"data.source must be one of stdlib, path, dataset, tokens, digits, cifar.*; got 'web'",
    "data.source=stdlib": r"data.path has no effect with data.source=stdlib; got 'texts'",
    "data.subset=en": r"data.subset has no effect with data.source=path; got 'en'",
    "data.path=''": r"data.source=path needs data.path; got ''; say there where the text is",
    "data.val_fraction=1": r"data.val_fraction must be between 0 and 1; got 1.0",
    "schedule.min_ratio=2": r"schedule.min_ratio must be between 0 and 1; got 2.0",
    "max_grad_norm=0": r"max_grad_norm must be positive; got 0.0; set it to null",
    "model.architecture=null": r"model.architecture must name a kind of model; got None",
    "data.source=digits": r"unknown key 'data.seq_len' in .*mine.yaml; valid keys are .*data.crop_padding",
    "data.crop_padding=4": r"unknown key 'data.crop_padding' in the command line; valid keys are .*seq_len",
    "run.timeout=0": r"run.timeout must be at least 1; got 0",
    "schedule.shape=multistep": r"schedule.milestones must be .*, and only then; got \[\]; write \[100, 200\]",
    "schedule.milestones=[5]": r"schedule.milestones must be .*, and only then; got \[5\]",
    "schedule.milestones=5": r"schedule.milestones must have the type of its default",
    "schedule.gamma=2": r"schedule.gamma must be between 0 and 1; got 2.0",
    "optimizer=lion": r"optimizer must be one of adaiv2, adai, adaiw, adam, adamw, sgd; got 'lion'",
    "optimizers.adaiv2.momentum=0.9": r"unknown key 'optimizers.adaiv2.momentum'; valid keys are lr, betas, eps",
    "optimizers.adaiv2.max_grad_norm=1": r"unknown key 'optimizers.adaiv2.max_grad_norm'",
    "optimizers.adaiv2.lr=-1": r"optimizers.adaiv2: lr must be .*-1",
    "optimizers.adaiv2.dampening=2": r"optimizers.adaiv2: dampening must be .*2",
    "optimizers.adaiv2.betas=0.9": r"optimizers.adaiv2: betas must be .*0.9",
    "optimizers.lion.lr=1": r"unknown key 'optimizers.lion'; valid keys are adaiv2, adai, adaiw, adam, adamw, sgd",
    "optimizers.adamw.lr=1": r"'optimizers.adamw.lr=1' has no effect; the optimizer is 'adaiv2'",
    "steps": r"an override must read key=value; got 'steps'",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path, [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_the_file_is_refused_with_the_name_of_the_file(path: Path) -> None:
    path.write_text(path.read_text().replace("steps: 6", "setps: 6"))
    with pytest.raises(RecipeError, match=rf"unknown key 'run.setps' in {path}; valid keys are run.name"):
        load_recipe(path)


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.stem)
def test_a_shipped_recipe_is_found_by_its_name_from_any_folder(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / shipped.stem).mkdir()  # such as the folder of an earlier run
    assert load_recipe(shipped.stem) == load_recipe(shipped)


def test_a_file_that_is_called_like_a_shipped_recipe_is_found_by_its_path(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path.rename("lm_tiny")
    assert load_recipe("./lm_tiny").run.steps == 6
    assert load_recipe("lm_tiny").run.steps == 1200


@pytest.mark.parametrize("given", ["lm_tini", "lm_tiny.yaml", "none/lm_tiny"])
def test_an_unknown_name_is_refused_in_one_line_that_lists_the_names(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(given)
    assert str(caught.value) == (
        f"the recipe must be a file, or the name of a shipped one; got {given!r}; "
        f"give the path of a file, or one of {', '.join(path.stem for path in SHIPPED)}"
    )


def test_the_files_for_deepspeed_are_found_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "configs" / "deepspeed").iterdir():
        assert find_config("deepspeed", path.stem, "deepspeed.config").read_bytes() == path.read_bytes()
    with pytest.raises(RecipeError, match=r"^deepspeed.config must be .*; got 'zero4'; .* zero1, zero2, .*zero3"):
        find_config("deepspeed", "zero4", "deepspeed.config")


def test_a_folder_and_a_file_that_is_no_yaml_are_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"must be a readable file; got '.*'; Is a directory"):
        load_recipe(tmp_path)
    path.write_text("run: [1,\n")
    with pytest.raises(RecipeError, match=r"must be YAML; got .*mine.yaml") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_an_optimizer_without_a_learning_rate_is_refused(path: Path) -> None:
    path.write_text(path.read_text().replace("{lr: 2.0, dampening: 0.0}", "{dampening: 0.0}"))
    with pytest.raises(RecipeError, match=r"optimizers.adaiv2.lr must be given"):
        load_recipe(path)


def test_every_setting_has_a_sentence_and_every_engine_a_name() -> None:
    source = Path(config.__file__).read_text() + Path(data_config.__file__).read_text()
    sections = (config.RunConfig, data_config.TextConfig, data_config.ImagesConfig, config.DeepSpeedSettings)
    for schema in (Recipe, *sections, ScheduleConfig):
        for field in dataclasses.fields(schema):
            assert f"    {field.name}: " in source
    assert tuple(engines.ENGINES) == config.ENGINES


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    schedule = ScheduleConfig(warmup=4, min_ratio=0.1)
    factors = [schedule.factor(step, 15) for step in range(15)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx((1 + 0.1) / 2)
    assert factors[14] == pytest.approx(0.1)
    assert sorted(factors[4:], reverse=True) == factors[4:]
    assert ScheduleConfig(shape="constant").factor(5, 6) == 1.0
    assert math.isfinite(ScheduleConfig(warmup=3).factor(3, 4)), "one step after the warm-up"
