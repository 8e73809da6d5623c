"""What holds for the tests of integrations."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# DeepSpeed compiles its operators when they are first used, which takes minutes: once, before any test's time runs.
BUILD = """
from deepspeed.accelerator import get_accelerator
for name in ("ShareMemCommBuilder", "PinMemoryBuilder", "AsyncIOBuilder", "CPUAdamBuilder"):
    builder = get_accelerator().create_op_builder(name)
    if builder.is_compatible(verbose=False):
        builder.load(verbose=False)
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    is_needed = any(HERE in item.path.parents and "deepspeed" in item.path.name for item in session.items)
    if is_needed and find_spec("deepspeed") is not None and not session.config.option.collectonly:
        command = [sys.executable, "-c", BUILD]
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            pytest.exit(f"DeepSpeed's operators cannot be compiled:\n{built.stdout}\n{built.stderr}", returncode=1)
