"""Properties that hold for any shapes, groups, options and gradients, and for any sharding of a model.

Hypothesis draws the examples, the same ones in every run.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from adai_dist import AdaiV2
from adai_dist.optimizer import retirement
from adai_dist.sharding.mean import Sums, global_mean
from tests.oracle import Oracle, OracleGroup

few = settings(derandomize=True, deadline=None, database=None, max_examples=150)

HYPER = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.05, 0.5]),
        "betas": st.tuples(st.sampled_from([0.0, 0.1, 1.0, 2.0]), st.sampled_from([0.0, 0.9, 0.999])),
        "eps": st.sampled_from([1e-3, 0.01, 0.5]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "dampening": st.sampled_from([0.0, 0.25, 1.0]),
        "decoupled": st.booleans(),
        "maximize": st.booleans(),
    }
)
SHAPE = st.lists(st.integers(0, 5), max_size=3).map(tuple)
GROUP = st.tuples(HYPER, st.lists(SHAPE, min_size=1, max_size=3))


@dataclass(frozen=True)
class Case:
    """Parameter groups, and gradients derived from a seed."""

    groups: list[tuple[dict[str, Any], list[tuple[int, ...]]]]
    seed: int
    steps: int
    max_grad_norm: float | None
    share_missing: float
    dtype: torch.dtype = torch.float64
    foreach: bool | None = None

    def shapes(self) -> list[tuple[int, ...]]:
        return [shape for _, shapes in self.groups for shape in shapes]

    def draw(self, key: int) -> list[Tensor]:
        """Return one tensor per parameter, with magnitudes over four decades."""
        random = np.random.default_rng((self.seed, key))
        return [
            torch.from_numpy(np.asarray(random.standard_normal(shape) * 10.0 ** random.integers(-2, 2))).to(self.dtype)
            for shape in self.shapes()
        ]

    def starts(self) -> list[Tensor]:
        return [x.sign() + 0.1 * x for x in self.draw(0)]

    def gradients(self, step: int) -> list[Tensor | None]:
        missing = np.random.default_rng((self.seed, step, 1)).random(len(self.shapes())) < self.share_missing
        return [None if is_missing else x for x, is_missing in zip(self.draw(step + 1), missing, strict=True)]

    def optimizer(self, params: list[Parameter], order: list[int] | None = None, **options: Any) -> AdaiV2:
        """Return the optimizer, with its groups in the given order."""
        remaining = iter(params)
        groups = [{**hyper, "params": [next(remaining) for _ in shapes]} for hyper, shapes in self.groups]
        groups = groups if order is None else [groups[k] for k in order]
        options = {"max_grad_norm": self.max_grad_norm, "foreach": self.foreach} | options
        return AdaiV2(groups, lr=1.0, **options)

    def oracle(self) -> Oracle:
        names = iter(range(len(self.shapes())))
        groups = [OracleGroup(tuple(str(next(names)) for _ in shapes), **hyper) for hyper, shapes in self.groups]
        return Oracle({str(k): x.numpy() for k, x in enumerate(self.starts())}, groups, self.max_grad_norm)

    def set_gradients(self, params: list[Parameter], step: int, factor: float = 1.0) -> None:
        for parameter, gradient in zip(params, self.gradients(step), strict=True):
            parameter.grad = None if gradient is None else gradient * factor

    def train(self, optimizer: AdaiV2, params: list[Parameter], first: int, last: int, factor: float = 1.0) -> None:
        for step in range(first, last):
            self.set_gradients(params, step, factor)
            optimizer.step()

    def parameters(self) -> list[Parameter]:
        return [Parameter(x) for x in self.starts()]


CASE = st.builds(
    Case,
    groups=st.lists(GROUP, min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 6),
    max_grad_norm=st.sampled_from([None, 0.5, 1e6]),
    share_missing=st.sampled_from([0.0, 0.3, 1.0]),
    foreach=st.sampled_from([None, False]),
)
FLOAT32 = CASE.map(lambda case: Case(**{**vars(case), "dtype": torch.float32}))


def close(found: list[Tensor], expected: list[Any], starts: list[Tensor], tolerance: float) -> bool:
    """Return whether all differ by less than a fraction of the distance travelled and of the parameters' rounding."""
    unit = float(torch.finfo(found[0].dtype).eps) if found else 0.0
    flat = [torch.cat([torch.as_tensor(x).double().flatten() for x in xs]) for xs in (found, expected, starts)]
    error, travelled = (flat[0] - flat[1]).norm(), (flat[1] - flat[2]).norm()
    return bool(error <= tolerance * travelled + 4 * unit * flat[1].norm())


