"""Tests of the harness: results are returned by rank, and failures and hangs are reported."""

from __future__ import annotations

import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.spawn import run_ranks


def sum_of_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one fails")
    dist.barrier()


def hang_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def wait_forever() -> None:
    time.sleep(60)


def fail_on_rank_one_while_the_other_hangs() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one fails")
    wait_forever()


def modules_at_start() -> set[str]:
    return set(sys.modules)


def test_a_rank_starts_with_its_imports_and_without_engines_of_other_projects() -> None:
    (loaded,) = run_ranks(modules_at_start, 1)
    assert loaded >= {"adai_dist", "torch._dynamo", "torch.distributed.fsdp", "tests.distributed.layouts"}
    assert not loaded & {"accelerate", "deepspeed", "transformers"}


def test_results_are_in_the_order_of_the_ranks() -> None:
    assert run_ranks(sum_of_ranks, 4, 10) == [(rank, 46.0) for rank in range(4)]


def test_the_traceback_of_a_failed_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ranks \[.*1.*\] of 2.*rank one fails"):
        run_ranks(fail_on_rank_one, 2)


def test_a_rank_that_hangs_is_killed_and_its_stack_reported() -> None:
    run_ranks(sum_of_ranks, 2, 0)  # starts the server, outside the measured time
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)failed on ranks \[0\] of 2.*hang_on_rank_zero"):
        run_ranks(hang_on_rank_zero, 2, timeout=6)
    assert time.monotonic() - start < 20


def test_the_stacks_of_the_other_ranks_are_reported_with_the_failure_of_a_rank() -> None:
    expected = r"(?s)rank 0: timed out.*rank 0, output:.*in wait_forever.*rank one fails"
    with pytest.raises(AssertionError, match=expected):
        run_ranks(fail_on_rank_one_while_the_other_hangs, 2)
