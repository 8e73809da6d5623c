"""launch/torchrun.sh on two hosts, with the same command on both and the c10d rendezvous."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.hosts import Host
from tests.launch.training import launch_on_all, outcome, train_words, world_size

pytestmark = pytest.mark.distributed


def test_two_nodes_with_one_rank_each_end_with_the_loss_of_one_node(
    two_hosts: list[Host], tmp_path: Path, one_node: list[float]
) -> None:
    logs = launch_on_all(two_hosts, "torchrun.sh", train_words(tmp_path, "two"), tmp_path, RANKS_PER_NODE=1)
    assert world_size(tmp_path / "two") == 2
    assert outcome(tmp_path / "two") == one_node
    assert sum("held-out loss" in log for log in logs) == 1, "only one rank prints the table"


def test_two_nodes_with_two_ranks_each_end_with_nearly_the_loss_of_one_node(
    two_hosts: list[Host], tmp_path: Path, one_node: list[float]
) -> None:
    launch_on_all(two_hosts, "torchrun.sh", train_words(tmp_path, "four"), tmp_path, RANKS_PER_NODE=2)
    assert world_size(tmp_path / "four") == 4
    # Four parts of the batch are added up in another order than two. Measured: 9e-8, one unit of float32.
    assert outcome(tmp_path / "four") == pytest.approx(one_node, rel=2e-7)
    assert outcome(tmp_path / "four") != one_node, "the order is visible, so the equality above is no coincidence"
