"""No rank is left waiting: ranks without elements or gradients and with non-finite ones take part in every step."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from adai_dist import AdaiV2
from tests.distributed.layouts import LAYOUTS, SHARDED, Prescribed, Walk, local, make, walk
from tests.problems import Problem, Spec, worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

# Three elements: of four ranks one holds two, one holds one, and two hold none.
TINY = Problem(
    (({"lr": 0.3, "dampening": 0.5}, (Spec("first.one", (1,)), Spec("second.two", (2,)), Spec("root.one", (1,)))),),
    steps=12,
)
# In every third step no parameter has a gradient, in the first steps only the last block has any.
GAPS = Problem(
    (
        (
            {"lr": 0.3},
            (Spec("first.weight", (5, 2), missing_every=3, first_step=3), Spec("root.w", (4,), missing_every=3)),
        ),
        ({"lr": 0.1, "decoupled": True}, (Spec("second.weight", (3,), missing_every=3, first_step=6),)),
    ),
    steps=14,
)
SHORT = replace(SHARDED, steps=12, dtype=torch.float32)
BAD_STEPS = {0: math.nan, 5: math.inf, 6: -math.inf}


def walk_all(layout: str) -> dict[str, Walk]:
    walks = {"bad": walk(layout, SHORT, corrupt_one_element)}
    if not layout.startswith("tp"):  # it distributes parameters that the other two problems do not have
        walks |= {"tiny": walk(layout, TINY), "gaps": walk(layout, GAPS)}
    return walks


def corrupt_one_element(model: Prescribed, optimizer: AdaiV2, step: int) -> None:
    """Make one element non-finite on the last rank only, if it holds a piece of "second.weight"."""
    if step in BAD_STEPS and dist.get_rank() == dist.get_world_size() - 1:
        grad = model.by_name()["second.weight"].grad
        assert grad is not None
        local(grad)[-1, -1] = BAD_STEPS[step]


@pytest.mark.parametrize("layout", ["fsdp2-4", "fsdp2-beside-plain-4", "hsdp-2x2", "tp-fsdp2-2x2", "fsdp2-2"])
def test_every_rank_takes_part_whatever_it_holds(layout: str) -> None:
    ranks = run_ranks(walk_all, LAYOUTS[layout].world_size, layout)
    for name, problem in {"tiny": TINY, "gaps": GAPS}.items():
        oracle, seen = problem.solve()
        for walks in ranks:
            if name in walks:
                assert worst_relative_error(walks[name].parameters, oracle, problem) < 1e-13
                counted = [k for k, s in enumerate(seen) if s.mean > 0]
                np.testing.assert_allclose(
                    np.array(walks[name].means)[counted], [seen[k].mean for k in counted], rtol=1e-12
                )
    oracle = SHORT.oracle()
    for step in range(SHORT.steps):
        gradients = SHORT.oracle_gradients(step)
        if step in BAD_STEPS:
            gradients["second.weight"][-1, -1] = BAD_STEPS[step]  # type: ignore[index]
        oracle.step(gradients)
    for walks in ranks:
        assert walks["bad"].num_skipped_steps == len(BAD_STEPS)
        assert worst_relative_error(walks["bad"].parameters, oracle, SHORT) < 1e-6
        assert walks["bad"].states["second.weight"]["step"].item() == SHORT.steps - len(BAD_STEPS)


def log_of_a_bad_step(layout: str) -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    walk(layout, replace(SHORT, steps=8), corrupt_one_element)
    return [record.getMessage() for record in records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("layout", ["fsdp2-2", "hsdp-2x2", "tp-fsdp2-2x2"])
def test_only_rank_zero_logs_skips(layout: str) -> None:
    first, *others = run_ranks(log_of_a_bad_step, LAYOUTS[layout].world_size, layout)
    assert len(first) == len(BAD_STEPS).bit_length(), "the first, the second, the fourth ..."
    assert others == [[]] * len(others)


def log_of_a_bad_step_under_ddp() -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    _, wrapped, optimizer = make("ddp-2", SHORT)
    (wrapped(0) * (math.inf if dist.get_rank() == 1 else 1.0)).backward()
    optimizer.step()
    assert optimizer.num_skipped_steps.item() == 1
    return [record.getMessage() for record in records]


def test_under_ddp_all_ranks_skip_a_step_that_one_rank_corrupted() -> None:
    first, second = run_ranks(log_of_a_bad_step_under_ddp, 2)
    assert len(first) == 1
    assert second == []


def steps_around_new_local_tensors() -> float:
    """Replace the local tensor of a DTensor parameter, as FSDP2 does when a model is moved or loaded."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    parameter = torch.nn.Parameter(distribute_tensor(torch.arange(1.0, 9.0), mesh, [Shard(0)]))
    optimizer = AdaiV2([parameter], lr=0.1)
    for _ in range(2):
        parameter.grad = distribute_tensor(torch.arange(1.0, 9.0), mesh, [Shard(0)])
        optimizer.step()
        parameter._local_tensor = parameter._local_tensor.clone()
    before = parameter.full_tensor().detach().clone()
    parameter.grad = distribute_tensor(torch.arange(1.0, 9.0), mesh, [Shard(0)])
    optimizer.step()
    return float((parameter.full_tensor() - before).abs().min())


def test_a_local_tensor_that_an_engine_replaced_is_stepped() -> None:
    assert min(run_ranks(steps_around_new_local_tensors, 2)) > 1e-2
