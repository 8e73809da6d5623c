"""Checkpoints are complete or invisible, damage is detected before anything is loaded, and no rank hangs."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from adai_dist.recipes.checkpoints import CheckpointError, Checkpoints
from adai_dist.recipes.job import World
from tests.faults.linear_engine import LinearEngine
from tests.faults.starter import Starter, output_of
from tests.recipe_runs import losses, write_recipe
from tests.spawn import fork, run_ranks

pytestmark = pytest.mark.distributed

DIED = 9
CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"})


def world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def engine_after(num_steps: int, **options: Any) -> LinearEngine:
    engine = LinearEngine(**options)
    engine.take_steps(num_steps)
    return engine


# -- a process that dies between any two changes of the file system ----------------------------------------------------


def save_and_die_at(change: int, folder: Path, step: int) -> None:
    """Save a checkpoint, and exit just before change number `change` to the folder; 0 saves completely."""
    engine, num_seen = engine_after(step), 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal num_seen
        is_written = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or (is_written and str(folder) in str(args[0])):
            num_seen += 1
            if num_seen == change:
                os._exit(DIED)

    sys.addaudithook(count)
    Checkpoints(folder, 2, world()).save(engine, step)


def continue_from(folder: Path, steps: tuple[int, ...]) -> None:
    """Load the newest checkpoint, which must be an intact one of these steps, and save the next two."""
    warnings: list[logging.LogRecord] = []
    logging.getLogger("adai_dist").addFilter(lambda record: bool(warnings.append(record)))
    checkpoints = Checkpoints(folder, 2, world())
    engine = engine_after(0)
    found = checkpoints.load_latest(engine)
    assert found in steps, found
    assert engine.is_at(engine_after(found).local_state())
    assert not warnings
    for step in (8, 9):
        checkpoints.save(engine_after(step), step)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000008", "step_00000009"]


def run_in_fork(work: Callable[..., None], *args: Any) -> int:
    """Run a function in a forked process with a process group of one rank, and return the exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            work(*args)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at_every_change(folder: Path, step: int, sender: Any) -> None:
    """Save `step` into copies of a folder with steps 2 and 3, exiting before each change; 3 or `step` must remain."""
    torch.set_num_threads(1)
    original = folder / "original"
    for earlier in (2, 3):
        assert run_in_fork(save_and_die_at, 0, original, earlier) == 0
    codes = [DIED]
    while codes[-1] == DIED:
        copy = folder / str(len(codes))
        shutil.copytree(original, copy)
        codes.append(run_in_fork(save_and_die_at, len(codes), copy, step))
        assert run_in_fork(continue_from, copy, (3, step)) == 0, f"after change {len(codes) - 1}"
    sender.send(codes)


@pytest.mark.parametrize("step", [3, 4], ids=["written again", "new"])
def test_an_intact_checkpoint_remains_wherever_the_process_dies(tmp_path: Path, step: int) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = fork(die_at_every_change, tmp_path, step, sender)
    sender.close()
    process.join(120)
    assert process.exitcode == 0
    codes = receiver.recv()
    assert codes[-1] == 0
    assert len(codes) > 15, "a checkpoint makes more changes"


# -- damaged checkpoints, on two ranks ---------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: os.truncate(path / "__1_0.distcp", 100), "__1_0.distcp has 100 bytes instead of "),
    "flipped": (lambda path: flip_bit(path / "__1_0.distcp"), "__1_0.distcp does not have the content"),
    "missing": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no manifest": (lambda path: (path / "about.json").unlink(), "about.json is missing or cannot be read"),
    "half a manifest": (lambda path: os.truncate(path / "about.json", 40), "about.json is missing or cannot be read"),
    "another manifest": (lambda path: (path / "about.json").write_text("[1]"), "about.json is missing or cannot be"),
}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def on_main(work: Callable[[], Any]) -> None:
    if dist.get_rank() == 0:
        work()
    dist.barrier()


def load_damaged(folder: str) -> dict[str, Any]:
    """Damage the newest checkpoint and load; return step, correctness, warnings and folder names, by damage."""
    records: list[logging.LogRecord] = []
    logging.getLogger("adai_dist").addFilter(lambda record: bool(records.append(record)))
    found: dict[str, Any] = {}
    for name, (damage, _) in DAMAGES.items():
        records.clear()
        checkpoints, place = Checkpoints(Path(folder) / name, 2, world()), Path(folder) / name
        for step in (2, 3):
            checkpoints.save(engine_after(step), step)
        on_main(lambda damage=damage, place=place: damage(place / "step_00000003"))
        engine = engine_after(1)
        step = checkpoints.load_latest(engine)
        is_right = engine.is_at(engine_after(step).local_state())
        checkpoints.save(engine_after(3), 3)
        names = sorted(path.name for path in place.iterdir())
        found[name] = step, is_right, [record.getMessage() for record in records], names
    return found


def test_under_fsdp2_a_damaged_checkpoint_is_renamed_with_a_warning_and_an_older_one_is_loaded(tmp_path: Path) -> None:
    first, second = run_ranks(load_damaged, 2, str(tmp_path))
    for name, (_, words) in DAMAGES.items():
        step, is_right, (warning,), names = first[name]
        assert (step, is_right) == (2, True), name
        assert f"{name}/step_00000003 is damaged: {words}" in warning
        assert warning.endswith("renamed to damaged-step_00000003, going back to step_00000002")
        assert names == ["damaged-step_00000003", "step_00000002", "step_00000003"]
        assert second[name] == (2, True, [], names), "the other rank also warned, or loaded another step"


