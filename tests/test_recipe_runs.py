"""The training program end to end, in real processes: command line, launchers, signals, and the files of a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adai_dist.cli import main
from adai_dist.recipes.job import STOP_SIGNALS, StopRequest, join_world
from tests.recipe_runs import cli_command, cli_environment, losses, read_lines, run_cli, write_recipe

pytestmark = pytest.mark.distributed

ENGINES = ("ddp", "fsdp2")
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def runs(recipe: Path) -> dict[str, Path]:
    """Return the folder of a run on two ranks by engine; ENGINE-resumed is a copy cut after step 2 and resumed."""
    folders: dict[str, Path] = {}
    for engine in ENGINES:
        arguments = ("train", "--config", recipe, f"engine={engine}", f"run.name={engine}")
        result = run_cli(*arguments, num_ranks=2)
        assert result.returncode == 0, result.stderr
        assert "held-out loss" in result.stdout
        assert f"{engine}: 100%" in result.stderr, "no progress bar"
        assert result.stderr.count("100%") == 1, "a progress bar on more than one rank"
        folders[engine] = recipe.parent / "runs" / engine
        folders[f"{engine}-resumed"] = _cut_and_resume(folders[engine])
    return folders


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.05)


def _ranks_of(launcher: int) -> dict[str, int]:
    """Return the processes that a launcher has started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    variables = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return {
        entry.removeprefix(b"RANK=").decode(): pid
        for pid, entries in variables.items()
        for entry in entries
        if entry.startswith(b"RANK=")
    }


