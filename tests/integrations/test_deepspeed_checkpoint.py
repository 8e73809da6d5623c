"""DeepSpeed checkpoints, loaded on the number of ranks that saved them: the run continues with the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integrations.deepspeed_resume import (
    SAVED_AT,
    Run,
    Snapshot,
    assert_same,
    attempt_all,
    model_names,
    of_all_ranks,
    on_first_rank,
    resumed,
    saved,
    uninterrupted,
)
from tests.integrations.deepspeed_setups import (
    BF16,
    CLIPPED,
    COUPLED,
    CPU_OFFLOAD,
    FP32_GRADIENTS,
    Setup,
    zero,
)
from tests.integrations.test_deepspeed_nvme import AIO, LARGE, can_load_the_operator
from tests.problems import to_numpy
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

SCALED = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 3}}

SETUPS = {
    "stage-0": Setup(zero(0)),
    "stage-0-bf16": Setup(zero(0) | BF16, CLIPPED),
    "stage-1": Setup(zero(1)),
    "stage-1-bf16": Setup(zero(1) | BF16, CLIPPED),
    "bf16-optimizer": Setup(zero(1) | BF16 | FP32_GRADIENTS, CLIPPED),
    "stage-2": Setup(zero(2), CLIPPED),
    "stage-2-coupled": Setup(zero(2) | BF16, COUPLED),
    "stage-2-fp16": Setup(zero(2) | SCALED, CLIPPED),
    "stage-2-offload": Setup(zero(2, **CPU_OFFLOAD)),
    "stage-3": Setup(zero(3), CLIPPED),
    "stage-3-many-sub-groups": Setup(zero(3, sub_group_size=50) | BF16),
    "stage-3-offload": Setup(zero(3, offload_param={"device": "cpu"}, **CPU_OFFLOAD)),
}
# DeepSpeed's script supports no checkpoint of BF16_Optimizer, with any optimizer ("is not a zero checkpoint").
CONVERTIBLE = [name for name, setup in SETUPS.items() if setup.stage > 0 and name != "bf16-optimizer"]
# Before DeepSpeed 0.16.9, stage 0 fails and leaves an engine behind: it comes last.
OTHERS = ("stage-0-bf16", "stage-1", "stage-2-offload", "bf16-optimizer", "stage-3", "stage-0")


def stop_and_go(
    setup: Setup, folder: Path, is_convertible: bool
) -> tuple[Snapshot, Snapshot, Snapshot, Snapshot, dict[str, Any]]:
    """Return the snapshots uninterrupted, saved, loaded and resumed, and the weights that zero_to_fp32 extracts."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole = uninterrupted(setup)
    half = saved(setup, folder)
    weights: dict[str, Any] = {}
    if is_convertible:
        converted = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        weights = {name: to_numpy(converted[key]) for name, key in model_names(setup).items()}
    return whole, half, *resumed(setup, folder), weights


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = {name: (setup, folder / name, name in CONVERTIBLE) for name, setup in SETUPS.items()}
    return run_ranks(attempt_all, 2, stop_and_go, cases)


@pytest.mark.parametrize("name", SETUPS)
def test_a_resumed_run_is_bitwise_equal_to_the_uninterrupted_one(name: str, outcomes: list[dict[str, Any]]) -> None:
    for whole, half, loaded, second_half, _ in of_all_ranks(outcomes, name):
        assert_same(loaded, half)
        assert_same(second_half, whole)
        assert {float(part["step"]) for part in half.parts} == {SAVED_AT}
        assert any(np.any(whole.parameters[key] != half.parameters[key]) for key in whole.parameters)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_zero_to_fp32_finds_the_master_weights(name: str, outcomes: list[dict[str, Any]]) -> None:
    for _, half, _, _, weights in of_all_ranks(outcomes, name):
        for key, expected in half.parameters.items():
            np.testing.assert_array_equal(weights[key], expected, err_msg=key)


@dataclass
class Refusal:
    """Outcome of loading a checkpoint of AdamW."""

    message: str
    is_unchanged: bool
    weights: dict[str, Any]
    """Weights of AdamW's run."""
    weights_alone: dict[str, Any]
    """Weights of a new run that loaded only the weights."""
    steps: set[float]
    """Step counts of that run after one step."""