# -- a model sharded over ranks ----------------------------------------------------------------------------------------


def step_as_ranks(optimizers: list[AdaiV2], max_norm: float | None) -> None:
    """Take one step of several ranks in one process, and add up their sums in place of the collective."""
    shards = [optimizer.owned_shards() for optimizer in optimizers]
    sums = [torch.stack(optimizer.observe(own)) for optimizer, own in zip(optimizers, shards, strict=True)]
    mean = global_mean(Sums(*torch.stack(sums).sum(0).unbind()), (), max_norm=max_norm)
    for optimizer, own in zip(optimizers, shards, strict=True):
        optimizer.advance(own, mean)


def cuts(case: Case, num_ranks: int) -> list[list[int]]:
    """Draw the cuts of every parameter; pieces may be empty."""
    random = np.random.default_rng((case.seed, num_ranks))
    sizes = [int(np.prod(shape)) for shape in case.shapes()]
    return [[0, *sorted(random.integers(0, size + 1, num_ranks - 1)), size] for size in sizes]


@few
@given(case=st.one_of(CASE, FLOAT32), num_ranks=st.integers(1, 4))
def test_ranks_take_the_steps_of_one_process_and_of_the_oracle(case: Case, num_ranks: int) -> None:
    whole = case.parameters()
    unsharded = case.optimizer(whole)
    oracle = case.oracle()
    pieces = [
        [
            Parameter(x.flatten()[cut[rank] : cut[rank + 1]])
            for x, cut in zip(case.starts(), cuts(case, num_ranks), strict=True)
        ]
        for rank in range(num_ranks)
    ]
    optimizers = [case.optimizer(mine) for mine in pieces]
    for step in range(case.steps):
        gradients = case.gradients(step)
        oracle.step({str(k): None if g is None else g.double().numpy() for k, g in enumerate(gradients)})
        case.train(unsharded, whole, step, step + 1)
        for rank, mine in enumerate(pieces):
            for parameter, gradient, cut in zip(mine, gradients, cuts(case, num_ranks), strict=True):
                parameter.grad = None if gradient is None else gradient.flatten()[cut[rank] : cut[rank + 1]].clone()
        step_as_ranks(optimizers, case.max_grad_norm)
    put_together = [torch.cat([x.detach() for x in of_parameter]) for of_parameter in zip(*pieces, strict=True)]
    # With inertia near its bound 1 - eps, 1 - beta1_prod magnifies rounding by up to 1 / eps = 1,000.
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-4}[case.dtype]
    assert close(put_together, [p.detach() for p in whole], case.starts(), tolerance)
    assert close(put_together, list(oracle.parameters.values()), case.starts(), tolerance)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@few
@given(case=st.one_of(CASE, FLOAT32), data=st.data())
def test_saving_and_loading_at_any_step_is_bitwise_neutral(case: Case, data: st.DataObject) -> None:
    """beta1_prod may be retired by then, in either optimizer."""
    at = data.draw(st.integers(0, case.steps))
    retires = [data.draw(st.booleans()) for _ in range(2)]
    params = case.parameters()
    optimizer = case.optimizer(params, retire_beta1_prod=retires[0])
    before = retirement.STEPS_BETWEEN_CHECKS
    retirement.STEPS_BETWEEN_CHECKS = 2
    try:
        case.train(optimizer, params, 0, at)
        file = io.BytesIO()
        torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        others = [Parameter(x) for x in loaded["params"]]
        other = case.optimizer(others, retire_beta1_prod=retires[1])
        other.load_state_dict(loaded["optimizer"])
        case.train(optimizer, params, at, case.steps)
        case.train(other, others, at, case.steps)
    finally:
        retirement.STEPS_BETWEEN_CHECKS = before
    for parameter, twin in zip(params, others, strict=True):
        assert torch.equal(parameter, twin)
    states, twins = (x.state_dict()["state"] for x in (optimizer, other))
    assert states.keys() == twins.keys()
    for key, state in states.items():
        assert all(torch.equal(value, twins[key][name]) for name, value in state.items() if name != "beta1_prod")
        # A retired product counts as zeros, as 1 - beta1_prod rounds to 1.
        assert torch.equal(1 - state["beta1_prod"], 1 - twins[key]["beta1_prod"])


