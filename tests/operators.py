"""Compiles what the tests load, before the first of them: our kernels, and operators of DeepSpeed.

They lie in a folder of this checkout, for one version of all that they are linked with, so that the tests neither
find nor leave anything elsewhere. torch's loader creates a file `lock` even where nothing is to be compiled, and waits
for ever for one whose process was killed, as tests do with ranks. Therefore each process of pytest has its own copy,
which nobody else uses: before a test, every lock in it is a leftover.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

BOUND_SECONDS = 900.0  # AsyncIO, the slowest operator, takes 3 minutes on two idle cores, and 10 beside two busy loops

_BUILD = """
import sys
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder(sys.argv[1] + "Builder")
if builder.is_compatible(verbose=False):
    builder.load(verbose=False)
"""


class CompilationError(Exception):
    """An operator could not be compiled."""


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


_ROOT = (
    Path(__file__).parent.parent
    / "build"
    / f"test-extensions-{sys.implementation.cache_tag}-torch-{_version('torch')}-deepspeed-{_version('deepspeed')}"
)
COMPILED = _ROOT / "compiled"
COPY = _ROOT / os.environ.get("PYTEST_XDIST_WORKER", "main")  # from which the tests of this process load


def compile_kernels() -> None:
    """Compile our kernels for the CPU. Without a compiler, tests that need them say so."""
    with _turn() as turn:
        _run([sys.executable, "-m", "adai_dist", "build", "--device", "cpu"], turn)


def copy_operators() -> None:
    """Renew this process's copy. Where nothing has changed, nothing is compiled again: times are copied too."""
    with _turn():
        shutil.rmtree(COPY, ignore_errors=True)
        shutil.copytree(COMPILED, COPY)


def remove_locks(folder: Path = COPY) -> None:
    """Remove the locks that loaders have left in a folder that no running process uses."""
    for left_behind in folder.glob("*/lock"):
        left_behind.unlink()


def compile_for_deepspeed(names: set[str]) -> None:
    """Compile operators of DeepSpeed, such as "CPUAdam"; one that this machine lacks the libraries for is left out.

    Raises:
        CompilationError: DeepSpeed could not compile one, or took too long.
    """
    if find_spec("deepspeed") is None:
        return
    with _turn() as turn:
        for name in sorted(names):
            finished = _run([sys.executable, "-c", _BUILD, name], turn)
            if finished.returncode != 0:
                raise CompilationError(f"DeepSpeed's {name} cannot be compiled:\n{finished.stdout}\n{finished.stderr}")


@contextmanager
def _turn() -> Iterator[int]:
    """One process at a time, and the compilers that it has started: they inherit the descriptor that holds the lock."""
    COMPILED.mkdir(parents=True, exist_ok=True)
    with (COMPILED / "turn").open("w") as file:
        deadline = time.monotonic() + BOUND_SECONDS
        while not _has_lock(file):
            if time.monotonic() > deadline:
                raise CompilationError(f"another process holds {file.name} for {BOUND_SECONDS:.0f} s; end that process")
            time.sleep(0.2)
        remove_locks(COMPILED)
        yield file.fileno()


def _has_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _run(command: list[str], turn: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(COMPILED), "DS_ACCELERATOR": "cpu"}
    try:
        return subprocess.run(
            command,
            env=environment,
            pass_fds=[turn],
            capture_output=True,
            text=True,
            check=False,
            timeout=BOUND_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise CompilationError(f"no end after {BOUND_SECONDS:.0f} s: {' '.join(command)}\n{error.stderr!r}") from None
