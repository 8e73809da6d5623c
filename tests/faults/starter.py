"""Ranks of the training program, forked from a process that has imported all modules.

A fork replaces seconds of imports, so that a test can kill and restart a run twenty times.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from tests.recipe_runs import ROOT, cli_environment, free_port


class Rank:
    """One process of the training program."""

    def __init__(self, starter: Starter, pid: int, log: Path) -> None:
        self._starter = starter
        self.pid = pid
        self.log = log

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        return self._starter.ask(poll=self.pid)

    def wait(self, seconds: float) -> int:
        """Wait for the end and return the exit code; on a timeout, raise an error with the stack of the process."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGUSR1)
                time.sleep(0.5)
                raise AssertionError(f"still running after {seconds} s: {self.log.read_text()[-6000:]}")
            time.sleep(0.02)
        return code


class Starter:
    """Context manager that starts ranks of the command line, and kills those that still run at its end."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            env=cli_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its standard input, upon which it kills all ranks
        assert self._process.returncode == 0

    def start(self, logs: Path, num_ranks: int, *arguments: str | Path) -> list[Rank]:
        """Start `adai-dist ARGUMENTS` on `num_ranks` ranks, which write to LOGS-RANK.log."""
        port = free_port()
        ranks: list[Rank] = []
        for rank in range(num_ranks):
            log = logs.with_name(f"{logs.name}-{rank}.log")
            variables = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in variables.items()}
            pid = self.ask(start=[*map(str, arguments)], environment=environment, log=str(log))
            ranks.append(Rank(self, pid, log))
        return ranks

    def ask(self, **question: Any) -> Any:
        """Send a question to the starting process, and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    """Answer questions from standard input until it is closed; the main function of the starting process."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import adai_dist.recipes.train  # noqa: F401
    from adai_dist.cli import main

    torch.set_num_threads(1)
    codes: dict[int, int | None] = {}
    while line := sys.stdin.readline():
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                _become_rank(question["environment"], question["log"])
                main(question["start"])
            codes[pid] = None
            answer: int | None = pid
        else:
            answer = _poll(question["poll"], codes)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid, code in codes.items():
        if code is None and _poll(pid, codes) is None:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def _become_rank(environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    null, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for old, new in ((null, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def _poll(pid: int, codes: dict[int, int | None]) -> int | None:
    if codes[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def output_of(ranks: Sequence[Rank]) -> str:
    """Return the last lines that each rank has written, for messages."""
    return "\n".join(f"--- {rank.log.name}\n{rank.log.read_text()[-3000:]}" for rank in ranks)


if __name__ == "__main__":
    _serve()
