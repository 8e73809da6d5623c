"""kill -9 at any moment: the run resumes from its last checkpoint, and ends with the bits of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from adai_dist.tools.plots import read_records
from tests.faults.starter import Rank, Starter, output_of
from tests.recipe_runs import LLAMA, losses, read_lines, write_recipe

pytestmark = pytest.mark.distributed

STEPS = 36
NUM_KILLS = 10  # per engine
BOUND_SECONDS = 30.0  # bound on the life of a rank after its peer is killed; gloo notices in milliseconds
EXACT = ("loss", "lr", "grad_norm", "val_loss")  # the other metrics are times


@dataclass(frozen=True)
class Attack:
    """Time and victims of one kill."""

    victims: tuple[int, ...]
    while_writing: bool
    """True to wait until a checkpoint is being written, False until the log changes."""
    delay: float
    """Seconds between this event and the kill."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("killed"), LLAMA)
    text = path.read_text()
    for old, new in (("steps: 6", f"steps: {STEPS}"), ("eval_every: 2", "eval_every: 3")):
        text = text.replace(old, new)
    path.write_text(
        text.replace("checkpoint_every: 2, keep_checkpoints: 5", "checkpoint_every: 3, keep_checkpoints: 1")
    )
    return path


def attacks(engine: str) -> list[Attack]:
    numbers = random.Random(engine)
    made: list[Attack] = []
    for k in range(NUM_KILLS):
        victims = ((0, 1), (0,), (1,))[k % 3]
        while_writing = k % 2 == 0
        made.append(Attack(victims, while_writing, numbers.uniform(0, 0.05 if while_writing else 0.08)))
    numbers.shuffle(made)
    return made


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2, bfloat16 states", "fsdp2, mixed8 states"])
def test_a_run_killed_ten_times_ends_with_the_bits_of_the_uninterrupted_one(
    starter: Starter, recipe: Path, engine: str
) -> None:
    prefix = engine.replace(", ", "-").replace(" ", "-")
    uninterrupted = run_to_the_end(starter, recipe, engine, f"{prefix}-uninterrupted")
    killed_while_writing = 0
    planned = attacks(engine)
    started = recipe.parent / "runs" / f"{prefix}-once"  # as left by a kill before its folder was complete
    started.mkdir()
    (started / "config.yaml.writing").write_text("run:")
    for name, some in ((f"{prefix}-once", planned[:5]), (f"{prefix}-again", planned[5:])):
        for attack in some:
            killed_while_writing += start_and_kill(starter, recipe, engine, name, attack)
        run = run_to_the_end(starter, recipe, engine, name)
        assert_same_run(run, uninterrupted)
    assert killed_while_writing >= 2, "no kill hit a checkpoint that was being written"
    assert not [path.name for path in started.parent.iterdir() if path.name.endswith("-2")], "a run got a second folder"


def arguments(recipe: Path, engine: str, name: str) -> tuple[str | Path, ...]:
    overrides = [f"engine={engine.split(',')[0]}", f"run.name={name}"]
    if engine.endswith(" states"):
        overrides.append(f"optimizers.adaiv2.state_dtype={engine.split()[1]}")
    return ("train", "--config", recipe, "--resume", *overrides)


def run_to_the_end(starter: Starter, recipe: Path, engine: str, name: str) -> Path:
    ranks = starter.start(recipe.with_name(name), 2, *arguments(recipe, engine, name))
    assert [rank.wait(60) for rank in ranks] == [0, 0], output_of(ranks)
    return recipe.parent / "runs" / name


def start_and_kill(starter: Starter, recipe: Path, engine: str, name: str, attack: Attack) -> bool:
    """Start or resume a run and kill some ranks; return whether a checkpoint was being written."""
    run = recipe.parent / "runs" / name
    lines, leftovers = last_line(run), being_written(run)
    ranks = starter.start(recipe.with_name(name), 2, *arguments(recipe, engine, name))
    if attack.while_writing:
        wait_until(lambda: bool(being_written(run) - leftovers), ranks)
    else:
        wait_until(lambda: last_line(run) != lines, ranks)
    time.sleep(attack.delay)
    for victim in attack.victims:
        os.kill(ranks[victim].pid, signal.SIGKILL)
    codes = [rank.wait(BOUND_SECONDS) for rank in ranks]
    for rank, code in enumerate(codes):
        if rank in attack.victims:
            assert code == -signal.SIGKILL, "the run was over before the kill; choose shorter delays"
        else:
            assert code != 0, f"a rank succeeded without its peer: {output_of(ranks)}"
    assert_lines_reach_the_checkpoint(run)
    return bool(being_written(run) - leftovers)


def assert_lines_reach_the_checkpoint(run: Path) -> None:
    """Assert that all steps up to the newest checkpoint are logged, since a resumed run does not repeat them."""
    newest = max((int(path.name[5:13]) for path in run.glob("checkpoints/step_*")), default=0)
    for key, every in (("loss", 1), ("val_loss", 3)):
        found = {record["step"] for record in read_records(run / "metrics.jsonl") if key in record}
        assert found.issuperset(range(every, min(newest, STEPS - 1) + 1, every)), f"{key} up to step {newest}"


def being_written(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoints/writing-*")}


def last_line(run: Path) -> tuple[int, int]:
    """Return inode and size of the log, which change with every line and when a resumed run drops lines."""
    path = run / "metrics.jsonl"
    return (path.stat().st_ino, path.stat().st_size) if path.exists() else (0, 0)


def wait_until(holds: Callable[[], bool], ranks: list[Rank], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, output_of(ranks)
        assert all(rank.poll() is None for rank in ranks), output_of(ranks)
        time.sleep(0.001)


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    for key in EXACT:
        assert losses(run, key) == losses(uninterrupted, key), key
    for name in ("metrics.jsonl", "inertia.jsonl"):
        steps, expected = ([line["step"] for line in read_lines(of / name)] for of in (run, uninterrupted))
        assert steps == expected, "a step is missing or repeated"
    assert (run / "inertia.jsonl").read_text() == (uninterrupted / "inertia.jsonl").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{STEPS:08d}"]
    assert_same_tensors(final_state(run), final_state(uninterrupted), "")


def final_state(run: Path) -> dict[str, Any]:
    path = run / "final.pt"
    dcp_to_torch_save(run / "checkpoints" / f"step_{STEPS:08d}", path)
    return torch.load(path, weights_only=True)


def assert_same_tensors(a: Any, b: Any, where: str) -> None:
    if isinstance(b, dict):
        assert a.keys() == b.keys(), where
        assert b, where
        for key in b:
            assert_same_tensors(a[key], b[key], f"{where}/{key}")
    elif isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu().view(torch.uint8) if a.ndim else a, b.view(torch.uint8) if b.ndim else b), where
    else:
        assert a == b, where
