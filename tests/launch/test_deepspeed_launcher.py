"""launch/deepspeed.sh on two hosts with sshd: an ssh connection per node, and DeepSpeed's default, pdsh."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.hosts import Host
from tests.launch.training import (
    BOUND_SECONDS,
    LAUNCH,
    SHOW,
    WORDS,
    assert_arguments_are_intact,
    environment,
    launch,
    outcome,
    train_words,
    world_size,
)
from tests.recipe_runs import ROOT

pytestmark = pytest.mark.distributed

ZERO2 = "configs/deepspeed/zero2.json"


def test_a_run_of_deepspeeds_engine_through_ssh_ends_with_the_loss_of_one_node(
    two_hosts: list[Host], tmp_path: Path, hostfile: Path, ssh_config: Path
) -> None:
    one, two = (train_words(tmp_path, name, "engine=deepspeed", f"deepspeed.config={ZERO2}") for name in ("one", "two"))
    launch(two_hosts[0], "torchrun.sh", one, RANKS_PER_NODE=2)
    launch(two_hosts[0], "deepspeed.sh", two, HOSTFILE=hostfile, SSH_OPTIONS=f"-F {ssh_config}")
    assert world_size(tmp_path / "two") == 2
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh; apt install pdsh")
def test_a_run_through_pdsh_ends_with_the_loss_of_one_node(
    two_hosts: list[Host], tmp_path: Path, hostfile: Path, ssh_config: Path, one_node: list[float]
) -> None:
    knobs = {"HOSTFILE": hostfile, "SSH_OPTIONS": f"-F {ssh_config}", "LAUNCHER": "pdsh"}
    launch(two_hosts[0], "deepspeed.sh", train_words(tmp_path, "two"), **knobs)
    assert world_size(tmp_path / "two") == 2
    assert outcome(tmp_path / "two") == one_node


WAIT_OR_FAIL = """
import os, pathlib, signal, sys, time
rank, folder, who_fails = os.environ["RANK"], pathlib.Path(sys.argv[-2]), sys.argv[-1]
def stop(number, frame):
    (folder / f"stopped{rank}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / f"started{rank}").touch()
if rank == who_fails:
    sys.exit(7)
time.sleep(1000)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "wait_or_fail.py"
    path.write_text(SHOW + WAIT_OR_FAIL)
    return path


def test_arguments_arrive_intact_and_when_a_node_fails_all_end_with_its_exit_code(
    two_hosts: list[Host], hostfile: Path, ssh_config: Path, script: Path
) -> None:
    env = environment(HOSTFILE=hostfile, SSH_OPTIONS=f"-F {ssh_config}", NCCL_DEBUG="WARN")
    command = [LAUNCH / "deepspeed.sh", script, *WORDS, script.parent, "1"]
    ended = two_hosts[0].run(command, BOUND_SECONDS, env, cwd=ROOT)
    assert_arguments_are_intact(ended.stdout)
    assert ended.returncode == 7, ended.stderr
    assert running(two_hosts, script) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_when_the_launch_script_is_stopped_the_program_is_terminated_on_all_nodes(
    two_hosts: list[Host], hostfile: Path, ssh_config: Path, script: Path, how: signal.Signals
) -> None:
    env, folder = environment(HOSTFILE=hostfile, SSH_OPTIONS=f"-F {ssh_config}"), script.parent
    with (folder / "log").open("wb") as log:
        command = [LAUNCH / "deepspeed.sh", script, folder, "none"]
        process = two_hosts[0].popen(command, env, cwd=ROOT, stdout=log, stderr=log)
    wait_until(lambda: len(list(folder.glob("started*"))) == 2)
    process.send_signal(how)
    code = process.wait(timeout=40)
    if how == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        assert running(two_hosts, script) == [], "the script must wait for them"
    wait_until(lambda: running(two_hosts, script) == [])
    assert len(list(folder.glob("stopped*"))) == 2, (folder / "log").read_text()


def running(hosts: list[Host], script: Path) -> list[str]:
    """Return the command lines of the processes on the hosts that mention a script."""
    lines: list[str] = []
    for host in hosts:
        for pid in host.processes():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(script).encode() in words:
                lines.append(f"{host.name}: {b' '.join(words).decode()}")
    return lines


def wait_until(holds: Callable[[], bool], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
