"""Optimizers that step in turn without sharing a mean: one warning, with the two ways to resolve it."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from adai_dist import Adai, AdaiV2, AdaiW, share_mean
from adai_dist.integrations.deepspeed.registration import OPTIMIZERS
from adai_dist.optimizer import adaptive_inertia
from adai_dist.optimizer.interleaved_steps import InterleavedSteps
from tests.spawn import run_ranks


@pytest.fixture(autouse=True)
def _a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_inertia, "interleaved_steps", InterleavedSteps())


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="adai_dist")
    return lambda: [record.getMessage() for record in caplog.records]


def parameter(size: int = 3) -> nn.Parameter:
    param = nn.Parameter(torch.ones(size))
    param.grad = torch.full_like(param, 0.5)
    return param


def make(cls: type[Any] = Adai, **settings: Any) -> Any:
    return cls([parameter()], lr=0.1, **settings)


def step(*optimizers: Any, times: int = 1) -> None:
    for _ in range(times):
        for optimizer in optimizers:
            optimizer.step()


def test_two_interleaved_optimizers_are_warned_about_once(warnings: Callable[[], list[str]]) -> None:
    one, other = make(AdaiW), AdaiV2([parameter(), parameter()], lr=0.1)
    step(one, other)
    assert warnings() == []
    step(one, other, times=3)
    (message,) = warnings()
    assert "AdaiW with 1 parameters and AdaiV2 with 2" in message
    assert "adai_dist.share_mean(optimizers)" in message
    assert "independent=True" in message
    step(make(), make(), times=3)
    assert len(warnings()) == 1


def test_a_hundred_optimizers_of_one_parameter_each_are_warned_about(warnings: Callable[[], list[str]]) -> None:
    """torchao's CPUOffloadOptimizer makes one optimizer per parameter."""
    optimizers = [make() for _ in range(100)]
    step(*optimizers, times=3)
    assert len(warnings()) == 1


def test_optimizers_that_step_at_different_rates_are_warned_about(warnings: Callable[[], list[str]]) -> None:
    """The discriminator of a GAN steps five times as often."""
    generator, critic = make(), make()
    for _ in range(2):
        step(critic, times=5)
        step(generator)
    assert len(warnings()) == 1


def test_an_optimizer_beside_others_that_share_a_mean_is_warned_about(warnings: Callable[[], list[str]]) -> None:
    members = [make(), make()]
    share_mean(members)
    step(*members, times=3)
    assert warnings() == []
    late = make()
    step(*members, late, times=2)
    assert len(warnings()) == 1


@pytest.mark.parametrize("how", ["share_mean", "independent", "independent later", "two ensembles of one kind"])
def test_resolved_setups_are_not_warned_about(how: str, warnings: Callable[[], list[str]]) -> None:
    optimizers = [make(independent=how == "independent") for _ in range(4)]
    if how == "share_mean":
        share_mean(optimizers)
    elif how == "independent later":
        for optimizer in optimizers:
            optimizer.independent = True
    elif how == "two ensembles of one kind":
        share_mean(optimizers[:2])
        share_mean(optimizers[2:])
        for optimizer in optimizers:
            optimizer.independent = True
    step(*optimizers, times=3)
    assert warnings() == []


def test_clipping_a_shared_mean_is_not_an_interleaved_step(warnings: Callable[[], list[str]]) -> None:
    optimizers = [make(), make()]
    share_mean(optimizers)
    for _ in range(3):
        optimizers[1].clip_grad_norm_(0.1)
        step(*optimizers)
    assert warnings() == []


def test_consecutive_trainings_are_not_warned_about(warnings: Callable[[], list[str]]) -> None:
    kept = [make() for _ in range(4)]
    for optimizer in kept:
        step(optimizer, times=3)
    assert warnings() == []


def test_optimizers_that_are_gone_are_forgotten(warnings: Callable[[], list[str]]) -> None:
    """A temporary optimizer warms up between the steps of another one."""
    optimizer = make()
    for _ in range(3):
        step(optimizer)
        step(make(), times=2)
        gc.collect()
    assert warnings() == []


def test_two_optimizers_of_the_same_parameters_are_not_warned_about(warnings: Callable[[], list[str]]) -> None:
    params = [parameter(), parameter()]
    step(Adai(params, lr=0.1), AdaiV2(params[::-1], lr=0.1), times=3)
    assert warnings() == []


def test_state_initialisation_steps_are_not_warned_about(warnings: Callable[[], list[str]]) -> None:
    """torch makes these steps for checkpoints, with a learning rate of 0; here before both trainings."""
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    optimizers = [Adai(model.parameters(), lr=0.1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        get_optimizer_state_dict(model, optimizer)
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            model(torch.ones(3)).sum().backward()
            optimizer.step()
    assert warnings() == []


def test_copies_and_pickles_keep_independent() -> None:
    assert copy.deepcopy(make(independent=True)).independent is True
    assert make().independent is False


@pytest.mark.parametrize("wrong", [None, 1, "yes"])
def test_independent_must_be_a_bool(wrong: Any) -> None:
    with pytest.raises(TypeError, match="independent must be a bool, got"):
        make(independent=wrong)


def test_independent_can_be_set_in_a_deepspeed_json() -> None:
    """DeepSpeed passes its params to the class unchanged."""
    params = {"lr": 0.1, "independent": True}
    assert all(cls([parameter()], **params).independent for cls in OPTIMIZERS.values())


def two_stages() -> list[str]:
    """Step two parts of one model on each rank, as pipelines with several chunks do, without share_mean."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    step(make(), make(), times=3)
    return messages


@pytest.mark.distributed
def test_only_the_main_rank_warns() -> None:
    first, second = run_ranks(two_stages, 2)
    assert len(first) == 1
    assert second == []
