"""Users' mistakes on the command line: one line on stderr and exit code 2."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adai_dist
from adai_dist.cli import main
from tests.faults.starter import Starter
from tests.recipe_runs import run_cli, write_recipe


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers


def end_of(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_module_is_the_command_and_prints_its_version() -> None:
    result = run_cli("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == f"adai-dist {adai_dist.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.stesp=3"], "adai-dist: unknown key 'run.stesp' in the command line; "),
        (["--resume", "run.overwrite=true"], "adai-dist: run.resume and run.overwrite exclude each other; "),
        (["data.batch=8", "grad_accumulation=3"], "adai-dist: data.batch must be a multiple of 3; got 8; "),
        (["model.width=3"], "adai-dist: unknown key 'model.width' for llama; valid keys are "),
        (["data.path=nowhere"], "adai-dist: data.path must name a file, a folder or a glob pattern; got 'nowhere'; "),
    ],
)
def test_a_mistake_in_a_recipe_is_reported_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert end_of("train", "--config", write_recipe(tmp_path), *arguments) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists(), "a run that cannot start leaves no folder"


@pytest.mark.distributed
def test_every_rank_reports_the_same_mistake_without_waiting_for_the_others(tmp_path: Path) -> None:
    # torchrun would kill the slower rank as soon as the faster one fails.
    with Starter() as starter:
        for rank in starter.start(tmp_path / "rank", 2, "train", "--config", write_recipe(tmp_path), "data.batch=9"):
            assert rank.wait(120) == 2
            (line,) = rank.log.read_text().splitlines()
            assert line.startswith("adai-dist: data.batch must be a multiple of 2; got 9; ")


def test_key_value_pairs_may_precede_or_follow_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert end_of("train", "run.steps=0", "--config", recipe) == 2
    assert re.search(r"run\.steps must be .* 1; got 0;", capfd.readouterr().err)
    assert end_of("train", "--config", recipe, "optimizer=adai", "--resume", "run.seed=-1") == 2
    assert re.search(r"run\.seed must be .* 0; got -1;", capfd.readouterr().err)


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["train"], ["train", "--config", "x", "--fast"], ["bench", "a=b"]]
)
def test_unknown_and_missing_arguments_are_refused_with_the_usage(
    capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert end_of(*arguments) == 2
    assert "usage: adai-dist" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "adai-dist: unknown command 'trian'; did you mean 'train'?\n"),
        (["to_universal", "a", "b"], "adai-dist: unknown command 'to_universal'; did you mean 'to-universal'?\n"),
        (["--versoin"], "adai-dist: unknown option '--versoin'; did you mean '--version'?\n"),
        (["train", "--cofnig", "x"], "adai-dist train: unknown option '--cofnig'; did you mean '--config'?\n"),
        (["train", "a=1", "-config", "x"], "adai-dist train: unknown option '-config'; did you mean '--config'?\n"),
        (["bench", "--numle=3"], "adai-dist bench: unknown option '--numle'; did you mean '--numel'?\n"),
    ],
)
def test_a_misspelt_command_or_option_gets_a_suggestion_in_one_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert end_of(*arguments) == 2
    assert capfd.readouterr() == ("", message)


def test_options_may_be_abbreviated(capfd: pytest.CaptureFixture[str]) -> None:
    assert end_of("bench", "--rep", "0") == 2
    assert capfd.readouterr().err.startswith("adai-dist: repetitions must be at least 1; got 0; ")


def test_the_help_of_train_has_examples_and_ends_with_the_keys(capfd: pytest.CaptureFixture[str]) -> None:
    assert end_of("train", "--help") == 0
    stdout, _ = capfd.readouterr()
    assert "adai-dist train --config lm_tiny run.steps=200 optimizers.adaiv2.lr=0.5\n" in stdout
    assert "torchrun --standalone --nproc-per-node 2 -m adai_dist train --config lm_tiny " in stdout
    keys = stdout.partition("\nkeys:\n")[2]
    assert re.search(r"^ *run\.steps .*Number of optimizer steps\.", keys, re.MULTILINE)


def test_the_help_of_train_says_how_to_install_what_lists_the_keys(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "adai_dist.recipes.recipe", None)
    assert end_of("train", "--help") == 0
    assert capfd.readouterr().out.endswith("\nkeys: to list them here, run: pip install 'adai-dist[train]'\n")


def test_runs_of_the_same_name_are_numbered_unless_run_overwrite_is_set(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    short = ("train", "--config", recipe, "run.steps=1", "run.checkpoint_every=0", "optimizer=sgd")
    runs = tmp_path / "runs"
    for expected in (["tiny"], ["tiny", "tiny-2"]):
        assert end_of(*short) == 0
        assert sorted(path.name for path in runs.iterdir()) == expected
        stdout, _ = capfd.readouterr()
        assert f"folder                          {runs / expected[-1]}" in stdout
    (runs / "tiny-2" / "mark").touch()
    assert end_of(*short, "run.name=tiny-2", "run.overwrite=true", "run.checkpoint_every=1") == 0
    assert sorted(path.name for path in runs.iterdir()) == ["tiny", "tiny-2"]
    assert not (runs / "tiny-2" / "mark").exists()
    capfd.readouterr()
    assert end_of("train", "--config", runs / "tiny-2" / "config.yaml", "--resume") == 0, (
        "its run.overwrite=true is ignored"
    )
    assert "held-out loss" in capfd.readouterr().out
    (runs / "precious").mkdir()
    (runs / "precious" / "mark").touch()
    assert end_of(*short, "run.name=precious", "run.overwrite=true") == 2
    assert "run.overwrite deletes runs only; got " in capfd.readouterr().err
    assert [path.name for path in (runs / "precious").iterdir()] == ["mark"]
    (tmp_path / "file").touch()
    assert end_of(*short, f"run.out={tmp_path / 'file'}") == 2
    assert "the folder of the run must be writable; got " in capfd.readouterr().err
    assert end_of(*short, "run.name=tiny", "run.seed=4", "--resume") == 2
    assert "a resumed run must keep run.seed=3; got 4" in capfd.readouterr().err
    summary = json.loads((runs / "tiny-2" / "summary.json").read_text())
    assert summary["tokens_per_second"] is None, "the only step of a run is not timed"
    assert not (runs / "tiny-2" / "inertia.png").exists(), "SGD has no inertia"


def test_the_folder_of_a_run_may_be_a_link(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    short = ("train", "--config", recipe, "run.steps=2", "engine=ddp", "optimizer=sgd", "run.name=linked")
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "runs" / "linked"
    link.parent.mkdir()
    link.symlink_to(elsewhere)
    for flags in ((), ("--resume",), ("run.overwrite=true",)):
        assert end_of(*short, *flags) == 2
        stderr = capfd.readouterr().err
        assert stderr.startswith(f"adai-dist: a link in the place of a run must lead to a folder; got '{link}', ")
        assert f"which leads to '{elsewhere}'; make that folder, delete the link, or change run.name" in stderr
        assert stderr.count("\n") == 1
    elsewhere.mkdir()
    assert end_of(*short, "--resume") == 0, "an empty folder"
    (elsewhere / "mark").touch()
    (elsewhere / "checkpoints" / "kept").symlink_to(tmp_path / "text")
    assert end_of(*short, "run.steps=3", "--resume") == 0
    assert (elsewhere / "mark").exists()
    assert end_of(*short, "run.overwrite=true") == 0
    assert link.is_symlink()
    assert not (elsewhere / "mark").exists()
    assert not (elsewhere / "checkpoints" / "kept").exists()
    assert any((tmp_path / "text").iterdir()), "the targets of links are not deleted"
    assert len(list(elsewhere.glob("events.out.*"))) == 1
    assert sorted(path.name for path in link.parent.iterdir()) == ["linked"]


@pytest.mark.parametrize("out", ["link", "file", "folder"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], out: str) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "tiny" / "run.lock").mkdir(parents=True)
    assert end_of("train", "--config", write_recipe(tmp_path), f"run.out={tmp_path / out}", "--resume") == 2
    stderr = capfd.readouterr().err
    assert stderr.startswith(f"adai-dist: the folder of the run must be writable; got '{tmp_path / out}")
    assert "None" not in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["run.name=", "run.name=null", "run.out=", "optimizer=", "run.steps=", "data.batch=~"]
)
def test_a_setting_without_a_value_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: str) -> None:
    assert end_of("train", "--config", write_recipe(tmp_path), words) == 2
    key = words.partition("=")[0]
    expected = f"adai-dist: {key} must have a value; got none; give it one, or leave the key out\n"
    assert capfd.readouterr().err == expected
    no_name = tmp_path / "no_name.yaml"
    no_name.write_text((tmp_path / "tiny.yaml").read_text().replace("seed: 3", "name: , seed: 3"))
    assert end_of("train", "--config", no_name) == 2
    assert "run.name must have a value; got none; " in capfd.readouterr().err


def test_compare_refuses_a_folder_without_a_finished_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert end_of("compare", tmp_path, "--out", tmp_path / "out.png") == 2
    assert capfd.readouterr().err.startswith("adai-dist: a run must have a readable summary.json; got ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.py"], "adai-dist: run needs a script; got 'none.py', No such file or directory; "),
        (["run", "-m", "none.at.all", "x"], "adai-dist: run needs a module with Python code; got 'none.at.all'; "),
        (["--local_rank=0", "run", "-m", "adai_dist.recipes"], "adai-dist: run needs a module with Python code; got "),
        (["run", "tests"], "adai-dist: run needs a module with Python code; got 'tests'; put a __main__.py into tests"),
        (["run"], "usage: adai-dist run [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]\n"),
        (["run", "-m"], "usage: adai-dist run [-h] (SCRIPT | -m MODULE) [ARGUMENT ...]\n"),
    ],
)
def test_a_missing_program_is_reported_in_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr("sys.path", ["", *sys.path])
    assert end_of(*arguments) == 2
    assert capfd.readouterr().err.startswith(message)


def test_run_has_its_own_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert end_of("run", "--help") == 0
    assert "The arguments after its name belong to it." in " ".join(capfd.readouterr().out.split())


def test_converting_something_other_than_a_checkpoint_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in ((tmp_path / "none", tmp_path / "out"), (tmp_path, tmp_path / "out", "--num-workers", "0")):
        assert end_of("to-universal", *words) == 2
        stderr = capfd.readouterr().err
        assert stderr.startswith("adai-dist: ")
        assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine=deepspeed"], "adai-dist: engine=deepspeed needs deepspeed.config; got ''; "),
        (
            ["engine=deepspeed", "deepspeed.config=no.json"],
            "adai-dist: deepspeed.config must be a file, or the name of ",
        ),
        (["deepspeed.config=no.json"], "adai-dist: 'deepspeed.config=no.json' has no effect; the engine is 'fsdp2'; "),
        (["engine=deepspeed", "deepspeed.cfg=x"], "adai-dist: unknown key 'deepspeed.cfg' in the command line; "),
    ],
)
def test_a_mistake_in_the_settings_of_deepspeed_is_reported_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert end_of("train", "--config", write_recipe(tmp_path), *arguments) == 2
    stderr = capfd.readouterr().err
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_is_resumed_only_by_an_engine_that_reads_its_checkpoints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    assert end_of("train", "--config", recipe, "run.steps=1", "engine=ddp", "optimizer=sgd") == 0
    config = tmp_path / "file.json"
    config.write_text("{}")
    settings = ("engine=deepspeed", f"deepspeed.config={config}", "optimizer=sgd", "run.steps=2", "--resume")
    capfd.readouterr()
    assert end_of("train", "--config", recipe, *settings) == 2
    assert "by an engine that reads its checkpoints, engine=ddp; got 'deepspeed'; " in capfd.readouterr().err
