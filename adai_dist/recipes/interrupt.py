"""Ctrl-C, whatever becomes of it on its way."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def interruptible(message: Callable[[], str]) -> Generator[None, None, None]:
    """Makes Ctrl-C within the block end it with KeyboardInterrupt(message()), and with nothing else.

    torch.distributed.checkpoint wraps a KeyboardInterrupt into an exception of its own, and where a peer left first a
    collective fails instead; so what counts is that the signal came.
    """
    received = False

    def note(number: int, frame: Any) -> None:
        nonlocal received
        received = True
        signal.default_int_handler(number, frame)

    # Somebody else's handler, or none at all in the background of a shell, stays.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except BaseException as error:
        if received or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(message()) from None
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
