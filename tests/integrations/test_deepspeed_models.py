"""Experts and tensor parallelism, where the mean must count every parameter of every rank once."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from tests.integrations.deepspeed_engines import Family
from tests.integrations.deepspeed_models import check_captured, walk_experts, walk_tensor_parallel
from tests.integrations.deepspeed_setups import BF16, COUPLED, CPU_OFFLOAD, FP32_GRADIENTS, Setup, zero

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

# Only the hyperparameters are used; at these learning rates nothing diverges.
SLOW = replace(
    COUPLED,
    groups=tuple((hyper | {"lr": 0.1 * hyper["lr"]}, specs) for hyper, specs in COUPLED.groups),
    max_grad_norm=None,
)
DECOUPLED = SLOW.with_all(decoupled=True)
CLIPPED, CLIPPED_COUPLED = (replace(problem, max_grad_norm=0.1) for problem in (DECOUPLED, SLOW))

EXPERTS = {
    ep_size: Family(
        {
            "stage-0": Setup(zero(0), DECOUPLED),
            "stage-0-coupled": Setup(zero(0), SLOW),
            "stage-1": Setup(zero(1), DECOUPLED),
            "stage-1-clipped": Setup(zero(1), CLIPPED),
            "stage-0-bf16": Setup(zero(0) | BF16, SLOW),
            "bf16-optimizer": Setup(zero(1) | BF16 | FP32_GRADIENTS, SLOW),
            "stage-2-bf16-clipped": Setup(zero(2) | BF16, CLIPPED),
            "stage-1-offload": Setup(zero(1, **CPU_OFFLOAD), SLOW),
            "stage-2": Setup(zero(2), DECOUPLED),
            "stage-2-coupled": Setup(zero(2), SLOW),
        },
        functools.partial(walk_experts, ep_size=ep_size),
    )
    for ep_size in (1, 2)
}
AUTOTP = {"tensor_parallel": {"autotp_size": 2}}
TENSOR_PARALLEL = Family(
    {
        "stage-0": Setup(zero(0) | AUTOTP, DECOUPLED),
        "stage-0-bf16": Setup(zero(0) | AUTOTP | BF16, DECOUPLED),
        "stage-1": Setup(zero(1) | AUTOTP, DECOUPLED),
        "stage-1-clipped-coupled": Setup(zero(1) | AUTOTP, CLIPPED_COUPLED),
        "stage-1-bf16": Setup(zero(1) | AUTOTP | BF16, DECOUPLED),
        "stage-2-offload-coupled": Setup(zero(2, **CPU_OFFLOAD) | AUTOTP, SLOW),
        "bf16-optimizer": Setup(zero(1) | AUTOTP | BF16 | FP32_GRADIENTS, SLOW),
        "stage-3": Setup(zero(3) | AUTOTP, DECOUPLED),
        "stage-3-offload-coupled-bf16": Setup(zero(3, **CPU_OFFLOAD) | AUTOTP | BF16, SLOW),
        "stage-3-clipped-coupled": Setup(zero(3) | AUTOTP, CLIPPED_COUPLED),
    },
    walk_tensor_parallel,
)


@pytest.mark.parametrize("ep_size", EXPERTS)
@pytest.mark.parametrize("name", EXPERTS[1].setups)
def test_a_mixture_of_experts_follows_the_oracle(name: str, ep_size: int) -> None:
    family = EXPERTS[ep_size]
    ranks = family.ranks(name)
    num_expert_copies = sum("deepspeed_experts" in key for captured in ranks for key in captured.starts)
    num_distinct = len({key for captured in ranks for key in captured.starts if "deepspeed_experts" in key})
    assert (num_expert_copies, num_distinct) == ((8, 4) if ep_size == 1 else (4, 4))
    print(f"{name} with ep_size {ep_size}: {check_captured(ranks, family.setups[name]):.1e}")


@pytest.mark.parametrize("name", TENSOR_PARALLEL.setups)
def test_tensor_parallel_layers_follow_the_oracle(name: str) -> None:
    from adai_dist.integrations.deepspeed.adapters.releases import installed_release

    release = installed_release()
    is_stage_3 = TENSOR_PARALLEL.setups[name].stage == 3
    if not release.has_tested_autotp or (is_stage_3 and not release.has_tensor_parallel_partitions):
        by_us, by_deepspeed = "has not been tested|must have a gradient norm", "between 'autotp' and 'zero_stage = 3'"
        with pytest.raises(AssertionError, match=f"{by_us}|{by_deepspeed}"):
            TENSOR_PARALLEL.ranks(name)
        return
    ranks = TENSOR_PARALLEL.ranks(name)
    assert any("@1" in key for key in ranks[1].starts)
    print(f"{name}: {check_captured(ranks, TENSOR_PARALLEL.setups[name]):.1e}")
