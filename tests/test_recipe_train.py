"""Parts of the training loop: the learning rate of a step, random numbers, and the step at which a run resumes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adai_dist.recipes.checkpoints import Checkpoints
from adai_dist.recipes.job import World, join_world
from adai_dist.recipes.recipe import load_recipe
from adai_dist.recipes.train import seed_dropout, train
from tests.faults.linear_engine import LinearEngine
from tests.recipe_runs import write_recipe
from tests.spawn import run_ranks


def learning_rates(path: str) -> tuple[list[float], list[float]]:
    """Return the learning rates that the optimizer used, and those of the recipe, by step."""
    recipe = load_recipe(path, ["engine=ddp", "run.checkpoint_every=0"])
    seen: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    with join_world(recipe.device) as world, contextlib.redirect_stderr(io.StringIO()):
        train(recipe, world)
    hook.remove()
    return seen, [recipe.learning_rate(step) for step in range(recipe.run.steps)]


@pytest.mark.distributed
def test_the_optimizer_steps_with_the_learning_rate_of_the_step(tmp_path: Path) -> None:
    ((seen, expected),) = run_ranks(learning_rates, 1, str(write_recipe(tmp_path)))
    assert len(set(expected)) > 3, "the schedule must change"
    assert seen == expected


def test_dropout_draws_different_numbers_for_every_rank_step_and_seed() -> None:
    drawn: dict[tuple[int, int, int], float] = {}
    for seed in (0, 1):
        for step in (0, 1, 2):
            for rank in (0, 1):
                seed_dropout(seed, step, World(rank, 2, torch.device("cpu")))
                drawn[seed, step, rank] = torch.rand(()).item()
    assert len(set(drawn.values())) == len(drawn)
    seed_dropout(1, 2, World(1, 2, torch.device("cpu")))
    assert torch.rand(()).item() == drawn[1, 2, 1], "a resumed run must draw the same numbers"


def resume(folder: str) -> tuple[int, bool]:
    """Save three checkpoints; return the step of the loaded one, and whether all tensors equal those of the last."""
    with join_world("cpu") as world:
        checkpoints = Checkpoints(Path(folder), 5, world)
        states = {}
        engine = LinearEngine()
        for step in (2, 4, 10):
            engine.take_steps(1)
            states[step] = engine.local_state()
            checkpoints.save(engine, step)
        fresh = LinearEngine()
        step = checkpoints.load_latest(fresh)
        return step, fresh.is_at(states[10])


@pytest.mark.distributed
def test_a_run_continues_from_the_newest_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(resume, 2, str(tmp_path)) == [(10, True)] * 2
