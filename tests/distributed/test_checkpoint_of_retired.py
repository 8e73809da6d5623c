"""Checkpoints of parameters whose beta1_prod is retired on all ranks, on some, or on none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from adai_dist.optimizer import retirement
from adai_dist.optimizer.retirement import is_retired
from tests.distributed.checkpoint_layouts import PROBLEM, Training
from tests.distributed.layouts import Walk
from tests.problems import Problem, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

ENGINES = ("ddp", "fsdp2", "fsdp1-orig", "fsdp1-flat")


def some_retire() -> Problem:
    """Make a training with eps=0.9, at which the float64 products of "first" retire after at most 17 steps."""
    groups = ((PROBLEM.groups[0][0] | {"eps": 0.9}, PROBLEM.groups[0][1]), *PROBLEM.groups[1:])
    return replace(PROBLEM, groups=groups, steps=24)


SAVED_AFTER = 20


def num_retired(training: Training) -> int:
    states = [training.optimizer.state[p] for group in training.optimizer.param_groups for p in group["params"]]
    return sum(map(is_retired, states))


def save(folder: str) -> dict[str, Walk]:
    """Save with and without retirement; all must reach the result of a training without retirement."""
    retirement.STEPS_BETWEEN_CHECKS = 1
    ends: dict[str, Walk] = {}
    for layout in ENGINES:
        of_both: list[Walk] = []
        for retires in (True, False):
            training = Training(layout, some_retire(), retire_beta1_prod=retires)
            training.train(0, SAVED_AFTER)
            assert (num_retired(training) > 0) == retires
            training.save(f"{folder}/{layout}-{retires}")
            training.train(SAVED_AFTER, training.problem.steps)
            of_both.append(training.seen())
        for name, parameter in of_both[1].parameters.items():
            np.testing.assert_array_equal(of_both[0].parameters[name], parameter)
            products = [walk.states[name]["beta1_prod"] for walk in of_both]
            np.testing.assert_array_equal(1 - products[0], 1 - products[1])
        ends[layout] = of_both[1]
    return ends


def load(folder: str, ends: dict[str, Walk]) -> None:
    retirement.STEPS_BETWEEN_CHECKS = 1
    oracle = some_retire().solve()[0]
    for index, layout in enumerate(ENGINES):
        for saved in (layout, ENGINES[index - 1]):
            for was_retired, retires in ((True, False), (False, True)):
                training = Training(layout, some_retire(), retire_beta1_prod=retires)
                training.corrupt()
                training.load(f"{folder}/{saved}-{was_retired}")
                training.train(SAVED_AFTER, training.problem.steps)
                assert (num_retired(training) > 0) == retires
                seen = training.seen()
                assert worst_relative_error(seen.parameters, oracle, some_retire()) < 1e-12
                if saved == layout and dist.get_world_size() == 2:
                    for name, parameter in ends[layout].parameters.items():
                        np.testing.assert_array_equal(seen.parameters[name], parameter)


def test_checkpoints_with_and_without_retired_products_are_interchangeable(tmp_path: Any) -> None:
    ends = run_ranks(save, 2, str(tmp_path))[0]
    for num_ranks in (2, 3):
        run_ranks(load, num_ranks, str(tmp_path), ends)
