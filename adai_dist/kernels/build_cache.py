"""The cache of compiled libraries: its paths, the files beside a library, and the lock for compiling."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import _appdirs

from adai_dist.kernels.lock_holder import LockHolder, read_holder, write_holder
from adai_dist.kernels.wait_notices import notices_while_waiting, write_to_stderr


def library_path(name: str) -> Path:
    """Return the path at which torch's own loader puts the library of this name."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        accelerator = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
        python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
        cache = os.path.realpath(_appdirs.user_cache_dir(appname="torch_extensions"))
        root = os.path.join(cache, f"{python}_{accelerator}")
    return Path(root).absolute() / name / f"{name}.so"


def stamp_path(path: Path) -> Path:
    """Return the path of a library's stamp, which records its inputs."""
    return path.with_suffix(".stamp.json")


def failure_path(path: Path) -> Path:
    """Return the path of the last failure to compile, which the processes that waited for it read."""
    return path.with_suffix(".failure.json")


def log_path(path: Path) -> Path:
    """Return the path of the compiler's output in the last failure, for the user."""
    return path.with_name("build.log")


def read(path: Path) -> dict[str, str]:
    """Read a stamp or a failure; an empty dict if the file is missing or damaged."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, str]", content) if isinstance(content, dict) else {}


def write(path: Path, content: dict[str, str]) -> None:
    """Replace a stamp or a failure atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)


def size_of(path: Path) -> str:
    """Return the size of a file in bytes, as recorded in a stamp; empty if there is no file."""
    try:
        return str(path.stat().st_size) if path.is_file() else ""
    except OSError:
        return ""


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the lock of a folder; a process that has to wait for it announces the holder.

    The system releases the lock when its process ends, however it ends.

    Raises:
        OSError: the folder is not writable, or its file system has no locks.
    """
    import fcntl  # not on Windows

    path = folder / "build.lock"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with notices_while_waiting(lambda: _wait_notice(path), write_to_stderr, early=True):
                fcntl.flock(lock, fcntl.LOCK_EX)
        write_holder(lock, LockHolder.of_this_process())
        try:
            yield
        finally:
            write_holder(lock, None)


def _wait_notice(lock: Path) -> str:
    holder, name = read_holder(lock), lock.parent.name
    if holder is None:
        return f"waiting for another process, which is compiling {name}; it holds {lock}"
    return (
        f"waiting for {holder}, which has been compiling {name} for {holder.age}; if it hangs, end it: it holds {lock}"
    )
