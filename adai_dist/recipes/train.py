"""The training loop: read it from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adai_dist.optimizer import AdaptiveInertia
from adai_dist.recipes.atomic_files import write_text
from adai_dist.recipes.checkpoints import Checkpoints
from adai_dist.recipes.engines import Engine, TorchEngine
from adai_dist.recipes.folder import CONFIG, open_run_folder
from adai_dist.recipes.job import Stopped, StopRequest, World, interruptible
from adai_dist.recipes.journal import Journal, Meter, Summary
from adai_dist.recipes.recipe import Recipe, TextData, require
from adai_dist.recipes.task import Rows, Task
from adai_dist.tools import environment
from adai_dist.tools.plots import plot_inertia, plot_loss, read_summary


def train(recipe: Recipe, world: World) -> Summary:
    """Run a recipe and leave its folder behind (see folder.py).

    Args:
        recipe: from `load_recipe`; its `run.name` becomes the name that was chosen.
        world: from `join_world`.

    Returns:
        The summary, on every rank.

    Raises:
        RecipeError: the recipe cannot be run.
        Stopped: a rank got SIGTERM or SIGUSR1; there is a checkpoint of the next logged step.
        KeyboardInterrupt: Ctrl-C; the message says how to continue.

    Collective: all ranks of the job.
    """
    batch, num_parts = recipe.data.batch, world.size * recipe.grad_accumulation
    why = f"{world.size} ranks and grad_accumulation={recipe.grad_accumulation} share it"
    require(batch % num_parts == 0, f"data.batch must be a multiple of {num_parts}", batch, why)
    build_engine = _engine_of(recipe, world)
    task = load_task(recipe)
    model = task.build_model(recipe.run.seed)
    with open_run_folder(recipe, world) as folder:
        return _train_in(folder, recipe, task, build_engine(task, model), world)


def load_task(recipe: Recipe) -> Task:
    """Read the data that a recipe names.

    Raises:
        RecipeError: the data, or a package that reads them, are missing; there are too few of them.

    Collective: none; every rank reads the same data.
    """
    data = recipe.data
    if isinstance(data, TextData):
        from adai_dist.recipes.language import LanguageTask, load_tokens

        return LanguageTask(data, recipe.model, load_tokens(data))
    from adai_dist.recipes.images import ImageTask, load_images

    return ImageTask(data, recipe.model, recipe.engine, load_images(data))


def _engine_of(recipe: Recipe, world: World) -> Callable[[Task, nn.Module], Engine]:
    """Return the constructor of the engine, once its own settings are valid."""
    if recipe.engine != "deepspeed":
        return functools.partial(TorchEngine, recipe, world)
    from adai_dist.recipes.deepspeed_engine import DeepSpeedEngine, read_settings

    return functools.partial(DeepSpeedEngine, recipe, world, read_settings(recipe, world))


def _train_in(folder: Path, recipe: Recipe, task: Task, engine: Engine, world: World) -> Summary:
    run = recipe.run
    checkpoints = Checkpoints(folder / "checkpoints", run.keep_checkpoints, world)
    first_step = checkpoints.load_latest(engine) if run.resume else 0
    must = f"run.steps must be at least {first_step}, the steps already done"
    require(run.steps >= first_step, must, run.steps, "raise it")
    if first_step == run.steps and (folder / "summary.json").exists():
        return read_summary(folder)

    num_at_once = recipe.data.batch // (world.size * recipe.grad_accumulation)
    held_out = HeldOut(*task.val_rows(world.rank, world.size), num_at_once)
    meter, stop = Meter(world.device), StopRequest()
    journal = Journal(folder, first_step, run.steps, world)
    with (
        interruptible(lambda: _how_to_continue(folder, checkpoints)),
        contextlib.closing(journal),
        stop.listening(),
    ):
        for step in range(first_step, run.steps):
            meter.mark()
            seed_dropout(run.seed, step, world)
            rows = task.train_rows(run.seed, step, world.rank, world.size)
            loss = accumulate(engine, rows, recipe.grad_accumulation, world)
            meter.mark()
            grad_norm = engine.step(recipe.learning_rate(step))
            meter.mark()
            meter.add(loss)
            journal.count_step()

            done, is_last = step + 1, step + 1 == run.steps
            keeps = run.checkpoint_every > 0 and (done % run.checkpoint_every == 0 or is_last)
            is_stopping = False
            if done % run.log_every == 0 or is_last or keeps:
                log(journal, done, recipe, task, meter, grad_norm)
                is_stopping = not is_last and stop.reached_any_rank(world)
            if done % run.eval_every == 0 and not is_last:
                evaluate(journal, done, engine, held_out, world)
            if keeps or is_stopping:  # last: a resumed run writes everything after the checkpoint again
                journal.sync()
                checkpoints.save(engine, done)
            if is_stopping:
                raise Stopped(_how_to_continue(folder, checkpoints))
        scores = evaluate(journal, run.steps, engine, held_out, world)

    summary = summarize(recipe, folder, task, engine, meter, scores, world)
    if world.is_main:
        plot_loss(folder, task.unit)
        plot_inertia(folder)
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")  # last: the run has finished
    return summary


class HeldOut(NamedTuple):
    """This rank's part of the rows of every evaluation, their weights, and the number of rows per forward pass."""

    rows: Rows
    weights: Tensor
    num_at_once: int


