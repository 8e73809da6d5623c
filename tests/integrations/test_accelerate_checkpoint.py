"""Checkpoints with accelerate's save_state and load_state in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe_runs import TORCHRUN, run_command

pytest.importorskip("accelerate")
pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parent / "accelerate_script.py"


def test_a_resumed_run_of_accelerate_is_bitwise_equal(tmp_path: Path) -> None:
    """Use bfloat16 parameters, to whose dtype torch would cast the states."""
    for what in ("save", "resume"):
        command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(SCRIPT), str(tmp_path), what]
        ended = run_command(command, timeout=120)
        assert ended.returncode == 0, ended.stderr
    ends = {
        (what, rank): (tmp_path / f"{what}{rank}").read_text().split() for what in ("save", "resume") for rank in "01"
    }
    hashes = {end[0] for end in ends.values()}
    assert len(hashes) == 1, "all ranks of both runs end with the same parameters and states"
    for rank in "01":
        assert ends["save", rank][1:] == ends["resume", rank][1:]
        assert len(ends["save", rank]) == 5
    assert ends["save", "0"][1:] != ends["save", "1"][1:], "the ranks had different data"
