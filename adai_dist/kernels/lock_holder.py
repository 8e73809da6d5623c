"""The holder of a file lock, recorded in the locked file: over a network file system, the kernel cannot name it."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from adai_dist.kernels.wait_notices import format_duration


class LockHolder(NamedTuple):
    """A process that holds a file lock."""

    host: str
    pid: int
    since: float
    """Time of acquisition in seconds since the epoch, by the clock of ``host``."""

    @classmethod
    def of_this_process(cls) -> LockHolder:
        return cls(socket.gethostname(), os.getpid(), time.time())

    @property
    def age(self) -> str:
        """Time since the lock was acquired, formatted for a message."""
        return format_duration(time.time() - self.since)

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


def write_holder(file: TextIO, holder: LockHolder | None) -> None:
    """Replace the content of a file that is open for writing, in place: the lock belongs to the inode, not to the path.

    Args:
        holder: None when the lock is being released.
    """
    file.seek(0)
    file.truncate()
    if holder is not None:
        file.write(json.dumps(holder._asdict()))
    file.flush()


def read_holder(path: Path) -> LockHolder | None:
    """Read the holder recorded in a file; None if there is none or the record is unreadable."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return LockHolder(str(content["host"]), int(content["pid"]), float(content["since"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
