"""bfloat16 parameters without master weights are warned about, unless a layout keeps float32 parameters."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

from adai_dist import AdaiW
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed


def train(kind: str) -> list[str]:
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    if kind == "bf16":
        fully_shard(model.bfloat16())
    elif kind == "mixed":
        fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    else:
        model = FullyShardedDataParallel(
            model, mixed_precision=MixedPrecision(torch.bfloat16), use_orig_params=True, device_id=torch.device("cpu")
        )
    logged: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(listener)
    optimizer = AdaiW(model.parameters(), lr=0.1, master_weights=False)
    if kind == "mixed, fsdp1":
        optimizer.configure_sharding(model=model)
    for _ in range(2):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        model(torch.ones(2, 6, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    logging.getLogger("adai_dist").removeHandler(listener)
    return logged


def train_all() -> dict[str, list[str]]:
    return {kind: train(kind) for kind in ("bf16", "mixed", "mixed, fsdp1")}


def test_the_main_rank_warns_about_bfloat16_without_master_weights_and_not_about_mixed_precision() -> None:
    main, other = run_ranks(train_all, 2)
    assert other == {"bf16": [], "mixed": [], "mixed, fsdp1": []}
    assert {kind: len(logged) for kind, logged in main.items()} == {"bf16": 1, "mixed": 0, "mixed, fsdp1": 0}
    assert "parameters are stepped in bfloat16 without master weights, 4 of 4 on this rank" in main["bf16"][0]
