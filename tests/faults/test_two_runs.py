"""Two runs in one folder: the second is refused on all ranks, with an error that names the first, which continues."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adai_dist.recipes.folder import CONFIG, GRACE_SECONDS, LOCK, open_run_folder, run_lock
from adai_dist.recipes.job import join_world
from adai_dist.recipes.recipe import RecipeError, load_recipe
from tests.faults.starter import Rank, Starter, output_of
from tests.recipe_runs import ROOT, cli_environment, losses, write_recipe

pytestmark = pytest.mark.distributed

ENDLESS = ("engine=ddp", "run.steps=1000000", "run.checkpoint_every=5", "schedule.shape=constant")
SHORT = ("engine=ddp", "run.steps=3", "run.checkpoint_every=0", "schedule.shape=constant")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("two"))


def start(starter: Starter, recipe: Path, logs: str, num_ranks: int, *arguments: str) -> list[Rank]:
    return starter.start(recipe.with_name(logs), num_ranks, "train", "--config", recipe, *arguments)


def wait_until(holds: Callable[[], bool], ranks: list[Rank]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, output_of(ranks)
        assert all(rank.poll() is None for rank in ranks), output_of(ranks)
        time.sleep(0.01)


def end(ranks: list[Rank]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            os.kill(rank.pid, signal.SIGKILL)
        rank.wait(30)


def has_logged(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and len(losses(run)) > 0


def refusal(run: Path, first: Rank) -> str:
    must = f"adai-dist: a run must have its folder to itself; got {str(run)!r}, where process {first.pid} on host "
    return (
        rf"{re.escape(must + socket.gethostname())} has been at work for \d+ s; wait for it, end it, or change run.name"
    )


@pytest.mark.parametrize("how", ["--resume", "run.overwrite=true", "stopped"])
def test_the_second_run_in_a_folder_is_refused_with_the_host_and_the_process_of_the_first(
    starter: Starter, recipe: Path, how: str
) -> None:
    name = f"first-{how.strip('-')}".partition("=")[0]
    run = recipe.parent / "runs" / name
    first = start(starter, recipe, f"{name}-first", 2, *ENDLESS, f"run.name={name}")
    try:
        wait_until(lambda: any(run.glob("checkpoints/step_*")), first)
        if how == "stopped":
            os.kill(first[0].pid, signal.SIGSTOP)
        config = (run / "config.yaml").read_bytes()
        flag = "--resume" if how == "stopped" else how
        second = start(starter, recipe, f"{name}-second", 2, *ENDLESS, f"run.name={name}", flag)
        assert [rank.wait(60) for rank in second] == [2, 2], output_of(second)
        for rank in second:
            (line,) = rank.log.read_text().splitlines()
            assert re.fullmatch(refusal(run, first[0]), line)
        assert (run / "config.yaml").read_bytes() == config
        if how == "stopped":
            os.kill(first[0].pid, signal.SIGCONT)
        steps = max(losses(run))
        wait_until(lambda: max(losses(run)) > steps + 6, first)  # across a checkpoint
    finally:
        end(first)
    # All ranks were killed while they had the lock file open: the next run gets the folder at once.
    third = start(starter, recipe, f"{name}-third", 1, *ENDLESS, f"run.name={name}", "--resume")
    try:
        begin = time.monotonic()
        lock = run / LOCK
        wait_until(lambda: f'"pid": {third[0].pid},' in lock.read_text(), third)
        assert time.monotonic() - begin < GRACE_SECONDS
    finally:
        end(third)


def test_ranks_restarted_by_torchrun_get_the_folder_at_once(recipe: Path) -> None:
    run = recipe.parent / "runs" / "restarted"
    lock = run / LOCK
    words = ("train", "--config", str(recipe), *ENDLESS, "run.name=restarted", "run.timeout=60", "--resume")
    # Under plain torchrun, restarted ranks may read the addresses of the killed ones.
    command = [ROOT / "launch/torchrun.sh", "adai-dist", *words]
    environment = {**cli_environment(), "PYTHON": sys.executable, "RANKS_PER_NODE": "2", "MAX_RESTARTS": "1"}
    path = recipe.with_name("restarted.log")
    with path.open("w") as log:
        process = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)

        def wait_for(holds: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 120
            while not holds():
                assert process.poll() is None, path.read_text()
                assert time.monotonic() < deadline, path.read_text()
                time.sleep(0.05)

        try:
            wait_for(lambda: any(run.glob("checkpoints/step_*")))
            first = json.loads(lock.read_text())["pid"]
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: lock.read_text() != "" and json.loads(lock.read_text())["pid"] != first)
            steps = max(losses(run))
            wait_for(lambda: max(losses(run)) > steps)
            assert "must have its folder to itself" not in path.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(60) != 0


def test_runs_that_start_together_get_separate_folders(starter: Starter, recipe: Path) -> None:
    name = "together"
    runs = [start(starter, recipe, f"{name}-{k}", 1, *SHORT, f"run.name={name}") for k in range(4)]
    for (rank,) in runs:
        assert rank.wait(60) == 0, output_of([rank])
    folders = sorted((recipe.parent / "runs").glob(f"{name}*"))
    assert [folder.name for folder in folders] == [name, *(f"{name}-{k}" for k in (2, 3, 4))]
    for folder in folders:
        assert sorted(losses(folder)) == [1, 2, 3]
        assert json.loads((folder / "summary.json").read_text())["run"] == folder.name
        assert (folder / LOCK).read_text() == ""


@pytest.mark.parametrize("exists", [False, True])
def test_only_one_of_several_runs_that_resume_together_continues(starter: Starter, recipe: Path, exists: bool) -> None:
    name = f"resumed-{exists}"
    if exists:
        (before,) = start(starter, recipe, f"{name}-before", 1, *ENDLESS, f"run.name={name}", "run.steps=5")
        assert before.wait(60) == 0, output_of([before])
    runs = [start(starter, recipe, f"{name}-{k}", 1, *ENDLESS, f"run.name={name}", "--resume") for k in range(3)]
    ranks = [rank for (rank,) in runs]
    try:
        deadline = time.monotonic() + 60
        while sum(rank.poll() is None for rank in ranks) > 1:
            assert time.monotonic() < deadline, output_of(ranks)
            time.sleep(0.05)
        (winner,) = [rank for rank in ranks if rank.poll() is None]
        run = recipe.parent / "runs" / name
        for rank in ranks:
            if rank is not winner:
                assert rank.poll() == 2
                assert re.search(refusal(run, winner), rank.log.read_text())
        wait_until(lambda: has_logged(run), [winner])
    finally:
        end(ranks)
    assert not list(run.parent.glob(f"{name}-2"))


@pytest.mark.parametrize("look", ["exists", "iterdir"])
@pytest.mark.parametrize("setting", ["run.resume=true", "run.overwrite=true"])
def test_a_run_uses_the_folder_into_which_another_writes_its_config_meanwhile(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str, setting: str
) -> None:
    """The other run has created the folder at the first look, and has written its config at the next."""
    resolved = load_recipe(recipe, ["run.name=run", f"run.out={tmp_path}", setting])
    folder = tmp_path / "run"
    folder.mkdir()
    original: Callable[[Path], Any] = getattr(Path, look)

    def look_just_before(path: Path) -> Any:
        seen = original(path)
        seen = seen if isinstance(seen, bool) else list(seen)
        if folder in (path, path.parent):
            resolved.replaced(resume=False, overwrite=False).save(folder / CONFIG)
        return seen

    monkeypatch.setattr(Path, look, look_just_before)
    with join_world("cpu") as world, open_run_folder(resolved, world) as chosen:
        assert chosen == folder
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# -- the lock alone ----------------------------------------------------------------------------------------------------

# Program that holds the lock until its standard input is closed, and forks a process that outlives it.
HOLD = """
import os, sys, time
from pathlib import Path
from adai_dist.recipes.folder import run_lock
with run_lock(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    sys.stdin.read()
"""


HERE, ELSEWHERE = socket.gethostname(), "elsewhere"


def content(host: str, pid: int) -> str:
    return json.dumps({"host": host, "pid": pid, "since": time.time() - 300})


def test_a_process_left_behind_by_a_killed_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left_behind = int(process.stdout.readline())
        try:
            with (
                pytest.raises(RecipeError, match=f"where process {process.pid} on host "),
                run_lock(tmp_path, 0),
            ):
                pass
            process.kill()
            process.wait()
            with run_lock(tmp_path, 0):
                assert f'"pid": {os.getpid()},' in (tmp_path / LOCK).read_text()
        finally:
            os.kill(left_behind, signal.SIGKILL)


def test_the_error_names_the_owner_on_another_host_or_an_unknown_one(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    command = [sys.executable, "-c", HOLD.replace("if os.fork() == 0:", "if True:"), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for text, expected in (
            (
                content(ELSEWHERE, 3),
                f"where process 3 on host elsewhere has been at work for 5 min; end it, or delete '{path}' ",
            ),
            ("", "where another process has been at work; wait for it, end it, or change run.name"),
        ):
            path.write_text(text)
            with pytest.raises(RecipeError, match=re.escape(expected)), run_lock(tmp_path, 0.2):
                pass
        path.unlink()
        with run_lock(tmp_path, 0):
            process.kill()


def test_a_run_waits_briefly_for_one_that_is_ending(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        HOLD.replace("if os.fork() == 0:", "if True:").replace("600", "1.5"),
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        begin = time.monotonic()
        with run_lock(tmp_path, 30):
            assert time.monotonic() - begin > 0.5
            assert process.wait(10) == 0


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make locks fail as on a file system without them."""

    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


UNLOCKED: dict[str, tuple[Callable[[], str], bool]] = {
    "alive": (lambda: content(HERE, os.getppid()), True),
    "alive, with process id 1": (lambda: content(HERE, 1), True),
    "on another host": (lambda: content(ELSEWHERE, ended_process()), True),
    "same process id on another host": (lambda: content(ELSEWHERE, os.getpid()), True),
    "ended": (lambda: content(HERE, ended_process()), False),
    "same process id in an earlier container": (lambda: content(HERE, os.getpid()), False),
    "released": (lambda: "", False),
    "half written": (lambda: '{"host": "', False),
}


@pytest.mark.usefixtures("_no_locks")
@pytest.mark.parametrize("case", UNLOCKED)
def test_without_locks_the_recorded_run_holds_the_folder_unless_it_has_certainly_ended(
    tmp_path: Path, case: str
) -> None:
    make, is_refused = UNLOCKED[case]
    path = tmp_path / LOCK
    path.write_text(make())
    message = re.escape(f" has been at work for 5 min; end it, or delete {str(path)!r} if it has ended")
    with pytest.raises(RecipeError, match=message) if is_refused else contextlib.nullcontext():
        with run_lock(tmp_path, 0.2):
            assert f'"pid": {os.getpid()},' in path.read_text()
        assert path.read_text() == ""
        with run_lock(tmp_path, 0.2):
            pass
