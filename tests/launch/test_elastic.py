"""torchrun on two hosts restarts all ranks when one is lost, and the run ends with the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launch.hosts import Host
from tests.launch.long_run import (
    STEPS,
    assert_same_run,
    newest_checkpoint,
    ranks_on,
    recipe_of,
    uninterrupted_run,
    wait_until,
)
from tests.launch.two_torchruns import TwoTorchruns
from tests.recipe_runs import losses

pytestmark = pytest.mark.distributed


def arguments_of(recipe: Path, name: str) -> list[str]:
    return ["adai-dist", "train", "--config", str(recipe), "--resume", f"run.name={name}"]


def test_a_run_in_which_a_rank_is_killed_ends_with_the_bits_of_one_node(
    two_hosts: list[Host], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = recipe_of(tmp_path_factory)
    run = recipe.parent / "runs" / "restarted"
    with TwoTorchruns(two_hosts, arguments_of(recipe, run.name), tmp_path, MAX_RESTARTS="1") as started:
        wait_until(lambda: newest_checkpoint(run) > 0, 60, started.output)
        survivor, victim = (ranks_on(host)[0] for host in two_hosts)
        os.kill(victim, signal.SIGKILL)
        assert started.wait(90) == [0, 0], started.output()
    assert not Path(f"/proc/{survivor}").exists(), "the rank on the other host must be restarted as well"
    assert_same_run(run, uninterrupted_run(tmp_path_factory))


def test_a_run_terminated_on_one_node_ends_on_both_and_resumes_to_the_bits_of_one_node(
    two_hosts: list[Host], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = recipe_of(tmp_path_factory)
    run = recipe.parent / "runs" / "terminated"
    words = [
        *arguments_of(recipe, run.name),
        "run.checkpoint_every=0",
    ]  # only the checkpoint requested by the signal
    with TwoTorchruns(two_hosts, words, tmp_path) as started:
        wait_until(lambda: (run / "metrics.jsonl").exists() and bool(losses(run)), 90, started.output)
        started.terminate_on(two_hosts[1])
        assert 0 not in started.wait(60), started.output()
    assert 0 < newest_checkpoint(run) < STEPS

    with TwoTorchruns(two_hosts, words, tmp_path) as started:
        assert started.wait(90) == [0, 0], started.output()
    assert_same_run(run, uninterrupted_run(tmp_path_factory))
