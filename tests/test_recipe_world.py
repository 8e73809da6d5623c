"""Rank and world size, as read from the environment variables of each launcher."""

from __future__ import annotations

import pytest

from adai_dist.recipes.job import is_launched, read_launcher
from adai_dist.recipes.recipe import RecipeError

RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ],
)
def test_the_rank_is_read_from_every_launcher(names: tuple[str, str, str]) -> None:
    environment = dict(zip(names, ("5", "8", "1"), strict=True))
    assert is_launched(environment)
    assert read_launcher({**environment, **RENDEZVOUS}) == (5, 8, 1)
    with pytest.raises(RecipeError, match="need MASTER_ADDR to find each other; got none"):
        read_launcher(environment)


def test_without_a_launcher_there_is_one_rank() -> None:
    assert not is_launched({"HOME": "/", **RENDEZVOUS})
    assert read_launcher({"HOME": "/", **RENDEZVOUS}) is None
