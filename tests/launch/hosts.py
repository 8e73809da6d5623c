"""Emulated hosts with their own names and addresses: network, UTS and mount namespaces connected by a bridge.

They share files, users and processes with the machine, and can only reach each other. The namespaces are unnamed, so
that concurrent sessions do not conflict, and disappear with their last process. Each has a keeper process, which kills
all processes in it when the test ends or is killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

SUBNET = "10.213.77"
NAMESPACES = ["--net", "--uts", "--mount"]
_KILL_SECONDS = 20.0  # time for all processes of a host to disappear after SIGKILL

# The keeper reports that it is ready, and waits until its standard input is closed, as when the test process ends.
_KEEPER = """
import os, sys, time
sys.stdout.write("\\n"), sys.stdout.flush()
sys.stdin.read()
mine = os.readlink("/proc/self/ns/net")
for _ in range(1000):
    found = False
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(pid) != os.getpid() and os.readlink(f"/proc/{pid}/ns/net") == mine:
                os.kill(int(pid), 9)
                found = True
        except OSError:
            pass
    if not found:
        break
    time.sleep(0.01)
"""


@functools.cache
def missing() -> str | None:
    """Return why hosts cannot be created on this machine, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts need Linux namespaces and root; run the tests as root, for example in a container"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"hosts need the program {program}; apt install {package}"
    trial = "ip link add bridge0 type bridge && mount --bind /etc/hosts /etc/hosts && hostname trial"
    tried = subprocess.run(["unshare", *NAMESPACES, "sh", "-c", trial], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"hosts need network, UTS and mount namespaces; got {tried.stderr.strip()!r}; docker run --privileged"
    return None


class Host:
    """Emulated host, with methods to start commands on it."""

    def __init__(self, name: str, address: str, known_hosts: Path) -> None:
        self.name, self.address = name, address
        self._started: list[subprocess.Popen[Any]] = []
        self._keeper = subprocess.Popen(
            ["unshare", *NAMESPACES, sys.executable, "-I", "-c", _KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.read(1) == b"\n", f"host {name} could not be created"
        setup = f"hostname {name}; ip link set lo up; mount --bind {known_hosts} /etc/hosts"
        try:
            subprocess.run(self.command(["sh", "-ec", setup]), check=True)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the keeper, whose namespaces are the host."""
        return self._keeper.pid

    def command(self, arguments: Sequence[str | Path], cwd: str | Path | None = None) -> list[str]:
        """Return a command that executes another on this host, with the same working directory and process id."""
        enter = ["nsenter", f"--target={self.pid}", *NAMESPACES, "--", "env", f"--chdir={cwd or os.getcwd()}"]
        return [*enter, *map(str, arguments)]

    def popen(
        self, arguments: Sequence[str | Path], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on this host in a new session, with options of Popen."""
        command = self.command(arguments, options.pop("cwd", None))
        process = subprocess.Popen(command, env=None if env is None else dict(env), start_new_session=True, **options)
        self._started.append(process)
        elsewhere = os.readlink("/proc/self/ns/net")
        with contextlib.suppress(OSError):  # the process has ended
            while os.readlink(f"/proc/{process.pid}/ns/net") == elsewhere:
                time.sleep(0.0005)  # until it is on the host, where the keeper can find and kill it
        return process

    def run(
        self, arguments: Sequence[str | Path], timeout: float = 60, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to completion; kill its session after `timeout` seconds."""
        taken = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.popen(arguments, env, **{**taken, **options})
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            report = f"--- {self.name}: {' '.join(map(str, arguments))}\n{(out or '')[-6000:]}\n{(err or '')[-6000:]}"
            if isinstance(error, subprocess.TimeoutExpired):
                raise AssertionError(f"still running after {timeout} s\n{report}") from None
            raise
        return subprocess.CompletedProcess(list(map(str, arguments)), process.returncode, out, err)

    def processes(self) -> list[int]:
        """Return the ids of the processes on this host, without its keeper and zombies."""
        mine = os.readlink(f"/proc/{self.pid}/ns/net")
        found: list[int] = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # the process has ended, or is a zombie, which has no link
                if os.readlink(folder / "ns/net") == mine and int(folder.name) != self.pid:
                    found.append(int(folder.name))
        return found

    def kill_everything(self) -> None:
        """Kill all processes on this host, as in a power failure."""
        deadline = time.monotonic() + _KILL_SECONDS
        for process in self._started:
            process.kill()
        while running := self.processes():
            assert time.monotonic() < deadline, f"{self.name}: {running} cannot be killed"
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        for process in self._started:
            process.wait(timeout=_KILL_SECONDS)
        self._started.clear()

    def cut_off(self) -> None:
        """Disconnect the host: packets are lost without errors."""
        self._switch("down")

    def reconnect(self) -> None:
        self._switch("up")

    def plug_into(self, switch: Host) -> None:
        self._port_of = switch
        add = (
            f"ip link add {self.name} type veth peer name eth0 netns {self.pid}; "
            f"ip link set {self.name} master bridge0 up"
        )
        subprocess.run(switch.command(["sh", "-ec", add]), check=True)
        up = f"ip address add {self.address}/24 dev eth0; ip link set eth0 up"
        subprocess.run(self.command(["sh", "-ec", up]), check=True)

    def _switch(self, state: str) -> None:
        subprocess.run(self._port_of.command(["ip", "link", "set", self.name, state]), check=True)

    def close(self) -> None:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        try:
            self.kill_everything()
            self._keeper.stdin.close()
            self._keeper.wait(timeout=_KILL_SECONDS)
        finally:
            self._keeper.stdin.close()
            self._keeper.kill()
            self._keeper.wait()
            self._keeper.stdout.close()


@contextlib.contextmanager
def hosts(num: int = 2) -> Generator[list[Host], None, None]:
    """Create hosts node1, node2, ... on one network, and kill their processes at the end."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = {f"node{k}": f"{SUBNET}.{k}" for k in range(1, num + 1)}
        known = folder / "hosts"
        known.write_text("".join(f"{at} {name}\n" for name, at in {"localhost": "127.0.0.1", **names}.items()))
        switch = stack.enter_context(contextlib.closing(Host("switch", f"{SUBNET}.254", known)))
        subprocess.run(
            switch.command(["sh", "-ec", "ip link add bridge0 type bridge; ip link set bridge0 up"]), check=True
        )
        made = [stack.enter_context(contextlib.closing(Host(*item, known))) for item in names.items()]
        for host in made:
            host.plug_into(switch)
        yield made
