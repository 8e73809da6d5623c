"""The trajectory is the oracle's without ZeRO and in every ZeRO stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.integrations.deepspeed_engines import Family
from tests.integrations.deepspeed_oracle_check import check_all_ranks, solve
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

SUB_GROUPS = {"sub_group_size": 50}

STAGES = Family(
    {
        f"stage-{stage}-{name}": setup
        for stage in (0, 1, 2, 3)
        for name, setup in {
            "fp32": Setup(zero(stage)),
            "fp32-clipped": Setup(zero(stage), CLIPPED),
            "bf16": Setup(zero(stage) | BF16),
            "bf16-clipped-accumulation": Setup(zero(stage) | BF16, CLIPPED, num_micro_batches=2),
            "fp32-accumulation": Setup(zero(stage), num_micro_batches=2),
        }.items()
    }
    | {
        "sub-groups-fp32": Setup(zero(3, **SUB_GROUPS)),
        "sub-groups-bf16-clipped": Setup(zero(3, **SUB_GROUPS) | BF16, CLIPPED),
        "bf16-optimizer": Setup(zero(1) | BF16 | FP32_GRADIENTS),
        "bf16-optimizer-clipped-accumulation": Setup(zero(1) | BF16 | FP32_GRADIENTS, CLIPPED, num_micro_batches=2),
        "bf16-optimizer-one-beta2": Setup(zero(1) | BF16 | FP32_GRADIENTS, CLIPPED.with_all(betas=(0.1, 0.98))),
    }
)
OFFLOAD = Family(
    {
        f"stage-{stage}-{name}": setup
        for stage in (1, 2, 3)
        for name, setup in {
            "fp32-clipped": Setup(zero(stage, **CPU_OFFLOAD), CLIPPED),
            "bf16": Setup(zero(stage, **CPU_OFFLOAD) | BF16),
            "bf16-clipped-accumulation": Setup(zero(stage, **CPU_OFFLOAD) | BF16, CLIPPED, num_micro_batches=2),
            "accumulation-of-four": Setup(zero(stage, **CPU_OFFLOAD), CLIPPED, num_micro_batches=4),
        }.items()
    }
    | {
        "sub-groups-clipped": Setup(zero(3, **CPU_OFFLOAD, **SUB_GROUPS), CLIPPED),
        "parameters": Setup(zero(3, **CPU_OFFLOAD, offload_param={"device": "cpu"}), CLIPPED),
        "parameters-bf16": Setup(zero(3, **CPU_OFFLOAD, offload_param={"device": "cpu"}) | BF16, CLIPPED),
    }
)
OPTIONS = Family(
    {
        "stage-1-parameter-alignment": Setup(zero(1, parameter_alignment=True) | BF16, CLIPPED),
        "stage-2-parameter-alignment": Setup(zero(2, parameter_alignment=True), COUPLED),
        "stage-1-round-robin": Setup(zero(1, round_robin_gradients=True), CLIPPED),
        "stage-2-round-robin": Setup(zero(2, round_robin_gradients=True), COUPLED),
        "stage-2-round-robin-aligned": Setup(
            zero(2, round_robin_gradients=True, parameter_alignment=True) | BF16, COUPLED
        ),
        "stage-2-no-grad-norm": Setup(zero(2, compute_grad_norm=False)),
        "stage-1-no-grad-norm": Setup(zero(1, compute_grad_norm=False) | BF16, replace(COUPLED, max_grad_norm=None)),
        "stage-1-no-reduce-scatter": Setup(zero(1, reduce_scatter=False), CLIPPED),
        "stage-2-no-reduce-scatter": Setup(zero(2, reduce_scatter=False), CLIPPED),
        "stage-3-no-reduce-scatter": Setup(zero(3, reduce_scatter=False), CLIPPED),
        "stage-2-not-contiguous": Setup(zero(2, contiguous_gradients=False), CLIPPED),
        "stage-3-not-contiguous": Setup(zero(3, contiguous_gradients=False), CLIPPED),
        "stage-1-overlap": Setup(zero(1, overlap_comm=True), CLIPPED),
        "stage-2-overlap": Setup(zero(2, overlap_comm=True) | BF16, CLIPPED, num_micro_batches=2),
        "stage-2-no-overlap": Setup(zero(2, overlap_comm=False), CLIPPED),
        "stage-3-overlap": Setup(zero(3, overlap_comm=True), CLIPPED),
        "stage-3-no-overlap": Setup(zero(3, overlap_comm=False), CLIPPED),
    }
)


@pytest.mark.parametrize("name", STAGES.setups)
def test_every_stage_follows_the_oracle(name: str) -> None:
    check_all_ranks(STAGES, name)


@pytest.mark.parametrize("name", OFFLOAD.setups)
def test_offload_to_the_cpu_follows_the_oracle(name: str) -> None:
    check_all_ranks(OFFLOAD, name)


@pytest.mark.parametrize("name", OPTIONS.setups)
def test_every_option_of_zero_follows_the_oracle(name: str) -> None:
    check_all_ranks(OPTIONS, name)


def test_the_clip_bound_lies_between_the_norms_of_the_steps() -> None:
    """Validate that some steps of the clipped problems are clipped."""
    assert CLIPPED.max_grad_norm is not None
    for setup in (Setup(zero(1), CLIPPED), Setup(zero(1) | BF16, CLIPPED)):
        norms = [seen.grad_norm for seen in solve(setup)[1] if seen is not None]
        assert 3 < sum(norm > CLIPPED.max_grad_norm for norm in norms) < len(norms) - 3
