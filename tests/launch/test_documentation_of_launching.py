"""docs/launching.md: its table matches its formula, and every script, setting and variable that it names exists."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import pytest
import torch

from adai_dist.recipes.recipe import Run
from tests.recipe_runs import ROOT

PAGE = (ROOT / "docs/launching.md").read_text()
README = (ROOT / "launch/README.md").read_text()
SCRIPTS = {path.name: path.read_text() for path in sorted((ROOT / "launch").iterdir())}
# Absent from torch without CUDA: from NCCL's documentation, or only in torch's headers.
OF_NCCL = {"NCCL_IB_DISABLE", "NCCL_IB_HCA"}


def assumed(name: str) -> float:
    (number,) = re.findall(rf"\b{name} = (\d+) ?[(.,]|\b{name} = (\d+)\.", PAGE)[:1]
    return float(number[0] or number[1])


def microseconds(num_ranks: int, between: float) -> float:
    ranks_of_a_node = min(num_ranks, 8)
    num_nodes = num_ranks // ranks_of_a_node
    hops = math.ceil(math.log2(ranks_of_a_node)) * assumed("within") + math.ceil(math.log2(num_nodes)) * between
    return assumed("launch") + 2 * hops


@pytest.mark.parametrize("num_ranks", [8, 1024, 16384])
def test_the_table_of_latencies_matches_the_formula(num_ranks: int) -> None:
    (row,) = re.findall(rf"^\| {num_ranks:,} \| (.*) \|$", PAGE, re.MULTILINE)
    nodes, rdma, tcp, share = row.split(" | ")
    assert nodes == f"{num_ranks // 8:,}"
    assert rdma == f"{microseconds(num_ranks, assumed('between')):,.0f}"
    (over_tcp,) = re.findall(r"For TCP, between = (\d+)", PAGE)
    assert tcp == f"{microseconds(num_ranks, float(over_tcp)):,.0f}"
    assert share == f"{microseconds(num_ranks, assumed('between')) / 0.5e6:.3%}".replace("%", " %")


@pytest.mark.parametrize("text", [PAGE, README], ids=["launching.md", "README.md"])
def test_every_named_file_exists(text: str) -> None:
    named = re.findall(r"\b((?:launch|configs|tests|docs)/[\w./-]*\w\.\w+)", text)
    assert len(set(named)) >= 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_script_is_in_a_table() -> None:
    for name in SCRIPTS.keys() - {"README.md", "hostfile.example", "Dockerfile.dockerignore"}:
        assert f"launch/{name}" in PAGE + README, name


@pytest.mark.parametrize("text", [PAGE, README], ids=["launching.md", "README.md"])
def test_torch_reads_every_variable(text: str) -> None:
    variables = set(re.findall(r"\b((?:TORCH|NCCL|GLOO|PET)_[A-Z0-9_]+)", text)) - {"TORCH_ENV", "TORCH_CUDA_ARCH_LIST"}
    known = strings_of_torch()
    unknown = {name for name in variables - OF_NCCL if name.encode() not in known}
    # torchrun derives these from its options
    unknown -= {name for name in unknown if name.startswith("PET_") and option_of(name) in known}
    assert not unknown
    assert variables


def option_of(name: str) -> bytes:
    return b"--" + name.removeprefix("PET_").lower().replace("_", "-").encode()


@functools.cache
def strings_of_torch() -> bytes:
    package = Path(torch.__file__).parent
    texts = [*package.glob("distributed/**/*.py"), *package.glob("include/torch/csrc/distributed/c10d/*.hpp")]
    libraries = [package / "lib" / name for name in ("libc10.so", "libtorch_cpu.so", "libtorch_python.so")]
    return b"".join(path.read_bytes() for path in [*texts, *libraries])


def test_every_setting_of_a_script_is_defined_in_one() -> None:
    scripts = "".join(SCRIPTS.values())
    knobs = {name for name in re.findall(r"\b([A-Z][A-Z_]+)=", PAGE) if not re.match(r"(TORCH|NCCL|GLOO|PET)_", name)}
    assert {"NUM_NODES", "MASTER_ADDR", "MAX_RESTARTS"} <= knobs
    assert [name for name in sorted(knobs) if not re.search(rf"^{name}=\$\{{{name}:-", scripts, re.MULTILINE)] == []


def test_every_setting_of_a_run_exists_with_the_stated_default() -> None:
    settings = set(re.findall(r"`run\.(\w+)", PAGE))
    assert settings <= set(Run.model_fields)
    assert f"| `run.timeout` of a recipe; `init_process_group(timeout=...)` | {Run().timeout} s;" in PAGE


def test_the_seconds_before_the_time_limit_are_those_of_the_script() -> None:
    (seconds,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)", SCRIPTS["slurm.sbatch"], re.MULTILINE)
    assert f"`#SBATCH --signal=B:USR1@{seconds}`" in PAGE
    (patience,) = re.findall(
        r"^CHECKPOINT_SECONDS=\$\{CHECKPOINT_SECONDS:-(\d+)", SCRIPTS["slurm.sbatch"], re.MULTILINE
    )
    assert int(seconds) >= int(patience) + 60, "Slurm may send the signal a minute early or late"
    assert f"`launch/slurm.sbatch` and `launch/k8s.yaml`: {patience} |" in PAGE
    assert f'TORCH_ELASTIC_SHUTDOWN_TIMEOUT, value: "{patience}"' in SCRIPTS["k8s.yaml"]
