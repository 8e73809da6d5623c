"""The benchmark also measures DeepSpeed's Adam if DeepSpeed is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")


@pytest.mark.deepspeed("CPUAdam")
def test_the_benchmark_measures_deepspeeds_adam_with_and_without_clipping(tmp_path: Path) -> None:
    results = tmp_path / "bench.json"
    options = ["--numel", "1000", "--repetitions", "1", "--dtype", "bfloat16", "--json", str(results)]
    finished = subprocess.run(
        [sys.executable, "-m", "adai_dist", "bench", *options],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(results.read_text())
    rows = {row["case"]: row for row in report["rows"] if row["package"] == "deepspeed"}
    # Parameter and gradient have 2 bytes; exp_avg and exp_avg_sq, read and written, have 4.
    counted = {name: row["bytes_per_parameter"] for name, row in rows.items()}
    assert counted == {"DeepSpeed CPUAdam": 3 * 2 + 4 * 4, "DeepSpeed CPUAdam, clipped": 6 * 2 + 4 * 4}
    assert {row["state_bytes_per_parameter"] for row in rows.values()} == {8}
    assert not [line for line in report["missing"] if "DeepSpeed" in line]
    assert report["versions"]["deepspeed"]
