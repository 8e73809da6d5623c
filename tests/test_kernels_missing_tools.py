"""Machines that cannot compile the kernels: the optimizer takes the same steps, and warns once why it is slower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

# Steps two optimizers, and prints their errors against the float64 oracle.
PROGRAM = """
import json, sys
from dataclasses import replace
import torch
from adai_dist import AdaiV2
from tests.problems import THREE_GROUPS, relative_error
from tests.variants import solve, solve_plainly

problem = replace(THREE_GROUPS, dtype=torch.float32)
oracle, _ = problem.solve()
device = torch.device(sys.argv[1])
with device:
    optimizer = AdaiV2([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
errors = [relative_error(solution(problem), oracle, problem) for solution in (solve, solve_plainly)]
print(json.dumps({"errors": errors, "kernels": repr(optimizer).splitlines()[-1]}))
"""


def run(folder: Path, device: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Take steps in a process that finds neither tools nor a compiled library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ADAI_DIST_", "CXX", "LOCAL_"))}
    bare = {"PATH": str(folder), "TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, device],
        env={**kept, **bare, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_without_a_compiler_steps_are_exact_and_one_warning_states_the_reason(tmp_path: Path) -> None:
    finished = run(tmp_path, "cpu")
    assert finished.returncode == 0, finished.stderr
    facts = json.loads(finished.stdout)
    error, error_of_plain_torch = facts["errors"]
    assert error < 2 * error_of_plain_torch
    assert facts["kernels"] == "Kernels: cpu: the equations (foreach)"
    (warning,) = finished.stderr.splitlines()
    assert warning.startswith("no compiled kernels for cpu, stepping with the equations (foreach): ")
    assert "kernels need a C++ compiler; got none by the name 'c++' in PATH; install g++" in warning
    assert not (tmp_path / "extensions").exists()


def test_without_a_compiler_an_optimizer_that_requires_kernels_raises_an_error_with_the_reason(tmp_path: Path) -> None:
    finished = run(tmp_path, "cpu", ADAI_DIST_KERNELS="require")
    assert finished.returncode == 1
    assert finished.stdout == ""
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: compiled kernels are required, ")
    assert "kernels need a C++ compiler; got none by the name 'c++' in PATH; install g++" in last


def test_without_a_compiler_there_is_no_warning_if_kernels_are_off(tmp_path: Path) -> None:
    finished = run(tmp_path, "cpu", ADAI_DIST_KERNELS="off")
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tools", ["none", "all but nvcc"])
def test_without_nvcc_steps_on_cuda_work_and_one_warning_states_the_reason(tmp_path: Path, tools: str) -> None:
    environment = {"CUDA_HOME": str(tmp_path)} | ({"PATH": os.environ["PATH"]} if tools != "none" else {})
    finished = run(tmp_path, "cuda", **environment)
    assert finished.returncode == 0, finished.stderr
    (warning,) = [line for line in finished.stderr.splitlines() if "no compiled kernels for cuda" in line]
    assert ("need nvcc" if tools != "none" else "need a C++ compiler") in warning
