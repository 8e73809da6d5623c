"""A step of the compiled kernels needs almost no memory besides parameters, gradients and states."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# The operating system counts the peak of resident memory, including allocations in C++.
PROGRAM = """
import ctypes, json, re
from pathlib import Path
import torch
from torch import nn
from adai_dist import Adai

def kibibytes(name):
    return int(re.search(rf"^{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

def extra_kibibytes(step):
    step()  # makes the states
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kibibytes("VmRSS")
    step()
    return kibibytes("VmHWM") - before

params = [nn.Parameter(torch.zeros(2**20)) for _ in range(32)]
for param in params:
    param.grad = torch.ones_like(param)
adai = Adai(params, lr=1e-3, max_grad_norm=1.0)
adamw = torch.optim.AdamW(params, foreach=True)
print(json.dumps({"adai": extra_kibibytes(adai.step), "kernels": repr(adai), "foreach": extra_kibibytes(adamw.step)}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory as Linux counts it")
def test_a_step_of_33_million_parameters_takes_less_than_one_mebibyte() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=240)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    if "compiled kernels" not in found["kernels"]:
        pytest.skip("the kernels cannot be compiled here")
    assert found["adai"] <= 1024
    assert found["foreach"] > 100 * 1024, "the measurement sees temporaries"
