"""The kernels as DeepSpeed operators, compiled by its builders and listed by `ds_report`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipe_runs import run_command

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

# Counts the loads: registering an operator twice is an error.
SOURCE = """
#include <cstdio>
static const int loaded = [] {
  std::FILE* file = std::fopen("@PATH@", "a");
  std::fputc('x', file);
  return std::fclose(file);
}();
extern "C" int adai_tiny() { return loaded; }
"""

BUILD = """
import json, sys
from pathlib import Path
import adai_dist, deepspeed, torch
from adai_dist.kernels import build
from adai_dist.integrations.deepspeed._op_builder import CPUAdaiBuilder
from deepspeed.ops.op_builder.builder import OpBuilder

calls, jit_load = [], OpBuilder.jit_load

def counted(self, verbose=True):
    calls.append([self.name, *self.cxx_args()])
    return jit_load(self, verbose)

OpBuilder.jit_load = counted
folder = Path(sys.argv[1])
extensions = [build.Extension(name, "cpu", (folder / f"{name}.cpp",), ("-O1", f"-D{name}")) for name in "abc"]
new = [build.load(extensions[0]).seconds is not None]                          # DeepSpeed is imported
new += [build.load(extensions[1], build.compile_with_torch).seconds is not None]
ops = [CPUAdaiBuilder(extension).load() for extension in extensions * 2]       # only c is not there yet
found = [build.find(extension) is not None for extension in extensions]
print(json.dumps({
    "new": new,
    "found": found,
    "calls": calls,
    "ops": all(op is torch.ops.adai_dist for op in ops),
    "loaded": [(folder / name).read_text() for name in "abc"],
}))
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_deepspeed_compiles_missing_operators_and_loads_each_library_once(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.cpp").write_text(SOURCE.replace("@PATH@", str(tmp_path / name)))
    program = tmp_path / "program.py"
    program.write_text(BUILD)
    extensions = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    finished = run_command([sys.executable, str(program), str(tmp_path)], **extensions)
    assert finished.returncode == 0, finished.stderr
    facts: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    assert facts == {
        "new": [True, True],
        "found": [True, True, True],
        "calls": [["a", "-O1", "-Da"], ["c", "-O1", "-Dc"]],
        "ops": True,
        "loaded": ["x", "x", "x"],
    }


def report(**environment: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the lines of `ds_report` about the operators of this package: compatibility, and reasons against it."""
    command = [sys.executable, "-m", "adai_dist", "run", "-m", "deepspeed.env_report"]
    finished = run_command(command, **environment)
    assert finished.returncode == 0, finished.stderr
    text = re.sub(r"\x1b\[\d+m", "", finished.stdout)
    assert "deepspeed install path" in text, "the report is complete"
    compatible = re.findall(r"^(cpu_adai|fused_adai) \.+ \[NO\] \.+ \[(\w+)\]", text, re.MULTILINE)
    return dict(compatible), dict(re.findall(r"\[WARNING\] +(cpu_adai|fused_adai): (.*)", text))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_ds_report_lists_the_operators_and_names_what_is_missing(tmp_path: Path) -> None:
    has_compiler = shutil.which("c++") is not None
    compatible, reasons = report()
    assert compatible == {"cpu_adai": "OKAY" if has_compiler else "NO", "fused_adai": "NO"}
    assert reasons["fused_adai"].startswith("kernels for CUDA need ")
    compatible, reasons = report(PATH=str(tmp_path))
    assert compatible == {"cpu_adai": "NO", "fused_adai": "NO"}
    assert reasons["cpu_adai"].startswith("kernels need a C++ compiler; ")
