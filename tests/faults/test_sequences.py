"""Random sequences of events between steps: each mean is the oracle's.

Hypothesis draws the sequences, the same ones in every run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from adai_dist import AdaiV2
from tests.oracle import Oracle, OracleGroup

SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (((3,), (60, 50)), ((), (2, 4)), ((2500,),))
"""Shapes by group; the last group joins during training. Large tensors are compared by samples."""
HYPERS: tuple[dict[str, Any], ...] = (
    {"lr": 0.1, "betas": (0.1, 0.9), "dampening": 0.5},
    {"lr": 0.2, "betas": (0.2, 0.99), "weight_decay": 0.1, "decoupled": False},
    {"lr": 0.1, "betas": (0.1, 0.0), "weight_decay": 0.1, "decoupled": True, "maximize": True},
)


def scale_past_torch(v: Tensor) -> None:
    v.numpy()[...] *= 4.0


WAYS: tuple[Callable[[Tensor], object], ...] = (
    lambda v: v.mul_(4.0),
    lambda v: v.data.mul_(4.0),
    scale_past_torch,
    lambda v: torch.from_dlpack(v).mul_(4.0),
)


class Training:
    """An optimizer and the oracle, to which the same events happen."""

    def __init__(self, seed: int, dtype: torch.dtype, max_norm: float | None) -> None:
        self.dtype = dtype
        self.random = np.random.default_rng(seed)
        self.tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        self.params: dict[str, Parameter] = {}
        self.frozen: set[str] = set()
        self.saved: tuple[Any, Any] | None = None
        self.num_compared = 0
        groups = [self.new_group(index) for index in range(len(SHAPES) - 1)]
        self.optimizer = AdaiV2([group for group, _ in groups], lr=1.0, max_grad_norm=max_norm)
        starts = {name: param.detach().numpy() for name, param in self.params.items()}
        self.oracle = Oracle(starts, [group for _, group in groups], max_norm)

    def new_group(self, index: int) -> tuple[dict[str, Any], OracleGroup]:
        names = tuple(f"{index}.{k}" for k in range(len(SHAPES[index])))
        for name, shape in zip(names, SHAPES[index], strict=True):
            self.params[name] = Parameter(torch.from_numpy(np.asarray(self.random.normal(size=shape))).to(self.dtype))
        params = [self.params[name] for name in names]
        return {**HYPERS[index], "params": params}, OracleGroup(names, **HYPERS[index])

    def some_name(self, number: int) -> str:
        """Return one of the parameters that have a state."""
        names = [name for name, param in self.params.items() if self.optimizer.state[param]]
        return names[number % len(names)] if names else ""

    # -- events --------------------------------------------------------------------------------------------------------

    def step(self, number: int, size: float = 1.0) -> None:
        gradients: dict[str, Any] = {}
        for name, param in self.params.items():
            values = size * self.random.normal(size=tuple(param.shape)) * 10.0 ** self.random.integers(-1, 2)
            grad = None if name in self.frozen else torch.from_numpy(np.asarray(values)).to(self.dtype)
            param.grad = grad
            gradients[name] = None if grad is None else grad.numpy()
        if number % 3 == 0 and self.oracle.max_grad_norm is not None:
            self.optimizer.clip_grad_norm_(self.oracle.max_grad_norm)
        self.optimizer.step()
        seen = self.oracle.step(gradients)
        if not seen.undefined:
            assert self.optimizer.inertia_mean.item() == pytest.approx(seen.mean, rel=self.tolerance)
            self.num_compared += 1

    def zero_step(self, number: int) -> None:
        self.step(number, 0.0)

    def idle_step(self, number: int) -> None:
        """Take a state-initialisation step, as checkpoint libraries do."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.set_rates([0.0] * len(rates))
        self.step(number, 0.0)
        self.set_rates(rates)

    def set_rates(self, rates: list[float]) -> None:
        groups = zip(self.optimizer.param_groups, self.oracle.groups, rates, strict=True)
        for param_group, oracle_group, lr in groups:
            param_group["lr"] = oracle_group.lr = lr

    def skipped_step(self, number: int) -> None:
        before = {name: param.detach().clone() for name, param in self.params.items()}
        for param in self.params.values():
            param.grad = torch.full_like(param, torch.inf)
        self.optimizer.step()
        assert all(torch.equal(param, before[name]) for name, param in self.params.items()), number

    def write(self, number: int) -> None:
        if name := self.some_name(number):
            WAYS[number % len(WAYS)](self.optimizer.state[self.params[name]]["exp_avg_sq"])
            self.oracle.states[name].exp_avg_sq *= 4.0

    def receive(self, number: int) -> None:
        """Write all states in place without a record in torch, as broadcasts do."""
        for name, param in self.params.items():
            state, of_oracle = self.optimizer.state[param], self.oracle.states[name]
            if state:
                v = torch.from_numpy(np.asarray(self.random.random(tuple(param.shape)))).to(self.dtype)
                state["exp_avg_sq"].data.copy_(v)
                state["exp_avg"].data.copy_(v - 0.5)
                product = v / 2 if "beta1_prod" in state else torch.zeros_like(v)  # zeros stand for a retired product
                if "beta1_prod" in state:
                    state["beta1_prod"].data.copy_(product)
                state["step"].data.fill_(7 + number % 2)
                of_oracle.exp_avg_sq, of_oracle.exp_avg = v.double().numpy().copy(), (v - 0.5).double().numpy()
                of_oracle.beta1_prod, of_oracle.step = product.double().numpy(), 7 + number % 2

    def replace(self, number: int) -> None:
        if name := self.some_name(number):
            state = self.optimizer.state[self.params[name]]
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
            self.oracle.states[name].exp_avg_sq = np.zeros_like(self.oracle.states[name].exp_avg_sq)

    def reset(self, number: int) -> None:
        if number % 2:
            self.optimizer.state.clear()
            names = list(self.params)
        else:
            names = [name] if (name := self.some_name(number)) else []
            for name in names:
                del self.optimizer.state[self.params[name]]
        for name in names:
            del self.oracle.states[name]
        self.oracle._make_states(names)

    def save_or_load(self, number: int) -> None:
        """Load the saved states if the parameter groups are still the same."""
        del number
        if self.saved is None or len(self.saved[0]["param_groups"]) != len(self.optimizer.param_groups):
            self.saved = copy.deepcopy((self.optimizer.state_dict(), self.oracle.states))
            return
        saved, states = copy.deepcopy(self.saved)
        self.optimizer.load_state_dict(saved)
        self.oracle.states = {
            name: states[name] if self.optimizer.state[param] else fresh(states[name])
            for name, param in self.params.items()
        }

    def freeze_or_thaw(self, number: int) -> None:
        name = list(self.params)[number % len(self.params)]
        self.frozen ^= {name}
        self.params[name].requires_grad_(name not in self.frozen)

    def add_group(self, number: int) -> None:
        del number
        if len(self.optimizer.param_groups) < len(SHAPES):
            group, oracle_group = self.new_group(len(SHAPES) - 1)
            self.optimizer.add_param_group(group)
            starts = {name: self.params[name].detach().numpy() for name in oracle_group.names}
            self.oracle.add_group(oracle_group, starts)

    def refresh(self, number: int) -> None:
        del number
        self.optimizer.refresh()


def fresh(state: Any) -> Any:
    zeros = np.zeros_like(state.exp_avg)
    return type(state)(zeros, zeros.copy(), np.ones_like(zeros))


EVENTS: tuple[Callable[[Training, int], None], ...] = (
    Training.step,
    Training.step,
    Training.step,
    Training.zero_step,
    Training.idle_step,
    Training.skipped_step,
    Training.write,
    Training.write,
    Training.receive,
    Training.replace,
    Training.reset,
    Training.save_or_load,
    Training.freeze_or_thaw,
    Training.add_group,
    Training.refresh,
)
SEQUENCE = st.lists(st.tuples(st.sampled_from(range(len(EVENTS))), st.integers(0, 999)), min_size=5, max_size=25)


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(
    events=SEQUENCE,
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    max_norm=st.sampled_from([None, 1.0]),
)
def test_each_mean_is_the_oracles(
    events: list[tuple[int, int]], seed: int, dtype: torch.dtype, max_norm: float | None
) -> None:
    training = Training(seed, dtype, max_norm)
    training.step(1)
    for event, number in events:
        EVENTS[event](training, number)
    training.frozen.clear()
    training.step(1)
    assert training.num_compared >= 2
