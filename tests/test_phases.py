"""The phases of a step, called separately, as by an engine that steps one part of the model at a time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from adai_dist import AdaiV2
from adai_dist.sharding import global_mean
from tests.variants import VARIANTS


@pytest.mark.parametrize("name", ["l2", "clipping", "mixed-groups", "all-zero-at-first"])
def test_advancing_parts_in_any_order_with_one_mean_takes_the_same_step(name: str) -> None:
    problem = replace(VARIANTS[name], dtype=torch.float32, steps=25)
    params, others = problem.parameters(), problem.parameters()
    optimizer = AdaiV2(problem.param_groups(params), lr=1.0, max_grad_norm=problem.max_grad_norm)
    engine = AdaiV2(problem.param_groups(others), lr=1.0)
    for step in range(problem.steps):
        problem.set_gradients(params, step)
        problem.set_gradients(others, step)
        optimizer.step()
        shards = engine.owned_shards()
        mean = global_mean(engine.observe(shards), engine.mean_group, max_norm=problem.max_grad_norm)
        random.Random(step).shuffle(shards)
        for part in shards:
            engine.advance([part], mean)
        assert torch.equal(mean.inertia_mean, optimizer.inertia_mean)
    assert all(torch.equal(params[key], others[key]) for key in params)


def test_a_mean_per_part_gives_another_trajectory() -> None:
    """Check that the test above can fail."""
    problem = replace(VARIANTS["no-decay"], steps=25)
    params, others = problem.parameters(), problem.parameters()
    optimizer = AdaiV2(problem.param_groups(params), lr=1.0)
    engine = AdaiV2(problem.param_groups(others), lr=1.0)
    for step in range(problem.steps):
        problem.set_gradients(params, step)
        problem.set_gradients(others, step)
        optimizer.step()
        for part in engine.owned_shards():
            engine.advance([part], global_mean(engine.observe([part]), engine.mean_group))
    assert not torch.allclose(params["b.large"], others["b.large"], rtol=1e-2)
