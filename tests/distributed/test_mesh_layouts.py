"""The mean is exact if the meshes define it, refused if they do not, and warned about if other ranks contradict it."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from adai_dist import AdaiV2
from adai_dist.sharding.assumption_check import CHECK_STEPS
from tests.distributed.mesh_layouts import LAYOUTS, OTHERS, gradient_of
from tests.distributed.recorded import Recorder, Recording, follow
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

WORLD_SIZES = (2, 4, 8)


@dataclass
class Seen:
    """The observations of one rank in a layout."""

    recording: Recording | None
    error: str
    warnings: list[str]


def walk(layout: str) -> Seen:
    """Take some steps, synchronised as in training. Collective: all ranks."""
    made = LAYOUTS[layout].make()
    names = made.names()
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    seen = Seen(None, "", [])
    if names:
        optimizer = AdaiV2(list(names), lr=0.3, dampening=0.5, max_grad_norm=20.0)
        made.configure(optimizer)
        recorder = Recorder([optimizer], names)
    for step in range(CHECK_STEPS[-1]):
        if names and not seen.error:
            for param, name in names.items():
                param.grad = gradient_of(param, name, step)
            try:
                optimizer.step()
            except RuntimeError as error:
                seen.error = str(error)
        dist.barrier()
    if names and not seen.error:
        seen.recording = recorder.finish()
    logging.getLogger("adai_dist").removeHandler(handler)
    seen.warnings = [record.getMessage() for record in records]
    return seen


def walk_all(world_size: int) -> dict[str, Seen]:
    return {name: walk(name) for name, layout in LAYOUTS.items() if layout.world_size == world_size}


@functools.cache
def ranks(world_size: int) -> list[dict[str, Seen]]:
    return run_ranks(walk_all, world_size, world_size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mean_is_exact_or_refused_or_warned_about(name: str) -> None:
    layout = LAYOUTS[name]
    seen = [of_rank[name] for of_rank in ranks(layout.world_size)]
    if layout.outcome == "exact":
        assert [one.error for one in seen] == [""] * len(seen)
        assert [one.warnings for one in seen] == [[]] * len(seen), "no false alarm"
        recordings = [one.recording for one in seen if one.recording is not None]
        for part in by_mean(recordings, name):
            assert follow(part, rounding=1e-13) < 1e-13
    elif layout.is_refused:
        assert all(one.error for one in seen), "refused on all ranks"
        assert any(one.error.startswith(layout.outcome) and "configure_sharding(" in one.error for one in seen)
        for one in seen:
            assert one.error.startswith(
                (layout.outcome, "all ranks that share the mean must know which ranks hold what")
            )
    else:
        assert [one.error for one in seen] == [""] * len(seen)
        assert [one.warnings for one in seen[1:]] == [[]] * (len(seen) - 1), "rank 0 alone"
        (warning,) = [one for one in seen[0].warnings if "step skipped" not in one]
        assert layout.outcome in warning
        assert "configure_sharding(" in warning


def by_mean(recordings: list[Recording], name: str) -> list[list[Recording]]:
    """Return the ranks that share a mean: all of them, unless each has a separate model."""
    return [[one] for one in recordings] if name.startswith("models of their own") else [recordings]


def step_some_ranks(stepping: tuple[int, ...]) -> list[str]:
    """Step on some ranks only, each with a model of different size. Collective: none."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    if dist.get_rank() in stepping:
        model = torch.nn.Linear(2, 2 + dist.get_rank())
        optimizer = AdaiV2(model.parameters(), lr=0.1)
        for _ in range(CHECK_STEPS[-1]):
            model(torch.ones(2)).sum().backward()
            optimizer.step()
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("stepping", [(), (0,), (1,), (1, 2)])
def test_no_rank_waits_for_ranks_that_do_not_step(stepping: tuple[int, ...]) -> None:
    assert run_ranks(step_some_ranks, 3, stepping) == [[], [], []]


def step_after_another_rank() -> list[str]:
    """Step rank 0 after rank 1, and rank 2 never."""
    if dist.get_rank() == 0:
        dist.barrier()
    seen = step_some_ranks((0, 1))
    if dist.get_rank() != 0:
        dist.barrier()
    return seen


def test_ranks_that_have_stepped_are_compared_without_the_others() -> None:
    first, *others = run_ranks(step_after_another_rank, 3)
    assert len(first) == 1
    assert OTHERS in first[0]
    assert others == [[], []]
