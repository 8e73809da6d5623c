"""Engines, checkpoints and run folders, in many short runs that share one process per rank."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from tests.recipe_runs import GPT2, losses, write_recipe
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed


def run(recipe: str, *overrides: str, **settings: Any) -> dict[int, float]:
    """Train on the ranks of the existing process group, and return the training loss by step."""
    from adai_dist.recipes.job import join_world
    from adai_dist.recipes.recipe import load_recipe
    from adai_dist.recipes.train import train

    loaded = load_recipe(recipe, overrides).replaced(**settings)
    with join_world(loaded.device) as world, contextlib.redirect_stderr(io.StringIO()):
        summary = train(loaded, world)
    return losses(Path(summary["folder"]))


def try_every_way(recipe: str) -> dict[str, dict[int, float]]:
    """Return the losses of short runs with every optimizer, engine and precision, and with accumulation."""
    short = {"steps": 3, "eval_every": 3, "checkpoint_every": 0}
    ways = {name: (f"optimizer={name}", "engine=ddp") for name in ("adai", "adaiw", "sgd")}
    for engine in ("ddp", "fsdp2"):
        for name in ("adaiv2", "adamw"):
            ways[f"{engine}-{name}"] = (f"engine={engine}", f"optimizer={name}")
            ways[f"{engine}-{name}-accumulated"] = (*ways[f"{engine}-{name}"], "grad_accumulation=2")
        ways[f"{engine}-bf16"] = (f"engine={engine}", "precision=bf16")
    return {way: run(recipe, *overrides, name=way, **short) for way, overrides in ways.items()}


def stop_and_continue(recipe: str) -> dict[str, dict[int, float]]:
    """Train without interruption, and stop and resume on either engine. The model has tied weights and dropout."""
    constant = "schedule.shape=constant"  # independent of the number of steps
    settings = {"name": "uninterrupted", "steps": 4, "eval_every": 1, "keep_checkpoints": 1}
    results = {"uninterrupted": run(recipe, constant, "engine=ddp", **settings)}
    for first, second in (("ddp", "ddp"), ("fsdp2", "fsdp2"), ("ddp", "fsdp2"), ("fsdp2", "ddp")):
        name = f"{first}-{second}"
        run(recipe, constant, f"engine={first}", name=name, steps=2)
        results[name] = run(recipe, constant, f"engine={second}", name=name, steps=4, resume=True)
    results["once more"] = run(recipe, constant, "engine=ddp", name="uninterrupted", steps=4, resume=True)
    return results


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_recipe(tmp_path_factory.mktemp("engines")))


@pytest.fixture(scope="module")
def ways(recipe: str) -> dict[str, dict[int, float]]:
    results, on_rank_one = run_ranks(try_every_way, 2, recipe)
    assert results == on_rank_one
    return results


def test_changing_one_word_changes_the_optimizer_and_it_learns(ways: dict[str, dict[int, float]]) -> None:
    curves = [ways[way] for way in ("adai", "adaiw", "sgd", "ddp-adamw", "ddp-adaiv2")]
    for curve in curves:
        assert list(curve) == [1, 2, 3]
        assert curve[3] < curve[1] - 0.003
    assert len({curve[3] for curve in curves}) == len(curves), "two optimizers gave the same losses"


@pytest.mark.parametrize("name", ["adaiv2", "adamw"])
def test_accumulation_and_engine_change_nothing_but_rounding(ways: dict[str, dict[int, float]], name: str) -> None:
    for way in (f"ddp-{name}-accumulated", f"fsdp2-{name}", f"fsdp2-{name}-accumulated"):
        assert ways[way] == pytest.approx(ways[f"ddp-{name}"], rel=1e-5), way


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_bf16_stays_close_to_fp32(ways: dict[str, dict[int, float]], engine: str) -> None:
    exact, rounded = ways[f"{engine}-adaiv2"], ways[f"{engine}-bf16"]
    assert rounded != exact, "bf16 had no effect"
    assert rounded == pytest.approx(exact, rel=2e-3)


def test_a_run_resumed_on_either_engine_has_the_losses_of_the_uninterrupted_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, GPT2)
    results, _ = run_ranks(stop_and_continue, 2, str(recipe))
    uninterrupted = results.pop("uninterrupted")
    assert list(uninterrupted) == [1, 2, 3, 4]
    for way, curve in results.items():
        assert curve == pytest.approx(uninterrupted, rel=1e-5), way
    assert results["ddp-ddp"] == results["once more"] == uninterrupted
    kept = {
        run.name: sorted(path.name for path in run.glob("checkpoints/*")) for run in (recipe.parent / "runs").iterdir()
    }
    assert kept["uninterrupted"] == ["step_00000004"], "keep_checkpoints=1"
    assert kept["ddp-ddp"] == ["step_00000002", "step_00000004"]
    assert len(kept) == 5, "no run got a second folder"
