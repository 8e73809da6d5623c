"""Measure the latency of the step's collective, an all-reduce of 8 float64 numbers. Runs under any launcher.

launch/torchrun.sh tests/launch/latency.py
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

NUM_BYTES, NUM_CALLS, NUM_ROUNDS = 64, 200, 10


def main() -> None:
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    sums = torch.zeros(NUM_BYTES // 8, dtype=torch.float64, device=device)
    seconds: list[float] = []
    for _ in range(1 + NUM_ROUNDS):  # the first call connects the ranks
        dist.barrier()
        start = time.perf_counter()
        for _ in range(NUM_CALLS):
            dist.all_reduce(sums)
            float(sums[0])  # synchronises with the device
        seconds.append((time.perf_counter() - start) / NUM_CALLS)
    if dist.get_rank() == 0:
        best, middle = min(seconds[1:]), sorted(seconds[1:])[NUM_ROUNDS // 2]
        ranks = f"{dist.get_world_size()} ranks, {dist.get_backend()}"
        print(f"{ranks}: {NUM_BYTES} bytes in {middle * 1e6:.0f} microseconds (median), {best * 1e6:.0f} (best)")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
