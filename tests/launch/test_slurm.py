"""launch/slurm.sbatch on a real Slurm of two hosts: a run is preempted, loses a node, and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import hosts, slurm_cluster
from tests.launch.long_run import (
    STEPS,
    assert_same_run,
    has_pending,
    newest_checkpoint,
    ranks_on,
    recipe_of,
    uninterrupted_run,
    wait_until,
)
from tests.launch.slurm_cluster import Slurm, slurm
from tests.launch.training import LAUNCH, environment

pytestmark = pytest.mark.distributed

SCRIPT = LAUNCH / "slurm.sbatch"
WORDS = ["a b", "'q\"", "$HOME;x*", ""]

# Writes how it was started; with "wait" it waits for a signal, and writes its number.
PROGRAM = """
import json, os, pathlib, signal, sys, time
names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURM_RESTART_COUNT")
report = {name: os.environ.get(name) for name in names}
path = pathlib.Path(f"rank{report['RANK']}-{report['SLURM_RESTART_COUNT']}.json")
def stop(number, frame):
    path.write_text(json.dumps({**report, "words": sys.argv[2:], "signal": number}))
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
path.write_text(json.dumps({**report, "words": sys.argv[2:], "signal": None}))
if sys.argv[1] == "wait" and report["SLURM_RESTART_COUNT"] is None:
    time.sleep(60)
while sys.argv[1] == "fail" and len(list(pathlib.Path().glob("rank*.json"))) < int(report["WORLD_SIZE"]):
    time.sleep(0.05)
sys.exit(3 if sys.argv[1] == "fail" else 0)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    why = hosts.missing() or slurm_cluster.missing()
    if why:
        pytest.skip(why)
    with hosts.hosts(2) as made, slurm(made, tmp_path_factory.mktemp("slurm"), environment()) as running:
        yield running


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def submit(cluster: Slurm, cwd: Path, *words: str | Path, **knobs: str) -> str:
    return cluster.submit(SCRIPT, *words, cwd=cwd, **knobs)


def report_in(path: Path) -> dict[str, object]:
    return json.loads(path.read_text())


def test_the_unchanged_script_starts_a_rank_per_gpu_and_does_not_requeue_a_failed_program(
    cluster: Slurm, program: Path, tmp_path: Path
) -> None:
    job = cluster.wait(submit(cluster, tmp_path, program, "fail", *WORDS, MAX_RESTARTS="0"), 60)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), cluster.output()
    reports = [report_in(path) for path in sorted(tmp_path.glob("rank*.json"))]
    assert sorted(int(str(one["RANK"])) for one in reports) == list(range(16))
    same = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node1", "words": WORDS}
    assert all(one.items() >= same.items() for one in reports), reports


def test_a_preempted_job_is_terminated_and_requeued(cluster: Slurm, program: Path, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, program, "wait", RANKS_PER_NODE="1")
    wait_until(lambda: len(list(tmp_path.glob("rank*-None.json"))) == 2, 60, cluster.output)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    job = cluster.wait(number, 60)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), cluster.output()
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert [report_in(tmp_path / f"rank{rank}-None.json")["signal"] for rank in (0, 1)] == [signal.SIGTERM] * 2
    assert [report_in(tmp_path / f"rank{rank}-1.json")["signal"] for rank in (0, 1)] == [None] * 2


def test_a_run_that_reaches_its_time_limit_and_loses_a_node_ends_with_the_bits_of_one_node(
    cluster: Slurm, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = recipe_of(tmp_path_factory)
    run = recipe.parent / "runs" / "a run; $HOME"
    number = submit(
        cluster, tmp_path, "adai-dist", "train", "--config", recipe, f"run.name={run.name}", RANKS_PER_NODE="1"
    )
    stop_ranks_at_the_time_limit(cluster, number, run)
    wait_until(lambda: cluster.job(number)["Restarts"] == "1", 60, cluster.output)
    stopped_at = newest_checkpoint(run)
    assert 0 < stopped_at < STEPS

    wait_until(lambda: newest_checkpoint(run) > stopped_at, 60, cluster.output)
    first, second = cluster.hosts
    second.kill_everything()  # slurmd, torchrun, the rank
    assert newest_checkpoint(run) < STEPS, "the run ended before the node was lost"
    wait_until(lambda: cluster.job(number)["Restarts"] == "2", 60, cluster.output)
    cluster.start_node(second)

    job = cluster.wait(number, 90)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), cluster.output()
    assert_same_run(run, uninterrupted_run(tmp_path_factory))
    assert not ranks_on(first) + ranks_on(second)


def stop_ranks_at_the_time_limit(cluster: Slurm, number: str, run: Path) -> None:
    """Send the script the signal that Slurm sends before the limit, after the first checkpoint.

    The ranks are stopped until the signal reaches them, so that it arrives during the run on machines of any speed.
    """
    wait_until(lambda: newest_checkpoint(run) > 0, 60, cluster.output)
    ranks = [rank for host in cluster.hosts for rank in ranks_on(host)]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    assert len(ranks) == 2
    try:
        cluster.ask("scancel", "--signal=USR1", "--batch", number)
        wait_until(lambda: all(has_pending(rank, signal.SIGTERM) for rank in ranks), 30, cluster.output)
    finally:
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
