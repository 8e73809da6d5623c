"""An sshd on each host with its own keys, independent of any ~/.ssh."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from tests.launch.hosts import Host

_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""
_SSH = """
IdentityFile {folder}/user_key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
LogLevel ERROR
BatchMode yes
"""


def missing() -> str | None:
    """Return why sshd cannot run on this machine, or None."""
    if _sshd() is None or shutil.which("ssh") is None:
        return "needs ssh and sshd; apt install openssh-client openssh-server"
    return None


def start_sshd(hosts: list[Host], folder: Path) -> Path:
    """Start sshd on all hosts, and return a configuration file for `ssh -F FILE node1`."""
    folder.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)  # an empty folder, which Debian's service creates
    for name in ("host_key", "user_key"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", str(folder / name)]
        subprocess.run(make, check=True)
    key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{host.name},{host.address} {key}" for host in hosts))
    for host in hosts:
        config = folder / f"sshd_{host.name}"
        config.write_text(_SSHD.format(address=host.address, folder=folder))
        with (folder / f"{host.name}.log").open("wb") as log:
            host.popen([_sshd() or "", "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    (folder / "ssh_config").write_text(_SSH.format(folder=folder))
    for host in hosts:
        wait_until_it_listens(folder / f"{host.name}.log")
    return folder / "ssh_config"


def wait_until_it_listens(log: Path, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while "Server listening on" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def _sshd() -> str | None:
    return shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or shutil.which("sshd")
