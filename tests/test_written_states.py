"""Writes to states between two steps: the next mean is computed from the states as written."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adai_dist import AdaiV2
from tests.problems import Problem, Spec, relative_error

FACTOR = 9.0
PROBLEM = Problem(
    (
        ({"lr": 0.1, "dampening": 0.5}, (Spec("a.matrix", (64, 100)), Spec("a.bias", (7,), scale=3.0))),
        ({"lr": 0.1, "betas": (0.1, 0.9)}, (Spec("b.table", (5000,), scale=0.1), Spec("b.scalar", ()))),
    ),
    steps=8,
    dtype=torch.float32,
)
COUPLED = PROBLEM.with_all(weight_decay=0.1, decoupled=False)
WRITTEN = "a.matrix"
"""Name of the parameter whose exp_avg_sq is written to, large enough that a step compares samples of it."""

State = dict[str, Any]


def through_ctypes(v: Tensor) -> None:
    numbers = (ctypes.c_float * v.numel()).from_address(v.data_ptr())
    np.frombuffer(numbers, dtype=np.float32)[:] *= FACTOR


def through_numpy(v: Tensor) -> None:
    v.numpy()[...] *= FACTOR


def through_storage(v: Tensor) -> None:
    torch.empty(0).set_(v.untyped_storage(), 0, (v.numel(),)).mul_(FACTOR)  # type: ignore[call-overload]


def by_copy_of_storage(v: Tensor) -> None:
    v.untyped_storage().copy_((v * FACTOR).untyped_storage())


def of_an_older_view(state: State) -> Callable[[], object]:
    view = state["exp_avg_sq"].view(-1)[100:]
    head = state["exp_avg_sq"].view(-1)[:100]
    return lambda: (view.mul_(FACTOR), head.mul_(FACTOR))


def set_data(v: Tensor) -> None:
    v.data = v * FACTOR


def replace_state(state: State) -> None:
    state["exp_avg_sq"] = state["exp_avg_sq"] * FACTOR


def swap(v: Tensor) -> None:
    torch.utils.swap_tensors(v, v * FACTOR)


WAYS: dict[str, Callable[[State], object]] = {
    "in place": lambda state: state["exp_avg_sq"].mul_(FACTOR),
    "copy_": lambda state: state["exp_avg_sq"].copy_(state["exp_avg_sq"] * FACTOR),
    "foreach": lambda state: torch._foreach_mul_([state["exp_avg_sq"]], FACTOR),
    ".data": lambda state: state["exp_avg_sq"].data.mul_(FACTOR),
    ".data, row by row": lambda state: [row.mul_(FACTOR) for row in state["exp_avg_sq"].data],
    ".data is set": lambda state: set_data(state["exp_avg_sq"]),
    "detached": lambda state: state["exp_avg_sq"].detach().mul_(FACTOR),
    "NumPy": lambda state: through_numpy(state["exp_avg_sq"]),
    "DLPack": lambda state: torch.from_dlpack(state["exp_avg_sq"]).mul_(FACTOR),
    "ctypes": lambda state: through_ctypes(state["exp_avg_sq"]),
    "the storage": lambda state: through_storage(state["exp_avg_sq"]),
    "a copy of storages": lambda state: by_copy_of_storage(state["exp_avg_sq"]),
    "a view": lambda state: of_an_older_view(state)(),
    "replaced": replace_state,
    "swap_tensors": lambda state: swap(state["exp_avg_sq"]),
}
KERNELS = pytest.mark.parametrize("kernels", ["auto", "off"])


def walk(
    problem: Problem,
    write: Callable[[AdaiV2, dict[str, Parameter]], None],
    write_oracle: Callable[[Any], None],
    max_norm: float | None = None,
) -> None:
    """Train optimizer and oracle with the same writes after every second step; compare the means of all steps."""
    problem = replace(problem, max_grad_norm=max_norm)
    parameters, oracle = problem.parameters(), problem.oracle()
    optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0, max_grad_norm=max_norm)
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        optimizer.step()
        seen = oracle.step(problem.oracle_gradients(step))
        assert optimizer.inertia_mean.item() == pytest.approx(seen.mean, rel=1e-6)
        if step % 2:
            write(optimizer, parameters)
            write_oracle(oracle)
    assert relative_error(parameters, oracle, problem) < 1e-4  # float32; measured: 2.2e-5


def by(way: str, name: str) -> Callable[[AdaiV2, dict[str, Parameter]], None]:
    """Write to the state of a parameter."""

    def write(optimizer: AdaiV2, params: dict[str, Parameter]) -> None:
        WAYS[way](optimizer.state[params[name]])

    return write


def scale_oracle(oracle: Any) -> None:
    oracle.states[WRITTEN].exp_avg_sq *= FACTOR


@KERNELS
@pytest.mark.parametrize("problem", [PROBLEM, COUPLED], ids=["decoupled", "coupled"])
@pytest.mark.parametrize("way", WAYS)
def test_a_write_is_in_the_next_mean(way: str, problem: Problem, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    walk(problem, by(way, WRITTEN), scale_oracle, 1.0)


@pytest.mark.parametrize("name", ["a.bias", "b.scalar", "b.table"])
@pytest.mark.parametrize("way", [".data", "NumPy", "replaced"])
def test_a_write_to_a_state_of_another_shape_is_in_the_next_mean(way: str, name: str) -> None:
    def scale(oracle: Any) -> None:
        oracle.states[name].exp_avg_sq = oracle.states[name].exp_avg_sq * FACTOR

    walk(PROBLEM, by(way, name), scale)


def forget(oracle: Any, names: list[str]) -> None:
    for name in names:
        del oracle.states[name]
    oracle._make_states(names)


@KERNELS
def test_deleted_states_are_created_again(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    walk(
        PROBLEM,
        lambda optimizer, params: optimizer.state.pop(params[WRITTEN]).clear(),
        lambda oracle: forget(oracle, [WRITTEN]),
    )
    walk(
        PROBLEM,
        lambda optimizer, _: optimizer.state.clear(),
        lambda oracle: forget(oracle, list(oracle.states)),
    )


@KERNELS
def test_states_that_relora_sets_to_zero_are_zero_in_the_next_mean(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)

    def reset(optimizer: AdaiV2, params: dict[str, Parameter]) -> None:
        for param in params.values():
            optimizer.state[param]["exp_avg_sq"].data.zero_()

    def reset_oracle(oracle: Any) -> None:
        for state in oracle.states.values():
            state.exp_avg_sq = np.zeros_like(state.exp_avg_sq)

    walk(PROBLEM, reset, reset_oracle)


@KERNELS
def test_a_checkpoint_that_is_loaded_during_training_is_in_the_next_mean(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load older states and keep the current parameters."""
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    saved: list[Any] = []
    saved_oracle: list[Any] = []

    def go_back(optimizer: AdaiV2, _: dict[str, Parameter]) -> None:
        saved.append(copy.deepcopy(optimizer.state_dict()))
        optimizer.load_state_dict(copy.deepcopy(saved[0]))

    def take_oracle_back(oracle: Any) -> None:
        saved_oracle.append(copy.deepcopy(oracle.states))
        oracle.states = copy.deepcopy(saved_oracle[0])

    walk(PROBLEM, go_back, take_oracle_back)


