"""max_consecutive_skips under DeepSpeed: all ranks raise the same error in the same engine.step()."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integrations.deepspeed_engines import Family, Prescribed, backward, start
from tests.integrations.deepspeed_setups import BF16, CLIPPED, COUPLED, CPU_OFFLOAD, FP32_GRADIENTS, Setup, zero
from tests.test_skipped_steps import GRADIENT, PARAMETER, STATE

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

LIMIT = 3
FIRST_BAD = 4
NUM_STEPS = 9
UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1000, "hysteresis": 1}}


@dataclass(frozen=True)
class CorruptedStates(Setup):
    """Setup in which rank 1 corrupts its states before the first bad step, or has infinite gradients in all of them."""

    write: str = ""


def in_place(engine: Any) -> None:
    for state in engine.basic_optimizer.state.values():
        state["exp_avg"].fill_(math.nan)


def replaced(engine: Any) -> None:
    for state in engine.basic_optimizer.state.values():
        state["exp_avg"] = torch.full_like(state["exp_avg"], math.inf)


def second_moments(engine: Any) -> None:
    for state in engine.basic_optimizer.state.values():
        state["exp_avg_sq"].fill_(math.nan)


def masters(engine: Any) -> None:
    for flat in engine.basic_optimizer.mean_source.flat_partitions:
        flat.data.fill_(math.inf)


WRITES: dict[str, Callable[[Any], None]] = {
    "in place": in_place,
    "replaced": replaced,
    "exp_avg_sq": second_moments,
    "masters": masters,
}


def walk(setup: CorruptedStates) -> tuple[list[str], int, list[str]]:
    """Return the errors of engine.step() up to the first one, the number of skipped steps, and the log messages."""
    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(listener)
    setup_of_rank = replace(setup, bad_steps=() if setup.write else tuple(range(FIRST_BAD, NUM_STEPS)))
    engine = start(setup_of_rank, Prescribed(setup_of_rank))
    engine.basic_optimizer.max_consecutive_skips = LIMIT
    raised: list[str] = []
    for step in range(NUM_STEPS):
        if step == FIRST_BAD and setup.write and dist.get_rank() == 1:
            WRITES[setup.write](engine)
        backward(engine, setup_of_rank, step)
        try:
            engine.step()
        except RuntimeError as error:
            raised.append(str(error))
            break
        raised.append("")
    num_skipped = int(engine.basic_optimizer.num_skipped_steps)
    engine.destroy()
    logging.getLogger("adai_dist").removeHandler(listener)
    return raised, num_skipped, messages


GRADIENTS = {
    "stage-0": zero(0),
    "stage-0-bf16": zero(0) | BF16,
    "stage-1": zero(1),
    "stage-1-bf16-unchecked": zero(1) | UNCHECKED,
    "stage-2-fp16": zero(2) | FP16,
    "stage-2-offload": zero(2, **CPU_OFFLOAD),
    "bf16-optimizer": zero(1) | BF16 | FP32_GRADIENTS,
    "stage-3": zero(3),
    "stage-3-fp16": zero(3, sub_group_size=50) | FP16,
}
STATES = {name: GRADIENTS[name] for name in ("stage-1", "stage-2-offload", "bf16-optimizer", "stage-3")}
FAMILY = Family(
    {f"{name} gradients": CorruptedStates(config, CLIPPED) for name, config in GRADIENTS.items()}
    | {
        f"{name} {write}": CorruptedStates(config, CLIPPED, write=write)
        for name, config in STATES.items()
        for write in ("in place", "replaced", "exp_avg_sq")
    }
    | {
        f"{name} masters": CorruptedStates(GRADIENTS[name], COUPLED, write="masters") for name in ("stage-1", "stage-3")
    },
    walk,
)


@pytest.mark.parametrize("name", FAMILY.setups)
def test_all_ranks_raise_the_same_error_in_the_same_step(name: str) -> None:
    (raised, num_skipped, messages), (*other, other_messages) = FAMILY.ranks(name)
    assert [raised, num_skipped] == other
    assert ["step skipped on all ranks: " in line for line in messages] == [True] * len(messages), (
        "no other log messages"
    )
    assert len(messages) >= 2
    assert not other_messages
    assert raised[:-1] == [""] * (FIRST_BAD + LIMIT - 1)
    assert num_skipped == LIMIT
    reason = GRADIENT if "gradients" in name else PARAMETER if "masters" in name else STATE
    assert f"max_consecutive_skips={LIMIT} steps in a row must be skipped, got {LIMIT}: " in raised[-1]
    assert reason in raised[-1]


def walk_named_in_the_configuration(setup: Setup) -> int:
    import deepspeed

    from tests.integrations.deepspeed_engines import set_environment

    set_environment()
    config = copy.deepcopy({"train_micro_batch_size_per_gpu": 1, **setup.config})
    config["optimizer"] = {"type": "AdaiV2", "params": {"lr": 1.0, "max_consecutive_skips": 7}}
    engine, *_ = deepspeed.initialize(model=torch.nn.Linear(3, 3), config=config, dist_init_required=False)
    limit = engine.basic_optimizer.max_consecutive_skips
    engine.destroy()
    return limit


NAMED = Family({"stage-1": Setup(zero(1))}, walk_named_in_the_configuration)


def test_the_configuration_can_set_the_limit() -> None:
    assert NAMED.ranks("stage-1") == [7, 7]
