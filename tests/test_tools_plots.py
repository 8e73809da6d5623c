"""Pictures and tables are made from the files of any finished run, and other folders are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adai_dist.tools.plots import comparison_table, plot_comparison, plot_inertia, plot_loss, read_records
from adai_dist.tools.plots.drawing import smoothed


def write_run(folder: Path, num_layers: int = 3, num_records: int = 4, last_loss: float = 2.0) -> Path:
    folder.mkdir()
    losses = [{"step": step, "loss": 5.0 / step + last_loss} for step in range(1, num_records + 1)]
    val = {"step": num_records, "val_loss": last_loss}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*losses, val]))
    layers = {f"block {i}": [0.25] * 4 + [0.0] * 56 for i in range(num_layers)}
    inertia = [{"step": step, "layers": layers} for step in range(1, num_records + 1)]
    (folder / "inertia.jsonl").write_text("".join(json.dumps(line) + "\n" for line in inertia))
    summary = {
        "run": folder.name,
        "unit": "token",
        "optimizer": "adaiv2",
        "engine": "ddp",
        "world_size": 2,
        "steps": num_records,
        "val_loss": last_loss,
        "tokens_per_second": None if num_records == 1 else 1234.5,
        "optimizer_share": None if num_records == 1 else 0.25,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def size_of_png(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.parametrize(("num_layers", "num_records"), [(1, 1), (3, 4), (30, 2)])
def test_inertia_is_drawn_for_any_number_of_layers_and_records(
    tmp_path: Path, num_layers: int, num_records: int
) -> None:
    run = write_run(tmp_path / "run", num_layers, num_records)
    path = plot_inertia(run)
    assert path == run / "inertia.png"
    width, height = size_of_png(path)
    assert 400 < width < 2500
    assert 300 < height < 2500


def test_a_run_without_inertia_gets_no_picture_of_inertia(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "inertia.jsonl").unlink()
    assert plot_inertia(run) is None
    assert not (run / "inertia.png").exists()


@pytest.mark.parametrize("last_loss", [2.0, float("nan")])
def test_a_non_finite_loss_can_be_drawn(tmp_path: Path, last_loss: float) -> None:
    run = write_run(tmp_path / "run", last_loss=last_loss)
    assert size_of_png(plot_loss(run))[0] > 400


def test_the_comparison_lists_the_runs_in_the_order_given(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, num_records=n) for name, n in (("slow", 4), ("a-longer-name", 1))]
    summaries = plot_comparison(folders, tmp_path / "pictures" / "both.png")
    assert size_of_png(tmp_path / "pictures" / "both.png")[0] > 800
    header, first, second = comparison_table(summaries).splitlines()
    assert first.split() == ["slow", "adaiv2", "ddp", "2", "4", "2.0000", "1,234", "25.0%"]
    assert second.split()[0] == "a-longer-name"
    assert header.index("optimizer") == first.index("adaiv2") == second.index("adaiv2")


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a run must have a readable summary.json; got .*nothing"):
        plot_comparison([tmp_path / "nothing"], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    assert read_records(tmp_path / "none.jsonl") == []


def test_smoothing_preserves_a_straight_line_and_does_not_lag() -> None:
    line = [float(i) for i in range(200)]
    assert smoothed(line) == pytest.approx(line)
    assert max(smoothed([0.0, 10.0] * 100)[10:-10]) < 6.0
