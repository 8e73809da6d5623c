"""Arguments reach the program on every host unchanged, and wrong usage is one line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.hosts import Host
from tests.launch.test_mpirun import mpi, needs_mpi
from tests.launch.training import LAUNCH, SHOW, WORDS, assert_arguments_are_intact, environment, launch, launch_on_all
from tests.recipe_runs import ROOT


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "folder of a user" / "show it.py"
    path.parent.mkdir()
    path.write_text(SHOW)
    return path


ON_EVERY_NODE = [
    ("torchrun.sh", {}),
    ("accelerate.sh", {"CONFIG": "configs/accelerate/deepspeed_zero2.yaml"}),  # accelerate's default would call pdsh
]


@pytest.mark.parametrize(("name", "knobs"), ON_EVERY_NODE, ids=["torchrun", "accelerate"])
def test_arguments_arrive_intact_if_every_node_runs_the_script(
    two_hosts: list[Host], tmp_path: Path, script: Path, name: str, knobs: dict[str, str]
) -> None:
    knobs = {**knobs, "RANKS_PER_NODE": "1", "NCCL_DEBUG": "WARN"}
    logs = launch_on_all(two_hosts, name, [script, *WORDS], tmp_path, **knobs)
    assert_arguments_are_intact("\n".join(logs))


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="needs pdsh; apt install pdsh")
def test_arguments_arrive_intact_through_pdsh(
    two_hosts: list[Host], hostfile: Path, ssh_config: Path, script: Path
) -> None:
    knobs = {"HOSTFILE": hostfile, "SSH_OPTIONS": f"-F {ssh_config}", "LAUNCHER": "pdsh", "NCCL_DEBUG": "WARN"}
    assert_arguments_are_intact(launch(two_hosts[0], "deepspeed.sh", [script, *WORDS], **knobs))


@needs_mpi
def test_arguments_arrive_intact_through_mpirun(
    two_hosts: list[Host], hostfile: Path, ssh_config: Path, script: Path
) -> None:
    knobs = mpi(hostfile, ssh_config)
    assert_arguments_are_intact(launch(two_hosts[0], "mpirun.sh", [script, *WORDS], NCCL_DEBUG="WARN", **knobs))


def test_a_hostfile_without_slots_is_refused(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=8\nnode2")  # also without a final newline
    env = environment(HOSTFILE=hostfile)
    command = [LAUNCH / "deepspeed.sh", "train.py"]
    ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=20, check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip() == f"{hostfile} needs lines: NAME slots=N; got node2"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_without_arguments_a_script_prints_its_usage_in_one_line(path: Path) -> None:
    ended = subprocess.run([path], capture_output=True, text=True, env=environment(), timeout=20, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("usage: ")
    assert path.name in ended.stderr
    assert "ARGUMENT" in ended.stderr


@pytest.mark.parametrize(
    ("name", "knobs", "must"),
    [
        ("torchrun.sh", {"NUM_NODES": 2, "RANKS_PER_NODE": 1}, "MASTER_ADDR"),
        ("accelerate.sh", {"NUM_NODES": 2, "RANKS_PER_NODE": 1}, "MASTER_ADDR"),
        ("deepspeed.sh", {"HOSTFILE": "/nowhere/hostfile"}, "/nowhere/hostfile"),
        (
            "deepspeed.sh",
            {"LAUNCHER": "rsh", "HOSTFILE": "launch/hostfile.example"},
            "LAUNCHER must be ssh or pdsh; got rsh",
        ),
        ("mpirun.sh", {"HOSTFILE": "/nowhere/hostfile"}, "/nowhere/hostfile"),
    ],
)
def test_a_missing_setting_is_named_before_anything_starts(name: str, knobs: dict[str, str | int], must: str) -> None:
    ended = subprocess.run(
        [LAUNCH / name, "train.py"],
        capture_output=True,
        text=True,
        env=environment(**knobs),
        cwd=ROOT,
        timeout=20,
        check=False,
    )
    assert ended.returncode not in (0, None)
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert must in ended.stderr
