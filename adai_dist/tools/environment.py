"""The software and hardware of a measurement, for its records."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python, torch, this package and others; None for packages that are not installed."""
    found: dict[str, str | None] = {"adai_dist": _version("adai-dist"), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    return found | {package: _version(package) for package in packages}


def hardware(device_type: str) -> dict[str, Any]:
    """Return the names of the processor, the system and, if it was used, the GPU."""
    found: dict[str, Any] = {"cpu": _cpu_name(), "num_cpus": os.cpu_count(), "system": platform.platform()}
    if device_type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def git_commit() -> str | None:
    """Return the commit of the package's sources, with "+" if they were changed since; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(Path(__file__).parents[1]), *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed package may be inside an unrelated repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """Return the name that Linux gives the processor, because platform.processor() returns only its architecture."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
