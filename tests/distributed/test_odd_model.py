"""Mixed precision, accumulated gradients, tied, frozen and unused parameters: steps with real gradients."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.distributed.odd_model import WAYS, train
from tests.distributed.recorded import Recording, follow
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6}


def train_all(world_size: int) -> dict[str, Recording]:
    return {name: train(way) for name, way in WAYS.items() if way.world_size == world_size}


@functools.cache
def recordings(world_size: int) -> list[dict[str, Recording]]:
    return run_ranks(train_all, world_size, world_size)


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_train_follows_the_oracle_with_the_same_gradients(name: str) -> None:
    way = WAYS[name]
    of_ranks = [of_rank[name] for of_rank in recordings(way.world_size)]
    error = follow(of_ranks, ROUNDING[way.dtype])
    print(f"{name}: {error:.1e}")
    assert error < TOLERANCE[way.dtype]
    expected = torch.bfloat16 if way.bfloat16_gradients else way.dtype
    assert of_ranks[0].gradient_dtypes == {str(expected)}


@pytest.mark.parametrize("name", ["fsdp2", "fsdp1 original", "fsdp1 flat", "tensor parallel"])
def test_the_mean_of_a_single_rank_differs(name: str) -> None:
    """Check that the test above can fail."""
    with pytest.raises(AssertionError, match="mean of step 0"):
        follow([recordings(2)[0][name]], rounding=1e-2)
