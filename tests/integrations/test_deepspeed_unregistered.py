"""`ADAI_DIST_REGISTER=0`: the import sets no hooks, and steps that depend on them are refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.integrations.deepspeed_engines import launched

HOOKS = """
import sys
import adai_dist
print([type(finder).__name__ for finder in sys.meta_path if type(finder).__module__.startswith("adai_dist")])
"""

ZERO_REDUNDANCY = """
import warnings
import torch
import torch.distributed as dist
import adai_dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
warnings.simplefilter("ignore")
from torch.distributed.optim import ZeroRedundancyOptimizer
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
optimizer = ZeroRedundancyOptimizer([param], adai_dist.AdaiV2, lr=0.1)
{configure}
try:
    optimizer.step()
    print("stepped", float(param[0]) < 1)
except RuntimeError as error:
    print(error)
"""

DEEPSPEED = """
import adai_dist
{register}
import deepspeed
import torch
from torch import nn
model = nn.Linear(3, 2)
config = {{
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {{"stage": {stage}}},
}}
try:
    optimizer = adai_dist.AdaiV2(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    print("stepped", float(engine.basic_optimizer.inertia_mean) > 0, flush=True)
except RuntimeError as error:
    print(error, flush=True)
torch.distributed.destroy_process_group()
"""


def output(program: str, value: str) -> str:
    """Return the last line of the program's output, or of its traceback, for a value of the variable."""
    environment = os.environ | launched(0, 1, "0") | {"ADAI_DIST_REGISTER": value, "ADAI_DIST_KERNELS": "off"}
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return (finished.stdout if finished.returncode == 0 else finished.stderr).splitlines()[-1]


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("", "['_Finder']"),
        ("1", "['_Finder']"),
        (" 0 ", "[]"),
        ("no", "ValueError: ADAI_DIST_REGISTER must be one of 0, 1, got 'no'"),
    ],
)
def test_the_variable_controls_whether_the_import_sets_hooks(value: str, printed: str) -> None:
    assert output(HOOKS, value) == printed


def test_register_sets_the_hooks_of_deepspeed_regardless_of_the_variable() -> None:
    assert output(HOOKS.replace("import adai_dist", "import adai_dist\nadai_dist.register()"), "0") == "['_Finder']"


@pytest.mark.parametrize(
    ("value", "configure", "printed"),
    [
        ("1", "", "stepped True"),
        ("0", "", "AdaiV2 in a ZeroRedundancyOptimizer must be configured, as every rank holds different parameters"),
        ("0", "adai_dist.register()", "AdaiV2 in a ZeroRedundancyOptimizer must be configured"),
        ("0", "optimizer.optim.configure_sharding(num_replicas=1)", "stepped True"),
    ],
)
def test_zero_redundancy_without_its_hook_must_be_configured(value: str, configure: str, printed: str) -> None:
    assert output(ZERO_REDUNDANCY.format(configure=configure), value).startswith(printed)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_without_its_hooks_is_refused(stage: int) -> None:
    printed = output(DEEPSPEED.format(register="", stage=stage), "0")
    assert printed.startswith("DeepSpeed must bind AdaiV2 before it steps it")
    assert "call adai_dist.register() before deepspeed.initialize()" in printed


@pytest.mark.deepspeed
def test_deepspeed_without_zero_in_float32_needs_no_hooks() -> None:
    assert output(DEEPSPEED.format(register="", stage=0), "0") == "stepped True"


@pytest.mark.deepspeed
def test_deepspeed_works_after_an_explicit_registration() -> None:
    assert output(DEEPSPEED.format(register="adai_dist.register()", stage=2), "0") == "stepped True"
