"""A small run, long enough to be interrupted, and the uninterrupted run to compare with."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.hosts import Host
from tests.recipe_runs import LLAMA, losses, read_lines, run_cli, write_recipe

STEPS = 80  # three seconds on two busy cores
NUM_RANKS = 2


def recipe_of(folders: pytest.TempPathFactory) -> Path:
    """Return the recipe, the same file for the session; its runs are in the folder `runs` next to it."""
    return _recipe_below(folders.getbasetemp())


def uninterrupted_run(folders: pytest.TempPathFactory) -> Path:
    """Return the uninterrupted run on one node, which is made once per session."""
    return _uninterrupted_run_of(recipe_of(folders))


@functools.cache
def _recipe_below(folder: Path) -> Path:
    folder /= "long"
    folder.mkdir()
    path = write_recipe(folder, LLAMA)
    text = path.read_text().replace(
        "steps: 6, log_every: 1, eval_every: 2", f"steps: {STEPS}, log_every: 10, eval_every: 40"
    )
    path.write_text(
        text.replace("checkpoint_every: 2, keep_checkpoints: 5", "checkpoint_every: 20, keep_checkpoints: 2")
    )
    return path


@functools.cache
def _uninterrupted_run_of(recipe: Path) -> Path:
    done = run_cli("train", "--config", recipe, "run.name=uninterrupted", num_ranks=NUM_RANKS)
    assert done.returncode == 0, done.stderr
    return recipe.parent / "runs" / "uninterrupted"


def wait_until(holds: Callable[[], bool], seconds: float, output: Callable[[], str]) -> None:
    """Wait until a condition holds; `output` is called for the error message."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s:\n{output()}"
        time.sleep(0.02)


def newest_checkpoint(run: Path) -> int:
    """Return the step of the newest checkpoint, or 0 without one."""
    return max((int(path.name[5:13]) for path in run.glob("checkpoints/step_*")), default=0)


def ranks_on(host: Host) -> list[int]:
    """Return the ids of the training processes on a host, without their launchers."""
    found: list[int] = []
    for pid in host.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if (
                b"adai_dist" in words
                and b"torch.distributed.run" not in words
                and words[0].endswith((b"python", b"python3"))
            ):
                found.append(pid)
    return found


def has_pending(pid: int, number: int) -> bool:
    """Return whether a signal is pending for a stopped process."""
    lines = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool(int(lines["ShdPnd"], 16) >> (number - 1) & 1)


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    """Assert that all logged losses, including the final one, are bitwise those of the uninterrupted run."""
    for key in ("loss", "val_loss", "grad_norm"):
        assert losses(run, key) == losses(uninterrupted, key), key
    assert STEPS in losses(uninterrupted, "val_loss")
    steps, expected = ([line["step"] for line in read_lines(of / "metrics.jsonl")] for of in (run, uninterrupted))
    assert steps == expected, "a step is missing or repeated"