def test_an_unrecorded_write_to_part_of_a_tensor_shows_in_samples() -> None:
    """Write half of the rows through NumPy, which torch does not record."""

    def write(optimizer: AdaiV2, params: dict[str, Parameter]) -> None:
        optimizer.state[params[WRITTEN]]["exp_avg_sq"].numpy()[32:] *= FACTOR

    def write_oracle(oracle: Any) -> None:
        oracle.states[WRITTEN].exp_avg_sq[32:] *= FACTOR

    walk(PROBLEM, write, write_oracle)


def test_an_unrecorded_write_to_one_element_needs_refresh() -> None:
    def write(optimizer: AdaiV2, params: dict[str, Parameter]) -> None:
        optimizer.state[params[WRITTEN]]["exp_avg_sq"].numpy()[0, 1] = 1e3
        optimizer.refresh()

    def write_oracle(oracle: Any) -> None:
        oracle.states[WRITTEN].exp_avg_sq[0, 1] = 1e3

    walk(PROBLEM, write, write_oracle)


def test_a_write_to_a_step_count_is_in_the_next_mean() -> None:
    def write(optimizer: AdaiV2, params: dict[str, Parameter]) -> None:
        optimizer.state[params[WRITTEN]]["step"] = torch.tensor(1.0)
        optimizer.state[params["a.bias"]]["step"].fill_(2.0)

    def write_oracle(oracle: Any) -> None:
        oracle.states[WRITTEN].step, oracle.states["a.bias"].step = 1, 2

    walk(PROBLEM, write, write_oracle)


