"""Signals that end a run early: Ctrl-C at once, and what clusters send before they take a machine away."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist

from adai_dist.recipes.world import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop and has written a checkpoint. The message says how to continue."""


class StopRequest:
    """Whether a signal has asked this process to stop, since the block `listening` was entered."""

    def __init__(self) -> None:
        self._signal_number = 0

    @contextlib.contextmanager
    def listening(self) -> Generator[None, None, None]:
        """Within the block SIGTERM and SIGUSR1 are noted; they end nothing."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def reached_any_rank(self, world: World) -> bool:
        """Whether some rank was asked to stop: the same answer on all.

        Collective: all ranks of the job; one all-reduce of 4 bytes, for which the host waits.
        """
        asked = torch.tensor(self._signal_number, dtype=torch.int32, device=world.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _note(self, number: int, frame: Any) -> None:
        self._signal_number = number


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
