"""FSDP1 with empty ranks, blocks without gradients, non-finite or clipped gradients, and pipeline stages."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from adai_dist import AdaiV2
from tests.distributed.fsdp1_layouts import Layout, UnderFSDP1, param_groups, walk, whole_parameters, wrap
from tests.distributed.layouts import MAX_NORM, SHARDED, Prescribed, Walk, backward
from tests.problems import Problem, Spec, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

KINDS = {"orig": True, "flat": False}
# Three and four elements: some of four ranks hold no element of a block, and the last rank none at all.
TINY = UnderFSDP1.of(
    Problem(
        (
            ({"lr": 0.3, "weight_decay": 0.1}, (Spec("first.one", (1,)),)),
            ({"lr": 0.2, "dampening": 0.5}, (Spec("second.two", (2,)), Spec("second.late", (1,), first_step=4))),
            ({"lr": 0.3}, (Spec("root.one", (1,)),)),
        ),
        steps=12,
        max_grad_norm=1.0,
    )
)
# In some steps, blocks or parts of them have no gradient.
GAPS = UnderFSDP1.of(
    Problem(
        (
            (
                {"lr": 0.3},
                (Spec("first.w", (5, 2), missing_every=3), Spec("first.b", (3,), missing_every=3, first_step=4)),
            ),
            ({"lr": 0.1, "decoupled": True}, (Spec("second.weight", (3,), first_step=6),)),
            ({"lr": 0.2, "weight_decay": 0.05}, (Spec("root.one", (1,)), Spec("root.table", (4, 3)))),
        ),
        steps=14,
    )
)
CLIPPED = UnderFSDP1.of(replace(SHARDED, steps=10, max_grad_norm=MAX_NORM))
UNCLIPPED = replace(CLIPPED, max_grad_norm=None, dtype=torch.float32)  # FSDP1 has no norm in float64
PROBLEMS = {"tiny": TINY, "gaps": GAPS}
BAD_STEPS = {0: math.nan, 4: math.inf}


@dataclass
class Clipped:
    """Norms of the same gradients by optimizer and by FSDP1, and the result of the optimizer's clipping."""

    by_optimizer: list[float] = field(default_factory=list)
    by_fsdp1: list[float] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)


def clip_before_steps(layout: Layout) -> Clipped:
    clipped = Clipped()

    def clip(model: Prescribed, wrapped: FSDP, optimizer: AdaiV2) -> None:
        clipped.by_fsdp1.append(wrapped.clip_grad_norm_(math.inf).item())
        clipped.by_optimizer.append(optimizer.clip_grad_norm_(MAX_NORM).item())

    clipped.parameters = walk(layout, UNCLIPPED, clip, gather_states=False).parameters
    return clipped


def corrupt(layout: Layout) -> Walk:
    """Train with one non-finite element on the last rank only, in the table of the model."""
    steps = iter(range(CLIPPED.steps))

    def corrupt_one_element(model: Prescribed, wrapped: FSDP, optimizer: AdaiV2) -> None:
        step = next(steps)
        table = model.by_name()["root.table"] if layout.use_orig_params else wrapped._flat_param
        if step in BAD_STEPS and dist.get_rank() == dist.get_world_size() - 1:
            assert table.grad is not None
            table.grad.view(-1)[0] = BAD_STEPS[step]

    return walk(layout, CLIPPED, corrupt_one_element)


