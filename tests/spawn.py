"""The one harness for tests with several ranks: real processes, real gloo, one thread each.

    results = run_ranks(function, world_size, *args)

`function` is a module-level function; it runs on every rank with the default process group in place, and what it
returns comes back in a list by rank. A fork server that has imported torch once makes a rank cost a fork, no import.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

TIMEOUT_SECONDS = 120.0
GRACE_SECONDS = 5.0  # how long the other ranks may run on after one has failed

_PRELOADED = (
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
)


def run_ranks(function: Callable[..., T], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[T]:
    """Run `function(*args)` on every rank of a new world and return the results by rank.

    Raises:
        AssertionError: a rank raised, died or did not come back in time; the message holds the output of every rank.
    """
    __tracebackhide__ = True
    context = _fork_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder_name:
        folder = Path(folder_name)
        processes: list[Any] = []
        results: dict[Connection, int] = {}
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            work = (function, args, rank, world_size, folder_name, timeout, sender)
            process = context.Process(target=_rank_main, args=work, daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            results[receiver] = rank
        try:
            outcomes = _collect(results, timeout)
            if all(succeeded for succeeded, _ in outcomes.values()) and len(outcomes) == world_size:
                for process in processes:
                    process.join(GRACE_SECONDS)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
            for receiver in results:
                receiver.close()
        failed = [rank for rank in range(world_size) if not outcomes.get(rank, (False, None))[0]]
        if failed:
            raise AssertionError(_report(function, failed, world_size, outcomes, folder))
    return [outcomes[rank][1] for rank in range(world_size)]


def _fork_server() -> Any:
    context = multiprocessing.get_context("forkserver")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(
            name, "1"
        )  # read by the server when it starts: a process about to fork must have one thread
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _collect(results: dict[Connection, int], timeout: float) -> dict[int, tuple[bool, Any]]:
    """Wait for every rank's (succeeded, result or traceback); stop soon after the first failure."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    pending = dict(results)
    deadline = time.monotonic() + timeout
    while pending and time.monotonic() < deadline:
        for ready in wait(list(pending), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(ready, Connection)
            rank = pending.pop(ready)
            try:
                outcomes[rank] = pickle.loads(ready.recv_bytes())
            except EOFError:
                outcomes[rank] = (False, "the process died without a word")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    return outcomes


def _report(
    function: Callable[..., Any],
    failed: list[int],
    world_size: int,
    outcomes: dict[int, tuple[bool, Any]],
    folder: Path,
) -> str:
    lines = [f"{function.__name__} failed on ranks {failed} of {world_size}"]
    for rank in range(world_size):
        succeeded, outcome = outcomes.get(rank, (False, "no answer in time; where it stood is in its output"))
        lines += [f"--- rank {rank}: {'succeeded' if succeeded else outcome}"]
        output = folder / f"rank{rank}.log"
        if output.exists() and (text := output.read_text(errors="replace").strip()):
            lines += [f"--- rank {rank}, output:", text[-6000:]]
    return "\n".join(lines)


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    sender: Connection,
) -> None:
    log = os.open(os.path.join(folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(timeout - min(5.0, timeout / 4), exit=False)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("error", module=r"adai_dist")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=max(5.0, timeout / 2)),
    )
    try:
        outcome = (True, function(*args))
        sender.send_bytes(pickle.dumps(outcome))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        sender.close()
        sys.stderr.flush()
        os._exit(1)
    sender.close()
    # Without these three a gloo process may abort in its destructors after everything has gone well.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
