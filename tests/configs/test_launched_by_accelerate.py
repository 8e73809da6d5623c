"""Real runs of `accelerate launch --config_file FILE` on two CPU processes, one per way of starting ranks.

The cases are DDP, DeepSpeed, and two machines of one process each, on one address. The other files start ranks in the
same ways; test_accelerate_runs.py tests what the ranks do with each file.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.configs.accelerate_launch import FILES
from tests.recipe_runs import ACCELERATE, ROOT, cli_environment, free_port

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytestmark = pytest.mark.distributed

SCRIPT = ROOT / "tests/configs/training.py"


def run_to_the_end(commands: Sequence[list[str]], timeout: float = 150) -> None:
    """Run all commands concurrently, and leave none running."""
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=cli_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, output[-6000:]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def launch(name: str, folder: Path, *machines: Sequence[str]) -> list[dict[str, Any]]:
    port = str(free_port())
    head = [*ACCELERATE, "--config_file", str(FILES[name].relative_to(ROOT)), "--num_processes", "2"]
    run_to_the_end(
        [[*head, "--main_process_port", port, *flags, str(SCRIPT), str(folder)] for flags in machines or ((),)]
    )
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def check(ranks: list[dict[str, Any]], engine: str) -> None:
    for rank in ranks:
        assert rank["engine"] == engine
        assert rank["error"] < 0.03  # as in test_accelerate_runs.py
    assert ranks[0]["losses"] != ranks[1]["losses"], "the ranks had different data"
    assert ranks[0]["error"] == ranks[1]["error"]


def test_ddp(tmp_path: Path) -> None:
    check(launch("ddp", tmp_path), "MULTI_CPU")


def test_two_machines_with_fsdp2(tmp_path: Path) -> None:
    address = ("--main_process_ip", "127.0.0.1")
    ranks = launch("multi_node", tmp_path, (*address, "--machine_rank", "0"), (*address, "--machine_rank", "1"))
    check(ranks, "FSDP")


@pytest.mark.deepspeed
def test_deepspeed_zero2(tmp_path: Path) -> None:
    ranks = launch("deepspeed_zero2", tmp_path)
    check(ranks, "DEEPSPEED")
    assert ranks[0]["plugin"] == {"stage": "2", "clipping": "1.0"}
