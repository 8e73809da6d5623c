"""A node is disconnected during a run: both sides end in bounded time, and the resumed run ends with the same bits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.launch.hosts import Host
from tests.launch.long_run import STEPS, assert_same_run, newest_checkpoint, recipe_of, uninterrupted_run, wait_until
from tests.launch.two_torchruns import TwoTorchruns

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 15  # run.timeout, of the process group
TCP_RETRIES = "4"  # until the kernel closes a connection; the default of 15 takes a quarter of an hour
BOUND_SECONDS = 60.0  # measured: 15 to 21


def test_both_sides_of_a_disconnection_fail_and_the_run_resumes_to_the_bits_of_one_node(
    two_hosts: list[Host], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = recipe_of(tmp_path_factory)
    run = recipe.parent / "runs" / "disconnected"
    settings = [f"run.name={run.name}", f"run.timeout={TIMEOUT_SECONDS}"]
    words = ["adai-dist", "train", "--config", str(recipe), "--resume", *settings]
    for host in two_hosts:
        reduce_tcp_retries(host)
    with TwoTorchruns(two_hosts, words, tmp_path) as started:
        wait_until(lambda: newest_checkpoint(run) > 0, 60, started.output)
        two_hosts[1].cut_off()
        cut_at = time.monotonic()
        codes = started.wait(BOUND_SECONDS)
        print(f"both sides ended {time.monotonic() - cut_at:.1f} s after the cut")
        assert 0 not in codes, started.output()
    assert 0 < newest_checkpoint(run) < STEPS

    two_hosts[1].reconnect()
    with TwoTorchruns(two_hosts, words, tmp_path) as started:
        assert started.wait(90) == [0, 0], started.output()
    assert_same_run(run, uninterrupted_run(tmp_path_factory))


def reduce_tcp_retries(host: Host) -> None:
    """Set tcp_retries2 on this host only, as sysctl does."""
    done = host.run(["sh", "-c", f"echo {TCP_RETRIES} > /proc/sys/net/ipv4/tcp_retries2"])
    assert done.returncode == 0, done.stderr
