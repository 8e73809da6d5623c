"""Checkpoints of a run: complete or invisible, the newest few kept, verified before they are loaded.

NAME/checkpoints/step_00000300/            published by a rename, after all ranks have written
NAME/checkpoints/step_00000300-2/          the same step written again; takes over the name when the first is removed
NAME/checkpoints/damaged-step_00000300/    renamed by a resumed run, which went back to an older one
NAME/checkpoints/writing-*, .removing-*    left behind by a killed run; removed by the next one

A folder with a readable about.json is a complete checkpoint. The sizes and CRC-32 checksums in it, computed from the
files as they are read back after writing, show accidental damage.
"""

from __future__ import annotations

import logging
import re
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from pydantic import BaseModel
from torch.distributed.checkpoint.api import CheckpointException

from adai_dist.recipes import atomic_files
from adai_dist.recipes.engines import Engine
from adai_dist.recipes.job import World

logger: logging.Logger = logging.getLogger("adai_dist")

_MANIFEST = "about.json"
_PUBLISHED = re.compile(r"step_(\d+)(?:-(\d+))?")
_RANK_IN_NAME = re.compile(r"(?:__|pp_rank_)(\d+)_")  # torch: __3_0.distcp; DeepSpeed: zero_pp_rank_3_mp_rank_00_...
_CHUNK_BYTES = 1 << 22

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or continued from. The message is one line, the same on all ranks."""


class FileSum(BaseModel, frozen=True):
    """Size and checksum of a file as it was written."""

    size: int
    """Bytes."""
    crc32: int


class Manifest(BaseModel, frozen=True):
    """The content of about.json."""

    step: int
    world_size: int
    shapes: dict[str, list[int]]
    """Global shape of every parameter, by name."""
    files: dict[str, FileSum]
    """Checksums by path below the folder."""

    def write(self, folder: Path) -> None:
        """Make the folder a complete checkpoint; its other files must be on the disk."""
        atomic_files.write_text(folder / _MANIFEST, self.model_dump_json() + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return the manifest of a checkpoint; None if it is missing or unreadable."""
        try:
            return cls.model_validate_json((folder / _MANIFEST).read_bytes())
        except (OSError, ValueError):
            return None


