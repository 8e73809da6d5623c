"""Every layout follows the trajectory of the oracle."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.distributed.layouts import LAYOUTS, MAX_NORM, SHARDED, Walk, backward, full, local, make, walk
from tests.plain import PlainAdai
from tests.problems import Problem, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

CLIPPED = replace(SHARDED, max_grad_norm=MAX_NORM)
SHORT = replace(SHARDED, steps=16)
PROBLEMS: dict[str, Problem] = {
    "float64": SHORT,
    "float64-clipped": replace(SHORT, max_grad_norm=MAX_NORM),
    "float32-clipped": replace(CLIPPED, dtype=torch.float32),
    "float32-l2-maximize": replace(SHORT.with_all(decoupled=False, maximize=True), dtype=torch.float32),
}
# Relative to the distance travelled by the worst parameter. Measured at most 3e-15 and 4e-6.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def walk_all(layout: str) -> dict[str, Walk]:
    return {name: walk(layout, problem, count=problem.dtype == torch.float64) for name, problem in PROBLEMS.items()}


@functools.cache
def walks_of_all_ranks(layout: str) -> list[dict[str, Walk]]:
    """Run all layouts once for several tests."""
    return run_ranks(walk_all, LAYOUTS[layout].world_size, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_the_oracle(layout: str) -> None:
    ranks = walks_of_all_ranks(layout)
    for name, problem in PROBLEMS.items():
        oracle, seen = problem.solve()
        for walks in ranks:
            error = worst_relative_error(walks[name].parameters, oracle, problem)
            print(f"{layout} {name}: {error:.1e}")
            assert error < TOLERANCE[problem.dtype]
            rounding = {torch.float64: 1e-12, torch.float32: 1e-5}[problem.dtype]
            np.testing.assert_allclose(walks[name].means, [s.mean for s in seen], rtol=rounding)
            np.testing.assert_allclose(walks[name].grad_norms, [s.grad_norm for s in seen], rtol=rounding)
            assert {key: state["step"].item() for key, state in walks[name].states.items()} == {
                key: state.step for key, state in oracle.states.items()
            }
        for key in oracle.parameters:
            copies = [walks[name].parameters[key].tobytes() for walks in ranks]
            assert len(set(copies)) == 1, f"the copies of {key} drift apart"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_makes_as_many_all_reduces_as_the_mesh_has_dimensions(layout: str) -> None:
    expected = LAYOUTS[layout].num_all_reduces
    for walks in walks_of_all_ranks(layout):
        for calls in walks["float64"].collectives + walks["float64-clipped"].collectives:
            assert [name for name, _ in calls] == ["allreduce_"] * expected
            assert all(num_bytes <= 64 for _, num_bytes in calls)


def test_the_clip_bound_is_between_the_norms_of_the_steps() -> None:
    """Check that the clipped problems clip some steps and not others."""
    norms = [seen.grad_norm for seen in SHARDED.solve()[1]]
    assert 10 < sum(norm > MAX_NORM for norm in norms) < len(norms) - 10


def walk_with_local_means(layout: str) -> dict[str, np.ndarray]:
    """Run the naive per-shard optimizer: each rank takes the mean over the elements that it holds."""
    model, wrapped, optimizer = make(layout, SHARDED)
    locals_ = {name: torch.nn.Parameter(local(p).detach()) for name, p in model.by_name().items()}
    plain = PlainAdai(SHARDED.param_groups(locals_))
    for step in range(SHARDED.steps):
        backward(wrapped, optimizer, step)
        for name, parameter in model.by_name().items():
            locals_[name].grad = None if parameter.grad is None else local(parameter.grad)
        plain.step()
    return {name: full(parameter).numpy() for name, parameter in model.by_name().items()}


@pytest.mark.parametrize("layout", ["fsdp2-2", "fsdp2-beside-plain-2", "tp-2", "tp-fsdp2-2x2"])
def test_a_local_mean_would_be_far_off(layout: str) -> None:
    """Check that the tests above can fail: the error is a thousand times their tolerance."""
    oracle, _ = SHARDED.solve()
    for parameters in run_ranks(walk_with_local_means, LAYOUTS[layout].world_size, layout):
        error = worst_relative_error(parameters, oracle, SHARDED)
        print(f"{layout}: {error:.1e}")
        assert error > 1e-2
