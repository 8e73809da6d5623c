"""The soak test passes over some hundred steps, and detects divergence and growing memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from adai_dist.cli import main
from adai_dist.tools.soak import Check, Settings, soak
from tests.faults.starter import Starter, output_of
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed


def test_two_ranks_stay_equal_under_ddp_and_fsdp2(starter: Starter, tmp_path: Path) -> None:
    arguments = ("soak", "--steps", "520", "--check-every", "130", "--overflow-every", "97")
    ranks = starter.start(tmp_path / "soak", 2, *arguments)
    assert [rank.wait(120) for rank in ranks] == [0, 0], output_of(ranks)
    output = ranks[0].log.read_text()
    assert [line for line in output.splitlines() if "steps" in line] == [
        "ddp, 2 ranks, 520 steps",
        "fsdp2, 2 ranks, 520 steps",
    ]
    rows = re.findall(r"^ +([\d,]+) +(\d+) +(\d+) +(\S+) +(\S+) +(\S+)$", output, re.MULTILINE)
    assert [row[:2] for row in rows] == 2 * [("130", "1"), ("260", "2"), ("390", "4"), ("520", "5")]
    assert all(int(row[2]) > 0 for row in rows[3::4]), "no beta1_prod has retired by step 520"
    assert all(0 < float(row[3]) < 1e-6 for row in rows)
    assert "skipped on all ranks" not in output
    assert "step" not in ranks[1].log.read_text(), "only the main rank prints"


def test_diverging_ranks_are_detected(starter: Starter, tmp_path: Path) -> None:
    ranks = starter.start(tmp_path / "soak", 2, "soak", "--steps", "650", "--check-every", "50", "--layout", "local")
    assert [rank.wait(120) for rank in ranks] == [1, 1], output_of(ranks)
    assert "adai-dist: local, step 50: parameters or states differ between ranks" in ranks[0].log.read_text()
    assert "Traceback" not in output_of(ranks)


def leak() -> list[Check]:
    kept: list[torch.Tensor] = []
    checks: list[Check] = []
    for check in soak(Settings(steps=200, check_every=20), torch.device("cpu")):
        checks.append(check)
        kept.append(torch.ones(3 << 18))
    return checks


def test_growing_memory_is_detected() -> None:
    ((*good, bad),) = run_ranks(leak, 1)
    assert all(check.fault is None for check in good)
    assert bad.step in (60, 80), "3 MiB more at every check, and the allocations of the first steps"
    assert bad.growth > 8
    assert bad.fault == f"memory has grown by {bad.growth:.1f} MiB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "adai-dist: steps must be at least 1; got 0; give a larger number\n"),
        (("--max-growth", "-1"), "adai-dist: max_growth must be positive; got -1.0; 8 MiB is the default\n"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["soak", *arguments])
    assert end.value.code == 2
    assert capfd.readouterr() == ("", message)
