"""Whoever waits for long says what for: otherwise nobody can tell it from a program that hangs."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

NOTICE_SECONDS = 30.0
"""A wait is told after this time, and again each time that it has taken twice as long."""
SOON_SECONDS = 5.0
"""The same, once, for a wait that is usual and short, but whose reason the person who waits cannot see."""


def say(line: str) -> None:
    """Write a line to stderr, whatever is logged where; a program whose stderr is gone goes on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"adai_dist: {line}\n")
        sys.stderr.flush()


@contextmanager
def told(describe: Callable[[], str | None], tell: Callable[[str], None], soon: bool = False) -> Generator[None]:
    """Within the block, which waits for something, tell again and again for what.

    Args:
        describe: what is being waited for; None where there is nothing to say at this moment. Like ``tell`` it is
            called by another thread.
        tell: gets what ``describe`` returned.
        soon: whether to tell it once after :data:`SOON_SECONDS`, too.

    Collective: none.
    """
    over = threading.Event()
    start = time.monotonic()

    def watch() -> None:
        moments = itertools.chain([SOON_SECONDS] * soon, (NOTICE_SECONDS * 2**k for k in itertools.count()))
        for moment in moments:
            if over.wait(start + moment - time.monotonic()):
                return
            if what := describe():
                tell(what)

    watcher = threading.Thread(target=watch, name="adai_dist.waiting", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()  # nothing is told after the wait


def span(seconds: float) -> str:
    """A length of time in words, as long as people need it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
