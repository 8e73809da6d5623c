"""DeepSpeed compiles its operators when they are first used, which takes minutes: once, before any test's time runs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integrations.conftest import BUILD


def pytest_collection_finish(session: pytest.Session) -> None:
    here = Path(__file__).parent
    runs = any(item.path.parent == here and item.get_closest_marker("distributed") for item in session.items)
    if runs and find_spec("deepspeed") is not None and not session.config.option.collectonly:
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, check=True)
