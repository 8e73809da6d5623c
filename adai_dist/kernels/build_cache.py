"""Where compiled libraries lie, what lies beside them, and whose turn it is to compile."""

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

from adai_dist.kernels.holder import Holder, read_holder, sign
from adai_dist.kernels.waiting import say, told


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
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, str]", content) if isinstance(content, dict) else {}


def write(path: Path, content: dict[str, str]) -> None:
    """Whoever reads it meanwhile gets all of it or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)


def size_of(path: Path) -> str:
    """The size of a file in bytes, as stamps have it; empty where there is no file."""
    try:
        return str(path.stat().st_size) if path.is_file() else ""
    except OSError:
        return ""


def remove(path: Path) -> None:
    """Remove what has this name, a folder too, if there is anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk, and would outlast the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """One process at a time. The system frees the lock of a process that ends, however it ends.

    Whoever waits says for whom.

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
            with told(lambda: _who_compiles(path), say, soon=True):
                fcntl.flock(lock, fcntl.LOCK_EX)
        sign(lock, Holder.of_this_process())
        try:
            yield
        finally:
            sign(lock, None)


def _who_compiles(lock: Path) -> str:
    holder, name = read_holder(lock), lock.parent.name
    if holder is None:
        return f"waiting for another process, which is compiling {name}; it holds {lock}"
    return (
        f"waiting for {holder}, which has been compiling {name} for {holder.age}; if it hangs, end it: it holds {lock}"
    )
