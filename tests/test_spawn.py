"""The harness itself: results come back by rank, and failures and hangs are told, not swallowed."""

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
        raise ValueError("rank one is unhappy")
    dist.barrier()


def hang_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def wait_for_ever() -> None:
    time.sleep(60)


def fail_on_rank_one_while_the_other_hangs() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unhappy")
    wait_for_ever()


def modules_on_arrival() -> set[str]:
    return set(sys.modules)


def test_a_rank_has_imported_what_it_needs_and_no_engine_of_another_project() -> None:
    (loaded,) = run_ranks(modules_on_arrival, 1)
    assert loaded >= {"adai_dist", "torch._dynamo", "torch.distributed.fsdp", "tests.distributed.layouts"}
    assert not loaded & {"accelerate", "deepspeed", "transformers"}


def test_every_rank_answers_in_order() -> None:
    assert run_ranks(sum_of_ranks, 4, 10) == [(rank, 46.0) for rank in range(4)]


def test_the_traceback_of_a_failed_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ranks \[.*1.*\] of 2.*rank one is unhappy"):
        run_ranks(fail_on_rank_one, 2)


def test_a_rank_that_hangs_is_killed_and_its_place_reported() -> None:
    run_ranks(sum_of_ranks, 2, 0)  # so that the time of starting the server does not count
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)failed on ranks \[0\] of 2.*hang_on_rank_zero"):
        run_ranks(hang_on_rank_zero, 2, timeout=6)
    assert time.monotonic() - start < 20


def test_where_the_others_stood_is_reported_beside_the_failure_of_a_rank() -> None:
    expected = r"(?s)rank 0: no answer in time.*rank 0, output:.*in wait_for_ever.*rank one is unhappy"
    with pytest.raises(AssertionError, match=expected):
        run_ranks(fail_on_rank_one_while_the_other_hangs, 2)
