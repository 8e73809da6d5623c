"""DeepSpeed's engines on one CUDA device: the oracle's trajectory, and no synchronisation beyond DeepSpeed's own."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.integrations.deepspeed_setups import BF16, CLIPPED, COUPLED, PROBLEM, zero
from tests.problems import Problem, to_numpy, worst_relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU = {"device": "cpu"}
ROUNDED = replace(CLIPPED, dtype=torch.bfloat16)  # gradients that the model's dtype represents exactly
CASES: dict[str, tuple[dict[str, Any], Problem]] = {
    "no ZeRO": (zero(0), PROBLEM),
    "ZeRO 1": (zero(1), CLIPPED),
    "ZeRO 2": (zero(2), CLIPPED),
    "ZeRO 2, coupled decay": (zero(2), COUPLED),
    "ZeRO 3": (zero(3, sub_group_size=50), CLIPPED),
    "ZeRO 3, coupled decay": (zero(3, sub_group_size=50), COUPLED),
    "ZeRO 2, offload": (zero(2, offload_optimizer=CPU), CLIPPED),
    "ZeRO 3, offload": (zero(3, offload_optimizer=CPU, offload_param=CPU), CLIPPED),
    "BF16_Optimizer": (zero(1) | BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, ROUNDED),
}


class Products(nn.Module):
    """A model with the gradients of the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.params = nn.ParameterDict(
            {spec.name.replace(".", "_"): nn.Parameter(problem.initial(spec).float()) for spec in problem.specs()}
        )

    def by_name(self) -> dict[str, nn.Parameter]:
        return {spec.name: self.params[spec.name.replace(".", "_")] for spec in self.problem.specs()}

    def forward(self, step: int) -> Tensor:
        total = 0.0
        for name, param in self.by_name().items():
            gradient = self.problem.gradient(next(s for s in self.problem.specs() if s.name == name), step)
            assert gradient is not None
            total = total + (param.float() * gradient.to(param.device, torch.float32)).sum()
        assert isinstance(total, Tensor)
        return total


def engine_of(config: dict[str, Any], problem: Problem, accelerator: str) -> Any:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", CROSS_RANK="0", CROSS_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DS_ACCELERATOR=accelerator)
    import deepspeed

    import adai_dist  # noqa: F401  makes the names known

    model = Products(problem)
    common = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": problem.max_grad_norm or 0.0}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=problem.param_groups(model.by_name()),
        config=common | {"optimizer": {"type": "AdaiV2", "params": {"lr": 1.0}}} | config,
    )
    return engine


def trajectory(config: dict[str, Any], problem: Problem, accelerator: str = "cuda") -> dict[str, np.ndarray]:
    engine = engine_of(config, problem, accelerator)
    from deepspeed.utils import safe_get_full_fp32_param

    for step in range(problem.steps):
        engine.backward(engine(step))
        engine.step()
    params = engine.module.by_name()
    if config["zero_optimization"]["stage"] == 0:
        return {name: to_numpy(param.cpu()) for name, param in params.items()}
    return {name: to_numpy(safe_get_full_fp32_param(param).cpu()) for name, param in params.items()}


def num_waits(optimizer_type: str, stage: int) -> int:
    """Count the synchronisations of a step, as torch reports them."""
    engine = engine_of(
        zero(stage) | BF16 | {"optimizer": {"type": optimizer_type, "params": {"lr": 0.1}}}, PROBLEM, "cuda"
    )
    for step in range(3):
        engine.backward(engine(step))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.step()
        torch.cuda.set_sync_debug_mode("default")
    return len(caught)


def in_new_process(function: Any, *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@pytest.mark.parametrize("name", CASES)
def test_every_stage_follows_the_oracle(name: str) -> None:
    config, problem = CASES[name]
    oracle, _ = problem.solve()
    found = in_new_process(trajectory, config, problem)
    error = worst_relative_error(found, oracle, problem)
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_waits_no_more_often_than_with_adamw(stage: int) -> None:
    assert in_new_process(num_waits, "AdaiV2", stage) <= in_new_process(num_waits, "AdamW", stage)
