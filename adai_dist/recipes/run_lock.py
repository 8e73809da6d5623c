"""One run at a time in a folder: two would remove each other's checkpoints.

The main rank holds a lock on NAME/run.lock, which the system frees when the process ends, however it ends, and writes
into it who it is. It is a lock of POSIX (lockf), not flock: it works over NFS, and processes that the main rank has
forked, which may outlive it, do not hold it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from adai_dist.kernels.lock_holder import LockHolder, read_holder, write_holder
from adai_dist.recipes.refusal import RecipeError

FILE_NAME = "run.lock"
GRACE_SECONDS = 5.0
"""How long a run waits for another one that may be about to end, as one does whose launcher was killed."""
_POLL_SECONDS = 0.1


@contextmanager
def run_lock(folder: Path, patience: float = GRACE_SECONDS) -> Generator[None]:
    """Within the block no other run can enter it for the same folder, which must exist.

    Args:
        folder: of the run.
        patience: seconds to wait for the other one.

    Raises:
        RecipeError: a run is in this folder.
        OSError: the folder is not writable.

    Collective: none; the main rank alone enters it.
    """
    path = folder / FILE_NAME
    with path.open("a", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while refusal := _take(file, path):
            if time.monotonic() > deadline:
                raise refusal
            time.sleep(_POLL_SECONDS)
        write_holder(file, LockHolder.of_this_process())
        try:
            yield
        finally:
            write_holder(file, None)


def _take(file: TextIO, path: Path) -> RecipeError | None:
    """Locks the file; returns the reason where another run has it."""
    import fcntl  # not on Windows

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # it depends on the system which
        return _refusal(path, read_holder(path), may_be_over=False)
    except OSError:  # this file system has no locks
        other = read_holder(path)
        if other is not None and not _has_ended(other):
            return _refusal(path, other, may_be_over=True)
    return None


def _has_ended(holder: LockHolder) -> bool:
    """Whether it certainly has: of processes of another host nobody knows."""
    here = LockHolder.of_this_process()
    if holder.host != here.host:
        return False
    if holder.pid == here.pid:
        return True  # an earlier process of this number, as in a container that was started again
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