def refuse_adamw(setup: Setup, folder: Path) -> Refusal:
    other = Run(replace(setup, optimizer="torch.AdamW"))
    other.take_steps(range(2))
    weights = other.snapshot_of_model()
    other.save(folder)
    other.end()
    run = Run(setup)
    run.take_steps(range(1))
    before = run.snapshot()
    message = ""
    try:
        run.load(folder)
    except ValueError as error:
        message = str(error)
    after = run.snapshot()
    run.end()
    is_unchanged = all(np.array_equal(before.states[k]["exp_avg"], after.states[k]["exp_avg"]) for k in before.states)
    fresh = Run(setup)
    fresh.load(folder, load_module_only=True, load_optimizer_states=False)
    weights_alone = fresh.snapshot_of_model()
    fresh.take_steps(range(1))
    steps = {float(state["step"]) for state in fresh.engine.basic_optimizer.state.values()}
    fresh.end()
    return Refusal(message, is_unchanged, weights, weights_alone, steps)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("others")
    return run_ranks(attempt_all, 2, refuse_adamw, {name: (SETUPS[name], folder / name) for name in OTHERS})


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_optimizer_is_refused_on_all_ranks(name: str, refusals: list[dict[str, Any]]) -> None:
    for refusal in of_all_ranks(refusals, name):
        assert "must hold beta1_prod" in refusal.message
        assert "of another optimizer" in refusal.message
        assert refusal.is_unchanged


@pytest.mark.parametrize("name", OTHERS)
def test_its_weights_can_be_loaded_without_its_states(name: str, refusals: list[dict[str, Any]]) -> None:
    for refusal in of_all_ranks(refusals, name):
        for key, expected in refusal.weights.items():
            np.testing.assert_array_equal(refusal.weights_alone[key], expected, err_msg=key)
        assert refusal.steps == {1.0}


# -- NVMe, emulated by a folder ----------------------------------------------------------------------------------------

PIPELINED = {"buffer_count": 15, "pipeline_read": True, "pipeline_write": True}
ON_NVME: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "one-sub-group": ({}, {}, 10**9),
    "bf16-sub-groups": (BF16, {}, 2**19),
    "pipelined": ({}, PIPELINED, 2**19),
}


def on_nvme(name: str, folder: Path) -> Setup:
    extra, options, sub_group_size = ON_NVME[name]
    folder.mkdir()
    nvme = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 5, **options}
    return Setup(zero(3, offload_optimizer=nvme, sub_group_size=sub_group_size) | AIO | extra, LARGE)


@pytest.mark.slow  # DeepSpeed compiles its I/O operator at the first use, which takes minutes
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ON_NVME)
@pytest.mark.deepspeed("AsyncIO")
def test_a_resumed_run_with_states_on_nvme_is_bitwise_equal(name: str, tmp_path: Path) -> None:
    reason = run_ranks(can_load_the_operator, 1, timeout=1500.0)[0]
    if reason:
        pytest.skip(reason)
    # New processes for each, since DeepSpeed names the files by numbering the parameters of all engines of a process.
    (whole, _) = run_ranks(uninterrupted, 2, on_nvme(name, tmp_path / "uninterrupted"))
    (half, _) = run_ranks(saved, 2, on_nvme(name, tmp_path / "saved"), tmp_path / "checkpoint")
    for loaded, second_half in run_ranks(resumed, 2, on_nvme(name, tmp_path / "resumed"), tmp_path / "checkpoint"):
        for one, other in ((loaded, half), (second_half, whole)):
            for key, expected in other.parameters.items():
                np.testing.assert_array_equal(one.parameters[key], expected, err_msg=key)
                np.testing.assert_array_equal(one.model[key], other.model[key], err_msg=key)
                for state, values in other.states[key].items():
                    np.testing.assert_array_equal(one.states[key][state], values, err_msg=f"{state} of {key}")
            assert one.hyper == other.hyper
            assert [float(part["step"]) for part in one.parts] == [float(part["step"]) for part in other.parts]
    assert not list((tmp_path / "resumed").rglob("adai_dist_in_memory.pt"))


def refused_on_nvme(setup: Setup, folder: Path) -> list[str]:
    """Return the errors of loading into the second engine of a process and without this package's file."""
    run = Run(setup)
    run.take_steps(range(1))
    run.save(folder)
    run.end()
    messages: list[str] = []
    for is_complete in (True, False):
        run = Run(setup)
        if not is_complete:
            on_first_rank(lambda: [path.unlink() for path in folder.rglob("adai_dist_in_memory.pt")])
        try:
            run.load(folder)
        except FileNotFoundError as error:
            messages.append(str(error))
        run.end()
    return messages


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.deepspeed("AsyncIO")
def test_checkpoints_with_missing_files_on_nvme_are_refused_on_all_ranks(tmp_path: Path) -> None:
    reason = run_ranks(can_load_the_operator, 1, timeout=1500.0)[0]
    if reason:
        pytest.skip(reason)
    setup = on_nvme("one-sub-group", tmp_path / "nvme")
    for other_engine, without_package in run_ranks(refused_on_nvme, 2, setup, tmp_path / "checkpoint"):
        assert "load into the first engine of a new process" in other_engine
        assert "saved without adai_dist" in without_package
