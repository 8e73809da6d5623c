"""One non-finite element on any rank in any step: no rank changes anything, and one rank logs it."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from adai_dist import AdaiV2
from tests.distributed.layouts import LAYOUTS, SHARDED, Prescribed, Walk, gather, local, make
from tests.problems import Problem, Spec, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

PROBLEM = replace(SHARDED, steps=24)
NUM_EVENTS = 8
REPORTED_AT = (1, 2, 4, 8)  # numbers of skipped steps
VALUES = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Event:
    """A non-finite element, and the rank that has it."""

    rank: int
    value: float
    draw: float
    """Position of parameter and element, from 0 to 1."""


@dataclass(frozen=True)
class CorruptedProblem(Problem):
    """A problem with one non-finite gradient element before gradients are reduced; later only its owners may see it."""

    event: Event | None = None

    def gradient(self, spec: Spec, step: int) -> Tensor | None:
        gradient = super().gradient(spec, step)
        assert self.event is not None
        always = [other for other in self.specs() if not other.missing_every and not other.first_step]
        if spec is always[int(self.event.draw * len(always))]:
            assert gradient is not None
            gradient.view(-1)[int(self.event.draw * gradient.numel())] = self.event.value
        return gradient


@dataclass
class CorruptedWalk:
    """The observations of one rank."""

    walk: Walk
    untouched: dict[int, bool]
    """Whether parameters and states were bitwise unchanged, by step of an event."""
    warnings: list[str]
    scales: list[float]


def events(layout: str) -> dict[int, Event]:
    numbers = random.Random(layout)
    return {
        step: Event(numbers.randrange(LAYOUTS[layout].world_size), numbers.choice(VALUES), numbers.random())
        for step in numbers.sample(range(PROBLEM.steps), NUM_EVENTS)
    }


def walk_with_and_without_scaler(layout: str) -> tuple[CorruptedWalk, CorruptedWalk]:
    return walk_corrupted(layout, False), walk_corrupted(layout, True)


def walk_corrupted(layout: str, with_scaler: bool) -> CorruptedWalk:
    records: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(listener)
    model, wrapped, optimizer = make(layout, PROBLEM)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=5, enabled=with_scaler)
    seen = CorruptedWalk(Walk({}, {}), {}, [], [])
    planned = events(layout)
    for step in range(PROBLEM.steps):
        event = planned.get(step)
        before = copies(model, optimizer)
        optimizer.zero_grad()
        is_here = event is not None and event.rank == dist.get_rank()
        model.problem = CorruptedProblem(PROBLEM.groups, dtype=PROBLEM.dtype, event=event) if is_here else PROBLEM
        scaler.scale(wrapped(step)).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.scales.append(scaler.get_scale())
        if event is not None:
            after = copies(model, optimizer)
            seen.untouched[step] = all(torch.equal(before[key], after[key]) for key in before)
    seen.walk.num_skipped_steps = int(optimizer.num_skipped_steps)
    seen.warnings = [record.getMessage() for record in records]
    logging.getLogger("adai_dist").removeHandler(listener)
    gather(model, optimizer, seen.walk)
    return seen


def copies(model: Prescribed, optimizer: AdaiV2) -> dict[tuple[str, str], Tensor]:
    """Return this rank's elements of all parameters and of the existing states."""
    found: dict[tuple[str, str], Any] = {}
    for name, param in model.by_name().items():
        found[name, ""] = param.detach()
        found |= {(name, key): value for key, value in optimizer.state.get(param, {}).items()}
    return {key: local(value).clone() for key, value in found.items()}


def test_the_events_differ_in_rank_and_value() -> None:
    drawn = [event for layout in ("ddp-2", "fsdp2-4", "hsdp-2x2") for event in events(layout).values()]
    assert {event.rank for event in drawn} == {0, 1, 2, 3}
    assert {str(event.value) for event in drawn} == {"nan", "inf", "-inf"}


@pytest.mark.parametrize("layout", ["ddp-2", "fsdp2-4", "hsdp-2x2"])
def test_every_rank_skips_and_nothing_changes(layout: str) -> None:
    ranks = run_ranks(walk_with_and_without_scaler, LAYOUTS[layout].world_size, layout)
    bad = events(layout)
    oracle = PROBLEM.oracle()
    for step in range(PROBLEM.steps):
        if step not in bad:
            oracle.step(PROBLEM.oracle_gradients(step))
    for of_rank in zip(*ranks, strict=True):  # without a scaler, with one
        for rank, seen in enumerate(of_rank):
            assert seen.untouched == dict.fromkeys(sorted(bad), True)
            assert seen.walk.num_skipped_steps == NUM_EVENTS
            assert worst_relative_error(seen.walk.parameters, oracle, PROBLEM) < 1e-13
            assert len(seen.warnings) == (len(REPORTED_AT) if rank == 0 else 0)
            assert seen.scales == of_rank[0].scales
        for k, warning in zip(REPORTED_AT, of_rank[0].warnings, strict=True):
            assert f"skipped on all ranks: a gradient is inf or NaN (skipped so far: {k})" in warning
    scales = ranks[0][1].scales
    assert [step for step, scale in enumerate(scales) if scale < [8.0, *scales][step]] == sorted(bad), "halved when bad"
