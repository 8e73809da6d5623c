"""launch/torchrun.sh with the same command on each of several hosts, as started by a user."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from tests.launch.hosts import Host
from tests.launch.training import LAUNCH, environment


class TwoTorchruns:
    """Context manager that starts the launchers, and kills all processes on the hosts at its end."""

    def __init__(self, hosts: Sequence[Host], words: Sequence[str], logs: Path, **more: str) -> None:
        """Args:
        hosts: one launcher is started on each.
        words: arguments of the script.
        logs: folder for the output of the launchers.
        more: additional settings of the script.
        """
        knobs = {"NUM_NODES": str(len(hosts)), "MASTER_ADDR": hosts[0].name, "RANKS_PER_NODE": "1"}
        self._environment = environment(**{**knobs, **more})
        self._hosts, self._command, self._logs = hosts, [LAUNCH / "torchrun.sh", *words], logs
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        for host in self._hosts:
            with self._log_of(host).open("wb") as log:
                output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                self._started[host.name] = host.popen(self._command, self._environment, **output)
        return self

    def terminate_on(self, host: Host) -> None:
        """Send SIGTERM to the launcher of one host."""
        self._started[host.name].terminate()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for host in self._hosts:
            host.kill_everything()

    def wait(self, seconds: float) -> list[int]:
        """Return the exit codes of all hosts, which must end within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            return [self._started[host.name].wait(max(0.0, deadline - time.monotonic())) for host in self._hosts]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}") from None

    def output(self) -> str:
        """Return the output of the launchers, for error messages."""
        logs = [self._log_of(host) for host in self._hosts]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}" for log in logs)

    def _log_of(self, host: Host) -> Path:
        return self._logs / f"{host.name}.log"
