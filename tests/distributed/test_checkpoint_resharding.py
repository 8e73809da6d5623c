"""torch.distributed.checkpoint: M ranks continue a checkpoint of N ranks, in the same layout and in any other."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.distributed.checkpoint_layouts import PROBLEMS, SAVED_AFTER, Training, assert_same_bits
from tests.distributed.layouts import Walk
from tests.problems import worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS = ("ddp", "fsdp2", "fsdp1-orig", "fsdp1-flat")
WORLD_SIZES = (1, 2, 3, 4)


class Wanted(NamedTuple):
    """A checkpoint, and the layout in which to load it."""

    layout_saved: str
    ranks_saved: int
    dtype: str
    layout: str


class Run(NamedTuple):
    """The observations of one training."""

    at_checkpoint: Walk
    at_end: Walk


def save_and_continue(folder: str) -> dict[tuple[str, str], Run] | None:
    """Save one checkpoint per layout and dtype, and return the results without interruption."""
    runs: dict[tuple[str, str], Run] = {}
    for layout in LAYOUTS:
        for dtype, problem in PROBLEMS.items():
            training = Training(layout, problem)
            training.train(0, SAVED_AFTER)
            training.save(f"{folder}/{layout}-{dist.get_world_size()}-{dtype}")
            at_checkpoint = training.seen()
            training.train(SAVED_AFTER, problem.steps)
            runs[layout, dtype] = Run(at_checkpoint, training.seen())
    return runs if dist.get_rank() == 0 else None


def load_and_go_on(folder: str, wanted: list[Wanted]) -> list[Run] | None:
    runs: list[Run] = []
    for layout_saved, ranks_saved, dtype, layout in wanted:
        problem = PROBLEMS[dtype]
        training = Training(layout, problem)
        training.corrupt()
        training.load(f"{folder}/{layout_saved}-{ranks_saved}-{dtype}")
        assert training.state_dtypes() == {torch.float64 if dtype == "float64" else torch.float32}
        at_checkpoint = training.seen()
        training.train(SAVED_AFTER, problem.steps)
        runs.append(Run(at_checkpoint, training.seen()))
    return runs if dist.get_rank() == 0 else None


def wanted_of(num_ranks: int) -> list[Wanted]:
    """Return the pairs: all numbers of ranks in the same layout; all layouts on two ranks, one other elsewhere."""
    wanted = [Wanted(layout, n, "float64", layout) for n in WORLD_SIZES for layout in LAYOUTS]
    wanted += [Wanted(layout, num_ranks, "bfloat16", layout) for layout in LAYOUTS]
    wanted += [Wanted(layout, 3, "bfloat16", "plain") for layout in LAYOUTS if num_ranks == 1]
    for index, layout in enumerate(LAYOUTS):
        others = range(1, len(LAYOUTS)) if num_ranks == 2 else (1,)
        wanted += [Wanted(layout, 2, "float64", LAYOUTS[(index + k) % len(LAYOUTS)]) for k in others]
    return wanted


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[tuple[str, str], Run]]]:
    """Save the checkpoints of all layouts on 1 to 4 ranks, with the results without interruption."""
    folder = tmp_path_factory.mktemp("checkpoints")
    runs = {n: run_ranks(save_and_continue, n, str(folder))[0] for n in WORLD_SIZES}
    return folder, {n: of_main for n, of_main in runs.items() if of_main is not None}


@cache
def oracle() -> Any:
    return PROBLEMS["float64"].solve()[0]


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_a_checkpoint_of_any_number_of_ranks_continues_on_any_other(num_ranks: int, saved: Any) -> None:
    folder, uninterrupted = saved
    wanted = wanted_of(num_ranks)
    runs = run_ranks(load_and_go_on, num_ranks, str(folder), wanted)[0]
    assert runs is not None
    worst: dict[str, float] = defaultdict(float)
    for (layout_saved, ranks_saved, dtype, layout), run in zip(wanted, runs, strict=True):
        original = uninterrupted[ranks_saved][layout_saved, dtype]
        assert_same_bits(original.at_checkpoint, run.at_checkpoint)
        if (layout_saved, ranks_saved) == (layout, num_ranks):
            assert_same_bits(original.at_end, run.at_end)
        if dtype == "float64":
            error = worst_relative_error(run.at_end.parameters, oracle(), PROBLEMS[dtype])
            worst[layout] = max(worst[layout], error)
            # Measured: at most 1.6e-15.
            assert error < 1e-13, f"{layout_saved} of {ranks_saved} ranks in {layout}"
            assert {key: state["step"].item() for key, state in run.at_end.states.items()} == {
                key: state.step for key, state in oracle().states.items()
            }
    print(f"{num_ranks} ranks: {dict(worst)}")
