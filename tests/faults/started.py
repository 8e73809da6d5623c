"""Ranks of the training program as processes that can be killed at once: forked from one that has imported everything.

A rank costs a fork instead of seconds of imports, so that a run can be killed and started again twenty times.
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
        """The exit code, negative for a signal; None while it runs."""
        return self._starter.ask(poll=self.pid)

    def wait(self, seconds: float) -> int:
        """Waits for the end; a process that takes longer says where it stands."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGUSR1)
                time.sleep(0.5)
                raise AssertionError(f"still running after {seconds} s: {self.log.read_text()[-6000:]}")
            time.sleep(0.02)
        return code


class Starter:
    """Starts ranks of the command line. A context manager: what still runs at its end is killed."""

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
        self._process.communicate()  # its standard input ends, and it kills what it has started
        assert self._process.returncode == 0

    def start(self, logs: Path, num_ranks: int, *arguments: str | Path) -> list[Rank]:
        """Starts `adai-dist ARGUMENTS` on some ranks, which write into LOGS-RANK.log."""
        port = free_port()
        ranks: list[Rank] = []
        for rank in range(num_ranks):
            log = logs.with_name(f"{logs.name}-{rank}.log")
            meeting = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in meeting.items()}
            pid = self.ask(start=[*map(str, arguments)], environment=environment, log=str(log))
            ranks.append(Rank(self, pid, log))
        return ranks

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    """The starting process: answers questions from its standard input until that ends."""
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
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for old, new in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def _poll(pid: int, codes: dict[int, int | None]) -> int | None:
    if codes[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def words_of(ranks: Sequence[Rank]) -> str:
    """What the ranks have said, for messages."""
    return "\n".join(f"--- {rank.log.name}\n{rank.log.read_text()[-3000:]}" for rank in ranks)


if __name__ == "__main__":
    _serve()
