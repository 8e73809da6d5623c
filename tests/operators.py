"""Compilation of the kernels and of DeepSpeed's operators before the first test.

They are compiled into a folder of this checkout, one per combination of the versions that they are linked with, so that
the tests neither find nor leave anything elsewhere. torch's loader creates a file `lock` even if nothing has to be
compiled, and waits forever for the lock of a killed process, such as a rank of a test. Each pytest process therefore
has a private copy, in which every lock before a test is a leftover.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    """A failure to compile an operator."""


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
COPY = _ROOT / os.environ.get("PYTEST_XDIST_WORKER", "main")  # the copy that the tests of this process load


def compile_operators(names: set[str]) -> None:
    """Compile the kernels for the CPU, and operators of DeepSpeed, such as "CPUAdam", at the same time.

    Operators whose libraries this machine lacks are left out. Without a compiler, the tests that need the kernels
    report it. The workers of one run of pytest-xdist have the same tests, so that only the first of them compiles.

    Raises:
        CompilationError: an operator of DeepSpeed does not compile, or takes too long.
    """
    of_deepspeed = sorted(names) if find_spec("deepspeed") is not None else []
    commands = [[sys.executable, "-m", "adai_dist", "build", "--device", "cpu"]]
    commands += [[sys.executable, "-c", _BUILD, name] for name in of_deepspeed]
    this_run = f"{os.environ.get('PYTEST_XDIST_TESTRUNUID')} {of_deepspeed}"
    with _turn() as turn:
        compiled_by = COMPILED / "compiled_by"
        if "PYTEST_XDIST_TESTRUNUID" in os.environ and compiled_by.exists() and compiled_by.read_text() == this_run:
            return
        with ThreadPoolExecutor(len(commands)) as pool:
            _, *finished = pool.map(lambda command: _run(command, turn), commands)
        for name, done in zip(of_deepspeed, finished, strict=True):
            if done.returncode != 0:
                raise CompilationError(f"DeepSpeed's {name} cannot be compiled:\n{done.stdout}\n{done.stderr}")
        compiled_by.write_text(this_run)


def copy_operators() -> None:
    """Renew the copy of this process, including modification times, so that nothing is recompiled."""
    with _turn():
        shutil.rmtree(COPY, ignore_errors=True)
        shutil.copytree(COMPILED, COPY)


def remove_locks(folder: Path = COPY) -> None:
    """Remove leftover locks of loaders from a folder that no running process uses."""
    for left_behind in folder.glob("*/lock"):
        left_behind.unlink()


@contextmanager
def _turn() -> Iterator[int]:
    """Hold the lock for compiling, as do the compilers that this process starts: they inherit the descriptor."""
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
    # Several commands compile at the same time, and a compiler that includes torch's headers needs up to 1 GB.
    one_job_per_core = {"MAX_JOBS": str(os.cpu_count() or 1)}
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(COMPILED), "DS_ACCELERATOR": "cpu", **one_job_per_core}
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
