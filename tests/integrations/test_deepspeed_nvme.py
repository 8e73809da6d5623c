"""Offload of states to NVMe, emulated by a folder; parts of at least 1 MiB leave memory between steps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.deepspeed_engines import Family, Prescribed, Seen, backward, set_environment, start, walk
from tests.integrations.deepspeed_oracle_check import check
from tests.integrations.deepspeed_setups import BF16, PROBLEM, Setup, zero
from tests.problems import Problem, Spec
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed("AsyncIO")]

# Two parameters of more than 2 MiB, each its own sub-group, so that half of each is large enough to be swapped.
LARGE = replace(
    PROBLEM,
    groups=(
        (PROBLEM.groups[0][0], (Spec("first.large", (2**19 + 2**10 + 1,)), *PROBLEM.groups[0][1])),
        (PROBLEM.groups[1][0], (Spec("second.large", (2**19 + 3,), scale=4.0),)),
        PROBLEM.groups[2],
    ),
    max_grad_norm=3000.0,
)
UNUSED_LARGE = replace(
    LARGE,
    groups=(LARGE.groups[0], (LARGE.groups[1][0], (replace(LARGE.groups[1][1][0], missing_every=3),)), LARGE.groups[2]),
)
AIO = {"aio": {"block_size": 2**18, "queue_depth": 4}}
PIPELINED = {"buffer_count": 15, "pipeline_read": True, "pipeline_write": True}
CASES: dict[str, tuple[Problem, dict[str, Any], dict[str, Any], int]] = {
    "fp32": (LARGE, {}, {}, 10**9),
    "bf16-accumulation-sub-groups": (LARGE, BF16, {}, 2**19),
    "pipelined-unused": (UNUSED_LARGE, {}, PIPELINED, 2**19),
}


def can_load_the_operator() -> str:
    """Return the reason why the operator is unavailable, or an empty string."""
    set_environment()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        return "DeepSpeed finds no libaio (on Debian: libaio-dev)"
    AsyncIOBuilder().load(verbose=False)
    return ""


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setup]:
    reason = run_ranks(can_load_the_operator, 1)[0]
    if reason:
        pytest.skip(reason)
    made: dict[str, Setup] = {}
    for name, (problem, extra, offload, sub_group_size) in CASES.items():
        nvme = {"device": "nvme", "nvme_path": str(tmp_path_factory.mktemp(name)), "buffer_count": 5, **offload}
        stage_3 = zero(3, offload_optimizer=nvme, sub_group_size=sub_group_size)
        made[name] = Setup(stage_3 | AIO | extra, problem, num_micro_batches=2 if extra else 1)
    return made


def walk_and_list(setup: Setup) -> tuple[Seen, list[str]]:
    folder = Path(setup.config["zero_optimization"]["offload_optimizer"]["nvme_path"])
    seen = walk(setup)
    return seen, sorted(name for _, _, names in os.walk(folder) for name in names)


@pytest.fixture(scope="module")
def family(setups: dict[str, Setup]) -> Family:
    return Family(setups, walk_and_list)


@pytest.mark.parametrize("name", CASES)
def test_states_on_nvme_follow_the_oracle(family: Family, name: str) -> None:
    for rank, (seen, files) in enumerate(family.ranks(name)):
        assert sum("beta1_prod" in file for file in files) >= 2, files
        print(f"{name} on rank {rank}: {check(seen, family.setups[name]):.1e}, {len(files)} files")


def refusals_of_coupled_decay(setup: Setup) -> list[str]:
    """Return the errors in `initialize` and in a step after which coupled decay was enabled."""
    messages: list[str] = []
    coupled = replace(setup, problem=setup.problem.with_all(decoupled=False))
    try:
        start(coupled, Prescribed(coupled))
    except ValueError as error:
        messages.append(str(error))
    engine = start(setup, Prescribed(setup))
    for param_group in engine.basic_optimizer.param_groups:
        param_group["decoupled"] = False
    backward(engine, setup, 0)
    try:
        engine.step()
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_coupled_decay_is_refused_while_parameters_are_on_disk(setups: dict[str, Setup]) -> None:
    for messages in run_ranks(refusals_of_coupled_decay, 2, setups["fp32"]):
        assert len(messages) == 2
        for message in messages:
            assert "weight_decay = 0.02 with decoupled = False under NVMe offload" in message
            assert "AdaiW" in message
