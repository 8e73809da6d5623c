"""The job: this process among the ranks that a launcher started, and the signals that end it early."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from adai_dist.recipes.recipe import RecipeError

TIMEOUT_SECONDS = 600.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),  # so do deepspeed and accelerate
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class World:
    """This process and the number of its peers."""

    rank: int
    size: int
    """Number of ranks of the job."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes the files of the run."""
        return self.rank == 0


def is_launched(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher started this process as one of several ranks."""
    return any(rank in environment and size in environment for _, rank, size, _ in _LAUNCHERS)


def read_launcher(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Return (rank, world size, local rank) from the variables that launchers set; None without a launcher.

    Raises:
        RecipeError: the launcher did not set the rendezvous address.
    """
    for launcher, rank, size, local_rank in _LAUNCHERS:
        if rank not in environment or size not in environment:
            continue
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise RecipeError(
                    f"{launcher} ranks need {name} to find each other; got none; on one machine, for example, "
                    "export MASTER_ADDR=127.0.0.1 and MASTER_PORT=29500"
                )
        return int(environment[rank]), int(environment[size]), int(environment.get(local_rank, environment[rank]))
    return None


@contextlib.contextmanager
def join_world(device: str, timeout: float = TIMEOUT_SECONDS) -> Generator[World, None, None]:
    """Join the process group of the job on entry and leave it on exit; an initialised one is used as it is.

    Args:
        device: auto, cpu or cuda.
        timeout: seconds that a rank waits for the others in a collective before it fails.

    Collective: all ranks of the job, on entry, and on exit unless an exception passes.
    """
    launched = read_launcher(os.environ)
    rank, size, local_rank = launched or (0, 1, 0)
    on_cuda = _use_cuda(device, local_rank)
    if on_cuda:
        torch.cuda.set_device(local_rank)
    is_ours = not dist.is_initialized()
    if is_ours:
        # Objects and checkpoint plans travel over gloo; they would otherwise go through the GPU.
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        if launched is None:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            wait = datetime.timedelta(seconds=timeout)
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=wait)
    here = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), here)
    except BaseException:
        # Leaving would wait for peers that may be gone; the end of the process frees the process group as well.
        if is_ours and launched is None and not on_cuda:
            dist.destroy_process_group()
        raise
    if is_ours:
        dist.barrier()
        dist.destroy_process_group()


def _use_cuda(device: str, local_rank: int) -> bool:
    num_devices = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and num_devices == 0):
        return False
    if local_rank >= num_devices:
        raise RecipeError(
            f"every rank needs a CUDA device of its own; got local rank {local_rank} and {num_devices} devices; "
            "start fewer ranks or set device=cpu"
        )
    return True


class Stopped(Exception):
    """A run that was asked to stop and has written a checkpoint. The message says how to continue."""


class StopRequest:
    """The request of a signal to stop this process, received within the block ``listening``."""

    def __init__(self) -> None:
        self._signal_number = 0

    @contextlib.contextmanager
    def listening(self) -> Generator[None, None, None]:
        """Record SIGTERM and SIGUSR1 within the block instead of ending the process."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.signal(number, self._record)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def reached_any_rank(self, world: World) -> bool:
        """Return whether any rank was asked to stop, the same on all ranks.

        Collective: all ranks of the job; one all-reduce of 4 bytes, for which the host waits.
        """
        asked = torch.tensor(self._signal_number, dtype=torch.int32, device=world.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def _record(self, number: int, frame: Any) -> None:
        self._signal_number = number


@contextlib.contextmanager
def interruptible(message: Callable[[], str]) -> Generator[None, None, None]:
    """Raise KeyboardInterrupt(message()), and nothing else, after Ctrl-C within the block.

    torch.distributed.checkpoint wraps a KeyboardInterrupt into an exception of its own, and a collective fails if a
    peer ended first; the handler records that the signal came.
    """
    received = False

    def record(number: int, frame: Any) -> None:
        nonlocal received
        received = True
        signal.default_int_handler(number, frame)

    # Leave a handler of the caller, and the SIG_IGN of a background process, in place.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, record)
    try:
        yield
    except BaseException as error:
        if received or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(message()) from None
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
