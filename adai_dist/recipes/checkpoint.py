"""Checkpoints of a run: complete or invisible, the newest few kept.

NAME/checkpoints/step_00000300/        published by a rename, after all ranks have written
NAME/checkpoints/writing/              what a killed run may leave behind; the next one removes it
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch.distributed as dist

from adai_dist.recipes.engine import Engine
from adai_dist.recipes.world import World

_COMPLETE = re.compile(r"step_(\d+)")


class Checkpoints:
    """The checkpoints below a folder that all ranks share."""

    def __init__(self, folder: Path, num_kept: int, world: World) -> None:
        self._folder = folder
        self._num_kept = num_kept
        self._world = world

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [path for path in self._folder.glob("step_*") if _COMPLETE.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def save(self, engine: Engine, step: int) -> None:
        """Writes the state after `step` steps; a crash at any time leaves the older checkpoints as they were.

        Collective: all ranks of the job.
        """
        writing = self._folder / "writing"
        if self._world.is_main:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        dist.barrier()
        engine.save(writing)
        dist.barrier()
        if self._world.is_main:
            (writing / "about.json").write_text(json.dumps({"step": step, "world_size": self._world.size}) + "\n")
            published = self._folder / f"step_{step:08d}"
            shutil.rmtree(published, ignore_errors=True)
            writing.rename(published)
            for old in self.complete()[: -self._num_kept]:
                shutil.rmtree(old)
        dist.barrier()

    def load_latest(self, engine: Engine) -> int:
        """Loads the newest complete checkpoint.

        Returns:
            The number of steps it was written after; 0, with nothing loaded, if there is none.

        Collective: all ranks of the job.
        """
        # The main rank decides, so that no rank takes another one than its peers.
        latest: list[Path | None] = [next(reversed(self.complete()), None)]
        dist.broadcast_object_list(latest)
        if latest[0] is None:
            return 0
        engine.load(latest[0])
        return _step_of(latest[0])


def _step_of(path: Path) -> int:
    match = _COMPLETE.fullmatch(path.name)
    assert match is not None
    return int(match[1])
