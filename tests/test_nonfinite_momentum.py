"""A NaN in exp_avg, which a step reads only while it is taken, does not reach the parameters unnoticed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from adai_dist import AdaiW
from tests.test_skipped_steps import STATE, bits, give_gradients, trained

KERNELS = pytest.mark.parametrize("kernels", ["auto", "off"])
State = dict[str, Any]


def by_element(state: State, value: float) -> None:
    state["exp_avg"][2, 1] = value


def in_place(state: State, value: float) -> None:
    state["exp_avg"].mul_(value)


def replaced(state: State, value: float) -> None:
    state["exp_avg"] = torch.full_like(state["exp_avg"], value)


def all_states_replaced(state: State, value: float) -> None:
    state.update({name: tensor.clone() for name, tensor in state.items()})
    state["exp_avg"][0, 0] = value


def by_a_view(state: State, value: float) -> None:
    state["exp_avg"].t()[1].fill_(value)


def by_foreach(state: State, value: float) -> None:
    torch._foreach_copy_([state["exp_avg"]], [torch.full_like(state["exp_avg"], value)])


WAYS: dict[str, Callable[[State, float], None]] = {
    way.__name__: way for way in (by_element, in_place, replaced, all_states_replaced, by_a_view, by_foreach)
}


@KERNELS
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_recorded_writes_are_found_before_parameters_change_until_they_are_repaired(
    way: str, value: float, kernels: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    optimizer, twin = trained(), trained()
    state = optimizer.state[optimizer.params()[1]]
    whole = state["exp_avg"].clone()
    WAYS[way](state, value)
    before = bits(optimizer)
    caplog.clear()
    for step in range(3):
        optimizer.step()
        assert bits(optimizer) == before
        assert optimizer.num_skipped_steps.item() == step + 1
    logged = next(record.getMessage() for record in caplog.records if "step skipped" in record.getMessage())
    assert f"{STATE} (skipped so far: 1)" in logged
    assert "not finite on this rank: exp_avg of 'layer.1'; " in logged
    state["exp_avg"].copy_(whole)
    for each in (optimizer, twin):
        for _ in range(2):
            each.step()
    assert bits(optimizer) == bits(twin), "the skipped step had an effect"
    assert optimizer.num_skipped_steps.item() == 3


def test_replacing_the_state_repairs_it() -> None:
    optimizer = trained()
    param = optimizer.params()[0]
    whole = copy.deepcopy(optimizer.state[param])
    optimizer.state[param]["exp_avg"].fill_(math.nan)
    optimizer.step()
    optimizer.state[param] = whole
    optimizer.step()
    assert optimizer.num_skipped_steps.item() == 1
    del optimizer.state[param]
    optimizer.step()
    assert optimizer.num_skipped_steps.item() == 1


def test_two_parameters_are_repaired_in_different_steps() -> None:
    optimizer = trained()
    params = optimizer.params()
    for param in params[:2]:
        optimizer.state[param]["exp_avg"].fill_(math.inf)
    optimizer.step()
    for param in params[:2]:
        optimizer.state[param]["exp_avg"].zero_()
        optimizer.step()
    assert optimizer.num_skipped_steps.item() == 2


def test_a_write_before_clip_grad_norm_is_found() -> None:
    optimizer = trained()
    optimizer.state[optimizer.params()[0]]["exp_avg"].fill_(math.nan)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert optimizer.num_skipped_steps.item() == 1


def test_a_complex_momentum_is_checked() -> None:
    parameter = Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = AdaiW([parameter], lr=0.1)
    for step in range(2):
        parameter.grad = torch.full_like(parameter, 1.0 + 2.0j)
        if step:
            optimizer.state[parameter]["exp_avg"][1] = complex(0.0, math.nan)
        optimizer.step()
    assert optimizer.num_skipped_steps.item() == 1
    assert torch.isfinite(parameter).all()


def test_finite_writes_change_nothing_else() -> None:
    """The mean depends on exp_avg_sq only, whatever is written to exp_avg."""
    optimizer, twin = trained(), trained()
    for each in (optimizer, twin):
        each.state[each.params()[0]]["exp_avg"].mul_(0.5)
    twin.refresh()
    for each in (optimizer, twin):
        each.step()
    assert bits(optimizer) == bits(twin)
    assert optimizer.num_skipped_steps.item() == 0


@KERNELS
def test_an_ordinary_step_does_not_check_momentum(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a step after a skipped one, or after one in which some gradients were missing."""
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    optimizer = trained()
    looks: list[int] = []
    original = torch._foreach_norm

    def counted(tensors: list[Tensor], order: Any, **options: Any) -> Any:
        if order == math.inf:
            looks.append(len(tensors))
        return original(tensors, order, **options)

    monkeypatch.setattr(torch, "_foreach_norm", counted)
    for value in (1.0, math.nan, 1.0, 2.0):
        give_gradients(optimizer, value)
        optimizer.step()
    optimizer.params()[0].grad = None
    optimizer.step()
    give_gradients(optimizer)
    optimizer.step()
    assert not looks
    optimizer.state[optimizer.params()[2]]["exp_avg"].mul_(2.0)
    for _ in range(3):
        optimizer.step()
    assert looks == [1]


def through_data(momentum: Tensor) -> None:
    momentum.data.view(-1)[3] = math.nan


def through_numpy(momentum: Tensor) -> None:
    momentum.numpy().reshape(-1)[3] = math.inf


def through_dlpack(momentum: Tensor) -> None:
    torch.from_dlpack(momentum).view(-1)[3] = math.nan


@pytest.mark.parametrize("write", [through_data, through_numpy, through_dlpack])
def test_unrecorded_writes_are_named_by_the_next_step(
    write: Callable[[Tensor], None], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = AdaiW(model.named_parameters(), lr=0.1)
    data = torch.randn(8, 4)
    for step in range(4):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        if step == 2:
            write(optimizer.state[model[2].weight]["exp_avg"])
        optimizer.step()
    assert optimizer.num_skipped_steps.item() == 1
    (record,) = caplog.records
    assert "value of '2.weight'" in record.getMessage()
    assert "exp_avg of '2.weight'" in record.getMessage()
