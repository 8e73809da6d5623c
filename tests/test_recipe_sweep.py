"""A sweep runs every optimizer with every seed, and does not repeat finished runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.recipe_runs import ROOT, run_cli

pytestmark = pytest.mark.distributed

DIGITS = ROOT / "configs" / "recipes" / "digits_cnn.yaml"
PNG = b"\x89PNG\r\n"


def sweep(out: Path, *words: str, num_ranks: int = 1) -> tuple[int, str, str]:
    short = ("run.steps=4", "run.log_every=2", "run.eval_every=2", f"run.out={out}", "device=cpu")
    result = run_cli("sweep", "--config", DIGITS, *words, *short, num_ranks=num_ranks)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.exhaustive
def test_a_sweep_compares_all_optimizers_over_seeds_on_two_ranks_and_resumes_unfinished_runs(
    tmp_path: Path,
) -> None:
    code, table, errors = sweep(tmp_path, "--seeds", "2", num_ranks=2)
    assert code == 0, errors
    header, *rows = table.strip().splitlines()
    assert header.split("  ")[0] == "optimizer"
    names = ["sgd", "adam", "adamw", "adai", "adaiw", "adaiv2"]
    assert [row.split()[:2] for row in rows[:6]] == [[name, "2"] for name in names]
    assert all(row.count("±") == 2 for row in rows[:6]), "loss and error must have mean and deviation"
    folder = tmp_path / "digits_cnn"
    assert (folder / "sweep.png").read_bytes().startswith(PNG)
    members = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert members == sorted(f"{name}-seed{seed}" for name in names for seed in (0, 1))
    summaries = {name: json.loads((folder / name / "summary.json").read_text()) for name in members}
    assert len({summary["val_loss"] for summary in summaries.values()}) == 12, "two runs have the same loss"
    assert {summary["world_size"] for summary in summaries.values()} == {2}

    times = {name: (folder / name / "summary.json").stat().st_mtime_ns for name in members}
    (folder / "adai-seed1" / "summary.json").unlink()  # as left by a kill
    shutil.rmtree(folder / "adai-seed0")
    code, again, errors = sweep(tmp_path, "--seeds", "2", num_ranks=2)
    assert code == 0, errors
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == members
    changed = {name for name in members if (folder / name / "summary.json").stat().st_mtime_ns != times[name]}
    assert changed == {"adai-seed0", "adai-seed1"}
    before, after = ([row.rsplit("  ", 1)[0] for row in text.splitlines()] for text in (table, again))
    assert after == before, "the tables differ beyond their last column, the seconds"


def test_a_sweep_of_some_optimizers_and_one_seed(tmp_path: Path) -> None:
    code, table, errors = sweep(tmp_path, "--optimizers", "adaiw,sgd", "--seeds", "1", "run.seed=5")
    assert code == 0, errors
    assert [row.split()[0] for row in table.strip().splitlines()[1:3]] == ["adaiw", "sgd"]
    assert "±" not in table
    assert (tmp_path / "digits_cnn" / "sgd-seed5" / "summary.json").exists()

    code, _, errors = sweep(tmp_path, "--optimizers", "sgd", "--seeds", "1", "run.seed=5", "data.batch=32")
    assert code == 2
    assert "sgd-seed5' must hold the run that the sweep needs; got one with other settings" in errors
    code, _, errors = sweep(tmp_path, "--optimizers", "lion")
    assert code == 2
    assert "optimizers must be among those of the recipe, sgd, adam, adamw, adai, adaiw, adaiv2; got 'lion'" in errors
    code, _, errors = sweep(tmp_path, "--seeds", "0")
    assert code == 2
    assert "the number of seeds must be at least 1; got 0" in errors
