"""Which process this is among how many, on which device, whatever launcher started it."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from adai_dist.recipes.refusal import RecipeError

TIMEOUT_SECONDS = 600.0

_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),  # so do deepspeed and accelerate
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    """Number of ranks of the job."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that talks to people and writes the run's files."""
        return self.rank == 0


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return any(rank in environment and size in environment for _, rank, size, _ in _LAUNCHERS)


def read_launcher(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Returns (rank, world size, local rank) as the launcher put them into the environment; None without a launcher.

    Raises:
        RecipeError: the launcher does not say where the ranks meet.
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
    """The process group of the job: joined on entry and left on exit. An initialised one is used and left alone.

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
    world = World(
        dist.get_rank(), dist.get_world_size(), torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    )
    try:
        yield world
    except BaseException:
        # Others would first wait for what their peers, who may be gone, owe them; the process's end frees them as well.
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
