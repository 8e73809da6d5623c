"""The training loop: read it from top to bottom."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from adai_dist.optimizer import AdaptiveInertia
from adai_dist.recipes.checkpoint import Checkpoints
from adai_dist.recipes.config import Recipe, require
from adai_dist.recipes.data import load_tokens, train_rows, val_rows
from adai_dist.recipes.engine import Engine
from adai_dist.recipes.engines import build_engine, check_engine
from adai_dist.recipes.interrupt import interruptible
from adai_dist.recipes.meter import Meter
from adai_dist.recipes.model import build_model
from adai_dist.recipes.run_folder import Journal, open_run_folder
from adai_dist.recipes.summary import Summary, describe_environment, write_summary
from adai_dist.recipes.world import World
from adai_dist.tools.plots import plot_inertia, plot_loss, read_summary


def train(recipe: Recipe, world: World) -> Summary:
    """Runs a recipe and leaves its folder behind (see run_folder.py).

    Args:
        recipe: from `load_recipe`; its `run.name` becomes the name that was chosen.
        world: from `join_world`.

    Returns:
        The summary, on every rank.

    Raises:
        RecipeError: the recipe cannot be run.
        KeyboardInterrupt: as it came, with a message on how to continue.

    Collective: all ranks of the job.
    """
    run, data = recipe.run, recipe.data
    num_parts = world.size * recipe.grad_accumulation
    why = f"{world.size} ranks and grad_accumulation={recipe.grad_accumulation} share it"
    require(data.batch % num_parts == 0, f"data.batch must be a multiple of {num_parts}", data.batch, why)
    check_engine(recipe, world)

    tokens = load_tokens(data)
    model = build_model(recipe.model, tokens.vocab_size, data.seq_len, run.seed)
    folder = open_run_folder(recipe, world)
    engine = build_engine(recipe, model, world)
    checkpoints = Checkpoints(folder / "checkpoints", run.keep_checkpoints, world)
    first_step = checkpoints.load_latest(engine) if run.resume else 0
    must = f"run.steps must be at least {first_step}, the steps already done"
    require(run.steps >= first_step, must, run.steps, "raise it")
    if first_step == run.steps and (folder / "summary.json").exists():
        return read_summary(folder)

    windows, weights = val_rows(tokens.val, data, world.rank, world.size)
    meter = Meter(world.device)
    journal = Journal(folder, first_step, run.steps, world)
    with interruptible(lambda: _how_to_continue(folder, checkpoints)), contextlib.closing(journal):
        for step in range(first_step, run.steps):
            meter.mark()
            seed_dropout(run.seed, step, world)
            rows = train_rows(tokens.train, data, run.seed, step, world.rank, world.size)
            loss = accumulate(engine, rows, recipe.grad_accumulation, world)
            meter.mark()
            grad_norm = engine.step(recipe.learning_rate(step))
            meter.mark()
            meter.add(loss)
            journal.advance()

            done, is_last = step + 1, step + 1 == run.steps
            keeps = run.checkpoint_every > 0 and (done % run.checkpoint_every == 0 or is_last)
            if done % run.log_every == 0 or is_last or keeps:
                log(journal, done, recipe, meter, grad_norm)
            if done % run.eval_every == 0 and not is_last:
                evaluate(journal, done, engine, windows, weights, data.batch // num_parts, world)
            if keeps:  # after everything that a resumed run does not write again
                journal.sync()
                checkpoints.save(engine, done)
        val_loss = evaluate(journal, run.steps, engine, windows, weights, data.batch // num_parts, world)

    summary = summarize(recipe, folder, engine, meter, val_loss, world)
    if world.is_main:
        plot_loss(folder)
        plot_inertia(folder)
        write_summary(folder, summary)
    return summary


def seed_dropout(seed: int, step: int, world: World) -> None:
    """Makes random numbers a function of seed, step and rank, so that a resumed run draws what it would have drawn."""
    torch.manual_seed((seed * 1_000_003 + step) * world.size + world.rank)


def accumulate(engine: Engine, rows: Tensor, num_parts: int, world: World) -> Tensor:
    """Backward passes over this rank's rows, in equal parts; returns their mean loss (0-dim, on the device)."""
    if world.device.type == "cuda":
        rows = rows.pin_memory().to(world.device, non_blocking=True)
    parts = rows.chunk(num_parts)
    losses = [engine.backward(part, is_last=part is parts[-1]) for part in parts]
    return torch.stack(losses).mean()


def log(journal: Journal, step: int, recipe: Recipe, meter: Meter, grad_norm: Tensor | None) -> None:
    """Reads the meter and writes a line. Collective: all ranks of the job; the host waits for the device."""
    reading = meter.read()
    full_norm = getattr(grad_norm, "full_tensor", lambda: grad_norm)()  # a DTensor's parts are on several ranks
    speed = reading.tokens_per_second(recipe.data.batch * recipe.data.seq_len)
    journal.record(
        step,
        loss=reading.loss,
        lr=recipe.learning_rate(step - 1),
        grad_norm=None if full_norm is None else float(full_norm),
        tokens_per_second=speed,
        optimizer_share=reading.optimizer_share,
    )
    journal.show(loss=f"{reading.loss:.3f}")
    if speed is not None:
        journal.show(**{"tok/s": f"{speed:,.0f}", "optimizer": f"{reading.optimizer_share:.0%}"})


def evaluate(
    journal: Journal, step: int, engine: Engine, windows: Tensor, weights: Tensor, rows_at_once: int, world: World
) -> float:
    """Mean loss over the evaluation windows of all ranks, nats per token; records it, and the inertia of every layer.

    Args:
        windows, weights: of `val_rows`.
        rows_at_once: rows per forward pass.

    Collective: all ranks of the job.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for rows, weight in zip(windows.split(rows_at_once), weights.split(rows_at_once), strict=True):
        losses, weight = engine.losses(rows.to(world.device)), weight.to(world.device)
        sums += torch.stack([(losses * weight).sum(), weight.sum()])
    dist.all_reduce(sums)
    val_loss = float(sums[0] / sums[1])
    journal.record(step, val_loss=val_loss)
    journal.show(val=f"{val_loss:.3f}")
    shares = engine.inertia()
    if shares is not None:
        journal.record_inertia(step, shares)
    return val_loss


def summarize(recipe: Recipe, folder: Path, engine: Engine, meter: Meter, val_loss: float, world: World) -> Summary:
    """What came out of a run; the times are those of this process alone, also if it resumed the run of another one."""
    optimizer, tokens_per_step = engine.optimizer, recipe.data.batch * recipe.data.seq_len
    return {
        "run": folder.name,
        "val_loss": val_loss,
        "train_loss": meter.total.loss,
        "optimizer": recipe.optimizer,
        "engine": recipe.engine,
        "precision": engine.precision,
        "world_size": world.size,
        "num_parameters": engine.num_parameters,
        "steps": recipe.run.steps,
        "tokens": recipe.run.steps * tokens_per_step,
        "seconds": meter.total.seconds,
        "tokens_per_second": meter.total.tokens_per_second(tokens_per_step),
        "optimizer_share": meter.total.optimizer_share,
        "skipped_steps": int(optimizer.num_skipped_steps) if isinstance(optimizer, AdaptiveInertia) else None,
        "folder": str(folder),
        **describe_environment(world),
    }


def _how_to_continue(folder: Path, checkpoints: Checkpoints) -> str:
    if not checkpoints.complete():
        return f"stopped before the first checkpoint; what was logged is in {folder}"
    return f"stopped; continue with: adai-dist train --config {folder / 'config.yaml'} --resume"