class Checkpoints:
    """The checkpoints below a folder that all ranks share."""

    def __init__(self, folder: Path, num_kept: int, world: World) -> None:
        self._folder = folder
        self._num_kept = num_kept
        self._world = world

    def complete(self) -> list[Path]:
        """Return the complete checkpoints, oldest first, without verifying their files."""
        return [path for path in self._published() if Manifest.read(path)]

    def save(self, engine: Engine, step: int) -> None:
        """Write the state after ``step`` steps; a crash at any time leaves older checkpoints intact.

        Raises:
            CheckpointError: a rank could not write its part; nothing was published, older checkpoints are kept.

        Collective: all ranks of the job.
        """
        must = f"the checkpoint of step {step} must be written by all ranks"
        advice = f"nothing was published and older checkpoints are kept; check {str(self._folder)!r} and resume the run"
        # A new name each time: ranks of a killed run may still be writing.
        writing = self._on_main(self._prepare, must, advice)
        try:
            engine.save(writing)
        except (CheckpointException, Exception) as error:
            # torch reports a failure on all ranks. With DeepSpeed the others fail when this one has ended.
            raise CheckpointError(f"{must}; got {self._cause(error)}; {advice}") from error
        dist.barrier()
        parts = self._on_all(lambda: sum_files(writing, self._world), must, advice)
        files = dict(sorted((name, file_sum) for part in parts for name, file_sum in part.items()))
        shapes = engine.parameter_shapes()
        manifest = Manifest(step=step, world_size=self._world.size, shapes=shapes, files=files)
        self._on_main(lambda: self._publish(writing, manifest), must, advice)

    def load_latest(self, engine: Engine) -> int:
        """Load the newest undamaged checkpoint; rename damaged ones.

        Returns:
            The number of steps it was written after; 0, with nothing loaded, if there is none.

        Raises:
            CheckpointError: all checkpoints are damaged, or belong to another model; the engine is unchanged.

        Collective: all ranks of the job.
        """
        must, advice = "a checkpoint must be readable on all ranks", f"check {str(self._folder)!r}"
        # The main rank decides, so that all ranks take the same one.
        candidates = self._on_main(self._published, must, advice)
        damaged: list[tuple[Path, str]] = []
        for path in reversed(candidates):
            manifest = self._on_main(lambda path=path: Manifest.read(path), must, advice)
            files = {} if manifest is None else manifest.files
            found = self._on_all(lambda path=path, files=files: find_damage(path, files, self._world), must, advice)
            damage = next(filter(None, found), None)
            if manifest is None or damage is not None:
                damaged.append((path, damage or f"{_MANIFEST} is missing or cannot be read"))
                continue
            self._check_model(engine, path, manifest)
            self._on_main(lambda path=path: self._rename_damaged(damaged, path), must, advice)
            self._load(engine, path)
            return manifest.step
        if damaged:
            got = ", ".join(f"{path.name}: {damage}" for path, damage in damaged)
            advice = f"restore one, or start from scratch without --resume; they are in {str(self._folder)!r}"
            raise CheckpointError(f"at least one checkpoint must be undamaged; got {got}; {advice}")
        return 0

    def _load(self, engine: Engine, path: Path) -> None:
        try:
            engine.load(path)
        except CheckpointException as error:
            must = f"all ranks must be able to read the checkpoint {str(path)!r}"
            advice = "another optimizer may have written it, or the storage failed"
            raise CheckpointError(f"{must}; got {self._cause(error)}; {advice}") from error

    def _check_model(self, engine: Engine, path: Path, manifest: Manifest) -> None:
        current, saved = engine.parameter_shapes(), manifest.shapes
        for name in (*current, *saved):
            if current.get(name) != saved.get(name):
                must = f"a checkpoint is continued by the model that wrote it, {str(path)!r}"
                got = f"{name!r} has the shape {saved.get(name)} there and {current.get(name)} in this model"
                raise CheckpointError(f"{must}; got another one: {got}; change run.name, or the model back")

    def _published(self) -> list[Path]:
        """Return every folder with the name of a checkpoint, oldest first."""
        return sorted((path for path in self._folder.glob("step_*") if _PUBLISHED.fullmatch(path.name)), key=_age)

    # -- on the main rank ----------------------------------------------------------------------------------------------

    def _prepare(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        atomic_files.remove_leftovers(self._folder, "writing*")
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
        atomic_files.publish(writing, published)
        try:
            self._remove_replaced(published, self._folder / name)
        except OSError as error:
            logger.warning("older checkpoints could not be removed: %s", error)

    def _remove_replaced(self, newest: Path, plain: Path) -> None:
        """Remove other checkpoints of the same step, and those beyond the number to keep."""
        for other in self._published():
            if _age(other)[0] == _age(newest)[0] and other != newest:
                atomic_files.remove(other)
        if newest != plain:
            newest.rename(plain)
        for old in self.complete()[: -self._num_kept]:
            atomic_files.remove(old)

    def _rename_damaged(self, damaged: list[tuple[Path, str]], loaded: Path) -> None:
        for path, damage in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                atomic_files.remove(aside)
            path.rename(aside)
            logger.warning("%s is damaged: %s; renamed to %s, going back to %s", path, damage, aside.name, loaded.name)

    def _cause(self, error: BaseException) -> str:
        rank, cause = self._world.rank, error
        if isinstance(error, CheckpointException) and error.failures:
            rank = min(error.failures)
            cause = error.failures[rank][0]
        return f"rank {rank}: {_in_words(cause)}"

    # -- agreement -----------------------------------------------------------------------------------------------------

    def _on_main(self, work: Callable[[], T], must: str, advice: str) -> T:
        """Return, on every rank, the result of ``work`` on the main rank. Collective: all ranks of the job."""
        return cast(T, self._on_all(lambda: work() if self._world.is_main else None, must, advice)[0])

    def _on_all(self, work: Callable[[], T], must: str, advice: str) -> list[T]:
        """Return the results of ``work`` on all ranks, by rank; a failure on one of them is an error on all.

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


def sum_files(folder: Path, world: World) -> dict[str, FileSum]:
    """Flush this rank's share of the files to the disk, and return their sizes and checksums.

    A rank's share are the files that it wrote itself, judged by their names: they are in the memory of its machine.

    Raises:
        OSError: a file cannot be read or flushed.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    share = [name for name in names if _is_mine(name, world)]
    for name in share:
        atomic_files.sync(folder / name)
    return {name: _sum(folder / name) for name in share}


def find_damage(folder: Path, files: Mapping[str, FileSum], world: World) -> str | None:
    """Return what is wrong with this rank's share of the files; None if nothing is."""
    for name, expected in files.items():
        if not _is_mine(name, world):
            continue
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.size:
                return f"{name} has {size:,} bytes instead of {expected.size:,}"
            if _sum(path) != expected:
                return f"{name} does not have the content that was written (its checksum differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _is_mine(name: str, world: World) -> bool:
    match = _RANK_IN_NAME.search(name)
    return (int(match[1]) if match else 0) % world.size == world.rank


def _sum(path: Path) -> FileSum:
    size, crc32 = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
            size += len(chunk)
    return FileSum(size=size, crc32=crc32)


def _age(path: Path) -> tuple[int, int]:
    match = _PUBLISHED.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
