"""Notices of long waits, which would otherwise look like a program that hangs."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

NOTICE_SECONDS = 30.0
"""Time before the first notice; each further notice comes when the wait has doubled."""
EARLY_NOTICE_SECONDS = 5.0
"""Time before an additional notice of a wait that is common but whose reason is invisible to the user."""


def write_to_stderr(line: str) -> None:
    """Write a line to stderr, independently of logging; ignore a stderr that is closed or missing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"adai_dist: {line}\n")
        sys.stderr.flush()


@contextmanager
def notices_while_waiting(
    describe: Callable[[], str | None], notify: Callable[[str], None], early: bool = False
) -> Generator[None]:
    """Announce repeatedly what the enclosed block is waiting for.

    Args:
        describe: returns the reason for the wait, or None to skip a notice. Like ``notify``, it is called from another
            thread.
        notify: receives the result of ``describe``.
        early: also announce after :data:`EARLY_NOTICE_SECONDS`.

    Collective: none.
    """
    over = threading.Event()
    start = time.monotonic()

    def watch() -> None:
        doubling = (NOTICE_SECONDS * 2**k for k in itertools.count())
        for seconds in itertools.chain([EARLY_NOTICE_SECONDS] * early, doubling):
            if over.wait(start + seconds - time.monotonic()):
                return
            if reason := describe():
                notify(reason)

    watcher = threading.Thread(target=watch, name="adai_dist.wait_notices", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()  # no notice after the wait


def format_duration(seconds: float) -> str:
    """Format a duration in its largest unit of which there are at least two."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
