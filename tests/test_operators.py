"""Compilation for the tests: leftover locks of killed processes do not block it, and every wait is bounded."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import operators, spawn
from tests.recipe_runs import cli_environment
from tests.spawn import run_ranks

LOAD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(operators, "COMPILED", tmp_path)
    return tmp_path


def test_operators_are_compiled_into_a_folder_of_this_checkout() -> None:
    checkout = Path(__file__).parent.parent
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).is_relative_to(checkout / "build")


def test_a_lock_that_was_left_behind_is_removed(folder: Path) -> None:
    (folder / "cpu_adam").mkdir()
    (folder / "cpu_adam" / "lock").touch()
    with operators._turn():
        assert not (folder / "cpu_adam" / "lock").exists()


def test_every_test_starts_without_leftover_locks(request: pytest.FixtureRequest) -> None:
    assert "_no_lock_of_an_earlier_test" in request.fixturenames
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]) == operators.COPY
    (operators.COPY / "killed").mkdir(exist_ok=True)
    (operators.COPY / "killed" / "lock").touch()
    operators.remove_locks()
    assert not (operators.COPY / "killed" / "lock").exists()


def test_the_wait_for_another_compilation_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "BOUND_SECONDS", 0.3)
    with (folder / "turn").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(operators.CompilationError, match=r"another process holds .*turn for 0 s"),
            operators._turn(),
        ):
            pass
    with operators._turn():
        pass


def test_a_compilation_that_hangs_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "BOUND_SECONDS", 0.3)
    with operators._turn() as turn, pytest.raises(operators.CompilationError, match=r"no end after 0 s: sleep 60"):
        operators._run(["sleep", "60"], turn)


def test_the_error_of_a_rank_names_the_operator_that_it_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    spawn._wait_for_operator(SimpleNamespace(lock_file_path=str(lock)))
    lock.touch()
    monkeypatch.setattr(spawn, "OPERATOR_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"compiled before the tests, got .*/lock for 0 seconds; name it in"):
        spawn._wait_for_operator(SimpleNamespace(lock_file_path=str(lock)))


def load_in_rank() -> None:
    exec(LOAD)


@pytest.mark.distributed
@pytest.mark.deepspeed
def test_ranks_and_programs_load_compiled_operators_without_compiling() -> None:
    run_ranks(load_in_rank, 1)
    subprocess.run([sys.executable, "-c", LOAD], env=cli_environment(), check=True, timeout=120)
    copies = list(operators.COPY.glob("*/*.so"))
    assert copies
    for copy in copies:
        compiled = operators.COMPILED / copy.relative_to(operators.COPY)
        assert copy.stat().st_mtime_ns == compiled.stat().st_mtime_ns, f"{copy.name} was recompiled"
