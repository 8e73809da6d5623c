"""Damaged and foreign torch.distributed.checkpoint folders change nothing when they are loaded into a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tests.distributed.checkpoint_layouts import PROBLEM, SAVED_AFTER, Training, assert_same_bits
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed


def truncate(folder: Path) -> None:
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def lose_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def lose_a_file(folder: Path) -> None:
    sorted(folder.glob("*.distcp"))[-1].unlink()


DAMAGES = {"truncated": truncate, "no metadata": lose_metadata, "a file lost": lose_a_file}


def load_damaged(folder: str) -> list[str]:
    """Load every damaged checkpoint and return the errors that torch raised."""
    errors: list[str] = []
    training = Training("fsdp2", PROBLEM)
    training.train(0, SAVED_AFTER)
    for name, damage in DAMAGES.items():
        path = Path(folder, name)
        training.save(path)
        if dist.get_rank() == 0:
            damage(path)
        dist.barrier()
    foreign = Path(folder, "foreign")
    dcp.save({"something": {"else": 1}}, checkpoint_id=foreign)
    before = training.seen()
    for name in (*DAMAGES, "foreign"):
        state = copy.deepcopy(training.state())
        try:
            dcp.load(state, checkpoint_id=Path(folder, name))
        except (Exception, CheckpointException) as error:
            errors.append(type(error).__name__)
        else:
            training.take(state)
        assert_same_bits(before, training.seen())
    twin = Training("fsdp2", PROBLEM)
    twin.train(0, PROBLEM.steps)
    training.train(SAVED_AFTER, PROBLEM.steps)
    assert_same_bits(twin.seen(), training.seen())
    return errors


def test_a_damaged_checkpoint_that_is_loaded_into_a_copy_changes_nothing(tmp_path: Path) -> None:
    for errors in run_ranks(load_damaged, 2, str(tmp_path)):
        print(errors)
        assert len(errors) == len(DAMAGES) + 1
