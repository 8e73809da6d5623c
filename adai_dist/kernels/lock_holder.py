"""Who holds a file lock, written into the locked file: the system knows it, but does not tell over a network."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from adai_dist.kernels.waiting import span


class Holder(NamedTuple):
    """A process that holds a lock."""

    host: str
    pid: int
    since: float
    """Seconds since the epoch, by the clock of its host."""

    @classmethod
    def of_this_process(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), time.time())

    @property
    def age(self) -> str:
        """How long it has held the lock, in words."""
        return span(time.time() - self.since)

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


def sign(file: TextIO, holder: Holder | None) -> None:
    """Replace the content of a file, open for writing, in place: the lock belongs to the file, not to its name.

    Args:
        holder: None where nobody holds the lock any longer.
    """
    file.seek(0)
    file.truncate()
    if holder is not None:
        file.write(json.dumps(holder._asdict()))
    file.flush()


def read_holder(path: Path) -> Holder | None:
    """Who has signed a file; None where nobody has, or where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Holder(str(content["host"]), int(content["pid"]), float(content["since"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
