"""The folder of a run, runs/NAME: which one it is, and one run at a time in it.

    config.yaml       the resolved recipe; `adai-dist train --config NAME/config.yaml --resume` continues from it
    metrics.jsonl     one line per log step and per evaluation
    inertia.jsonl     the distribution of inertia per layer, one line per evaluation
    events.out.*      the same scalars for TensorBoard
    checkpoints/      see checkpoints.py
    run.lock          locked while a run is in the folder
    summary.json, loss.png, inertia.png   written at the end

Only the main rank writes (journal.py). It holds a lock on run.lock, which the system frees when the process ends, and
writes into the file which process it is. The lock is a POSIX lock (lockf) rather than flock: it works over NFS, and
forked processes, which may outlive the main rank, do not inherit it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from adai_dist.kernels.lock_holder import LockHolder, read_holder, write_holder
from adai_dist.recipes.job import World
from adai_dist.recipes.recipe import Recipe, RecipeError, load_recipe

logger: logging.Logger = logging.getLogger("adai_dist")

CONFIG, LOCK = "config.yaml", "run.lock"
GRACE_SECONDS = 5.0
"""Wait for a run that may be about to end, as one does whose launcher was killed."""
_POLL_SECONDS = 0.1


@contextmanager
def open_run_folder(recipe: Recipe, world: World) -> Generator[Path]:
    """Choose and create the folder of the run; write the recipe into it, and the final name into the recipe.

    A name that is taken gets a number, unless the recipe says resume or overwrite. Within the block no other run can
    use the folder.

    Raises:
        RecipeError: the folder's run cannot be continued with this recipe, must not be deleted, or is still running.

    Collective: all ranks of the job, on entry.
    """
    outcome: list[Path | RecipeError] = [RecipeError()]
    with contextlib.ExitStack() as until_the_end:
        if world.is_main:
            try:
                outcome = [_prepare(recipe, until_the_end)]
            except RecipeError as error:
                outcome = [error]
            except OSError as error:
                where = str(error.filename or recipe.run.out)
                advice = f"{error.strerror or error}; set run.out to a folder that can be written"
                outcome = [RecipeError(f"the folder of the run must be writable; got {where!r}; {advice}")]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], RecipeError):
            raise outcome[0]
        recipe.run.name = outcome[0].name
        yield outcome[0]


def _prepare(recipe: Recipe, until_the_end: contextlib.ExitStack) -> Path:
    folder, is_new = _choose(recipe)
    until_the_end.enter_context(run_lock(folder, min(GRACE_SECONDS, recipe.run.timeout / 2)))
    if is_new and recipe.run.resume:
        logger.warning("there is no run to resume in %s; it starts at step 0", folder)
    elif recipe.run.resume and (folder / CONFIG).exists():
        _check_same_run(recipe, folder)
    elif recipe.run.overwrite:
        _clear(folder)
    # The file is for --resume; how this process started is not part of it.
    recipe.replaced(name=folder.name, resume=False, overwrite=False).save(folder / CONFIG)
    return folder


def _choose(recipe: Recipe) -> tuple[Path, bool]:
    """Return the folder, and whether it was created: of processes that race for a name, one creates it."""
    wanted = Path(recipe.run.out) / recipe.run.name
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder = wanted
    for number in itertools.count(2):
        try:
            folder.mkdir()
            break
        except FileExistsError:
            if folder == wanted and _may_use(recipe, folder):
                return folder, False
            folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder, True


def _may_use(recipe: Recipe, folder: Path) -> bool:
    """Return whether this recipe continues or replaces the existing run of its name."""
    if folder.is_symlink() and not folder.exists():
        raise RecipeError(
            f"a link in the place of a run must lead to a folder; got {str(folder)!r}, which leads to "
            f"{os.readlink(folder)!r}; make that folder, delete the link, or change run.name"
        )
    # In this order: another run may write its config between the two looks.
    is_run = _is_before_its_config(folder) or (folder / CONFIG).exists()
    if recipe.run.resume:
        return is_run
    if recipe.run.overwrite and not is_run:
        raise RecipeError(
            f"run.overwrite deletes runs only; got {str(folder)!r}, which has no config.yaml; change run.name"
        )
    return recipe.run.overwrite


def _is_before_its_config(folder: Path) -> bool:
    """Return whether the run that created this folder has yet to write its config, or was killed before it did."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {f"{CONFIG}.writing", LOCK}


def _clear(folder: Path) -> None:
    """Delete a run, except for the files that identify it and its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (CONFIG, LOCK):
            path.unlink()


def _check_same_run(recipe: Recipe, folder: Path) -> None:
    """Refuse to continue a run with another model, other data, another optimizer, seed or format of checkpoints."""
    before = load_recipe(folder / CONFIG)
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


@contextmanager
def run_lock(folder: Path, patience: float = GRACE_SECONDS) -> Generator[None]:
    """Keep other runs out of an existing folder within the block.

    Args:
        folder: the folder of the run.
        patience: seconds to wait for another run to end.

    Raises:
        RecipeError: another run is in this folder.
        OSError: the folder is not writable.

    Collective: none; only the main rank enters it.
    """
    path = folder / LOCK
    with path.open("a", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while refusal := _try_lock(file, path):
            if time.monotonic() > deadline:
                raise refusal
            time.sleep(_POLL_SECONDS)
        write_holder(file, LockHolder.of_this_process())
        try:
            yield
        finally:
            write_holder(file, None)


def _try_lock(file: TextIO, path: Path) -> RecipeError | None:
    """Lock the file; return the reason if another run holds it."""
    import fcntl  # not on Windows

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which one depends on the system
        return _refusal(path, read_holder(path), may_be_over=False)
    except OSError:  # this file system has no locks
        other = read_holder(path)
        if other is not None and not _has_ended(other):
            return _refusal(path, other, may_be_over=True)
    return None


def _has_ended(holder: LockHolder) -> bool:
    """Return whether the process has certainly ended; unknown, and thus False, for another host."""
    here = LockHolder.of_this_process()
    if holder.host != here.host:
        return False
    if holder.pid == here.pid:
        return True  # an earlier process with this number, as in a restarted container
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _refusal(path: Path, other: LockHolder | None, may_be_over: bool) -> RecipeError:
    must, who = f"a run must have its folder to itself; got {str(path.parent)!r}", "another process"
    since, advice = "", "wait for it, end it, or change run.name"
    if other is not None:
        who, since = str(other), f" for {other.age}"
        # A file server may keep the lock of a host that is gone.
        if may_be_over or other.host != LockHolder.of_this_process().host:
            advice = f"end it, or delete {str(path)!r} if it has ended"
    return RecipeError(f"{must}, where {who} has been at work{since}; {advice}")
