"""`import adai_dist` registers the optimizers with DeepSpeed in either order of the two imports."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from adai_dist import Adai, AdaiV2, AdaiW
from adai_dist.optimizer import AdaptiveInertia
from adai_dist.optimizer.variants import OPTIMIZERS
from tests.integrations.deepspeed_engines import launched, set_environment
from tests.integrations.deepspeed_setups import zero
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

PROGRAM = """
import sys
{imports}
import torch
from torch import nn
model = nn.Linear(3, 2)
config = {{
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {{"type": "AdaiW", "params": {{"lr": 0.1}}}},
    "zero_optimization": {{"stage": 1}},
}}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
engine.backward(engine(torch.ones(1, 3)).sum())
engine.step()
print(type(engine.basic_optimizer).__name__, float(engine.basic_optimizer.inertia_mean) > 0, flush=True)
torch.distributed.destroy_process_group()
"""

ORDERS = {
    "adai_dist first": "import adai_dist\nassert 'deepspeed' not in sys.modules\nimport deepspeed",
    "deepspeed first": "import deepspeed\nimport adai_dist",
    "register() as well": "import adai_dist\nadai_dist.register()\nimport deepspeed\nadai_dist.register()",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_the_imports_does_not_matter(order: str) -> None:
    environment = os.environ | launched(0, 1, "0")
    program = PROGRAM.format(imports=ORDERS[order])
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "AdaiW True"


class Mine(AdaiW):
    """Subclass defined by a user."""


def class_and_groups(optimizer: Any, name: str | None) -> tuple[str, bool, list[dict[str, Any]]]:
    """Return class, binding and hyperparameters of the optimizer of an engine configured without special flags."""
    set_environment()
    import deepspeed

    model = nn.Linear(3, 2)
    named = {"optimizer": {"type": name, "params": {"lr": 0.1, "betas": [0.2, 0.9], "eps": 0.01}}} if name else {}
    params = list(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer(params) if isinstance(optimizer, type) else optimizer,
        model_parameters=params,
        config={"train_micro_batch_size_per_gpu": 1, **zero(1), **named},
        dist_init_required=False,
    )
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    from adai_dist.integrations.deepspeed.zero_mean_source import ZeroMeanSource

    basic = engine.basic_optimizer
    groups = [{key: value for key, value in group.items() if key != "params"} for group in basic.param_groups]
    return type(basic).__name__, isinstance(basic.mean_source, ZeroMeanSource), groups


class DefaultLR(Mine):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)


def callable_client(params: Any) -> AdaptiveInertia:
    return AdaiV2(params, lr=0.1, dampening=0.5)


@pytest.mark.parametrize("cls", OPTIMIZERS.values())
def test_the_json_selects_the_optimizer_by_either_spelling_and_sets_its_hyperparameters(
    cls: type[AdaptiveInertia],
) -> None:
    for spelling in (cls.__name__, cls.__name__.lower()):
        ((name, is_bound, (group,)),) = run_ranks(class_and_groups, 1, None, spelling)
        assert (name, is_bound) == (cls.__name__, True)
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.1, (0.2, 0.9), 0.01)
        assert group["decoupled"] is (cls is not Adai)


@pytest.mark.parametrize(("client", "name"), [(DefaultLR, "DefaultLR"), (callable_client, "AdaiV2")])
def test_a_client_optimizer_is_bound_as_an_instance_of_a_subclass_and_as_a_callable(client: Any, name: str) -> None:
    ((found, is_bound, groups),) = run_ranks(class_and_groups, 1, client, None)
    assert (found, is_bound) == (name, True)
    assert [group["lr"] for group in groups] == [0.1]


def adamw_engine() -> tuple[str, bool]:
    set_environment()
    import deepspeed

    model = nn.Linear(3, 2)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={"train_micro_batch_size_per_gpu": 1, **zero(2)},
        dist_init_required=False,
    )
    return type(engine.basic_optimizer).__name__, "step" in vars(engine.optimizer)


def test_engines_with_other_optimizers_are_left_alone() -> None:
    assert run_ranks(adamw_engine, 1) == [("AdamW", False)]
