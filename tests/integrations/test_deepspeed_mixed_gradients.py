"""Ranks that use different parameters: ZeRO adds up gradients of different parameters, and that step is skipped."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.integrations.deepspeed_engines import Family, set_environment
from tests.integrations.deepspeed_models import full_tensor
from tests.integrations.deepspeed_setups import BF16, CPU_OFFLOAD, FP32_GRADIENTS, Setup, zero
from tests.problems import to_numpy

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

Uses = tuple[tuple[str, ...], tuple[str, ...]]
"""The parameters that a rank uses in each micro-batch, in order, for two ranks."""

# What happens in the second of three steps; in the others, both ranks use all parameters in the same order.
USES: dict[str, Uses] = {
    "different": (("ac",), ("bc",)),
    "other-order": (("abc",), ("bac",)),
    "other-micro-batch": (("ac", "bc"), ("bc", "ac")),
}
SETUPS = {
    "stage-0": zero(0),
    "stage-0-bf16": zero(0) | BF16,
    "bf16-optimizer": zero(1) | BF16 | FP32_GRADIENTS,
    "stage-1": zero(1),
    "stage-1-overlapped": zero(1, overlap_comm=True),
    "stage-1-offload": zero(1, **CPU_OFFLOAD),
    "stage-2": zero(2),
    "stage-2-bf16-offload": zero(2, **CPU_OFFLOAD) | BF16,
    "stage-3": zero(3),
    "stage-3-offload": zero(3, **CPU_OFFLOAD),
}
MIXED = {
    "different": ("stage-1", "stage-1-overlapped", "stage-2", "stage-3"),
    "other-order": ("stage-1-overlapped", "stage-2"),  # stage 1 reduces after the backward pass, stage 3 sorts
    "other-micro-batch": ("stage-1-overlapped", "stage-2", "stage-3"),
}


class Weighted(nn.Module):
    """Parameters that are added up with different weights, in a given order."""

    def __init__(self) -> None:
        super().__init__()
        for index, name in enumerate("abc"):
            setattr(self, name, nn.Parameter(torch.full((6,), 1.0 + index)))

    def forward(self, order: str, weight: float) -> Tensor:
        total = torch.zeros(())
        for name in order:
            total = total + (getattr(self, name) * (weight * (1 + "abc".index(name)))).float().sum()
        return total


@dataclass
class Walked:
    parameters: list[dict[str, np.ndarray]] = field(default_factory=list)
    """Float32 parameters after each step."""
    num_skipped: list[int] = field(default_factory=list)
    """Number of skipped steps up to each step."""
    warnings: list[str] = field(default_factory=list)


def walk(setup: Setup, uses: Uses) -> Walked:
    """Take three steps. Collective: all ranks."""
    set_environment()
    import deepspeed

    walked, listener = Walked(), logging.Handler()
    listener.emit = lambda record: walked.warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(listener)
    rank, num_micro_batches = dist.get_rank(), len(uses[0])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    engine, *_ = deepspeed.initialize(
        model=Weighted(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": num_micro_batches,
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdaiV2", "params": {"lr": 0.1}},
            **setup.config,
        },
        dist_init_required=False,
    )
    for step in range(3):
        for micro_batch in range(num_micro_batches):
            order = uses[rank][micro_batch] if step == 1 else "abc"
            engine.backward(engine(order, 1.0 + rank + step))
            engine.step()
        named = engine.module.named_parameters()
        walked.parameters.append({name: to_numpy(full_tensor(engine, p, "fp32_param")).copy() for name, p in named})
        walked.num_skipped.append(int(engine.basic_optimizer.num_skipped_steps))
    logging.getLogger("adai_dist").removeHandler(listener)
    return walked


FAMILIES = {
    name: Family({setup: Setup(config) for setup, config in SETUPS.items()}, functools.partial(walk, uses=uses))
    for name, uses in USES.items()
}


def is_mixed(uses: str, name: str) -> bool:
    return name.removesuffix("-offload").removesuffix("-bf16") in MIXED[uses]


@pytest.mark.parametrize("uses", USES)
@pytest.mark.parametrize("name", SETUPS)
def test_a_step_with_mixed_gradients_is_skipped_on_all_ranks(name: str, uses: str) -> None:
    ranks = FAMILIES[uses].ranks(name)
    expected = FAMILIES[uses].ranks("stage-0")[0]
    for walked in ranks:
        before, after = walked.parameters[:2]
        if is_mixed(uses, name):
            assert walked.num_skipped == [0, 1, 1]
            assert all(np.array_equal(after[key], before[key]) for key in before)
        else:
            assert walked.num_skipped == [0, 0, 0]
            for key in before:
                np.testing.assert_allclose(after[key], expected.parameters[1][key], rtol=1e-6)
        assert all(not np.array_equal(walked.parameters[2][key], after[key]) for key in before), "training goes on"
    assert ["let all ranks use the same parameters in the same order" in text for text in ranks[0].warnings] == (
        [True] if is_mixed(uses, name) else []
    )
