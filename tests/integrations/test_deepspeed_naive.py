"""The error of a mean per call of step() under ZeRO, which shows that the parity tests detect it."""

from __future__ import annotations

import pytest

from tests.integrations.deepspeed_engines import Family
from tests.integrations.deepspeed_oracle_check import parameter_error, whole_error
from tests.integrations.deepspeed_setups import Setup, zero

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

NAIVE = Family({f"stage-{stage}": Setup(zero(stage), optimizer="naive") for stage in (0, 1, 2, 3)})


def test_the_naive_mean_is_exact_if_one_call_steps_everything() -> None:
    """Validate the naive class and the harness."""
    for seen in NAIVE.ranks("stage-0"):
        assert parameter_error(seen, NAIVE.setups["stage-0"]) < 1e-5


@pytest.mark.parametrize("name", ["stage-1", "stage-2", "stage-3"])
def test_the_mean_of_one_partition_is_far_off(name: str) -> None:
    for rank, seen in enumerate(NAIVE.ranks(name)):
        error, worst = whole_error(seen, NAIVE.setups[name]), parameter_error(seen, NAIVE.setups[name])
        print(f"{name} on rank {rank}: {error:.0%} of the distance travelled; the worst parameter {worst:.0%}")
        assert error > 0.1
