"""`import adai_dist` loads torch and nothing that is optional, and touches no GPU."""

from __future__ import annotations

import json
import subprocess
import sys

OPTIONAL = {
    "accelerate",
    "datasets",
    "deepspeed",
    "hypothesis",
    "matplotlib",
    "mpi4py",
    "omegaconf",
    "pandas",
    "pytest",
    "tensorboard",
    "tqdm",
    "transformers",
    "yaml",
}
NOT_CORE = ("adai_dist.cli", "adai_dist.recipes", "adai_dist.tools")
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")
REGISTRATION = {
    "adai_dist.integrations",
    "adai_dist.integrations.import_hooks",
    "adai_dist.integrations.torch_extension_lock",
    "adai_dist.integrations.deepspeed",
    "adai_dist.integrations.deepspeed.ignored_optimizer",
    "adai_dist.integrations.deepspeed.optimizer_names",
    "adai_dist.integrations.deepspeed.registration",
    "adai_dist.integrations.deepspeed.transformers_trainer",
    "adai_dist.integrations.lightning",
    "adai_dist.integrations.zero_redundancy",
}

PROGRAM = """
import json, sys
import torch
after_torch = set(sys.modules)
import adai_dist
print(json.dumps({
    "new": sorted(set(sys.modules) - after_torch),
    "cuda": torch.cuda.is_initialized(),
    "process_group": torch.distributed.is_available() and torch.distributed.is_initialized(),
}))
"""


def test_importing_the_package_loads_nothing_optional_and_starts_no_device() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    found = json.loads(finished.stdout)
    assert "adai_dist.optimizer" in found["new"]
    assert not {name for name in found["new"] if name.split(".")[0] in OPTIONAL}
    assert not {name for name in found["new"] if name.startswith(NOT_CORE)}
    assert not {name for name in found["new"] if name.startswith(COMPILER)}, "a second of CPU time in every rank"
    assert {name for name in found["new"] if name.startswith("adai_dist.integrations")} == REGISTRATION
    assert not found["cuda"]
    assert not found["process_group"]
