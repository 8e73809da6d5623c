"""A rank fails before or within a step: the others end with an error in bounded time, and none hangs."""

from __future__ import annotations

import datetime
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from adai_dist import AdaiV2
from tests.distributed.layouts import SHARDED, Prescribed, backward, make
from tests.spawn import fork

pytestmark = pytest.mark.distributed

LAYOUT, WORLD_SIZE, FAILING = "fsdp2-beside-plain-4", 3, 1  # this layout builds its mesh from all ranks of the job
GOOD_STEPS = 3
TIMEOUT_SECONDS = 5.0  # of the process group
SLACK_SECONDS = 20.0  # for busy machines


class End(NamedTuple):
    """The end of a rank."""

    error: str
    """Class and message; empty after a successful step."""
    seconds: float
    """Time since the start of the step."""


def fail_in_a_hook(model: Prescribed, optimizer: AdaiV2) -> None:
    def raise_error(*_: Any) -> None:
        raise OSError("a hook fails on this rank")

    optimizer.register_step_pre_hook(raise_error)


def make_a_gradient_sparse(model: Prescribed, optimizer: AdaiV2) -> None:
    table = model.by_name()["root.table"]  # plain: torch refuses it for a DTensor
    assert table.grad is not None
    table.grad = table.grad.to_sparse()


def exit_at_once(model: Prescribed, optimizer: AdaiV2) -> None:
    os._exit(3)


def stop(model: Prescribed, optimizer: AdaiV2) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, tuple[Callable[[Prescribed, AdaiV2], None], str, bool]] = {
    "hook": (fail_in_a_hook, "OSError: a hook fails on this rank", False),
    "hook, and the process lives on": (fail_in_a_hook, "OSError: a hook fails on this rank", True),
    "sparse gradient": (make_a_gradient_sparse, "TypeError: gradients must be dense, got layout torch.sparse_", False),
    "exit": (exit_at_once, "", False),
    "stopped": (stop, "", True),
}
"""The fault of the failing rank, its own error, and whether the others notice only by the timeout."""


def rank_main(fault: str, rank: int, folder: str, sender: Any) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.path.join(folder, f"{rank}.log"), os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    try:
        model, wrapped, optimizer = make(LAYOUT, SHARDED)
        for step in range(GOOD_STEPS):
            backward(wrapped, optimizer, step)
            optimizer.step()
        backward(wrapped, optimizer, GOOD_STEPS)
        # Set only now, because starting many processes at once is slow.
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=TIMEOUT_SECONDS))
        start = time.monotonic()
        error = ""
        try:
            if rank == FAILING:
                FAULTS[fault][0](model, optimizer)
            optimizer.step()
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        sender.send(End(error, time.monotonic() - start))
    except BaseException:
        sender.send(End(traceback.format_exc(), -1.0))
    sender.close()
    if rank == FAILING and FAULTS[fault][2]:
        time.sleep(60)
    os._exit(0)


@pytest.fixture(scope="module")
def ends() -> Iterator[dict[str, list[End | None]]]:
    """Return the end of every rank by fault, or None; all faults run at once, as they mostly wait."""
    processes: list[Any] = []
    receivers: dict[str, list[Connection]] = {fault: [] for fault in FAULTS}
    with tempfile.TemporaryDirectory(prefix="failing-") as folder:
        for number, fault in enumerate(FAULTS):
            place = Path(folder) / str(number)
            place.mkdir()
            for rank in range(WORLD_SIZE):
                receiver, sender = Pipe(duplex=False)
                processes.append(fork(rank_main, fault, rank, str(place), sender))
                sender.close()
                receivers[fault].append(receiver)
        silent = receivers["stopped"].pop(FAILING)
        deadline = time.monotonic() + 60
        heard = {fault: [answer(receiver, deadline) for receiver in of] for fault, of in receivers.items()}
        heard["stopped"].insert(FAILING, answer(silent, time.monotonic()))
        yield heard
        for process in processes:
            process.kill()
            process.join()


def answer(receiver: Connection, deadline: float) -> End | None:
    try:
        if receiver.poll(max(0.0, deadline - time.monotonic())):
            return receiver.recv()
    except EOFError:
        pass
    return None


@pytest.mark.parametrize("fault", FAULTS)
def test_under_fsdp2_the_others_end_with_an_error_in_time(ends: dict[str, list[End | None]], fault: str) -> None:
    _, own_error, waits_for_timeout = FAULTS[fault]
    failing = ends[fault].pop(FAILING)
    assert (failing is None) == (not own_error)
    if failing is not None:
        assert failing.error.startswith(own_error)
    for end in ends[fault]:
        assert end is not None, "a rank hung, or died without an error"
        assert end.error.startswith("RuntimeError: "), end
        assert 0 <= end.seconds < TIMEOUT_SECONDS + SLACK_SECONDS
        if waits_for_timeout:
            assert "Timed out waiting" in end.error
            assert end.seconds > TIMEOUT_SECONDS / 2
