"""FSDP1 in all strategies, with flat and with original parameters, follows the oracle's trajectory."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.distributed.fsdp1_layouts import LAYOUTS, UnderFSDP1, walk
from tests.distributed.layouts import MAX_NORM, SHARDED, Walk
from tests.problems import worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

CLIPPED = UnderFSDP1.of(replace(SHARDED, steps=14, max_grad_norm=MAX_NORM))
PROBLEMS: dict[str, UnderFSDP1] = {"float64": CLIPPED, "float32": replace(CLIPPED, dtype=torch.float32)}
# Relative to the distance travelled by the worst parameter.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
# Relative to means and norms. On three ranks FSDP1 divides gradients by 3, which rounds once more.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


def walk_all(world_size: int) -> dict[str, dict[str, Walk]]:
    return {
        key: {name: walk(layout, problem, gather_states=name == "float64") for name, problem in PROBLEMS.items()}
        for key, layout in LAYOUTS.items()
        if layout.world_size == world_size
    }


@functools.cache
def walks_of_all_ranks(world_size: int) -> list[dict[str, dict[str, Walk]]]:
    """Run all layouts once, in one world per number of ranks."""
    return run_ranks(walk_all, world_size, world_size)


def walks_in(layout: str) -> list[dict[str, Walk]]:
    return [walks[layout] for walks in walks_of_all_ranks(LAYOUTS[layout].world_size)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_strategy_follows_the_oracle(layout: str) -> None:
    ranks = walks_in(layout)
    for name, problem in PROBLEMS.items():
        oracle, seen = problem.solve()
        for walks in ranks:
            error = worst_relative_error(walks[name].parameters, oracle, problem)
            print(f"fsdp1-{layout} {name}: {error:.1e}")
            assert error < TOLERANCE[problem.dtype]
            rounding = ROUNDING[problem.dtype]
            np.testing.assert_allclose(walks[name].means, [s.mean for s in seen], rtol=rounding)
            np.testing.assert_allclose(walks[name].grad_norms, [s.grad_norm for s in seen], rtol=rounding)
        for key in oracle.parameters:
            copies = {walks[name].parameters[key].tobytes() for walks in ranks}
            assert len(copies) == 1, f"the copies of {key} drift apart"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_gathered_for_a_checkpoint_equal_the_oracles(layout: str) -> None:
    """FSDP1 sets no gradient on a rank without elements of a parameter; it gathers from the other ranks."""
    oracle, _ = PROBLEMS["float64"].solve()
    for walks in walks_in(layout):
        states = walks["float64"].states
        assert set(states) == set(oracle.states)
        for key, state in states.items():
            assert state["step"].item() == oracle.states[key].step
            for part in ("exp_avg", "exp_avg_sq", "beta1_prod"):
                np.testing.assert_allclose(
                    state[part], getattr(oracle.states[key], part), rtol=1e-12, atol=1e-15, err_msg=f"{key} {part}"
                )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_makes_one_all_reduce_and_a_second_one_for_replicated_shards(layout: str) -> None:
    expected = LAYOUTS[layout].num_all_reduces
    for walks in walks_in(layout):
        for seen in walks.values():
            for calls in seen.collectives:
                assert calls == [("allreduce_", 64)] * expected
