"""State-initialisation steps, with neither gradients nor learning rate, leave no trace."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _init_optim_state,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adai_dist import AdaiV2, share_mean
from tests.problems import to_numpy
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 5
COUPLED = {"weight_decay": 0.1, "decoupled": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "coupled decay": COUPLED,
    "clipped": {"max_grad_norm": 0.5},
    "lr on the device": {"lr": torch.tensor(0.5), **COUPLED},
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 2))


def make(model: nn.Module, num_optimizers: int, **options: Any) -> list[AdaiV2]:
    """Return one optimizer for all parameters, or several that share the mean."""
    params = list(model.parameters())
    options = {"lr": 0.5, "dampening": 0.5} | options
    optimizers = [AdaiV2(params[k::num_optimizers], **copy.deepcopy(options)) for k in range(num_optimizers)]
    if num_optimizers > 1:
        share_mean(optimizers)
    return optimizers


def train(model: nn.Module, optimizers: list[AdaiV2], first: int, last: int) -> None:
    for step in range(first, last):
        for optimizer in optimizers:
            optimizer.zero_grad()
        data = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(data).square().mean().backward()
        for k in range(len(optimizers)):  # another one steps first each time
            optimizers[(step + k) % len(optimizers)].step()


def by_checkpoint_library(_: nn.Module, optimizers: list[AdaiV2]) -> None:
    for optimizer in optimizers:
        _init_optim_state(optimizer)


def by_reading_state_dicts(model: nn.Module, optimizers: list[AdaiV2]) -> None:
    get_optimizer_state_dict(model, optimizers)


def by_the_last_alone(_: nn.Module, optimizers: list[AdaiV2]) -> None:
    """Take a step with one optimizer only; nothing may wait for the others."""
    _init_optim_state(optimizers[-1])


def twice(_: nn.Module, optimizers: list[AdaiV2]) -> None:
    for optimizer in 2 * optimizers:
        by_hand(optimizer)


def by_hand(optimizer: AdaiV2) -> None:
    rates = [param_group["lr"] for param_group in optimizer.param_groups]
    for param_group in optimizer.param_groups:
        param_group["lr"] = 0.0
    for param in optimizer.params():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param_group, lr in zip(optimizer.param_groups, rates, strict=True):
        param_group["lr"] = lr
    optimizer.zero_grad()


def after_a_clip(_: nn.Module, optimizers: list[AdaiV2]) -> None:
    """Clip before the step; the clipping is dropped with the gradients."""
    for optimizer in optimizers:
        for param in optimizer.params():
            param.grad = torch.ones_like(param)
    optimizers[0].clip_grad_norm_(1.0)
    for optimizer in optimizers:
        optimizer.zero_grad()
    for optimizer in optimizers:
        by_hand(optimizer)


IDLE: dict[str, Callable[[nn.Module, list[AdaiV2]], None]] = {
    "DCP creates states": by_checkpoint_library,
    "DCP reads state dicts": by_reading_state_dicts,
    "the last one alone": by_the_last_alone,
    "twice": twice,
    "after a clip": after_a_clip,
}


@pytest.mark.parametrize("num_optimizers", [1, 3])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("idle", IDLE)
def test_training_continues_as_without_the_step(idle: str, options: str, num_optimizers: int) -> None:
    models = [make_model() for _ in range(2)]
    sets = [make(model, num_optimizers, **OPTIONS[options]) for model in models]
    IDLE[idle](models[0], sets[0])
    for optimizer in sets[0]:
        assert optimizer.num_skipped_steps.item() == optimizer.num_undefined_steps.item() == 0
        for state in optimizer.state.values():
            assert state["step"] == 0
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()
            assert (state["beta1_prod"] == 1).all()
    for param, untouched in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(param, untouched)
    for model, optimizers in zip(models, sets, strict=True):
        train(model, optimizers, 0, STEPS)
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(param, other)


@pytest.mark.parametrize("num_optimizers", [1, 3])
def test_states_loaded_after_it_are_used_by_the_next_step(num_optimizers: int) -> None:
    model = make_model()
    optimizers = make(model, num_optimizers)
    train(model, optimizers, 0, STEPS)
    saved = copy.deepcopy((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))
    train(model, optimizers, STEPS, 2 * STEPS)

    other = make_model()
    resumed = make(other, num_optimizers)
    by_checkpoint_library(other, resumed)
    other.load_state_dict(saved[0])
    for optimizer, state_dict in zip(resumed, saved[1], strict=True):
        for state, param_id in zip(optimizer.state.values(), state_dict["state"], strict=True):
            for name, value in state_dict["state"][param_id].items():
                state[name].data.copy_(value)  # in place, as checkpoint libraries load into existing tensors
    train(other, resumed, STEPS, 2 * STEPS)
    for param, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(param, expected)


def test_undefined_steps_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdaiV2([param], lr=0.1, weight_decay=0.1)
    with caplog.at_level(logging.WARNING, logger="adai_dist"):
        for size in (0.0, 0.0, 0.0, 1.0, 0.0):
            param.grad = torch.full((3,), size)
            optimizer.step()
    assert optimizer.num_undefined_steps.item() == 3
    assert optimizer.num_skipped_steps.item() == 0
    assert optimizer.state[param]["step"].item() == 2
    assert [record.getMessage()[:19] for record in caplog.records] == ["step did not count:"]


def resumed_and_whole(num_optimizers: int) -> tuple[list[Any], list[Any]]:
    """Load with DCP's functions into FSDP2 optimizers that have not stepped. Collective: all ranks."""

    def sharded() -> tuple[nn.Module, list[AdaiV2]]:
        model = make_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return model, make(model, num_optimizers)

    model, optimizers = sharded()
    train(model, optimizers, 0, STEPS)
    parameters = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizers, options=StateDictOptions()))
    train(model, optimizers, STEPS, 2 * STEPS)
    other, resumed = sharded()
    other.load_state_dict(parameters)
    set_optimizer_state_dict(other, resumed, saved)
    train(other, resumed, STEPS, 2 * STEPS)
    return tuple([to_numpy(param.to_local()) for param in m.parameters()] for m in (other, model))  # type: ignore[return-value, union-attr]


@pytest.mark.parametrize("num_optimizers", [1, 3])
def test_a_resumed_run_is_bitwise_equal_to_the_uninterrupted_one(num_optimizers: int) -> None:
    for resumed, whole in run_ranks(resumed_and_whole, 2, num_optimizers):
        assert all((a == b).all() for a, b in zip(resumed, whole, strict=True))
