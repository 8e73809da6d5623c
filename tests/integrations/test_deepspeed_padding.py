"""Uninitialised memory of DeepSpeed, such as the padding of gradients, affects neither mean nor states."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.deepspeed_engines import Family, Seen, walk
from tests.integrations.deepspeed_oracle_check import check_all_ranks
from tests.integrations.deepspeed_setups import BF16, CLIPPED, CPU_OFFLOAD, Setup, zero

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]


def walk_in_nan(setup: Setup) -> Seen:
    """Walk through a setup with uninitialised tensors filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    try:
        return walk(setup)
    finally:
        torch.use_deterministic_algorithms(False)


FAMILY = Family(
    {
        "stage-2-offload": Setup(zero(2, **CPU_OFFLOAD), CLIPPED),
        "stage-3-sub-groups-bf16": Setup(zero(3, sub_group_size=50) | BF16, CLIPPED),
        "stage-3-offload": Setup(zero(3, **CPU_OFFLOAD), CLIPPED),
    },
    walk_in_nan,
)


@pytest.mark.parametrize("name", FAMILY.setups)
def test_uninitialised_memory_is_not_read(name: str) -> None:
    check_all_ranks(FAMILY, name)
