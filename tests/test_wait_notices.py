"""Notices of a process that waits for the compilation of another, and the end of the wait."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from adai_dist.kernels import build_cache, wait_notices
from tests.recipe_runs import run_command
from tests.tiny_extension import TINY, needs_toolchain

# Holds the lock of a folder until its standard input is closed.
HOLD = """
import sys
from pathlib import Path
from adai_dist.kernels.build_cache import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait_notices, "EARLY_NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(wait_notices, "NOTICE_SECONDS", 0.3)


def after(seconds: float, work: Callable[[], Any]) -> None:
    threading.Timer(seconds, work).start()


def close_input(process: subprocess.Popen[str]) -> Callable[[], None]:
    assert process.stdin is not None
    return process.stdin.close


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_process_that_waits_for_a_compilation_names_the_lock_holder_and_compiles_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], is_killed: bool
) -> None:
    folder = tmp_path / "cpu_adai"
    with held(folder) as process:
        after(1.0, process.kill if is_killed else close_input(process))
        with build_cache.locked(folder):
            lines = capfd.readouterr().err.splitlines()
            assert json.loads((folder / "build.lock").read_text())["pid"] == os.getpid()
    assert len(lines) == 3, "after 0.1, 0.3 and 0.6 s"
    who = f"process {process.pid} on host {socket.gethostname()}"
    start = f"adai_dist: waiting for {who}, which has been compiling cpu_adai for "
    assert all(line.startswith(start) and line.endswith(f"it holds {folder / 'build.lock'}") for line in lines)
    assert (folder / "build.lock").read_text() == "", "the lock is released"


def test_an_unknown_lock_holder_is_reported_as_another_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for text in ("", "{", "[3]", '{"pid": 3}', '{"pid": "x", "host": "a", "since": 1}'):
        with held(tmp_path) as process:
            (tmp_path / "build.lock").write_text(text)
            after(0.25, close_input(process))
            with build_cache.locked(tmp_path):
                pass
        expected = f"adai_dist: waiting for another process, which is compiling {tmp_path.name}; it holds "
        assert capfd.readouterr().err.startswith(expected), text


def test_a_short_wait_is_not_announced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wait_notices, "EARLY_NOTICE_SECONDS", 5.0)
    monkeypatch.setattr(wait_notices, "NOTICE_SECONDS", 30.0)
    with held(tmp_path) as process:
        after(0.3, close_input(process))
        with build_cache.locked(tmp_path):
            pass
    assert capfd.readouterr().err == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "adai_dist.wait_notices"]


def test_a_closed_or_missing_stderr_is_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "closed").open("w") as closed:
        pass
    for stderr in (None, closed):
        monkeypatch.setattr(sys, "stderr", stderr)
        wait_notices.write_to_stderr("a line")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0 s"), (0.4, "0 s"), (119, "119 s"), (600, "10 min"), (7200, "2 h"), (172800, "2 days"), (1e7, "116 days")],
)
def test_durations_are_formatted_in_the_largest_unit_of_which_there_are_two(seconds: float, words: str) -> None:
    assert wait_notices.format_duration(seconds) == words


def test_the_notice_of_torchs_loader_states_the_file_its_age_and_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (0, time.time() - 3 * 3600))
    after(1.0, lock.unlink)
    FileBaton(str(lock), wait_seconds=0.05).wait()
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2, "after 0.3 and 0.6 s"
    assert all(f"for the file {lock}, which is 3 h old: " in message for message in messages)
    assert all("or was killed while compiling; if none is running, delete the file" in message for message in messages)


def test_a_file_that_is_missing_or_soon_removed_is_not_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FileBaton(str(tmp_path / "none")).wait()
    lock = tmp_path / "lock"
    lock.touch()
    after(0.1, lock.unlink)
    FileBaton(str(lock), wait_seconds=0.8).wait()  # the file is removed before the notice
    assert not caplog.records


@needs_toolchain
def test_an_extension_of_another_package_waits_for_the_lock_of_a_killed_build(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "other.cpp"
    source.write_text(TINY.format("other"))

    def load() -> None:
        cpp_extension.load("other", [str(source)], build_directory=str(tmp_path), is_python_module=False)

    load()
    assert not caplog.records
    (tmp_path / "lock").touch()
    after(1.0, (tmp_path / "lock").unlink)
    load()
    assert f"for the file {tmp_path / 'lock'}, which is " in caplog.text


OPERATOR = """
import os, sys, threading
from pathlib import Path
import adai_dist
from adai_dist.kernels import wait_notices
{register}
wait_notices.NOTICE_SECONDS = 0.5
from deepspeed.accelerator import get_accelerator
lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm" / "lock"
lock.touch()
threading.Timer(2.0, lock.unlink).start()
assert get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
"""


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("hooks", "register", "num_warnings"), [("1", "", 2), ("0", "", 0), ("0", "adai_dist.register()", 2)]
)
def test_the_notice_of_a_deepspeed_operator_names_its_lock_unless_import_hooks_are_off(
    hooks: str, register: str, num_warnings: int
) -> None:
    program = OPERATOR.format(register=register)
    finished = run_command([sys.executable, "-c", program], ADAI_DIST_REGISTER=hooks)
    assert finished.returncode == 0, finished.stderr
    notices = [line for line in finished.stderr.splitlines() if "deepspeed_shm_comm/lock, which is " in line]
    assert len(notices) == num_warnings, finished.stderr
