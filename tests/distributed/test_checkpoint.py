"""torch.distributed.checkpoint: parameters with late gradients, two mesh dimensions, and optimizers without a state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from adai_dist import AdaiV2
from tests.distributed.layouts import LAYOUTS, SHARDED, Walk, backward, full, gather, make
from tests.problems import Problem, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

SAVED_AFTER = 12
PROBLEMS = {
    "float64": replace(SHARDED, steps=20),
    "bfloat16": replace(SHARDED, steps=20, dtype=torch.bfloat16),
}


def train(problem: Problem, wrapped: nn.Module, optimizer: AdaiV2, steps: range) -> None:
    for step in steps:
        backward(wrapped, optimizer, step)
        optimizer.step()


def save_and_continue(layout: str, folder: str) -> dict[str, Walk]:
    walks: dict[str, Walk] = {}
    for name, problem in PROBLEMS.items():
        model, wrapped, optimizer = make(layout, problem)
        train(problem, wrapped, optimizer, range(SAVED_AFTER))
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=f"{folder}/{name}")
        train(problem, wrapped, optimizer, range(SAVED_AFTER, problem.steps))
        walks[name] = gather(model, optimizer)
    return walks


def load_and_go_on(layout: str, folder: str) -> dict[str, Walk]:
    walks: dict[str, Walk] = {}
    for name, problem in PROBLEMS.items():
        model, wrapped, optimizer = make(layout, problem)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(100.0)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for parameter in model.by_name().values():
            wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
            assert {optimizer.state[parameter][k].dtype for k in ("exp_avg", "exp_avg_sq", "beta1_prod")} == {wide}
        train(problem, wrapped, optimizer, range(SAVED_AFTER, problem.steps))
        walks[name] = gather(model, optimizer)
    return walks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Walk]]:
    """Return a checkpoint of two FSDP2 ranks, and the result of these ranks without interruption."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, run_ranks(save_and_continue, 2, "fsdp2-2", str(folder))[0]


@pytest.mark.parametrize("layout", ["fsdp2-2", "hsdp-2x2", "tp-fsdp2-2x2"])
def test_a_checkpoint_of_two_ranks_continues_over_two_mesh_dimensions(
    layout: str, saved: tuple[Path, dict[str, Walk]]
) -> None:
    folder, uninterrupted = saved
    for walks in run_ranks(load_and_go_on, LAYOUTS[layout].world_size, layout, str(folder)):
        if layout == "fsdp2-2":
            for name, expected in uninterrupted.items():
                for key, parameter in expected.parameters.items():
                    np.testing.assert_array_equal(walks[name].parameters[key], parameter)
                    for part, state in expected.states[key].items():
                        np.testing.assert_array_equal(walks[name].states[key][part], state)
        oracle, _ = PROBLEMS["float64"].solve()
        assert worst_relative_error(walks["float64"].parameters, oracle, PROBLEMS["float64"]) < 1e-13


def step_on_a_fresh_optimizer(layout: str) -> dict[str, Walk]:
    walks: dict[str, Walk] = {}
    for name, hyper in FRESH.items():
        problem = replace(SHARDED.with_all(**hyper), steps=8)
        model, wrapped, optimizer = make(layout, problem)
        before = {key: full(p) for key, p in model.by_name().items()}
        for flatten in (False, True):
            get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flatten))
        assert all(torch.equal(full(p), before[key]) for key, p in model.by_name().items())
        assert all(p.grad is None for p in model.parameters())
        train(problem, wrapped, optimizer, range(problem.steps))
        walks[name] = gather(model, optimizer)
    return walks


FRESH: dict[str, dict[str, Any]] = {
    "l2": {"decoupled": False, "weight_decay": 0.1},
    "decoupled": {"decoupled": True, "weight_decay": 0.1},
    "none": {"weight_decay": 0.0},
}


@pytest.mark.parametrize("layout", ["plain-1", "fsdp2-2", "hsdp-2x2"])
def test_reading_the_state_of_a_fresh_optimizer_changes_nothing(layout: str) -> None:
    """torch takes a step with zero gradients and zero lr to initialise the states."""
    for walks in run_ranks(step_on_a_fresh_optimizer, LAYOUTS[layout].world_size, layout):
        for name, hyper in FRESH.items():
            problem = replace(SHARDED.with_all(**hyper), steps=8)
            oracle, _ = problem.solve()
            assert worst_relative_error(walks[name].parameters, oracle, problem) < 1e-13
            assert {k: s["step"].item() for k, s in walks[name].states.items()} == {
                k: s.step for k, s in oracle.states.items()
            }
