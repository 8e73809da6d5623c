"""The folder of a run: which one it is, and what is written into it while the run goes on.

    config.yaml       the resolved recipe; `adai-dist train --config NAME/config.yaml --resume` continues from it
    metrics.jsonl     one line per log step and per evaluation
    inertia.jsonl     the distribution of inertia per layer, one line per evaluation
    events.out.*      the same scalars for TensorBoard
    checkpoints/      see checkpoint.py
    run.lock          see run_lock.py
    summary.json, loss.png, inertia.png   written at the end

Only the main rank writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

from adai_dist.recipes import durable
from adai_dist.recipes.config import Recipe
from adai_dist.recipes.recipe_file import load_recipe
from adai_dist.recipes.refusal import RecipeError
from adai_dist.recipes.run_lock import FILE_NAME, GRACE_SECONDS, run_lock
from adai_dist.recipes.world import World
from adai_dist.tools.plots import read_records

logger: logging.Logger = logging.getLogger("adai_dist")

_BAR_SECONDS = 15.0  # between two updates of the bar where no person watches
_CONFIG_IN_PROGRESS = "config.yaml.writing"
_LINES = ("metrics.jsonl", "inertia.jsonl")


@contextmanager
def open_run_folder(recipe: Recipe, world: World) -> Generator[Path]:
    """Chooses and makes the folder of the run; writes the recipe into it and its final name into the recipe.

    A name that is taken gets a number, unless the recipe says resume or overwrite. Within the block the run has the
    folder to itself.

    Raises:
        RecipeError: the run cannot be continued with this recipe, or is not one that may be deleted, or goes on.

    Collective: all ranks of the job, on entry.
    """
    outcome: list[Path | RecipeError] = []
    with contextlib.ExitStack() as until_the_end:
        if world.is_main:
            try:
                outcome = [_make(recipe, until_the_end)]
            except RecipeError as error:
                outcome = [error]
            except OSError as error:
                where = str(error.filename or recipe.run.out)
                advice = f"{error.strerror or error}; set run.out to a folder that can be written"
                outcome = [RecipeError(f"the folder of the run must be writable; got {where!r}; {advice}")]
        outcome = outcome or [RecipeError()]  # broadcast fills in what the main rank found
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], RecipeError):
            raise outcome[0]
        recipe.run.name = outcome[0].name
        yield outcome[0]


def _make(recipe: Recipe, until_the_end: contextlib.ExitStack) -> Path:
    folder, is_new = _choose(recipe)
    until_the_end.enter_context(run_lock(folder, min(GRACE_SECONDS, recipe.run.timeout / 2)))
    if is_new and recipe.run.resume:
        logger.warning("there is no run to resume in %s; it starts at step 0", folder)
    elif recipe.run.resume and (folder / "config.yaml").exists():
        _refuse_other_run(recipe, folder)
    elif recipe.run.overwrite:
        _clear(folder)
    recipe.run.name = folder.name
    # What is asked for once is not a property of the run, which is to be resumed from this file.
    once = dataclasses.replace(recipe.run, resume=False, overwrite=False)
    writing = folder / _CONFIG_IN_PROGRESS
    dataclasses.replace(recipe, run=once).save(writing)
    durable.sync(writing)
    writing.replace(folder / "config.yaml")
    return folder


def _choose(recipe: Recipe) -> tuple[Path, bool]:
    """The folder, which exists from now on, and whether it has been made."""
    wanted = Path(recipe.run.out) / recipe.run.name
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, number = wanted, 1
    while not _could_make(folder):
        if folder == wanted and _may_enter(recipe, folder):
            return folder, False
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder, True


def _could_make(folder: Path) -> bool:
    """Makes a folder; of runs that start together one can."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _may_enter(recipe: Recipe, folder: Path) -> bool:
    """Whether this recipe continues or replaces what has the name that it wants."""
    if folder.is_symlink() and not folder.exists():
        raise RecipeError(
            f"a link in the place of a run must lead to a folder; got {str(folder)!r}, which leads to "
            f"{os.readlink(folder)!r}; make that folder, delete the link, or change run.name"
        )
    is_run = (folder / "config.yaml").exists()
    if recipe.run.resume:
        return is_run or _was_killed_at_its_start(folder)
    if recipe.run.overwrite and not is_run:
        raise RecipeError(
            f"run.overwrite deletes runs only; got {str(folder)!r}, which has no config.yaml; change run.name"
        )
    return recipe.run.overwrite