def scale_losses(layout: Layout) -> tuple[dict[str, Any], int]:
    """Train with torch's scaler for FSDP1, with one inf on the last rank in step 2, which all ranks skip."""
    model = Prescribed(CLIPPED)
    wrapped = wrap(model, layout)
    optimizer = AdaiV2(param_groups(model, wrapped, layout), lr=1.0, max_grad_norm=MAX_NORM)
    optimizer.configure_sharding(model=wrapped)
    scaler = ShardedGradScaler("cpu", init_scale=1024.0)
    for step in range(CLIPPED.steps):
        optimizer.zero_grad()
        factor = math.inf if step == 2 and dist.get_rank() == dist.get_world_size() - 1 else 1.0
        scaler.scale(wrapped(step) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return whole_parameters(model, wrapped), int(scaler.get_scale())


def walk_all(world_size: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kind, use_orig_params in KINDS.items():
        layout = Layout(world_size, use_orig_params)
        found[kind] = {name: walk(layout, problem) for name, problem in PROBLEMS.items()}
        if world_size == 2:
            found[kind] |= {
                "clipped": clip_before_steps(layout),
                "bad": corrupt(layout),
                "scaled": scale_losses(layout),
            }
        else:
            found[kind] |= {"stage": walk_one_stage(layout)}
    return found


@functools.cache
def walks(world_size: int) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(walk_all, world_size, world_size)


@pytest.mark.parametrize("problem_name", PROBLEMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_takes_part_whatever_it_holds(world_size: int, kind: str, problem_name: str) -> None:
    problem = PROBLEMS[problem_name]
    oracle, seen = problem.solve()
    for of_rank in walks(world_size):
        walked = of_rank[kind][problem_name]
        assert worst_relative_error(walked.parameters, oracle, problem) < 1e-13
        np.testing.assert_allclose(walked.means, [s.mean for s in seen], rtol=1e-12)
        for name, state in walked.states.items():
            assert state["step"].item() == oracle.states[name].step


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_equals_that_of_fsdp1_and_clipping_follows_the_oracle(kind: str) -> None:
    oracle, seen = replace(CLIPPED, dtype=torch.float32).solve()
    for of_rank in walks(2):
        clipped = of_rank[kind]["clipped"]
        np.testing.assert_allclose(clipped.by_optimizer, [s.grad_norm for s in seen], rtol=1e-12)
        np.testing.assert_allclose(clipped.by_fsdp1, clipped.by_optimizer, rtol=1e-6)
        assert worst_relative_error(clipped.parameters, oracle, UNCLIPPED) < 1e-5


def oracle_without(steps: set[int]) -> Any:
    oracle = CLIPPED.oracle()
    for step in range(CLIPPED.steps):
        if step not in steps:
            oracle.step(CLIPPED.oracle_gradients(step))
    return oracle


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_skip_a_step_that_one_rank_corrupted(kind: str) -> None:
    oracle = oracle_without(set(BAD_STEPS))
    for of_rank in walks(2):
        walked = of_rank[kind]["bad"]
        assert walked.num_skipped_steps == len(BAD_STEPS)
        assert worst_relative_error(walked.parameters, oracle, CLIPPED) < 1e-13
        assert {state["step"].item() for state in walked.states.values()} == {CLIPPED.steps - len(BAD_STEPS)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_sharded_grad_scaler_unscales_and_skips_on_all_ranks(kind: str) -> None:
    oracle = oracle_without({2})
    for of_rank in walks(2):
        parameters, scale = of_rank[kind]["scaled"]
        assert scale == 512
        assert worst_relative_error(parameters, oracle, CLIPPED) < 1e-13


def walk_one_stage(layout: Layout) -> tuple[int, dict[str, Any]]:
    """Train the blocks "first" and "second" as two stages, each sharded over two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    stage = mesh["stage"].get_local_rank()
    model = Prescribed(replace(CLIPPED, groups=(CLIPPED.groups[stage],)))
    wrapped = FSDP(
        model,
        process_group=mesh["shard"].get_group(),
        device_id=torch.device("cpu"),
        use_orig_params=layout.use_orig_params,
    )
    optimizer = AdaiV2(
        [CLIPPED.hyperparameters(stage) | {"params": list(wrapped.parameters())}], lr=1.0, max_grad_norm=MAX_NORM
    )
    optimizer.configure_sharding(model=wrapped, stages=mesh["stage"].get_group())
    for step in range(CLIPPED.steps):
        backward(wrapped, optimizer, step)
        optimizer.step()
    return stage, whole_parameters(model, wrapped)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_sharded_by_fsdp1_share_one_mean(kind: str) -> None:
    problem = replace(CLIPPED, groups=CLIPPED.groups[:2])
    oracle, _ = problem.solve()
    parameters: dict[str, Any] = {}
    for of_rank in walks(4):
        parameters |= of_rank[kind]["stage"][1]
    assert worst_relative_error(parameters, oracle, problem) < 1e-13
