"""The benchmark counts bytes as the algorithms do, and reports every case."""

from __future__ import annotations

import pytest

from adai_dist.tools.bench import REFERENCE, bench_table, measure


@pytest.mark.parametrize(("dtype", "adai", "adamw"), [("float32", 40, 28), ("bfloat16", 32, 14)])
def test_every_case_is_measured_and_its_bytes_counted(dtype: str, adai: int, adamw: int) -> None:
    report = measure("cpu", 2**20 + 3, dtype, repetitions=1)
    rows = {row["case"]: row for row in report["rows"]}
    assert rows["Adai, clipped"]["bytes_per_parameter"] == rows["Adai"]["bytes_per_parameter"] == adai
    assert rows["AdamW fused"]["bytes_per_parameter"] == adamw
    assert rows[REFERENCE]["ratio"] == 1.0
    for row in rows.values():
        assert row["milliseconds"] > 0
        moved = row["bytes_per_parameter"] * (2**20 + 3)
        assert row["gigabytes_per_second"] == pytest.approx(moved / row["milliseconds"] / 1e6)
    lines = bench_table(report).splitlines()
    assert [line[:28].strip() for line in lines[3:10]] == list(rows)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="numel must be at least 1; got 0"):
        measure("cpu", 0, "float32", 1)
    with pytest.raises(ValueError, match="device must be one that is there; got 'tpu'"):
        measure("tpu", 8, "float32", 1)
