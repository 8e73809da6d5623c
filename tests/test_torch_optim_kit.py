"""Our classes in torch's own optimizer test kit, ``torch.testing._internal.common_optimizers``.

The kit provides the inputs and the harness. The test functions are not in torch's wheel; these follow the ones of
its ``test/test_optim.py`` that apply to a third-party optimizer.
"""

# ruff: noqa: PT009 the kit's TestCase compares tensors in its own assertEqual

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from adai_dist import Adai, AdaiV2, AdaiW


def optimizer_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    kwargs: list[dict[str, Any]] = [
        {},
        {"lr": 0.01},
        {"lr": torch.tensor(0.01)},
        {"betas": (0.3, 0.9)},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled": True},
        {"weight_decay": 0.1, "maximize": True},
        {"max_grad_norm": 0.5},
    ]
    return [OptimizerInput(params=None, kwargs={"lr": 0.1} | x, desc=str(x)) for x in kwargs]  # type: ignore[arg-type]


def optimizer_inputs_v2(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    inputs = optimizer_inputs(device, dtype)
    return inputs + [
        OptimizerInput(params=None, kwargs={"lr": 0.1, "dampening": d}, desc=f"dampening {d}")  # type: ignore[arg-type]
        for d in (0.0, 0.5)
    ]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    inputs = get_error_inputs_for_all_optims(device, dtype)
    for error in inputs:  # lr has no default here
        error.optimizer_error_input.kwargs = {"lr": 0.1} | error.optimizer_error_input.kwargs
    return inputs


OPTIMIZERS = [
    OptimizerInfo(
        optimizer_class,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        supported_impls=("foreach",),
        not_og_supported_flags=("foreach", "maximize"),
        supports_complex=True,
    )
    for optimizer_class, inputs in ((Adai, optimizer_inputs), (AdaiW, optimizer_inputs), (AdaiV2, optimizer_inputs_v2))
]


class TestOptimizers(TestCase):
    def _problem(self, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 1, kernel_size=1), torch.nn.Flatten(), torch.nn.Linear(9, 3), torch.nn.Sigmoid()
        ).to(device, dtype)
        data = torch.randn(2, 2, 3, 3, device=device, dtype=dtype)

        def closure() -> torch.Tensor:
            model.zero_grad()
            loss = model(data).square().sum()
            loss.backward()
            return loss

        return model, closure

    def _inputs(self, device: str, dtype: torch.dtype, info: OptimizerInfo) -> list[OptimizerInput]:
        inputs = info.optim_inputs_func(device=device, dtype=dtype)
        assert inputs
        return inputs

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            wrong = error.optimizer_error_input
            params = [Parameter(torch.ones(2))] if wrong.params is None else wrong.params
            context: Any = pytest.warns if error.error_type is UserWarning else pytest.raises
            with context(error.error_type, match=error.error_regex):
                optim_info.optim_cls(params, **wrong.kwargs)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_loss_moves_in_the_right_direction(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for given, foreach in itertools.product(self._inputs(device, dtype, optim_info), (False, None, True)):
            model, closure = self._problem(device, dtype)
            optimizer = optim_info.optim_cls(model.parameters(), foreach=foreach, **given.kwargs)
            first = float(closure().detach())
            for _ in range(20):
                last = float(optimizer.step(closure).detach())
            if given.kwargs.get("maximize", False):
                assert last > first
            else:
                assert last < first

    @optims(OPTIMIZERS, dtypes=[torch.float32, torch.float64])
    def test_foreach_matches_forloop(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for given in self._inputs(device, dtype, optim_info):
            tracker = TensorTracker({"rtol": 0.0, "atol": 0.0})
            for foreach in (False, True):
                model, closure = self._problem(device, dtype)
                extra = Parameter(torch.tensor(0.5, dtype=dtype, device=device))  # 0-dim, and never with a gradient
                params = [*model.parameters(), extra]
                optimizer = optim_info.optim_cls(params, foreach=foreach, **given.kwargs)
                for step in range(7):
                    closure()
                    if step == 3:
                        optimizer.zero_grad()  # a step without any gradient
                    optimizer.step()
                    for parameter in params:
                        if foreach:
                            tracker.pop_check_set(parameter, self)
                        else:
                            tracker.add(parameter)
            assert tracker.all_popped()

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_zero_gradients_are_a_noop(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for given in self._inputs(device, dtype, optim_info):
            if given.kwargs.get("weight_decay"):
                continue
            parameter = Parameter(torch.randn(2, 3, device=device, dtype=dtype))
            before = parameter.detach().clone()
            parameter.grad = torch.zeros_like(parameter)
            optimizer = optim_info.optim_cls([parameter], **given.kwargs)
            optimizer.step()
            self.assertEqual(parameter.detach(), before, rtol=0, atol=0)

    @optims([info for info in OPTIMIZERS if info.supports_complex], dtypes=[torch.complex64, torch.complex128])
    def test_complex_parameters_equal_pairs_of_real_ones(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for given in self._inputs(device, dtype, optim_info):
            torch.manual_seed(1)
            number = Parameter(torch.randn(10, 5, device=device, dtype=dtype))
            pair = Parameter(torch.view_as_real(number.detach()).clone())
            optimizers = [optim_info.optim_cls([p], **copy.deepcopy(given.kwargs)) for p in (number, pair)]
            for _ in range(3):
                number.grad = torch.randn_like(number)
                pair.grad = torch.view_as_real(number.grad).clone()
                for optimizer in optimizers:
                    optimizer.step()
                self.assertEqual(torch.view_as_real(number.detach()), pair.detach(), rtol=0, atol=0)
                for key in ("exp_avg", "exp_avg_sq", "beta1_prod"):
                    value = torch.view_as_real(optimizers[0].state[number][key])
                    self.assertEqual(value, optimizers[1].state[pair][key], rtol=0, atol=0)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_deepcopy_copies_all_public_attributes(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for given in self._inputs(device, dtype, optim_info):
            model, closure = self._problem(device, dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **given.kwargs)
            optimizer.step(closure)
            twin = copy.deepcopy(optimizer)
            names = [{name for name in vars(x) if not name.startswith("_")} for x in (optimizer, twin)]
            self.assertEqual(names[0], names[1])

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_older_state_dicts_and_number_steps_load(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for given in self._inputs(device, dtype, optim_info):
            model, closure = self._problem(device, dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **given.kwargs)
            for _ in range(3):
                optimizer.step(closure)
            saved = copy.deepcopy(optimizer.state_dict())
            for param_group in saved["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    param_group.pop(flag, None)
            for state in saved["state"].values():
                state["step"] = state["step"].item()
            optimizer.load_state_dict(saved)
            for _ in range(2):
                optimizer.step(closure)
            for parameter in model.parameters():
                self.assertEqual(optimizer.state[parameter]["step"], torch.tensor(5.0))

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_state_dicts_are_deterministic(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for given in self._inputs(device, dtype, optim_info):
            model, closure = self._problem(device, dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **given.kwargs)
            for _ in range(2):
                optimizer.step(closure)
            twin_model, twin_closure = self._problem(device, dtype)
            twin_model.load_state_dict(model.state_dict())
            twin = optim_info.optim_cls(twin_model.parameters(), **given.kwargs)
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for _ in range(3):
                optimizer.step(closure)
                twin.step(twin_closure)
            self.assertEqual(list(model.parameters()), list(twin_model.parameters()), rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), twin.state_dict(), rtol=0, atol=0)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_groups_have_their_own_lr(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for given in self._inputs(device, dtype, optim_info):
            kwargs = {**given.kwargs, "lr": 0.0, "weight_decay": 0.0}
            still, moving = (Parameter(torch.ones(3, device=device, dtype=dtype)) for _ in range(2))
            optimizer = optim_info.optim_cls([{"params": [still]}, {"params": [moving], "lr": 0.1}], **kwargs)
            for parameter in (still, moving):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            self.assertEqual(still.detach(), torch.ones_like(still), rtol=0, atol=0)
            self.assertNotEqual(moving.detach(), torch.ones_like(moving))


instantiate_device_type_tests(TestOptimizers, globals(), only_for="cpu")
