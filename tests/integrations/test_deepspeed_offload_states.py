"""engine.offload_states and reload_states between two steps move Adai's states as they do Adam's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.integrations.deepspeed_resume import (
    NUM_STEPS,
    SAVED_AT,
    Run,
    Snapshot,
    assert_same,
    attempt_all,
    of_all_ranks,
    uninterrupted,
)
from tests.integrations.deepspeed_setups import BF16, CLIPPED, Setup, zero
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

SETUPS = {
    "stage-1": Setup(zero(1), CLIPPED),
    "stage-1-bf16": Setup(zero(1) | BF16, CLIPPED),
    "stage-2": Setup(zero(2), CLIPPED),
    "stage-2-bf16": Setup(zero(2) | BF16, CLIPPED),
    "stage-3": Setup(zero(3), CLIPPED),
    "stage-3-bf16": Setup(zero(3, sub_group_size=50) | BF16, CLIPPED),
}
STAGE_3 = [name for name in SETUPS if name.startswith("stage-3")]
OTHERS = [name for name in SETUPS if name not in STAGE_3]


@dataclass
class Outcome:
    """Snapshots of a run with offloaded states and of an uninterrupted one."""

    uninterrupted: Snapshot
    resumed: Snapshot
    offloaded: set[str]
    """Kinds of state that DeepSpeed reports as offloaded before reload_states."""
    reloaded: set[str]
    refused: str
    """Error of offloading optimizer states, if any."""


def away_and_back(setup: Setup) -> Outcome:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kind

    whole = uninterrupted(setup)
    run = Run(setup)
    run.take_steps(range(SAVED_AT))
    wrapper, refused = run.engine.optimizer, ""
    try:
        run.engine.offload_states()
    except AssertionError as error:
        refused = str(error)
        run.engine.offload_states(include=[Kind.lp_params, Kind.lp_grads, Kind.contiguous_grad_buffer])
    offloaded = {kind.value for kind in wrapper.offloaded_states}
    run.engine.reload_states()
    reloaded = {kind.value for kind in wrapper.offloaded_states}
    run.take_steps(range(SAVED_AT, NUM_STEPS))
    outcome = Outcome(whole, run.snapshot(), offloaded, reloaded, refused)
    run.end()
    return outcome


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    return run_ranks(attempt_all, 2, away_and_back, {name: (setup,) for name, setup in SETUPS.items()})


@pytest.mark.parametrize("name", SETUPS)
def test_the_run_continues_with_the_same_bits(name: str, outcomes: list[dict[str, Any]]) -> None:
    for outcome in of_all_ranks(outcomes, name):
        assert_same(outcome.resumed, outcome.uninterrupted)
        assert outcome.offloaded
        assert not outcome.reloaded


@pytest.mark.parametrize("name", OTHERS)
def test_stages_1_and_2_offload_the_states(name: str, outcomes: list[dict[str, Any]]) -> None:
    for outcome in of_all_ranks(outcomes, name):
        assert not outcome.refused
        assert {"optim_states", "hp_params"} <= outcome.offloaded


@pytest.mark.parametrize("name", STAGE_3)
def test_stage_3_offloads_only_states_of_deepspeeds_adam(name: str, outcomes: list[dict[str, Any]]) -> None:
    for outcome in of_all_ranks(outcomes, name):
        assert "Offloading is supported only for DeepSpeed FusedAdam" in outcome.refused
        assert outcome.offloaded == {"lp_params", "lp_grads", "contiguous_grad_buffer"}