def seed_dropout(seed: int, step: int, world: World) -> None:
    """Make random numbers a function of seed, step and rank, so that a resumed run draws the same ones."""
    torch.manual_seed((seed * 1_000_003 + step) * world.size + world.rank)


def accumulate(engine: Engine, rows: Rows, num_parts: int, world: World) -> Tensor:
    """Run backward passes over equal parts of this rank's rows; return their mean loss (0-dim, on the device)."""
    if world.device.type == "cuda":
        rows = tuple(column.pin_memory().to(world.device, non_blocking=True) for column in rows)
    parts = list(zip(*(column.chunk(num_parts) for column in rows), strict=True))
    losses = [engine.backward(part, is_last=part is parts[-1]) for part in parts]
    return torch.stack(losses).mean()


def log(journal: Journal, step: int, recipe: Recipe, task: Task, meter: Meter, grad_norm: Tensor | None) -> None:
    """Read the meter and write a line. Collective: all ranks of the job; the host waits for the device."""
    reading = meter.read()
    full_norm = getattr(grad_norm, "full_tensor", lambda: grad_norm)()  # a DTensor is sharded over the ranks
    speed = reading.units_per_second(task.units_per_step)
    journal.record(
        step,
        loss=reading.loss,
        lr=recipe.learning_rate(step - 1),
        grad_norm=None if full_norm is None else float(full_norm),
        **{f"{task.unit}s_per_second": speed},
        optimizer_share=reading.optimizer_share,
    )
    journal.show(loss=f"{reading.loss:.3f}")
    if speed is not None:
        journal.show(**{f"{task.unit}s/s": f"{speed:,.0f}", "optimizer": f"{reading.optimizer_share:.0%}"})


def evaluate(journal: Journal, step: int, engine: Engine, held_out: HeldOut, world: World) -> dict[str, float]:
    """Return the mean of every score over the held-out rows of all ranks; record them, and the inertia of every layer.

    Collective: all ranks of the job.
    """
    parts = zip(*(column.split(held_out.num_at_once) for column in (*held_out.rows, held_out.weights)), strict=True)
    sums: dict[str, Tensor] = {}
    for *part, weights in parts:
        weights = weights.to(world.device)
        scores = engine.scores(tuple(column.to(world.device) for column in part))
        for name, values in [*scores.items(), ("weight", torch.ones_like(weights))]:
            sums[name] = sums.get(name, 0.0) + (values * weights).sum()
    total = torch.stack(list(sums.values()))
    dist.all_reduce(total)
    means = {name: float(value / total[-1]) for name, value in zip(sums, total, strict=True) if name != "weight"}
    journal.record(step, **{f"val_{name}": mean for name, mean in means.items()})
    journal.show(**{f"val {name}": f"{mean:.3f}" for name, mean in means.items()})
    shares = engine.inertia()
    if shares is not None:
        journal.record_inertia(step, shares)
    return means


def summarize(
    recipe: Recipe, folder: Path, task: Task, engine: Engine, meter: Meter, scores: dict[str, float], world: World
) -> Summary:
    """Return the summary of a run; its times are those of this process alone, also if it resumed another one's run."""
    optimizer = engine.optimizer
    return {
        "run": folder.name,
        "unit": task.unit,
        **{f"val_{name}": score for name, score in scores.items()},
        "train_loss": meter.total.loss,
        "optimizer": recipe.optimizer,
        "seed": recipe.run.seed,
        "engine": recipe.engine,
        "precision": engine.precision,
        "world_size": world.size,
        "num_parameters": engine.num_parameters,
        "steps": recipe.run.steps,
        f"{task.unit}s": recipe.run.steps * task.units_per_step,
        "seconds": meter.total.seconds,
        f"{task.unit}s_per_second": meter.total.units_per_second(task.units_per_step),
        "optimizer_share": meter.total.optimizer_share,
        "skipped_steps": int(optimizer.num_skipped_steps) if isinstance(optimizer, AdaptiveInertia) else None,
        "folder": str(folder),
        "versions": environment.versions("transformers", "numpy", "deepspeed"),
        "git_commit": environment.git_commit(),
        "hardware": environment.hardware(world.device.type),
    }


def _how_to_continue(folder: Path, checkpoints: Checkpoints) -> str:
    if not checkpoints.complete():
        return f"stopped before the first checkpoint; what was logged is in {folder}"
    return f"stopped; continue with: adai-dist train --config {folder / CONFIG} --resume"
