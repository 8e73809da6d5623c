"""Non-finite gradients, on a single rank or through the loss scale: all ranks skip the step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.integrations.deepspeed_engines import Family
from tests.integrations.deepspeed_oracle_check import check
from tests.integrations.deepspeed_setups import (
    BF16,
    CLIPPED,
    COUPLED,
    CPU_OFFLOAD,
    FP32_GRADIENTS,
    PROBLEM,
    Setup,
    zero,
)

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

BAD_STEPS = (0, 3, 4)
UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}  # DeepSpeed alone would continue

INF = Family(
    {
        name: replace(setup, bad_steps=BAD_STEPS)
        for name, setup in {
            "stage-0": Setup(zero(0)),
            "stage-0-clipped": Setup(zero(0), CLIPPED),
            "stage-0-bf16-clipped": Setup(zero(0) | BF16, CLIPPED),
            "stage-1": Setup(zero(1)),
            "stage-1-bf16": Setup(zero(1) | BF16),
            "stage-2-bf16-clipped": Setup(zero(2) | BF16, CLIPPED),
            "stage-2-bf16-coupled": Setup(zero(2) | BF16, COUPLED),
            "stage-2-bf16-offload-clipped": Setup(zero(2, **CPU_OFFLOAD) | BF16, CLIPPED),
            "stage-2-no-grad-norm": Setup(zero(2, compute_grad_norm=False) | BF16),
            "stage-1-bf16-unchecked": Setup(zero(1) | UNCHECKED),
            "stage-2-bf16-clipped-unchecked": Setup(zero(2) | UNCHECKED, CLIPPED),
            "stage-2-bf16-coupled-unchecked": Setup(zero(2) | UNCHECKED, COUPLED),
            "stage-2-bf16-offload-clipped-unchecked": Setup(zero(2, **CPU_OFFLOAD) | UNCHECKED, CLIPPED),
            "bf16-optimizer": Setup(zero(1) | BF16 | FP32_GRADIENTS, CLIPPED),
            "stage-3": Setup(zero(3)),
            "stage-3-bf16-clipped": Setup(zero(3, sub_group_size=50) | BF16, CLIPPED),
            "stage-3-offload": Setup(zero(3, **CPU_OFFLOAD), CLIPPED),
        }.items()
    }
    # The gradients accumulated in a bad step must not enter the next one.
    | {
        f"stage-{stage}-accumulation{suffix}": Setup(
            zero(stage, **options) | BF16, CLIPPED, num_micro_batches=2, bad_steps=BAD_STEPS
        )
        for stage in (1, 2, 3)
        for suffix, options in {"": {}, "-offload": CPU_OFFLOAD}.items()
    }
)

# The initial scale makes the first steps overflow; it doubles after every three good steps.
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 14, "loss_scale_window": 3, "hysteresis": 1}}
NEVER_DOUBLED = {"fp16": FP16["fp16"] | {"loss_scale_window": 1000}}
LONG, LONG_CLIPPED, LONG_COUPLED = (replace(problem, steps=24) for problem in (PROBLEM, CLIPPED, COUPLED))
LOSS_SCALED = Family(
    {
        f"stage-{stage}-{name}": setup
        for stage in (1, 2, 3)
        for name, setup in {
            "plain": Setup(zero(stage) | FP16, LONG),
            "clipped-accumulation": Setup(zero(stage) | FP16, LONG_CLIPPED, num_micro_batches=2),
            "coupled": Setup(zero(stage) | FP16, LONG_COUPLED),
            "never-doubled": Setup(zero(stage) | NEVER_DOUBLED, LONG_CLIPPED),
            "offload-clipped": Setup(zero(stage, **CPU_OFFLOAD) | FP16, LONG_CLIPPED),
        }.items()
    }
)


@pytest.mark.parametrize("name", INF.setups)
def test_an_inf_on_one_rank_makes_all_ranks_skip_the_step(name: str) -> None:
    for rank, seen in enumerate(INF.ranks(name)):
        assert [step for step, skipped in enumerate(seen.was_skipped) if skipped] == list(BAD_STEPS)
        assert seen.num_skipped_steps == len(BAD_STEPS)
        print(f"{name} on rank {rank}: {check(seen, INF.setups[name]):.1e}")


@pytest.mark.parametrize("name", LOSS_SCALED.setups)
def test_a_dynamic_loss_scale_follows_the_oracle_over_its_skipped_steps(name: str) -> None:
    ranks = LOSS_SCALED.ranks(name)
    assert ranks[0].was_skipped == ranks[1].was_skipped
    for rank, seen in enumerate(ranks):
        num_skipped = sum(seen.was_skipped)
        assert 2 <= num_skipped <= 12
        assert seen.num_skipped_steps == num_skipped
        assert (0.5 in seen.unscaled_by) == ("never-doubled" not in name)
        print(f"{name} on rank {rank}: {check(seen, LOSS_SCALED.setups[name]):.1e}, {num_skipped} steps skipped")
