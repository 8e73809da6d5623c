"""A step adds one all-reduce of 64 bytes to ZeRO's own communication."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.integrations.deepspeed_engines import Family
from tests.integrations.deepspeed_setups import (
    BF16,
    CLIPPED,
    COUPLED,
    CPU_OFFLOAD,
    FP32_GRADIENTS,
    Setup,
    zero,
)

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

CONFIGS = {
    "stage-0": zero(0),
    "stage-0-bf16": zero(0) | BF16,
    "stage-1": zero(1),
    "stage-2-bf16": zero(2) | BF16,
    "stage-2-offload": zero(2, **CPU_OFFLOAD),
    "stage-3": zero(3),
    "stage-3-sub-groups-bf16": zero(3, sub_group_size=50) | BF16,
    "stage-3-offload": zero(3, **CPU_OFFLOAD),
    "bf16-optimizer": zero(1) | BF16 | FP32_GRADIENTS,
}
SHORT, SHORT_COUPLED = (replace(problem, steps=4) for problem in (CLIPPED, COUPLED))
PROBLEMS = {
    "one-beta2": SHORT.with_all(betas=(0.1, 0.98)),
    "three-beta2": SHORT,
    "coupled": SHORT_COUPLED,
}
NO_ZERO = ("stage-0", "stage-0-bf16")  # every rank has all gradients and all states
FAMILY = Family(
    {f"{config} AdamW": Setup(CONFIGS[config], SHORT, optimizer="torch.AdamW") for config in CONFIGS}
    | {f"{config} {name}": Setup(CONFIGS[config], PROBLEMS[name]) for config in CONFIGS for name in PROBLEMS}
)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_communicates_64_bytes_more_than_adamw(config: str, name: str) -> None:
    extra = Counter() if config in NO_ZERO else Counter({("allreduce_", 64): 1})
    for ours, theirs in zip(FAMILY.ranks(f"{config} {name}"), FAMILY.ranks(f"{config} AdamW"), strict=True):
        for calls, expected in zip(ours.collectives, theirs.collectives, strict=True):
            assert Counter(calls) - Counter(expected) == extra
            assert not Counter(expected) - Counter(calls)
