"""Retirement of beta1_prod saves memory and traffic, and leaves the trajectory bitwise the same."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from adai_dist import Adai, AdaiV2
from adai_dist.optimizer import AdaptiveInertia
from adai_dist.optimizer.retirement import STEPS_BETWEEN_CHECKS

SHAPES = ((40,), (7, 3), (1,), (0,), (65,))


class Pair:
    """Two runs of one training, with retirement and without."""

    def __init__(self, cls: type[AdaptiveInertia] = Adai, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.optimizers: list[AdaptiveInertia] = []
        for retires in (True, False):
            generator = torch.Generator().manual_seed(1)
            params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
            groups = [{"params": params[:3]}, {"params": params[3:], "eps": 4e-2}]
            self.optimizers.append(cls(groups, lr=0.05, retire_beta1_prod=retires, **options))  # type: ignore[call-arg]
        self.generator = torch.Generator().manual_seed(2)

    def walk(self, num_steps: int, first_step: int = 0) -> None:
        for step in range(first_step, first_step + num_steps):
            gradients = [torch.randn(shape, generator=self.generator) for shape in SHAPES]
            # Inertia stays at its bound there, so the product decreases as slowly as possible.
            gradients[0][:20] = gradients[1][:3] = 0.0
            for optimizer in self.optimizers:
                for index, (param, gradient) in enumerate(zip(optimizer.params(), gradients, strict=True)):
                    # The second parameter starts late and lacks some gradients: it retires by its own step count.
                    is_missing = index == 1 and (step < 300 or step % 3 == 0)
                    param.grad = None if is_missing else gradient.to(param.dtype)
                optimizer.step()

    def retired(self) -> list[bool]:
        return ["beta1_prod" not in state for state in self.optimizers[0].state.values()]

    def assert_equal(self) -> None:
        first, second = (optimizer.state_dict()["state"] for optimizer in self.optimizers)
        for a, b in zip(*(optimizer.params() for optimizer in self.optimizers), strict=True):
            assert torch.equal(a, b)
        for key, state in second.items():
            for name in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(first[key][name], state[name]), (key, name)


@pytest.fixture(params=["auto", "off"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ADAI_DIST_KERNELS", request.param)
    return request.param


OPTIONS: dict[str, dict[str, Any]] = {
    "l2": {"eps": 2e-2, "weight_decay": 0.01},
    "decoupled": {"eps": 2e-2, "weight_decay": 0.01, "decoupled": True, "max_grad_norm": 3.0},
    "v2": {"cls": AdaiV2, "eps": 2e-2, "dampening": 0.4},
    "bfloat16": {"dtype": torch.bfloat16, "eps": 2e-2},
    "float64": {"dtype": torch.float64, "eps": 4e-2},
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_trajectory_is_bitwise_the_same_before_and_after_retirement(options: dict[str, Any]) -> None:
    pair = Pair(**options)
    seen: set[tuple[bool, ...]] = set()
    for first_step in range(0, 2000, STEPS_BETWEEN_CHECKS):
        pair.walk(STEPS_BETWEEN_CHECKS, first_step)
        pair.assert_equal()
        seen.add(tuple(pair.retired()))
    assert len(seen) >= 3, seen  # the parameters of a group were retired at different steps
    assert all(pair.retired()[i] for i, shape in enumerate(SHAPES) if shape != (0,))


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_the_trajectory_is_bitwise_the_same_over_20000_steps() -> None:
    pair = Pair()
    for first_step in range(0, 20000, STEPS_BETWEEN_CHECKS):
        pair.walk(STEPS_BETWEEN_CHECKS, first_step)
        pair.assert_equal()
        if first_step + STEPS_BETWEEN_CHECKS == 17000:
            assert not pair.retired()[0]  # half of it is at the bound 1 - eps: (1 - 1e-3)^17320 is 2^-25
    assert pair.retired() == [
        True,
        False,
        True,
        False,
        True,
    ]  # the second takes 2/3 of the steps, the fourth has no elements


def test_one_minus_a_product_rounds_to_one_at_the_bound_and_not_just_above() -> None:
    for dtype in (torch.float32, torch.float64):
        bound = torch.tensor(torch.finfo(dtype).eps / 4, dtype=dtype)
        assert (1 - bound).item() == 1.0
        above = torch.nextafter(bound, torch.ones((), dtype=dtype))
        assert (1 - above).item() < 1.0


@pytest.mark.parametrize(("largest", "is_retired"), [(2.0**-25, True), (2.0**-25 + 2.0**-48, False)])
def test_the_largest_element_decides_and_not_the_number_of_steps(largest: float, is_retired: bool) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Adai([param], lr=0.1)
    for step in range(STEPS_BETWEEN_CHECKS):
        param.grad = None if step else torch.ones(3)
        if step == 1:
            optimizer.state[param]["beta1_prod"].fill_(0.0)[1] = largest
        optimizer.step()
    assert ("beta1_prod" not in optimizer.state[param]) is is_retired


def retired_optimizer() -> tuple[list[torch.nn.Parameter], Adai]:
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = Adai(params, lr=0.1, eps=0.1)
    for step in range(STEPS_BETWEEN_CHECKS + 1):
        for param in params:
            param.grad = torch.full_like(param, (-1.0) ** step)
        if step == 300:
            optimizer.state[params[1]]["beta1_prod"].fill_(1.0)  # as if it had started late: (1 - 0.1)^200 is 2^-30
        if step == 499:
            optimizer.state[params[1]]["beta1_prod"].fill_(0.5)
        optimizer.step()
    return params, optimizer


def step_on(params: list[torch.nn.Parameter], optimizer: Adai) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach().clone() for param in params]


def test_checkpoints_store_zeros_for_a_retired_product() -> None:
    params, optimizer = retired_optimizer()
    assert ["beta1_prod" in optimizer.state[param] for param in params] == [False, True]
    state = optimizer.state_dict()["state"]
    assert torch.equal(state[0]["beta1_prod"], torch.zeros(4))
    assert (state[1]["beta1_prod"] > 0).all()
    assert ["beta1_prod" in optimizer.state[param] for param in params] == [False, True]  # saving changed nothing


@pytest.mark.parametrize("retires", [True, False])
def test_a_checkpoint_with_retired_products_continues_bitwise(retires: bool) -> None:
    params, optimizer = retired_optimizer()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = Adai(others, lr=0.1, eps=0.1, retire_beta1_prod=retires)
    other.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(step_on(params, optimizer), step_on(others, other), strict=True):
        assert torch.equal(a, b)
    assert ["beta1_prod" in other.state[param] for param in others] == [not retires, True]


def test_loading_an_older_checkpoint_restores_the_product() -> None:
    params, optimizer = retired_optimizer()
    fresh = Adai([torch.nn.Parameter(param.detach().clone()) for param in params], lr=0.1, eps=0.1)
    step_on(fresh.params(), fresh)  # type: ignore[arg-type]
    optimizer.load_state_dict(copy.deepcopy(fresh.state_dict()))
    with torch.no_grad():
        for param, loaded in zip(params, fresh.params(), strict=True):
            param.copy_(loaded)
    assert ["beta1_prod" in optimizer.state[param] for param in params] == [True, True]
    for a, b in zip(step_on(params, optimizer), step_on(fresh.params(), fresh), strict=True):  # type: ignore[arg-type]
        assert torch.equal(a, b)


def test_copies_and_pickles_stay_retired_and_keep_the_setting() -> None:
    _, optimizer = retired_optimizer()
    copied = copy.deepcopy(optimizer)
    assert ["beta1_prod" in state for state in copied.state.values()] == [False, True]
    unwilling = copy.deepcopy(Adai([torch.nn.Parameter(torch.ones(1))], lr=0.1, retire_beta1_prod=False))
    assert not unwilling.retire_beta1_prod


def test_retired_states_take_eight_bytes_per_float32_parameter() -> None:
    param = torch.nn.Parameter(torch.ones(1000))
    optimizer = Adai([param], lr=0.1, eps=0.1)
    num_bytes: list[int] = []
    for step in range(STEPS_BETWEEN_CHECKS):
        param.grad = torch.full_like(param, (-1.0) ** step)
        optimizer.step()
        num_bytes.append(sum(x.numel() * x.element_size() for x in optimizer.state[param].values()))
    assert num_bytes[-2] == 12 * 1000 + 4
    assert num_bytes[-1] == 8 * 1000 + 4


def test_the_argument_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="retire_beta1_prod must be a bool, got 1"):
        Adai([torch.nn.Parameter(torch.ones(1))], lr=0.1, retire_beta1_prod=1)  # type: ignore[arg-type]
