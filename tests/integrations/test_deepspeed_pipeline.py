"""PipelineEngine, where each rank has only the layers of its stage and two stages share a tied layer."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from tests.integrations.deepspeed_engines import Family, Seen
from tests.integrations.deepspeed_oracle_check import check
from tests.integrations.deepspeed_pipeline import LAYERS, walk_pipeline
from tests.integrations.deepspeed_setups import BF16, CLIPPED, COUPLED, FP32_GRADIENTS, Setup, zero
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

SETUPS = {
    "stage-0": Setup(zero(0), num_micro_batches=2),  # DeepSpeed's own clipping counts the tied layer twice
    "stage-0-bf16": Setup(zero(0) | BF16, num_micro_batches=2),
    "stage-1": Setup(zero(1), CLIPPED, num_micro_batches=2),
    "stage-1-one-micro-batch": Setup(zero(1), CLIPPED),
    "stage-1-overlapped": Setup(zero(1, overlap_comm=True), CLIPPED, num_micro_batches=2),
    "stage-1-coupled": Setup(zero(1), COUPLED, num_micro_batches=2),
    "stage-1-bf16": Setup(zero(1) | BF16, CLIPPED, num_micro_batches=2),
    "bf16-optimizer": Setup(zero(1) | BF16 | FP32_GRADIENTS, CLIPPED, num_micro_batches=2),
}


DATA_PARALLEL = ("stage-1-coupled", "stage-1-overlapped", "bf16-optimizer")
FAMILIES = {
    2: Family(SETUPS, walk_pipeline, world_size=2),
    4: Family({name: SETUPS[name] for name in DATA_PARALLEL}, walk_pipeline, world_size=4),
}
# Rank 0 holds the first and the last of four stages, and with them the only copy of the tied layer.
DUAL_PIPE_V = Family(
    {
        name: dataclasses.replace(SETUPS[name], num_micro_batches=4)
        for name in ("stage-0", "stage-1-coupled", "bf16-optimizer")
    },
    functools.partial(walk_pipeline, module="DualPipeVModule"),
    world_size=2,
)


@pytest.mark.parametrize(
    ("name", "world_size"), [(name, size) for size, family in FAMILIES.items() for name in family.setups]
)
def test_a_pipeline_with_a_tied_layer_follows_the_oracle(name: str, world_size: int) -> None:
    from adai_dist.integrations.deepspeed.adapters.releases import installed_release

    setup = SETUPS[name]
    if setup.num_micro_batches > 1 and not installed_release().scales_pipeline_stages_alike:
        with pytest.raises(AssertionError, match="a pipeline with 2 micro-batches per step in DeepSpeed"):
            FAMILIES[world_size].ranks(name)
        return
    check_all_stages(FAMILIES[world_size].ranks(name), setup)


@pytest.mark.parametrize("name", DUAL_PIPE_V.setups)
def test_a_pipeline_with_two_stages_on_each_rank_follows_the_oracle(name: str) -> None:
    check_all_stages(DUAL_PIPE_V.ranks(name), DUAL_PIPE_V.setups[name])


def check_all_stages(ranks: list[Seen], setup: Setup) -> None:
    """Compare the parameters of all stages together with the oracle, and the copies of a parameter with each other."""
    whole = Seen(unscaled_by=[1.0] * setup.problem.steps)
    for seen in ranks:
        for key, parameter in seen.parameters.items():
            assert np.array_equal(parameter, whole.parameters.get(key, parameter)), f"the copies of {key} drift apart"
        whole.parameters |= seen.parameters
        whole.states |= seen.states
        whole.was_skipped, whole.means, whole.grad_norms = seen.was_skipped, seen.means, seen.grad_norms
        if len(whole.parameters) == len(list(setup.problem.specs())):
            print(f"on {len(ranks)} ranks: {check(whole, setup):.1e}")
    assert len(whole.parameters) == len(list(setup.problem.specs()))


UNEVEN_LAYERS = tuple(
    sorted(LAYERS)
)  # the first stage has no parameter of the third group, the last none of the second


def error_of_uneven_stages() -> str:
    with pytest.raises(ValueError, match="same parameter groups") as caught:
        walk_pipeline(SETUPS["stage-1-one-micro-batch"], UNEVEN_LAYERS)
    return str(caught.value)


def test_stages_must_have_the_same_groups() -> None:
    """Match the groups, since DeepSpeed adds up their norms by index."""
    first, last = run_ranks(error_of_uneven_stages, 2)
    print(first)
    assert first == last
