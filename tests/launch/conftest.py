"""Shared fixtures of the launcher tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ssh
from tests.launch.hosts import Host, hosts, missing
from tests.launch.training import launch, outcome, train_words


@pytest.fixture(scope="session")
def all_hosts() -> Iterator[list[Host]]:
    """Provide two hosts for the session."""
    why = missing()
    if why:
        pytest.skip(why)
    with hosts(2) as made:
        yield made


@pytest.fixture
def two_hosts(all_hosts: list[Host]) -> Iterator[list[Host]]:
    """Provide the two hosts, and reconnect them and kill their processes after the test."""
    yield all_hosts
    for host in all_hosts:
        host.kill_everything()
        host.reconnect()


@pytest.fixture
def ssh_config(two_hosts: list[Host], tmp_path: Path) -> Path:
    """Start sshd on both hosts, and return the FILE for `ssh -F FILE`."""
    why = ssh.missing()
    if why:
        pytest.skip(why)
    return ssh.start_sshd(two_hosts, tmp_path / "ssh")


@pytest.fixture
def hostfile(two_hosts: list[Host], tmp_path: Path) -> Path:
    """Write a hostfile with one rank per host."""
    path = tmp_path / "hostfile"
    path.write_text("# the nodes\n" + "".join(f"{host.name} slots=1\n" for host in two_hosts))
    return path


@pytest.fixture(scope="session")
def one_node(all_hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the outcome of the reduced recipe on one host with two ranks."""
    folder = tmp_path_factory.mktemp("one_node")
    launch(all_hosts[0], "torchrun.sh", train_words(folder, "one"), RANKS_PER_NODE=2)
    return outcome(folder / "one")
