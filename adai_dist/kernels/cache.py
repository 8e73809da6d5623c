"""Where compiled libraries lie, what lies beside them, and whose turn it is to compile."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import _appdirs


def library_path(name: str) -> Path:
    """Where torch's own loader puts the library of this name."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        accelerator = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
        python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
        cache = os.path.realpath(_appdirs.user_cache_dir(appname="torch_extensions"))
        root = os.path.join(cache, f"{python}_{accelerator}")
    return Path(root).absolute() / name / f"{name}.so"


def stamp_path(path: Path) -> Path:
    """What a library was made from."""
    return path.with_suffix(".stamp.json")


def failure_path(path: Path) -> Path:
    """How the last compilation failed, for the processes that waited for it."""
    return path.with_suffix(".failure.json")


def log_path(path: Path) -> Path:
    """The output of the last compilation that failed, for people."""
    return path.with_name("build.log")


def read(path: Path) -> dict[str, str]:
    """The content of such a file; nothing if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write(path: Path, content: dict[str, str]) -> None:
    """Whoever reads it meanwhile gets all of it or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """One process at a time. The system frees the lock of a process that ends, however it ends.

    Raises:
        OSError: the folder is not writable, or its file system has no locks.
    """
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
