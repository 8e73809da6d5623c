"""Harness for tests with several ranks: real processes on gloo, one thread each.

    results = run_ranks(function, world_size, *args)

`function` is a module-level function; it runs on every rank with the default process group initialised, and its return
values are collected in a list, by rank.

A rank costs a fork and no import: the server that it is forked from has imported the modules that ranks need. There are
two servers. Tests of DeepSpeed, Accelerate and the recipes use one that has imported those, and the other tests use one
in which `adai_dist` runs without them.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import gc
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")

TIMEOUT_SECONDS = 120.0
OPERATOR_SECONDS = 30.0  # limit of a rank's wait for another rank to load an operator
GRACE_SECONDS = 5.0  # limit for the other ranks after one has failed
DUMP_AND_EXIT = signal.SIGUSR2  # makes a rank write the stack of every thread and exit

_TORCH = (
    "numpy",
    "pytest",
    "torch._dynamo",  # imported by the constructor of any optimizer
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "torch.profiler",
    "torch.utils.cpp_extension",
    "adai_dist",
    "tests.distributed.layouts",
)
# Modules that are not installed are ignored.
_ENGINES = (
    *_TORCH,
    "accelerate",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "adai_dist.recipes.sweep",
    "deepspeed",
    "tests.integrations.deepspeed_engines",
)
_ENVIRONMENT = dict(os.environ)  # before any test changes it
_TESTS = Path(__file__).parent
_USE_ENGINES = ("integrations/", "configs/", "test_recipe", "faults/test_checkpoints")  # paths below this folder


def run_ranks(function: Callable[..., T], world_size: int, *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[T]:
    """Run `function(*args)` on every rank of a new process group and return the results by rank.

    Raises:
        AssertionError: a rank raised, died or timed out; the message contains the output of every rank.
    """
    __tracebackhide__ = True
    preloaded = _ENGINES if _uses_engines(function) else _TORCH
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder_name:
        folder = Path(folder_name)
        processes: list[ForkServerProcess] = []
        results: dict[Connection, int] = {}
        for rank in range(world_size):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            work = (function, args, rank, world_size, folder_name, timeout, sender)
            process = fork(_rank_main, *work, preloaded=preloaded)
            sender.close()
            processes.append(process)
            results[receiver] = rank
        try:
            outcomes = _collect(results, timeout)
            if all(succeeded for succeeded, _ in outcomes.values()) and len(outcomes) == world_size:
                for process in processes:
                    process.join(GRACE_SECONDS)
        finally:
            _end(processes)
            for receiver in results:
                receiver.close()
        failed = [rank for rank in range(world_size) if not outcomes.get(rank, (False, None))[0]]
        if failed:
            raise AssertionError(_report(function, failed, world_size, outcomes, folder))
    return [outcomes[rank][1] for rank in range(world_size)]


def _uses_engines(function: Callable[..., Any]) -> bool:
    """Decide by the file of a function: pytest names the module of a test without its folder."""
    path = Path(inspect.getfile(function))
    return path.is_relative_to(_TESTS) and path.relative_to(_TESTS).as_posix().startswith(_USE_ENGINES)


def _end(processes: list[ForkServerProcess]) -> None:
    """Terminate the processes that still run, after they have written their stacks to their output."""
    running = [process for process in processes if process.is_alive()]
    for process in running:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, DUMP_AND_EXIT)
    for process in processes:
        process.join(GRACE_SECONDS)
        if process.is_alive():
            process.kill()
        process.join()


def fork(function: Callable[..., None], *args: Any, preloaded: tuple[str, ...] = _TORCH) -> ForkServerProcess:
    """Start a process that runs a function, with these modules already imported; it ends with this process."""
    process = ForkServerProcess(target=function, args=args, daemon=True)
    # multiprocessing supports only one fork server
    with patch.object(forkserver, "connect_to_new_process", _server(preloaded).connect_to_new_process):
        process.start()
    return process


@functools.cache
def _server(preloaded: tuple[str, ...]) -> forkserver.ForkServer:
    """Return the fork server that imports these modules; its ranks inherit its environment."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(preloaded))
    one_thread = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
    )  # threads block fork
    # Otherwise a torch.compile decorator in DeepSpeed imports the compiler, which takes seconds.
    engines = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"} if preloaded is _ENGINES else {}
    environment = {**_ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo", **one_thread, **engines}
    with patch.dict(os.environ, environment, clear=True):
        server.ensure_running()
    return server


def _collect(results: dict[Connection, int], timeout: float) -> dict[int, tuple[bool, Any]]:
    """Return (succeeded, result or traceback) of every rank; stop soon after the first failure."""
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
                outcomes[rank] = (False, "the process died without a traceback")
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
        succeeded, outcome = outcomes.get(rank, (False, "timed out; see the stack in its output"))
        lines += [f"--- rank {rank}: {'succeeded' if succeeded else outcome}"]
        output = folder / f"rank{rank}.log"
        if output.exists() and (text := output.read_text(errors="replace").strip()):
            lines += [f"--- rank {rank}, output:", text[-6000:]]
    return "\n".join(lines)


def _wait_for_operator(baton: Any) -> None:
    """Replace torch's wait, which is infinite if the process that created the file was killed."""
    deadline = time.monotonic() + OPERATOR_SECONDS
    while os.path.exists(baton.lock_file_path):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"an operator must be compiled before the tests, got {baton.lock_file_path} for {OPERATOR_SECONDS:.0f} "
                "seconds; name it in pytest.mark.deepspeed(...) of the test"
            )
        time.sleep(0.02)


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
    gc.freeze()  # imported modules are not garbage
    faulthandler.register(DUMP_AND_EXIT, chain=True)  # then the signal's default action: exit

    import torch
    import torch.distributed as dist
    from torch.utils.file_baton import FileBaton

    torch.set_num_threads(1)
    FileBaton.wait = _wait_for_operator
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
    # Without these three, a gloo process may abort in its destructors after a successful run.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
