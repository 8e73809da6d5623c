"""DTensor gradients that are missing on some ranks, as for experts without tokens: step counts stay equal."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from adai_dist import AdaiV2
from adai_dist.sharding.missing_gradients import CHECKSUM_MODULUS, checksum_terms
from adai_dist.sharding.plan import plan_sharding
from tests.oracle import Oracle, OracleGroup
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

HYPER = {"lr": 0.3, "betas": (0.1, 0.9), "dampening": 0.5, "weight_decay": 0.01}
STEPS = 10
FIRST_MISSING = 2
ROWS, WIDTH = 4, 3


def gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + len(name))
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) * (3.0 if name == "experts" else 1.0)


def lacks(rank: int, step: int) -> bool:
    """Return whether no token was routed to the experts of this rank."""
    return step >= FIRST_MISSING and (step + rank) % 3 == 0


class Model(nn.Module):
    """A model with experts over all ranks, and a plain rest."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.experts = nn.Parameter(distribute_tensor(gradient("experts", 98), mesh, [Shard(0)]))
        self.rest = nn.Parameter(gradient("rest", 99))


def put_gradients(model: Model, step: int, world_size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Set this rank's gradients, except missing ones of experts; returns all gradients, with zeros for missing ones."""
    whole = {name: gradient(name, step) for name in ("experts", "rest")}
    per_rank = ROWS // world_size
    for rank in range(world_size):
        if lacks(rank, step):
            whole["experts"][rank * per_rank : (rank + 1) * per_rank] = 0.0
    mesh = model.experts.device_mesh  # type: ignore[attr-defined]
    experts = distribute_tensor(whole["experts"], mesh, [Shard(0)])
    model.experts.grad = None if lacks(dist.get_rank(), step) else experts
    model.rest.grad = whole["rest"].clone()
    return {name: value.numpy() for name, value in whole.items()}


@dataclass
class Seen:
    parameters: dict[str, np.ndarray[Any, Any]]
    means: list[float]
    counts: list[float]
    num_skipped: int
    warnings: list[str]


def train(until: int, folder: str | None = None, resumed: bool = False, **options: Any) -> Seen:
    """Take some steps, resuming from or saving to the checkpoint in a folder. Collective: all ranks."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    model = Model(init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AdaiV2(model.parameters(), **HYPER, **options)
    first = 0
    if resumed:
        first = STEPS // 2
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    means: list[float] = []
    for step in range(first, until):
        put_gradients(model, step, dist.get_world_size())
        optimizer.step()
        means.append(optimizer.inertia_mean.item())
    if folder is not None and not resumed:
        optimizer.zero_grad()
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder)
    parameters = {"experts": model.experts.full_tensor(), "rest": model.rest}  # type: ignore[attr-defined]
    logging.getLogger("adai_dist").removeHandler(handler)
    return Seen(
        {name: value.detach().numpy() for name, value in parameters.items()},
        means,
        [optimizer.state[param]["step"].item() for param in (model.experts, model.rest)],
        int(optimizer.num_skipped_steps),
        [record.getMessage() for record in records],
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_step_is_skipped_and_missing_gradients_count_as_zeros_from_then_on(world_size: int) -> None:
    """The result equals that of one process, where the gradient of all experts has zeros for those without tokens."""
    seen = run_ranks(train, world_size, STEPS)
    names = ("experts", "rest")
    oracle = Oracle(
        {"experts": gradient("experts", 98).numpy(), "rest": gradient("rest", 99).numpy()},
        [OracleGroup(names, **HYPER, eps=1e-3, decoupled=True, maximize=False)],  # type: ignore[arg-type]
        None,
    )
    first_missing = next(step for step in range(STEPS) if any(lacks(rank, step) for rank in range(world_size)))
    means: list[float] = []
    for step in range(STEPS):
        gradients = {name: gradient(name, step).numpy() for name in names}
        per_rank = ROWS // world_size
        for rank in range(world_size):
            if lacks(rank, step):
                gradients["experts"][rank * per_rank : (rank + 1) * per_rank] = 0.0
        if step != first_missing:
            means.append(oracle.step(gradients).mean)
    for of_rank in seen:
        assert of_rank.num_skipped == 1
        assert of_rank.counts == [STEPS - 1, STEPS - 1]
        counted = [mean for step, mean in enumerate(of_rank.means) if step != first_missing]
        assert counted == pytest.approx(means, rel=1e-13)
        for name in names:
            np.testing.assert_allclose(of_rank.parameters[name], oracle.parameters[name], rtol=1e-12)
    assert len(seen[0].warnings) == 1
    assert "some ranks have a gradient that others lack: that of a DTensor is taken as zeros" in seen[0].warnings[0]
    assert [of_rank.warnings for of_rank in seen[1:]] == [[]] * (world_size - 1)


def save_and_resume(folder: str) -> tuple[Seen, Seen]:
    train(STEPS // 2, folder, missing_as_zeros=True)
    whole = train(STEPS, missing_as_zeros=True)
    return train(STEPS, folder, resumed=True, missing_as_zeros=True), whole


def test_a_resumed_run_does_not_depend_on_which_ranks_count_was_saved(tmp_path: Path) -> None:
    for resumed, whole in run_ranks(save_and_resume, 2, str(tmp_path)):
        assert whole.counts == resumed.counts == [STEPS, STEPS]
        assert whole.num_skipped == resumed.num_skipped == 0
        assert resumed.means == whole.means[STEPS // 2 :]
        for name, value in whole.parameters.items():
            np.testing.assert_array_equal(resumed.parameters[name], value)


# -- patterns of missing gradients that are detected -------------------------------------------------------------------


def patterns() -> dict[str, int]:
    """Return the number of skipped steps, by the ranks (of 2 x 2) that lack a gradient."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    rank = dist.get_rank()
    placements = {"sharded": [Shard(0), Shard(1)], "copied": [Replicate(), Shard(0)], "whole": [Replicate()] * 2}
    cases: dict[str, dict[str, set[int]]] = {
        "none": {},
        "one rank": {"sharded": {3}},
        "one copy": {"copied": {2}},
        "a copy of all": {"whole": {0}},
        "half": {"sharded": {0, 1}},
        "all but one": {"sharded": {0, 1, 2}},
        "all ranks": {"sharded": {0, 1, 2, 3}},
        "two parameters in turn": {"sharded": {0, 1}, "copied": {2, 3}},
        "two parameters alike": {"sharded": {1}, "copied": {1}},
        "all of everything": {name: {0, 1, 2, 3} for name in placements},
    }
    skipped: dict[str, int] = {}
    for case, missing in cases.items():
        held = {
            name: nn.Parameter(distribute_tensor(torch.randn(4, 4, dtype=torch.float64), mesh, placement))
            for name, placement in placements.items()
        }
        optimizer = AdaiV2([*held.values(), nn.Parameter(torch.ones(2))], lr=0.1)
        for name, param in held.items():
            if rank not in missing.get(name, set()):
                param.grad = DTensor.from_local(torch.ones_like(param.to_local()), mesh, param.placements)  # type: ignore[attr-defined]
        optimizer.step()
        skipped[case] = int(optimizer.num_skipped_steps)
    return skipped


def test_a_gradient_missing_on_some_ranks_is_detected_and_one_missing_on_all_is_ignored() -> None:
    for skipped in run_ranks(patterns, 4):
        assert skipped == dict.fromkeys(skipped, 1) | dict.fromkeys(("none", "all ranks", "all of everything"), 0)


def step_over_a_part_of_the_mesh() -> tuple[int, float]:
    """Configure one row of a mesh of 2 x 2 ranks as the process group of the mean."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 4, dtype=torch.float64), mesh, [Shard(0), Shard(1)]))
    optimizer = AdaiV2([param], lr=0.1)
    optimizer.configure_sharding(mesh["column"].get_group(), num_replicas=lambda param: 1)
    param.grad = DTensor.from_local(torch.full((2, 2), 2.0, dtype=torch.float64), mesh, param.placements)  # type: ignore[attr-defined]
    optimizer.step()
    return int(optimizer.num_skipped_steps), optimizer.inertia_mean.item()


def test_missing_gradients_are_not_detected_if_the_mean_is_over_a_part_of_the_mesh() -> None:
    assert run_ranks(step_over_a_part_of_the_mesh, 4) == [(0, pytest.approx(4.0))] * 4


def shares_of_ranks() -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)])) for _ in range(3)]
    return list(checksum_terms(params, plan_sharding(params, None)).values())


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_checksum_terms_of_all_ranks_cancel_and_none_is_zero(world_size: int) -> None:
    by_rank = np.array(run_ranks(shares_of_ranks, world_size))
    assert (by_rank > 0).all()
    assert (by_rank.sum(0) % CHECKSUM_MODULUS == 0).all()
    assert len(set(by_rank[0])) == 3, "parameters of one shape have different terms"
