"""All ranks skip together, name what was not finite, and end together after too many consecutive skips."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from adai_dist import AdaiV2
from adai_dist.sharding.local_tensor import local_tensor
from tests.spawn import run_ranks
from tests.test_skipped_steps import BEYOND, GRADIENT, PARAMETER, STATE

pytestmark = pytest.mark.distributed

LIMIT = 3
RANK = 1
"""The rank with the fault; the other one is the main rank."""


def make(**options: Any) -> tuple[nn.Module, AdaiV2]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    fully_shard(model[2])
    fully_shard(model)
    return model, AdaiV2(model.named_parameters(), lr=0.1, max_consecutive_skips=LIMIT, **options)


def step(model: nn.Module, optimizer: AdaiV2, corrupt: Callable[[], object] | None = None) -> str:
    """Take one step with the same data on all ranks, and return what it raised."""
    optimizer.zero_grad()
    model(torch.randn(8, 6, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    if corrupt is not None:
        corrupt()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def shard(tensor: Any) -> Tensor:
    return local_tensor(tensor.detach())


def first(optimizer: AdaiV2) -> Any:
    return optimizer.params()[0]


FAULTS: dict[str, tuple[Callable[[AdaiV2], object], str]] = {
    "gradient": (lambda o: shard(first(o).grad)[0].fill_(math.nan), GRADIENT),
    "large gradients": (lambda o: shard(first(o).grad).fill_(3e38), BEYOND),
    "exp_avg_sq": (lambda o: shard(o.state[first(o)]["exp_avg_sq"])[0].fill_(math.inf), STATE),
    "exp_avg": (lambda o: o.state[first(o)]["exp_avg"].mul_(math.nan), STATE),
    "local exp_avg": (lambda o: o.state[first(o)]["exp_avg"].to_local()[0].fill_(math.nan), STATE),
    "replaced exp_avg": (
        lambda o: o.state[first(o)].update(exp_avg=o.state[first(o)]["exp_avg"] * math.nan),
        STATE,
    ),
    "parameter": (lambda o: shard(first(o))[0].fill_(math.inf), PARAMETER),
}


def walk(fault: str) -> tuple[list[str], list[str], list[bytes]]:
    """Return the errors of the steps, the log, and this rank's tensors before the fault and at the end."""
    logged: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(listener)
    model, optimizer = make(weight_decay=0.1, decoupled=fault != "parameter")
    raised = [step(model, optimizer) for _ in range(2)]
    make_bad, _ = FAULTS[fault]
    is_gradient = "gradient" in fault
    others = optimizer.params()[1:]
    before = bits(others, optimizer)
    for number in range(LIMIT):
        corrupts = dist.get_rank() == RANK and (is_gradient or number == 0)
        raised.append(step(model, optimizer, (lambda: make_bad(optimizer)) if corrupts else None))
    after = bits(others, optimizer)
    logging.getLogger("adai_dist").removeHandler(listener)
    return raised, logged, [before, after]


def bits(params: list[Tensor], optimizer: AdaiV2) -> bytes:
    tensors = [x for p in params for x in (p, *optimizer.state[p].values())]
    return b"".join(shard(x).numpy().tobytes() for x in tensors)


def walk_all() -> dict[str, Any]:
    return {fault: walk(fault) for fault in FAULTS}


def test_a_fault_on_one_rank_is_named_on_the_main_rank_and_ends_all_ranks_in_the_same_step() -> None:
    ranks = run_ranks(walk_all, 2)
    for fault, (_, reason) in FAULTS.items():
        (raised, logged, _), (raised_too, logged_on_other, _) = (seen[fault] for seen in ranks)
        assert raised == raised_too, fault
        assert raised[:-1] == [""] * (1 + LIMIT), fault
        assert f"max_consecutive_skips={LIMIT} steps in a row must be skipped, got {LIMIT}: " in raised[-1], fault
        assert reason in raised[-1], fault
        assert not logged_on_other, fault
        # The 1st and the 2nd; an infinite parameter makes gradients of NaN from the second step on.
        assert len(logged) == (3 if fault == "parameter" else 2), (fault, logged)
        assert reason in logged[0], fault
        for seen in ranks:
            before, after = seen[fault][2]
            assert before == after, fault
