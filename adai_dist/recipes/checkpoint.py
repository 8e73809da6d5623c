"""Checkpoints of a run: complete or invisible, the newest few kept, checked before they are loaded.

NAME/checkpoints/step_00000300/            published by a rename, after all ranks have written
NAME/checkpoints/step_00000300-2/          the same step written again; takes the name of the first when that is gone
NAME/checkpoints/damaged-step_00000300/    found damaged by a resumed run, which went back to an older one
NAME/checkpoints/writing-*, .removing-*    what a killed run may leave behind; the next one removes it
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from adai_dist.recipes import durable
from adai_dist.recipes.engine import Engine
from adai_dist.recipes.manifest import FileSum, Manifest, compare_shapes, find_damage, read_manifest, sum_files
from adai_dist.recipes.world import World

logger: logging.Logger = logging.getLogger("adai_dist")

_PUBLISHED = re.compile(r"step_(\d+)(?:-(\d+))?")

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or continued from. The message is one line, the same on all ranks."""


class Checkpoints:
    """The checkpoints below a folder that all ranks share."""

    def __init__(self, folder: Path, num_kept: int, world: World) -> None:
        self._folder = folder
        self._num_kept = num_kept
        self._world = world

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first; whether their files still are what was written is not looked at."""
        return [path for path in self._published() if read_manifest(path)]

    def save(self, engine: Engine, step: int) -> None:
        """Writes the state after `step` steps; a crash at any time leaves the older checkpoints as they were.

        Raises:
            CheckpointError: a rank could not write its part; nothing was published, the older checkpoints are kept.

        Collective: all ranks of the job.
        """
        doing = f"the checkpoint of step {step} must be written by all ranks"
        advice = f"nothing was published and older checkpoints are kept; check {str(self._folder)!r} and resume the run"
        # A new name each time: ranks of a killed run may still be writing.
        writing = self._on_main(self._prepare, doing, advice)
        try:
            engine.save(writing)
        except (CheckpointException, Exception) as error:
            # torch tells all ranks of a failure. DeepSpeed does not: there the others fail when this one has ended.
            raise CheckpointError(f"{doing}; got {self._cause(error)}; {advice}") from error
        dist.barrier()
        parts = self._on_all(lambda: sum_files(writing, self._world), doing, advice)
        files: dict[str, FileSum] = {name: file_sum for part in parts for name, file_sum in part.items()}
        manifest = Manifest(step, self._world.size, engine.parameter_shapes(), dict(sorted(files.items())))
        self._on_main(lambda: self._publish(writing, manifest), doing, advice)

    def load_latest(self, engine: Engine) -> int:
        """Loads the newest complete checkpoint whose files are what was written; sets damaged ones aside.

        Returns:
            The number of steps it was written after; 0, with nothing loaded, if there is none.

        Raises:
            CheckpointError: all checkpoints are damaged, or it is one of another model; the engine is as it was.

        Collective: all ranks of the job.
        """
        doing, advice = "a checkpoint must be readable on all ranks", f"check {str(self._folder)!r}"
        # The main rank decides, so that no rank takes another one than its peers.
        candidates = self._on_main(self._published, doing, advice)
        damaged: list[tuple[Path, str]] = []
        for path in reversed(candidates):
            manifest = self._on_main(lambda path=path: read_manifest(path), doing, advice)
            damage = self._find_damage(path, manifest)
            if manifest is None or damage is not None:
                damaged.append((path, damage or "about.json is missing or cannot be read"))
                continue
            self._refuse_other_model(engine, path, manifest)
            self._on_main(lambda path=path: self._set_aside(damaged, path), doing, advice)
            self._load(engine, path)
            return manifest.step
        if damaged:
            found = ", ".join(f"{path.name}: {damage}" for path, damage in damaged)
            advice = f"bring one back, or start anew without --resume; they are in {str(self._folder)!r}"
            raise CheckpointError(f"one checkpoint at least must be whole; got {found}; {advice}")
        return 0

    def _load(self, engine: Engine, path: Path) -> None:
        try:
            engine.load(path)
        except CheckpointException as error:
            advice = "it may be of another optimizer, or the storage failed"
            must = f"a checkpoint must be readable by all ranks, {str(path)!r}"
            raise CheckpointError(f"{must}; got {self._cause(error)}; {advice}") from error

    def _find_damage(self, path: Path, manifest: Manifest | None) -> str | None:
        if manifest is None:
            return None
        found = self._on_all(lambda: find_damage(path, manifest.files, self._world), "checkpoints must be readable", "")
        return next((damage for damage in found if damage is not None), None)

    def _refuse_other_model(self, engine: Engine, path: Path, manifest: Manifest) -> None:
        difference = compare_shapes(manifest.shapes, engine.parameter_shapes())
        if difference is not None:
            must = f"a checkpoint is continued by the model that wrote it, {str(path)!r}"
            raise CheckpointError(f"{must}; got another one: {difference}; change run.name, or the model back")

    def _published(self) -> list[Path]:
        """Whatever has the name of a checkpoint, oldest first."""
        return sorted((path for path in self._folder.glob("step_*") if _PUBLISHED.fullmatch(path.name)), key=_age)

    # -- on the main rank ------------------------------------------------------------------------------------------

    def _prepare(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        durable.discard_leftovers(self._folder, "writing*")
        writing = self._folder / f"writing-{uuid.uuid4().hex[:8]}"
        writing.mkdir()
        return writing

    def _publish(self, writing: Path, manifest: Manifest) -> None:
        manifest.write(writing)
        name, number = f"step_{manifest.step:08d}", 1
        published = self._folder / name
        while published.exists():
            number += 1
            published = self._folder / f"{name}-{number}"
        durable.publish(writing, published)
        try:
            self._tidy(published, self._folder / name)
        except OSError as error:
            logger.warning("older checkpoints could not be removed: %s", error)

    def _tidy(self, newest: Path, plain: Path) -> None:
        """Removes what the newest checkpoint has replaced, and those beyond the number to keep."""
        for other in self._published():
            if _age(other)[0] == _age(newest)[0] and other != newest:
                durable.discard(other)
        if newest != plain:
            newest.rename(plain)
        for old in self.complete()[: -self._num_kept]:
            durable.discard(old)

    def _set_aside(self, damaged: list[tuple[Path, str]], whole: Path) -> None:
        """Takes damaged checkpoints out of the way, so that they do not count as newer ones of the run."""
        for path, damage in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                durable.discard(aside)
            path.rename(aside)
            logger.warning("%s is damaged: %s; renamed to %s, going back to %s", path, damage, aside.name, whole.name)

    def _cause(self, error: BaseException) -> str:
        rank, cause = self._world.rank, error
        if isinstance(error, CheckpointException) and error.failures:
            rank = min(error.failures)
            cause = error.failures[rank][0]
        return f"rank {rank}: {_in_words(cause)}"

    # -- agreement -------------------------------------------------------------------------------------------------

    def _on_main(self, work: Callable[[], T], must: str, advice: str) -> T:
        """What `work` returns on the main rank, on every rank. Collective: all ranks of the job."""
        return cast(T, self._on_all(lambda: work() if self._world.is_main else None, must, advice)[0])

    def _on_all(self, work: Callable[[], T], must: str, advice: str) -> list[T]:
        """What `work` returns on every rank, by rank; a failure on one of them is an error on all.

        Collective: all ranks of the job.
        """
        outcome: tuple[T | None, str | None]
        try:
            outcome = work(), None
        except Exception as error:
            outcome = None, f"rank {self._world.rank}: {_in_words(error)}"
        outcomes: list[Any] = [None] * self._world.size
        dist.all_gather_object(outcomes, outcome)
        failure = next((failure for _, failure in outcomes if failure is not None), None)
        if failure is not None:
            raise CheckpointError("; ".join(filter(None, (must, f"got {failure}", advice))))
        return [value for value, _ in outcomes]


def _age(path: Path) -> tuple[int, int]:
    match = _PUBLISHED.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
