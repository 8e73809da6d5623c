"""The mean under ZeRO remains that of the stored second moments over any number of steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.integrations.deepspeed_engines import set_environment
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

BETA2S = (0.99, 0.999, 0.99999)
LOOKS = 20


def worst_error(stage: int, beta2: float, num_steps: int) -> float:
    """Return the largest relative difference between mean and states in LOOKS comparisons. Collective: all ranks."""
    set_environment()
    import deepspeed

    model = nn.Linear(30, 20)
    adai: dict[str, Any] = {"type": "AdaiV2", "params": {"lr": 1e-3, "betas": [0.1, beta2]}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "optimizer": adai,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    optimizer: Any = engine.basic_optimizer
    num_elements = 30 * 20 + 20
    random = torch.Generator().manual_seed(dist.get_rank())
    errors: list[float] = []
    for step in range(1, num_steps + 1):
        engine.backward((engine(torch.randn(4, 30, generator=random)) - 1.0).square().mean())
        engine.step()
        if step % (num_steps // LOOKS) == 0:
            total = sum(state["exp_avg_sq"].double().sum() for state in optimizer.state.values())
            assert isinstance(total, torch.Tensor)
            dist.all_reduce(total)
            mean = total.item() / (1.0 - beta2**step) / num_elements
            errors.append(abs(optimizer.inertia_mean.item() / mean - 1))
    engine.destroy()
    return max(errors)


def errors(stage: int, beta2: float, num_steps: int) -> list[float]:
    return run_ranks(worst_error, 2, stage, beta2, num_steps, timeout=3000.0)


@pytest.mark.parametrize("beta2", BETA2S)
@pytest.mark.parametrize("stage", [1, 3])
def test_the_mean_is_that_of_the_stored_moments(stage: int, beta2: float) -> None:
    assert max(errors(stage, beta2, 300)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("beta2", [0.999, 0.99999])
def test_the_mean_does_not_drift_in_a_hundred_thousand_steps(beta2: float) -> None:
    assert max(errors(1, beta2, 100_000)) < 1e-6
