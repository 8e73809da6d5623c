"""Recipes: the shipped files are valid, and an error in a file or override is one line that names the key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from adai_dist.recipes.optimizers import OPTIMIZERS
from adai_dist.recipes.recipe import Recipe, RecipeError, Schedule, describe_keys, find_config, load_recipe
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


def test_all_recipes_are_shipped() -> None:
    names = {"lm_tiny", "lm_124m", "lm_1b", "cifar10_resnet18", "cifar100_resnet34", "digits_cnn"}
    assert {path.stem for path in SHIPPED} == names


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.stem)
def test_every_shipped_recipe_states_its_clipping_precision_and_batch(shipped: Path) -> None:
    given = yaml.safe_load(shipped.read_text())
    assert {"max_grad_norm", "precision", "engine"} <= given.keys()
    assert "batch" in given["data"]


def test_the_learning_rate_falls_at_milestones() -> None:
    schedule = Schedule(warmup=2, shape="multistep", milestones=[4, 6], gamma=0.5)
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
    "run.stesp=3": r"unknown key 'run.stesp' in the command line; did you mean 'run.steps'\? valid keys are run.name, ",
    "engin=ddp": r"unknown key 'engin' in the command line; did you mean 'engine'\? valid keys are run, model, data, ",
    "run.colour=3": r"unknown key 'run.colour' in the command line; valid keys are run.name, .*run.steps",
    "run.steps=0": r"run.steps must be greater than or equal to 1; got 0; ",
    "run.steps=many": r"run.steps must be a valid integer; got 'many'; ",
    "run.steps=1.5": r"run.steps must be a valid integer; got 1.5; ",
    "run.steps=true": r"run.steps must be a valid integer; got True; ",
    "run.steps=": r"run.steps must have a value; got none; give it one, or leave the key out",
    "run.resume=maybe": r"run.resume must be a valid boolean; got 'maybe'; ",
    "run.name=a/b": r"run.name must be the name of one folder; got 'a/b'; use run.out",
    "run=5": r"run must be a mapping of keys to values; got 5",
    "run=[]": r"run must be a mapping of keys to values; got \[\]",
    "optimizers.adaiv2=[]": r"optimizers.adaiv2 must be a mapping of keys to values; got \[\]",
    "schedule.milestones={}": r"schedule.milestones must be a valid list; got {}",
    "data=5": r"data must be a mapping of keys to values; got 5",
    "engine=horovod": r"engine must be 'ddp', 'fsdp2' or 'deepspeed'; got 'horovod'",
    "precision=fp8": r"precision must be 'auto', 'fp32' or 'bf16'; got 'fp8'",
    "data.source=web": r"data.source must be one of stdlib, path, dataset, tokens, digits, cifar.*; got 'web'",
    "data.source=stdlib": r"unknown key 'data.path' in .*mine.yaml, with data.source=stdlib; ",
    "data.subset=en": r"unknown key 'data.subset' in the command line, with data.source=path; ",
    "data.path=''": r"data.path must have at least 1 character; got ''",
    "data.val_fraction=1": r"data.val_fraction must be less than 1; got 1",
    "schedule.min_ratio=2": r"schedule.min_ratio must be less than or equal to 1; got 2",
    "schedule.min_ratio=small": r"schedule.min_ratio must be a valid number; got 'small'",
    "max_grad_norm=0": r"max_grad_norm must be greater than 0; got 0",
    "model.architecture=null": r"model.architecture must name a kind of model; got None",
    "model=5": r"model must be a mapping of keys to values; got 5",
    "data.source=digits": r"unknown key 'data.path' in .*mine.yaml, with data.source=digits; .* data.crop_padding",
    "data.crop_padding=4": r"unknown key 'data.crop_padding' in the command line, with data.source=path; .*seq_len",
    "run.timeout=0": r"run.timeout must be greater than or equal to 1; got 0",
    "schedule.shape=multistep": r"schedule.milestones must be .*, and empty otherwise; got \[\]; write \[100, 200\]",
    "schedule.milestones=[5]": r"schedule.milestones must be .*, and empty otherwise; got \[5\]",
    "schedule.milestones=5": r"schedule.milestones must be a valid list; got 5",
    "schedule.gamma=2": r"schedule.gamma must be less than or equal to 1; got 2",
    "optimizer=lion": r"optimizer must be one of adai, adaiw, adaiv2, adam, adamw, sgd; got 'lion'",
    "optimizers=5": r"optimizers must be a mapping of keys to values; got 5",
    "optimizers.adaiv2=5": r"optimizers.adaiv2 must be a mapping of keys to values; got 5",
    "optimizers.adaiv2.momentum=0.9": r"unknown key 'optimizers.adaiv2.momentum' .*; valid keys are .*lr",
    "optimizers.adaiv2.weight_decy=0": r"did you mean 'optimizers.adaiv2.weight_decay'\? valid keys are ",
    "optimizers.adaiv2.max_grad_norm=1": r"unknown key 'optimizers.adaiv2.max_grad_norm'",
    "optimizers.adaiv2.lr=-1": r"optimizers.adaiv2: lr must be .*-1",
    "optimizers.adaiv2.dampening=2": r"optimizers.adaiv2: dampening must be .*2",
    "optimizers.adaiv2.betas=0.9": r"optimizers.adaiv2: betas must be .*0.9",
    "optimizers.lion.lr=1": r"unknown key 'optimizers.lion' .*; valid keys are optimizers.adai, optimizers.adaiw, ",
    "optimizers.adamw.lr=1": r"'optimizers.adamw.lr=1' has no effect; the optimizer is 'adaiv2'",
    "deepspeed.config=zero2": r"'deepspeed.config=zero2' has no effect; the engine is 'fsdp2'; add engine=deepspeed",
    "steps": r"an override must read key=value; got 'steps'",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=WRONG)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path, [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_the_file_is_refused_with_the_name_of_the_file(path: Path) -> None:
    path.write_text(path.read_text().replace("steps: 6", "setps: 6"))
    with pytest.raises(RecipeError, match=rf"unknown key 'run.setps' in {path}; did you mean 'run.steps'\? "):
        load_recipe(path)


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda shipped: shipped.stem)
def test_a_shipped_recipe_is_found_by_its_name_from_any_folder(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / shipped.stem).mkdir()  # for example, from an earlier run
    assert load_recipe(shipped.stem) == load_recipe(shipped)


def test_a_file_with_the_name_of_a_shipped_recipe_is_found_by_its_path(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path.rename("lm_tiny")
    assert load_recipe("./lm_tiny").run.steps == 6
    assert load_recipe("lm_tiny").run.steps == 1200


@pytest.mark.parametrize(
    ("given", "hint"),
    [("lm_tini", "did you mean 'lm_tiny'? "), ("lm_tiny.yaml", "did you mean 'lm_tiny'? "), ("none/resnet50", "")],
)
def test_an_unknown_name_is_refused_in_one_line_that_lists_the_names(
    given: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(given)
    assert str(caught.value) == (
        f"the recipe must be a file, or the name of a shipped one; got {given!r}; {hint}"
        f"give the path of a file, or one of {', '.join(path.stem for path in SHIPPED)}"
    )


def test_the_files_for_deepspeed_are_found_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "configs" / "deepspeed").iterdir():
        assert find_config("deepspeed", path.stem, "deepspeed.config").read_bytes() == path.read_bytes()
    with pytest.raises(RecipeError, match=r"^deepspeed.config must be .*; got 'zero4'; .* zero1, zero2, .*zero3"):
        find_config("deepspeed", "zero4", "deepspeed.config")


def test_a_folder_and_a_file_that_is_not_yaml_are_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"must be a readable file; got '.*'; Is a directory"):
        load_recipe(tmp_path)
    path.write_text("[1, 2]\n")
    with pytest.raises(RecipeError, match=r"a recipe must be a mapping of keys to values; got \[1, 2\]"):
        load_recipe(path)
    path.write_text("run: [1,\n")
    with pytest.raises(RecipeError, match=r"must be YAML; got .*mine.yaml") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_an_optimizer_without_a_learning_rate_is_refused(path: Path) -> None:
    path.write_text(path.read_text().replace("{lr: 2.0, dampening: 0.0}", "{dampening: 0.0}"))
    with pytest.raises(RecipeError, match=r"optimizers.adaiv2.lr must be given"):
        load_recipe(path)


def test_every_key_is_described_with_its_default() -> None:
    rows = [line.split(maxsplit=1) for line in describe_keys().splitlines()]
    assert all(len(row) == 2 for row in rows), "a key without a description"
    described = dict(rows)
    assert {"run.steps", "data.source", "data.path", "data.crop_padding", "schedule.gamma"} <= described.keys()
    assert described["run.steps"] == "Number of optimizer steps. Default: 1000."
    top_level = {key.partition(".")[0] for key in described}
    assert top_level == set(Recipe.model_fields)


def test_a_changed_copy_is_validated_too(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.replaced(seed=9, optimizer="sgd").optimizer_arguments["momentum"] == 0.9
    assert recipe.replaced(steps=7).replaced(steps=6) == recipe
    with pytest.raises(RecipeError, match=r"run.steps must be greater than or equal to 1; got 0"):
        recipe.replaced(steps=0)
    with pytest.raises(RecipeError, match=r"optimizers.adam.lr must be given"):
        recipe.replaced(optimizer="adam")


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    schedule = Schedule(warmup=4, min_ratio=0.1)
    factors = [schedule.factor(step, 15) for step in range(15)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx((1 + 0.1) / 2)
    assert factors[14] == pytest.approx(0.1)
    assert sorted(factors[4:], reverse=True) == factors[4:]
    assert Schedule(shape="constant").factor(5, 6) == 1.0
    assert math.isfinite(Schedule(warmup=3).factor(3, 4)), "one step after the warm-up"
