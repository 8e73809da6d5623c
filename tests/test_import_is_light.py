"""`import adai_dist` loads torch but nothing optional and uses no GPU; help texts load no heavy packages."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

OPTIONAL = {
    "accelerate",
    "datasets",
    "deepspeed",
    "hypothesis",
    "matplotlib",
    "mpi4py",
    "omegaconf",
    "pandas",
    "pydantic",
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


HELP = """
import contextlib, io, json, sys
import torch
after_torch = set(sys.modules)
from adai_dist.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert "usage: adai-dist" in text.getvalue()
print(json.dumps(sorted(set(sys.modules) - after_torch)))
"""


def output_of(program: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", program, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return json.loads(finished.stdout)


def test_importing_the_package_loads_nothing_optional_and_initialises_no_device() -> None:
    found = output_of(PROGRAM)
    assert "adai_dist.optimizer" in found["new"]
    assert not {name for name in found["new"] if name.split(".")[0] in OPTIONAL}
    assert not {name for name in found["new"] if name.startswith(NOT_CORE)}
    assert not {name for name in found["new"] if name.startswith(COMPILER)}, "a second of CPU time in every rank"
    assert {name for name in found["new"] if name.startswith("adai_dist.integrations")} == REGISTRATION
    assert not found["cuda"]
    assert not found["process_group"]


COMMANDS = ("sweep", "run", "compare", "bench", "soak", "build", "to-universal")


@pytest.mark.parametrize(
    ("commands", "unwanted"),
    [
        ([[], *([name] for name in COMMANDS)], OPTIONAL),
        # its keys are those of the recipe
        ([["train"]], {"transformers", "datasets", "deepspeed", "matplotlib", "tensorboard", "accelerate"}),
    ],
    ids=["others", "train"],
)
def test_help_loads_no_heavy_packages(commands: list[list[str]], unwanted: set[str]) -> None:
    loaded = output_of(HELP, json.dumps(commands))
    assert not {name for name in loaded if name.split(".")[0] in unwanted}