def error_of(work: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        work()
    return str(error.value)


def refused_loads(folder: str) -> dict[str, tuple[str, bool]]:
    """Return the error of each load that must fail, and whether it left the engine unchanged."""
    place = Path(folder)
    checkpoints = Checkpoints(place, 2, world())
    checkpoints.save(engine_after(2), 2)
    found: dict[str, tuple[str, bool]] = {}
    others = {"model": {"num_inputs": 34}, "optimizer": {"optimizer": torch.optim.AdamW}}
    for name, options in others.items():
        engine = engine_after(1, **options)
        before = engine.local_state()
        found[name] = error_of(lambda engine=engine: checkpoints.load_latest(engine)), engine.is_at(before)
    on_main(lambda: os.truncate(place / "step_00000002" / "__1_0.distcp", 100))
    engine = engine_after(1)
    before = engine.local_state()
    found["all damaged"] = error_of(lambda: checkpoints.load_latest(engine)), engine.is_at(before)
    assert [path.name for path in place.iterdir()] == ["step_00000002"]
    return found


def test_under_fsdp2_a_failing_load_is_one_error_on_all_ranks_and_changes_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(refused_loads, 2, str(tmp_path))
    assert first == second
    assert all(is_unchanged for _, is_unchanged in first.values())
    assert "continued by the model that wrote it" in first["model"][0]
    assert "'weight' has the shape [3, 33] there and [3, 34] in this model; change run.name" in first["model"][0]
    assert "Missing key in checkpoint state_dict: optimizer." in first["optimizer"][0]
    assert "one checkpoint must be undamaged; got step_00000002: __1_0.distcp has 100 b" in first["all damaged"][0]
    assert all("\n" not in error for error, _ in first.values())


def fill_the_disk(folder: str) -> tuple[list[str], list[str]]:
    """Save with a limit of 1,000 bytes per file on each rank in turn, as on a full disk, then below a file."""
    checkpoints = Checkpoints(Path(folder) / "kept", 2, world())
    checkpoints.save(engine_after(2), 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    errors: list[str] = []
    for rank in range(dist.get_world_size()):
        engine = engine_after(3)  # before the limit: steps write to the store of the process group, here a file
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        errors.append(error_of(lambda engine=engine: checkpoints.save(engine, 3)))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = [path.name for path in checkpoints.complete()]
    on_main(lambda: (Path(folder) / "file").touch())
    errors.append(error_of(lambda: Checkpoints(Path(folder) / "file", 2, world()).save(engine_after(3), 3)))
    checkpoints.save(engine_after(3), 3)
    return errors, names + [path.name for path in checkpoints.complete()]


def test_under_fsdp2_a_failing_write_is_one_error_on_all_ranks_and_keeps_older_checkpoints(tmp_path: Path) -> None:
    (errors, names), second = run_ranks(fill_the_disk, 2, str(tmp_path))
    assert second == (errors, names)
    for rank, error in enumerate(errors[:2]):
        assert f"the checkpoint of step 3 must be written by all ranks; got rank {rank}: " in error
        assert "nothing was published and older checkpoints are kept" in error
        assert "\n" not in error
    assert "got rank 0: FileExistsError" in errors[2]
    assert names == ["step_00000002", "step_00000002", "step_00000003"]


def save_after_an_unreadable_one(folder: str) -> list[str]:
    place = Path(folder)
    checkpoints = Checkpoints(place, 2, world())
    for step in (1, 2, 3):
        checkpoints.save(engine_after(step), step)
    (place / "step_00000003" / "about.json").write_text("{")
    checkpoints.save(engine_after(4), 4)
    return sorted(path.name for path in place.iterdir())


def test_an_unreadable_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    (names,) = run_ranks(save_after_an_unreadable_one, 1, str(tmp_path))
    assert names == ["step_00000002", "step_00000003", "step_00000004"]


# -- through the command line ------------------------------------------------------------------------------------------


def test_the_command_falls_back_to_an_intact_checkpoint_and_fails_without_one(starter: Starter, tmp_path: Path) -> None:
    arguments = ("train", "--config", write_recipe(tmp_path), "--resume", "engine=ddp")
    run = tmp_path / "runs" / "tiny"

    def result(attempt: str, *more: str) -> tuple[list[int], str]:
        ranks = starter.start(tmp_path / attempt, 2, *arguments, *more)
        return [rank.wait(60) for rank in ranks], output_of(ranks)

    assert result("undamaged")[0] == [0, 0]
    curve = losses(run)
    os.truncate(run / "checkpoints" / "step_00000006" / "__0_0.distcp", 100)
    codes, output = result("back")
    assert codes == [0, 0], output
    assert output.count("step_00000006 is damaged: __0_0.distcp has 100 bytes") == 1
    assert losses(run) == curve
    for path in (run / "checkpoints").glob("step_*"):
        about = json.loads((path / "about.json").read_text())
        assert about["world_size"] == 2
        assert {name: of["size"] for name, of in about["files"].items()} == {
            item.name: item.stat().st_size for item in path.iterdir() if item.name != "about.json"
        }
        os.truncate(path / ".metadata", 10)
    codes, output = result("nothing left", "run.steps=8")
    assert codes == [1, 1], output
    assert (
        output.count("adai-dist: at least one checkpoint must be undamaged; got step_00000006: .metadata has 10 ") == 2
    )
    assert "Traceback" not in output
