"""Kernel tests under NVIDIA's compute-sanitizer: no access out of bounds, no race, no uninitialised memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adai_dist.kernels import build

ROOT = Path(__file__).parent.parent.parent
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
TESTS = "(every_size and (seven or tiles or between)) or (alignment and not float32)"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, which comes with the CUDA toolkit"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    build.load(build.CUDA)  # compiled outside of the sanitizer
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=adai"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_cuda_kernels.py"]
    command += ["-k", TESTS]
    # Without torch's caching allocator, every tensor is an allocation whose bounds the sanitizer knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
