"""launch/accelerate.sh on two hosts, with the same command on both except for NODE_RANK."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.hosts import Host
from tests.launch.training import launch_on_all, outcome, train_words, world_size

pytestmark = pytest.mark.distributed


def test_the_run_ends_with_the_loss_of_one_node(two_hosts: list[Host], tmp_path: Path, one_node: list[float]) -> None:
    launch_on_all(two_hosts, "accelerate.sh", train_words(tmp_path, "two"), tmp_path, RANKS_PER_NODE=1)
    assert world_size(tmp_path / "two") == 2
    assert outcome(tmp_path / "two") == one_node