def _clear(folder: Path) -> None:
    """Deletes a run, but not what says that it is one and who has it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in ("config.yaml", FILE_NAME):
            path.unlink()


def _was_killed_at_its_start(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {_CONFIG_IN_PROGRESS, FILE_NAME}


def _refuse_other_run(recipe: Recipe, folder: Path) -> None:
    """A checkpoint continues the run that wrote it: same model, same data, same kind of optimizer."""
    before = load_recipe(folder / "config.yaml")
    for key in ("model", "data", "optimizer"):
        old, new = getattr(before, key), getattr(recipe, key)
        if old != new:
            raise RecipeError(
                f"a resumed run must keep its {key}; got {new!r}, and {str(folder)!r} has {old!r}; change run.name"
            )
    if before.engine != recipe.engine and "deepspeed" in (before.engine, recipe.engine):
        must = f"a run must be resumed by an engine that reads its checkpoints, engine={before.engine}"
        raise RecipeError(f"{must}; got {recipe.engine!r}; change run.name")
    if before.run.seed != recipe.run.seed:
        raise RecipeError(f"a resumed run must keep run.seed={before.run.seed}; got {recipe.run.seed}; change run.name")


class Journal:
    """Writes metrics as they come and shows the progress; on ranks other than the main one it does nothing.

    Everything is flushed line by line, so that an interrupted run has left all it knew.
    """

    def __init__(self, folder: Path, first_step: int, num_steps: int, world: World) -> None:
        self._folder = folder
        self._is_main = world.is_main
        self._last: dict[str, str] = {}
        if not self._is_main:
            return
        (folder / "summary.json").unlink(missing_ok=True)  # a run that goes on has not finished
        for name in _LINES:
            _keep_until(folder / name, first_step, is_done=first_step == num_steps)
        self._events = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
        watched = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc=folder.name,
            unit="step",
            dynamic_ncols=watched,
            mininterval=0.1 if watched else _BAR_SECONDS,
        )

    def close(self) -> None:
        """Ends the bar and the event file."""
        if self._is_main:
            self._bar.close()
            self._events.close()

    def sync(self) -> None:
        """Waits until the lines are on the disk, as a checkpoint is after them."""
        if self._is_main:
            for path in filter(Path.exists, (self._folder / name for name in _LINES)):
                durable.sync(path)

    def advance(self) -> None:
        """Moves the bar by one step."""
        if self._is_main:
            self._bar.update()

    def record(self, step: int, **scalars: float | None) -> None:
        """Appends scalars to metrics.jsonl and TensorBoard; None means that nobody knows the value."""
        if not self._is_main:
            return
        _append(self._folder / "metrics.jsonl", {"step": step, **scalars})
        for name, value in scalars.items():
            if value is not None:
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def record_inertia(self, step: int, shares: dict[str, list[float]]) -> None:
        """Appends the histogram of every layer to inertia.jsonl."""
        if self._is_main:
            rounded = {layer: [float(f"{share:.4g}") for share in row] for layer, row in shares.items()}
            _append(self._folder / "inertia.jsonl", {"step": step, "layers": rounded})

    def show(self, **texts: str) -> None:
        """Updates what stands beside the bar."""
        if self._is_main:
            self._last.update(texts)
            self._bar.set_postfix(self._last, refresh=False)


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _keep_until(path: Path, step: int, is_done: bool) -> None:
    """Drops what a resumed run is about to write again, and what a killed one left half written.

    That is all after `step`, and of a run that is done, but was killed before it said so, the last evaluation.
    """
    if path.exists():
        kept = [record for record in read_records(path) if record["step"] <= step]
        if is_done:
            kept = [record for record in kept if record["step"] < step or "loss" in record]
        durable.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