def test_states_of_two_parameters_may_be_exchanged() -> None:
    """Two parameters of the same shape exchange their states, by reference."""
    problem = Problem((({"lr": 0.1}, (Spec("a.left", (50, 50)), Spec("a.right", (50, 50), scale=5.0))),), steps=8)
    problem = replace(problem, dtype=torch.float32)

    def trade(optimizer: AdaiV2, params: dict[str, Parameter]) -> None:
        left, right = params["a.left"], params["a.right"]
        optimizer.state[left], optimizer.state[right] = optimizer.state[right], optimizer.state[left]

    def trade_in_oracle(oracle: Any) -> None:
        states = oracle.states
        states["a.left"], states["a.right"] = states["a.right"], states["a.left"]

    walk(problem, trade, trade_in_oracle)


# -- states that are refused -------------------------------------------------------------------------------------------


def trained() -> tuple[dict[str, Parameter], AdaiV2]:
    parameters = PROBLEM.parameters()
    optimizer = AdaiV2(PROBLEM.param_groups(parameters), lr=1.0)
    PROBLEM.set_gradients(parameters, 0)
    optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_an_incomplete_state_is_refused(key: str) -> None:
    parameters, optimizer = trained()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    del optimizer.state[parameters[WRITTEN]][key]
    with pytest.raises(ValueError, match=rf"a state must have tensors .* without {key}; .* delete all of its state"):
        optimizer.step()
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)


@KERNELS
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "beta1_prod"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_state_of_another_dtype_is_refused(
    dtype: torch.dtype, key: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    parameters, optimizer = trained()
    optimizer.state[parameters[WRITTEN]][key] = optimizer.state[parameters[WRITTEN]][key].to(dtype)
    with pytest.raises(TypeError, match=rf"{key} must be torch.float32, .* got {dtype}; convert it"):
        optimizer.step()


def test_a_number_instead_of_the_step_tensor_is_refused() -> None:
    parameters, optimizer = trained()
    optimizer.state[parameters[WRITTEN]]["step"] = 1
    with pytest.raises(ValueError, match="without step"):
        optimizer.step()


# -- between clip_grad_norm_() and step() ------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[AdaiV2, dict[str, Parameter]], object]] = {
    "a state is written": lambda optimizer, params: optimizer.state[params[WRITTEN]]["exp_avg_sq"].mul_(2.0),
    "a state is replaced": lambda optimizer, params: replace_state(optimizer.state[params[WRITTEN]]),
    "a state is deleted": lambda optimizer, params: optimizer.state.pop(params[WRITTEN]),
    "states are loaded": lambda optimizer, _: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "a step count is written": lambda optimizer, params: optimizer.state[params[WRITTEN]]["step"].add_(1.0),
    "betas change": lambda optimizer, _: optimizer.param_groups[0].update(betas=(0.1, 0.5)),
    "decay becomes coupled": lambda optimizer, _: optimizer.param_groups[0].update(weight_decay=0.1, decoupled=False),
    "the direction changes": lambda optimizer, _: optimizer.param_groups[0].update(maximize=True),
    "refresh()": lambda optimizer, _: optimizer.refresh(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_inputs_of_the_clipped_mean_must_not_change(change: str) -> None:
    parameters, optimizer = trained()
    PROBLEM.set_gradients(parameters, 1)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.clip_grad_norm_(1.0)
    CHANGES[change](optimizer, parameters)
    with pytest.raises(RuntimeError, match=r"must not change between clip_grad_norm_\(\) and step\(\)"):
        optimizer.step()
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)
    optimizer.step()  # the next step is an ordinary one


def test_parameters_are_inputs_of_the_clipped_mean_only_under_coupled_decay() -> None:
    for problem in (PROBLEM, COUPLED):
        parameters = problem.parameters()
        optimizer = AdaiV2(problem.param_groups(parameters), lr=1.0)
        problem.set_gradients(parameters, 0)
        optimizer.clip_grad_norm_(1.0)
        with torch.no_grad():
            parameters[WRITTEN].mul_(0.5)
        if problem is COUPLED:
            with pytest.raises(RuntimeError, match="must not change"):
                optimizer.step()
        else:
            optimizer.step()


def test_a_learning_rate_may_change_between_clipping_and_step() -> None:
    parameters, optimizer = trained()
    PROBLEM.set_gradients(parameters, 1)
    optimizer.clip_grad_norm_(1.0)
    for param_group in optimizer.param_groups:
        param_group["lr"] = 0.0
    before = parameters[WRITTEN].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[WRITTEN], before)
