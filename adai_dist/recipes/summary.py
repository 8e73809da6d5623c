"""The summary of a run: what came out, and on what it ran."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from adai_dist.recipes.world import World

Summary = dict[str, Any]

_PACKAGES = ("torch", "transformers", "numpy", "omegaconf")
_IN_TABLE = (
    ("run", "run", "{}"),
    ("val_loss", "held-out loss (nats per {unit})", "{:.4f}"),
    ("val_error", "held-out images named wrongly", "{:.2%}"),
    ("train_loss", "training loss, last log step", "{:.4f}"),
    ("optimizer", "optimizer", "{}"),
    ("engine", "engine", "{}"),
    ("world_size", "ranks", "{}"),
    ("num_parameters", "parameters", "{:,}"),
    ("steps", "steps", "{:,}"),
    ("{unit}s", "{unit}s seen", "{:,}"),
    ("seconds", "seconds of training", "{:.1f}"),
    ("{unit}s_per_second", "{unit}s per second", "{:,.0f}"),
    ("optimizer_share", "optimizer's share of a step", "{:.1%}"),
    ("skipped_steps", "skipped steps (non-finite gradient)", "{}"),
    ("folder", "folder", "{}"),
)


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes FOLDER/summary.json, whose presence says that the run has finished."""
    writing = folder / "summary.json.writing"
    writing.write_text(json.dumps(summary, indent=2) + "\n")
    writing.replace(folder / "summary.json")


def summary_table(summary: Summary) -> str:
    """The summary for people: aligned plain text."""
    named = [(key.format(**summary), label.format(**summary), form) for key, label, form in _IN_TABLE]
    rows = [(label, form.format(summary[key])) for key, label, form in named if summary.get(key) is not None]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def describe_environment(world: World) -> Summary:
    """Versions, git commit and hardware, as entries of a summary."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "versions": {
            "adai_dist": importlib.metadata.version("adai-dist"),
            "python": platform.python_version(),
            **versions,
        },
        "git_commit": _git_commit(Path(__file__).parent),
        "hardware": {
            "device": _device_name(world.device),
            "cpu": _cpu_name(),
            "cpu_cores": os.cpu_count(),
            "platform": sys.platform,
        },
    }


def _git_commit(folder: Path) -> str | None:
    """The commit that the package's sources are at, with "+" if they were changed since; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(folder), *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed packages may lie inside an unrelated repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