# -- orders and scales -------------------------------------------------------------------------------------------------


@few
@given(case=CASE, data=st.data())
def test_the_order_of_groups_does_not_matter(case: Case, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(case.groups))))
    params, others = case.parameters(), case.parameters()
    case.train(case.optimizer(params), params, 0, case.steps)
    case.train(case.optimizer(others, order), others, 0, case.steps)
    assert close([p.detach() for p in params], [p.detach() for p in others], case.starts(), 1e-12)


def without_clipping_and_coupled_decay(case: Case) -> Case:
    groups = [({**hyper, "decoupled": True}, shapes) for hyper, shapes in case.groups]
    return Case(**{**vars(case), "groups": groups, "max_grad_norm": None})


@few
@given(case=st.one_of(CASE, FLOAT32).map(without_clipping_and_coupled_decay), exponent=st.integers(-12, 12))
def test_inertia_does_not_depend_on_the_scale_of_gradients(case: Case, exponent: int) -> None:
    """Scaling by powers of two is bitwise neutral."""
    runs: list[tuple[list[Parameter], AdaiV2]] = []
    for factor in (1.0, 2.0**exponent):
        params = case.parameters()
        optimizer = case.optimizer(params)
        case.train(optimizer, params, 0, case.steps, factor)
        runs.append((params, optimizer))
    for parameter, twin in zip(runs[0][0], runs[1][0], strict=True):
        state, other = runs[0][1].state[parameter], runs[1][1].state[twin]
        if state:
            assert torch.equal(state["beta1_prod"], other["beta1_prod"])
            assert torch.equal(state["exp_avg"] * 2.0**exponent, other["exp_avg"])
            assert torch.equal(state["exp_avg_sq"] * 4.0**exponent, other["exp_avg_sq"])


# -- groups and non-finite gradients that come and go ------------------------------------------------------------------


@few
@given(case=CASE, late=GROUP, data=st.data())
def test_groups_may_join_and_gradients_be_non_finite_at_any_time(case: Case, late: Any, data: st.DataObject) -> None:
    joins, poisoned = (data.draw(st.integers(0, case.steps)) for _ in range(2))
    everything = Case(**{**vars(case), "groups": [*case.groups, late]})
    params, oracle = everything.parameters(), case.oracle()
    num_early = len(case.shapes())
    optimizer = case.optimizer(params[:num_early])
    for step in range(case.steps):
        if step == joins:
            optimizer.add_param_group({**late[0], "params": params[num_early:]})
            names = tuple(map(str, range(num_early, len(params))))
            starts = {name: params[int(name)].detach().numpy() for name in names}
            oracle.add_group(OracleGroup(names, **late[0]), starts)
        everything.set_gradients(params, step)
        if step == poisoned:
            for parameter in params[:1]:
                if parameter.grad is not None and parameter.numel():
                    parameter.grad.view(-1)[-1] = torch.inf
        present = params if step >= joins else params[:num_early]
        before = copy.deepcopy(optimizer.state_dict()["state"])
        seen = oracle.step({str(k): None if p.grad is None else p.grad.numpy() for k, p in enumerate(present)})
        optimizer.step()
        if seen.skipped:
            after = optimizer.state_dict()["state"]
            assert all(torch.equal(v, after[k][name]) for k, state in before.items() for name, v in state.items())
    found = [p.detach() for p in params[: num_early if joins >= case.steps else len(params)]]
    expected = [oracle.parameters[str(k)] for k in range(len(found))]
    assert close(found, expected, everything.starts()[: len(found)], 1e-12)


def test_the_measure_of_differences_can_fail() -> None:
    make: Callable[..., list[Tensor]] = lambda x: [torch.tensor([x, 1.0], dtype=torch.float64)]  # noqa: E731
    assert close(make(2.0), make(2.0 + 1e-13), make(1.0), 1e-12)
    assert not close(make(2.0), make(2.0 + 1e-11), make(1.0), 1e-12)
