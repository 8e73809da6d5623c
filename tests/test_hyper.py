"""Hyperparameters: ranges, error messages, and values in parameter groups."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2
from adai_dist.hyper import MIN_EPS, Hyper
from adai_dist.optimizer.variants import OPTIMIZERS

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -0.1}, ValueError, "lr must be finite and >= 0, got -0.1"),
    ({"lr": math.nan}, ValueError, "lr must be finite and >= 0, got nan"),
    ({"lr": math.inf}, ValueError, "lr must be finite and >= 0, got inf"),
    ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
    ({"lr": None}, TypeError, "lr must be a number, got None"),
    ({"lr": True}, TypeError, "lr must be a number, got True"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element, got (2,)"),
    ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be finite and >= 0, got -1.0"),
    ({"betas": (-0.1, 0.99)}, ValueError, "betas[0] (beta0) must be finite and >= 0, got (-0.1, 0.99)"),
    ({"betas": (0.1, 1.0)}, ValueError, "betas[1] (beta2) must be in [0, 1), got (0.1, 1.0)"),
    ({"betas": (0.1, -0.1)}, ValueError, "betas[1] (beta2) must be in [0, 1)"),
    ({"betas": (0.1,)}, TypeError, "betas must be a pair (beta0, beta2), got (0.1,)"),
    ({"betas": (0.9, 0.99, 0.999)}, TypeError, "betas must be a pair"),
    ({"betas": 0.1}, TypeError, "betas must be a pair (beta0, beta2), got 0.1"),
    ({"betas": "ab"}, TypeError, "betas must be a pair"),
    ({"betas": (0.1, None)}, TypeError, "betas[1] must be a number, got None"),
    ({"eps": 0.0}, ValueError, "eps must be in [2**-24, 1), got 0.0"),
    ({"eps": 1e-8}, ValueError, "eps must be in [2**-24, 1), got 1e-08"),
    ({"eps": 1.0}, ValueError, "eps must be in [2**-24, 1), got 1.0"),
    ({"eps": math.nan}, ValueError, "eps must be in"),
    ({"weight_decay": -1e-4}, ValueError, "weight_decay must be finite and >= 0, got -0.0001"),
    ({"weight_decay": "1e-4"}, TypeError, "weight_decay must be a number, got '1e-4'"),
    ({"decoupled": 1}, TypeError, "decoupled must be a bool, got 1"),
    ({"maximize": None}, TypeError, "maximize must be a bool, got None"),
    ({"foreach": 1}, TypeError, "foreach must be a bool, got 1"),
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be > 0 (use None for no clipping), got 0.0"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be > 0"),
    ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be > 0"),
    ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number, got '1'"),
]


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS.values())
@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[f"{w[0]}" for w in WRONG])
def test_the_error_of_an_invalid_argument_states_its_name_and_value(
    optimizer_class: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        optimizer_class([Parameter(torch.ones(2))], **({"lr": 0.1} | arguments))


@pytest.mark.parametrize("dampening", [-0.1, 1.1, math.nan])
def test_dampening_is_between_0_and_1(dampening: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"dampening must be in [0, 1], got {dampening!r}")):
        AdaiV2([Parameter(torch.ones(2))], lr=0.1, dampening=dampening)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [w for w in WRONG if "max_grad_norm" not in w[0]],
    ids=[f"{w[0]}" for w in WRONG if "max_grad_norm" not in w[0]],
)
def test_an_invalid_value_in_a_parameter_group_is_refused_like_an_argument(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = Adai([Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], **arguments})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("key_and_value", [("lr", -0.1), ("eps", 0.0), ("betas", (0.1, 2.0))], ids=str)
def test_a_value_that_became_invalid_during_training_is_refused_before_a_parameter_changes(
    key_and_value: tuple[str, Any],
) -> None:
    parameter = Parameter(torch.ones(2))
    optimizer = Adai([parameter], lr=0.1)
    optimizer.param_groups[0][key_and_value[0]] = key_and_value[1]
    parameter.grad = torch.ones(2)
    with pytest.raises(ValueError, match=re.escape(repr(key_and_value[1]))):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(2))


ROUNDED: list[tuple[str, Any, Any]] = [
    ("lr", -9e-18, 0.0),
    ("lr", -1e-9, 0.0),
    ("lr", np.float64(-2e-17), 0.0),
    ("lr", np.float32(-3e-8), 0.0),
    ("lr", torch.tensor(-3e-8), 0.0),
    ("lr", torch.tensor([-5e-19], dtype=torch.float64), 0.0),
    ("weight_decay", -1e-18, 0.0),
    ("weight_decay", torch.tensor(-1e-9), 0.0),
    ("dampening", -1e-17, 0.0),
    ("dampening", math.nextafter(1.0, 2.0), 1.0),
    ("betas", (-1e-18, 0.99), (0.0, 0.99)),
    ("betas", (0.1, -1e-18), (0.1, 0.0)),
    ("betas", [0.1, 1.0 + 1e-16], (0.1, math.nextafter(1.0, 0.0))),
    ("betas", (0.1, math.nextafter(1.0, 2.0)), (0.1, math.nextafter(1.0, 0.0))),
    ("betas", torch.tensor([-1e-9, 0.5]), (0.0, 0.5)),
]
each_rounded = pytest.mark.parametrize(("name", "value", "meant"), ROUNDED, ids=[f"{r[:2]}" for r in ROUNDED])


@each_rounded
def test_a_value_that_rounding_moves_out_of_its_range_during_training_becomes_the_end_of_the_range(
    name: str, value: Any, meant: Any
) -> None:
    found: list[torch.Tensor] = []
    for taken in (value, meant):
        parameter = Parameter(torch.ones(3))
        optimizer = AdaiV2([parameter], lr=0.1, weight_decay=0.1)
        for step in range(3):
            parameter.grad = torch.tensor([1.0, -2.0, 3.0]) * (step + 1)
            if step == 2:
                optimizer.param_groups[0][name] = taken
                if name == "betas":
                    optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        assert optimizer.num_skipped_steps.item() == 0
        found.append(parameter.detach())
    assert torch.equal(*found)
    assert torch.isfinite(found[0]).all()


@each_rounded
def test_a_run_that_ended_with_such_a_value_can_be_resumed(name: str, value: Any, meant: Any) -> None:
    del meant
    parameter = Parameter(torch.ones(3))
    optimizer, resumed = (AdaiV2([parameter], lr=0.1) for _ in range(2))
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()


@pytest.mark.parametrize(("name", "value"), [rounded[:2] for rounded in ROUNDED], ids=[f"{r[:2]}" for r in ROUNDED])
def test_the_constructor_accepts_no_value_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        AdaiV2([Parameter(torch.ones(2))], **({"lr": 0.1} | {name: value}))
    optimizer = AdaiV2([Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], name: value})


def test_schedules_of_torch_that_end_below_zero_run_to_their_end() -> None:
    parameter = Parameter(torch.ones(3))
    optimizer = Adai([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - sum([0.1] * step) - 2e-16)
    lrs: list[float] = []
    for _ in range(11):
        parameter.grad = torch.ones(3)
        optimizer.step()
        lrs.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert lrs[-1] < 0
    assert lrs[-1] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", -1e-6),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "0.1"),
        ("lr", torch.tensor(-1e-2)),
        ("weight_decay", -1e-4),
        ("weight_decay", None),
        ("dampening", 1.0 + 1e-6),
        ("dampening", -math.inf),
        ("betas", (0.1, 1.01)),
        ("betas", (-1e-3, 0.9)),
        ("betas", (0.1, math.nan)),
        ("eps", -1e-18),
        ("maximize", "yes"),
    ],
    ids=str,
)
def test_an_invalid_value_during_training_is_refused_with_the_name_of_its_parameter_group(
    name: str, value: Any
) -> None:
    groups = [{"params": [Parameter(torch.ones(2))]}, {"params": [Parameter(torch.ones(2))], "name": "decay"}]
    optimizer = AdaiV2(groups, lr=0.1)
    for param_group, place in zip(
        optimizer.param_groups, ("param_groups[0]: ", "param_groups[1] ('decay'): "), strict=True
    ):
        for parameter in optimizer.params():
            parameter.grad = torch.ones(2)
        before = param_group[name]
        param_group[name] = value
        for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
            with pytest.raises((TypeError, ValueError), match=re.escape(f"{place}{name}")) as error:
                call()
            assert repr(value if not isinstance(value, torch.Tensor) else value.item()) in str(error.value)
        param_group[name] = before
    assert all(torch.equal(parameter.detach(), torch.ones(2)) for parameter in optimizer.params())


def test_lr_has_no_default() -> None:
    with pytest.raises(TypeError, match="lr"):
        Adai([Parameter(torch.ones(2))])  # type: ignore[call-arg]


def test_the_ends_of_the_ranges_are_allowed() -> None:
    Hyper(lr=0.0, betas=(0.0, 0.0), eps=MIN_EPS, weight_decay=0.0, dampening=0.0)
    Hyper(lr=100, betas=(20.0, 0.9999), eps=0.999, weight_decay=10, dampening=1)


def test_betas_may_be_a_list_as_in_a_configuration_file() -> None:
    assert Hyper(lr=0.1, betas=[0.2, 0.95]).betas == (0.2, 0.95)  # type: ignore[arg-type]


def test_the_smallest_eps_keeps_the_bias_correction_of_float32_above_zero() -> None:
    """With a smaller bound, 1 - eps would round to 1."""
    assert 1.0 - torch.tensor(1.0 - MIN_EPS, dtype=torch.float32) > 0
    assert 1.0 - torch.tensor(1.0 - MIN_EPS / 4, dtype=torch.float32) == 0


def test_groups_take_the_defaults_of_the_constructor_and_keep_foreign_keys() -> None:
    """Trainers add names and flags of other optimizers to the groups."""
    groups = [{"params": [Parameter(torch.ones(2))], "name": "decay", "fused": True, "lr": 0.5}]
    optimizer = AdaiV2(groups, lr=0.1, betas=(0.2, 0.9), dampening=0.5)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["dampening"]) == (0.5, (0.2, 0.9), 0.5)
    assert (group["name"], group["fused"]) == ("decay", True)
    group["params"][0].grad = torch.ones(2)
    optimizer.step()
    assert (group["params"][0] < 1).all()


@pytest.mark.parametrize("params", [[], torch.ones(2), [torch.ones(2, requires_grad=True) * 2]], ids=str)
def test_parameters_that_are_not_a_list_of_leaf_tensors_are_refused_by_torch(params: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Adai(params, lr=0.1)