def _cut_and_resume(run: Path) -> Path:
    """Copy a run as left by a kill in step 4, with an incomplete checkpoint and an incomplete line; resume the copy."""
    cut = run.with_name(f"{run.name}-resumed")
    shutil.copytree(run, cut)
    for late in ("loss.png", "checkpoints/step_00000004", "checkpoints/step_00000006"):
        path = cut / late
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (cut / "checkpoints" / "writing").mkdir()
    lines = (cut / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 3]
    (cut / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 4, "lo')
    config = cut / "config.yaml"
    result = run_cli("train", "--config", config, "--resume", f"run.name={cut.name}", num_ranks=2)
    assert result.returncode == 0, result.stderr
    return cut


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_writes_all_its_files(runs: dict[str, Path], engine: str) -> None:
    run = runs[engine]
    summary = json.loads((run / "summary.json").read_text())
    expected = {"optimizer": "adaiv2", "engine": engine, "world_size": 2, "steps": 6, "tokens": 6 * 8 * 16}
    assert expected.items() <= summary.items()
    assert 1.0 < summary["val_loss"] < 5.6  # a uniform guess among 256 bytes has ln 256 = 5.55
    assert summary["val_loss"] == losses(run, "val_loss")[6]
    assert summary["tokens_per_second"] > 0
    assert 0 < summary["optimizer_share"] < 1
    assert {"adai_dist", "torch", "transformers", "python"} <= summary["versions"].keys()
    assert {"git_commit", "hardware", "skipped_steps"} <= summary.keys()
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert list(losses(run, "val_loss")) == [2, 4, 6]
    for picture in ("loss.png", "inertia.png"):
        assert (run / picture).read_bytes().startswith(PNG)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_0000000{i}" for i in (2, 4, 6)]


@pytest.mark.parametrize("engine", ENGINES)
def test_tensorboard_reads_the_same_losses(runs: dict[str, Path], engine: str) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (events,) = runs[engine].glob("events.out.tfevents.*")
    found = {
        event.step: event.summary.value[0].tensor.float_val[0]
        for event in EventFileLoader(str(events)).Load()
        if event.summary.value and event.summary.value[0].tag == "loss"
    }
    assert found == pytest.approx(losses(runs[engine]), rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(runs: dict[str, Path], engine: str) -> None:
    uninterrupted, resumed = runs[engine], runs[f"{engine}-resumed"]
    assert (resumed / "summary.json").exists()
    assert losses(resumed) == losses(uninterrupted)
    assert losses(resumed, "grad_norm") == losses(uninterrupted, "grad_norm")
    assert losses(resumed, "val_loss") == losses(uninterrupted, "val_loss")
    assert (resumed / "inertia.jsonl").read_text() == (uninterrupted / "inertia.jsonl").read_text()
    assert not (resumed / "checkpoints" / "writing").exists()


def test_both_engines_have_the_same_losses_and_inertia(runs: dict[str, Path]) -> None:
    ddp, fsdp2 = runs["ddp"], runs["fsdp2"]
    assert losses(ddp) == pytest.approx(losses(fsdp2), rel=1e-5)
    for a, b in zip(read_lines(ddp / "inertia.jsonl"), read_lines(fsdp2 / "inertia.jsonl"), strict=True):
        assert list(a["layers"]) == list(b["layers"]) == ["embed_tokens", "block 0", "block 1", "norm", "lm_head"]
        for layer, shares in a["layers"].items():
            assert sum(shares) == pytest.approx(1.0, abs=1e-3)
            # An element near the edge of a bin may fall on either side.
            assert shares == pytest.approx(b["layers"][layer], abs=0.01)


def test_one_rank_without_a_launcher_trains_as_two_ranks_do(recipe: Path, runs: dict[str, Path]) -> None:
    result = run_cli("train", "--config", recipe, "run.checkpoint_every=0", "run.name=alone")
    assert result.returncode == 0, result.stderr
    alone = recipe.parent / "runs" / "alone"
    assert json.loads((alone / "summary.json").read_text())["world_size"] == 1
    assert losses(alone) == pytest.approx(losses(runs["fsdp2"]), rel=1e-5)
    assert losses(alone, "val_loss") == pytest.approx(losses(runs["fsdp2"], "val_loss"), rel=1e-5)


def test_the_comparison_shows_every_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "compare.png"
    with pytest.raises(SystemExit) as end:
        main(["compare", str(runs["ddp"]), str(runs["fsdp2"]), "--out", str(picture)])
    assert not end.value.code
    assert picture.read_bytes().startswith(PNG)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["run", "optimizer"]
    assert [line.split()[:4] for line in lines[:2]] == [
        ["ddp", "adaiv2", "ddp", "2"],
        ["fsdp2", "adaiv2", "fsdp2", "2"],
    ]


@pytest.mark.exhaustive
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_continues_to_the_same_bits(recipe: Path) -> None:
    """Send the signal to one of two ranks, in the middle of a step."""
    name = "asked"
    run = recipe.parent / "runs" / name
    settings = ("run.checkpoint_every=0", "schedule.shape=constant", "run.log_every=3", "run.eval_every=4")
    command = cli_command("train", "--config", recipe, "run.steps=100000", f"run.name={name}", *settings, num_ranks=2)
    process = subprocess.Popen(
        command, env=cli_environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        _wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 1, process)
        os.kill(_ranks_of(process.pid)["1"], signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "exitcode  : 143" in stderr
    assert f"stopped; continue with: adai-dist train --config {run / 'config.yaml'} --resume" in stderr
    assert not (run / "summary.json").exists()
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    done = int(checkpoint.name.removeprefix("step_"))
    assert done % 3 == 0, "not at a logged step"
    assert max(losses(run)) == done

    for other in (name, f"{name}-uninterrupted"):
        words = ("--config", recipe, f"run.name={other}", f"run.steps={done + 4}", *settings, "run.resume=true")
        result = run_cli("train", *words, num_ranks=2)
        assert result.returncode == 0, result.stderr
    for key in ("loss", "grad_norm", "val_loss"):
        assert losses(run, key) == losses(run.with_name(f"{name}-uninterrupted"), key)


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGUSR1])
def test_stop_signals_are_recorded_and_their_handlers_restored(
    number: signal.Signals | None,
) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    stop = StopRequest()
    with join_world("cpu") as world, stop.listening():
        if number is not None:
            os.kill(os.getpid(), number)
        assert stop.reached_any_rank(world) == (number is not None)
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_ctrl_c_ends_a_run_with_its_logs_written_and_says_how_to_continue(recipe: Path) -> None:
    command = cli_command("train", "--config", recipe, "run.steps=1000000", "run.name=stopped")
    process = subprocess.Popen(
        command, env=cli_environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    run = recipe.parent / "runs" / "stopped"
    try:
        _wait_for((run / "checkpoints" / "step_00000004").exists, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert f"continue with: adai-dist train --config {run / 'config.yaml'} --resume" in stderr
    assert "Traceback" not in stderr
    assert losses(run)[4] > 0
    assert not (run / "summary.json").exists()
