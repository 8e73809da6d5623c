"""The cases of the benchmark: the copy, the phases and steps of Adai, and torch's AdamW.

All cases share their gradients; the cases of one package also share parameters and, where possible, states, so that a
large model fits into memory. Clipping is active in every step and costs the same in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from adai_dist.kernels.backends import ENVIRONMENT_VARIABLE
from adai_dist.kernels.toolchain import environment
from adai_dist.optimizer import Adai
from adai_dist.rounding import LOW_DTYPES
from adai_dist.sharding import global_mean
from adai_dist.sharding.mean import GlobalMean
from adai_dist.sharding.owned_shards import OwnedShards
from adai_dist.sharding.param_shard import MASTER
from adai_dist.tools.bench.shapes import Shape
from adai_dist.tools.bench.traffic import ADAM, ADVANCE, ADVANCE_RETIRED, CLIP, OBSERVE, OBSERVE_COUPLED, Traffic

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Size of the copied tensor: far larger than any cache, and on a GPU far longer to copy than to launch a kernel."""

COPY, REFERENCE, STEP = "copy", "AdamW fused, clipped", "Adai, clipped"
LOW_STEP = f"{STEP}, bfloat16 states"
MIXED_STEP = f"{STEP}, mixed8 states"
REMAINDER_BYTES = torch.int16.itemsize
LR, WEIGHT_DECAY = 1e-3, 1e-4


def _no_preparation() -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    name: str
    package: str
    """Package whose code is timed."""
    run: Callable[[], object]
    """Function to time."""
    num_bytes: int
    """Bytes that the algorithm has to move."""
    state_bytes: int = 0
    """Bytes of the states, including the remainders of master weights."""
    prepare: Callable[[], object] = _no_preparation
    """Function to call, untimed, before every run."""


@dataclass(frozen=True)
class Model:
    """Parameters and gradients with random values."""

    device: torch.device
    dtype: torch.dtype
    params: list[nn.Parameter]
    numel: int
    max_norm: float

    @classmethod
    def of(cls, shapes: list[Shape], device: torch.device, dtype: torch.dtype) -> Model:
        params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        numel = sum(param.numel() for param in params)
        return cls(device, dtype, params, numel, max_norm=0.5 * math.sqrt(numel))

    def copy(self) -> Model:
        """Return a copy of the parameters that shares the gradients, for optimizers that may overflow to NaN."""
        params = [nn.Parameter(param.detach().clone()) for param in self.params]
        for param, other in zip(params, self.params, strict=True):
            param.grad = other.grad
        return replace(self, params=params)

    def num_bytes(self, traffic: Traffic, state_bytes: float, *, has_remainder: bool = False) -> int:
        """Return the bytes that an algorithm moves; ``state_bytes`` is the mean size of an element of a state."""
        gradient_bytes = self.dtype.itemsize
        param_bytes = gradient_bytes + has_remainder * REMAINDER_BYTES
        return round(self.numel * traffic.bytes_per_parameter(param_bytes, gradient_bytes, state_bytes))

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.params, self.max_norm)


def copy_case(device: torch.device) -> Case:
    source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return Case(COPY, "torch", lambda: target.copy_(source), 2 * COPY_BYTES[device.type])


@dataclass
class AdaiCases:
    """One optimizer for several cases: `configure` changes its settings, which every step reads."""

    model: Model
    optimizer: Adai
    shards: list[OwnedShards] = field(default_factory=list[OwnedShards])
    mean: GlobalMean | None = None

    def configure(self, dampening: float = 1.0, weight_decay: float = 0.0, is_clipped: bool = True) -> None:
        self.optimizer.param_groups[0].update(dampening=dampening, weight_decay=weight_decay)
        self.optimizer.max_grad_norm = self.model.max_norm if is_clipped else None

    def find_shards(self) -> None:
        self.configure()
        self.shards = self.optimizer.owned_shards()

    def find_mean(self) -> None:
        self.find_shards()
        self.mean = self._mean()

    def observe_gradients(self) -> None:
        self.optimizer.observe(self.shards)

    def advance_parameters(self) -> None:
        assert self.mean is not None
        self.optimizer.advance(self.shards, self.mean)

    def step_without(self, *names: str) -> None:
        """Step without some tensors: ``beta1_prod`` as after its retirement, ``remainder`` without master weights."""
        self.shards = self._shards_without(*names)
        self.mean = self._mean()
        self.advance_parameters()

    def _mean(self) -> GlobalMean:
        sums = self.optimizer.observe(self.shards)
        return global_mean(sums, self.optimizer.mean_group, max_norm=self.optimizer.max_grad_norm)

    def _shards_without(self, *names: str) -> list[OwnedShards]:
        nothing = dict[str, list[Tensor]].fromkeys(names, [])
        return [replace(owned, tensors=owned.tensors._replace(**nothing)) for owned in self.optimizer.owned_shards()]

    def case(
        self,
        name: str,
        run: Callable[[], object],
        traffic: Traffic,
        prepare: Callable[[], object],
        without: tuple[str, ...] = (),
    ) -> Case:
        """Return a case of the optimizer.

        Args:
            without: tensors that ``run`` leaves out, as in :meth:`step_without`.
        """
        states = [owned.tensors for owned in self._shards_without("param", "grad", *without)]
        remainder_bytes = sum(tensor.nbytes for each in states for tensor in each.remainder)
        state_bytes = sum(tensor.nbytes for each in states for tensors in each for tensor in tensors)
        num_states = 3 if any(each.beta1_prod for each in states) else 2
        of_one = (state_bytes - remainder_bytes) / num_states / self.model.numel
        num_bytes = self.model.num_bytes(traffic, of_one, has_remainder=remainder_bytes > 0)
        return Case(name, "adai_dist", run, num_bytes, state_bytes, prepare)

    def case_without(self, name: str, traffic: Traffic, *names: str) -> Case:
        """Return the case of a clipped step without some tensors."""
        return self.case(name, partial(self.step_without, *names), traffic, self.configure, without=names)


def adai_cases(model: Model) -> tuple[list[Case], list[Adai]]:
    """Return the cases of this package, and the optimizers that run on the kernels."""
    kernels = AdaiCases(model, Adai(model.params, lr=LR))
    low = AdaiCases(model, Adai(model.params, lr=LR, state_dtype="bfloat16"))
    mixed = AdaiCases(model, Adai(model.params, lr=LR, state_dtype="mixed8"))
    with environment({ENVIRONMENT_VARIABLE: "off"}):
        equations = AdaiCases(model, Adai(model.params, lr=LR))
    kernels.optimizer.step()
    for of_mode in (low, mixed):
        of_mode.optimizer.step()
        _share_remainders(of_mode.optimizer, kernels.optimizer)
    # The kernels would read exp_avg and exp_avg_sq once more after writes by another optimizer.
    _share_states(equations.optimizer, kernels.optimizer, copied=("step", "exp_avg", "exp_avg_sq"))
    step, case = kernels.optimizer.step, kernels.case
    both_phases, both_retired = OBSERVE + ADVANCE, OBSERVE + ADVANCE_RETIRED
    configure_coupled = partial(kernels.configure, weight_decay=WEIGHT_DECAY)
    low_cases = [
        low.case(LOW_STEP, low.optimizer.step, both_phases, low.configure),
        low.case_without(f"{LOW_STEP}, retired", both_retired, "beta1_prod"),
        mixed.case(MIXED_STEP, mixed.optimizer.step, both_phases, mixed.configure),
        mixed.case_without(f"{MIXED_STEP}, retired", both_retired, "beta1_prod"),
    ]
    if model.dtype in LOW_DTYPES:
        low_cases.append(low.case_without(f"{LOW_STEP}, no master", both_phases, "remainder"))
    cases = [
        case("observe", kernels.observe_gradients, OBSERVE, kernels.find_shards),
        case("advance", kernels.advance_parameters, ADVANCE, kernels.find_mean),
        case("Adai", step, both_phases, partial(kernels.configure, is_clipped=False)),
        case(STEP, step, both_phases, kernels.configure),
        kernels.case_without(f"{STEP}, retired", both_retired, "beta1_prod"),
        *low_cases,
        case(f"{STEP}, coupled decay", step, OBSERVE_COUPLED + ADVANCE, configure_coupled),
        case("AdaiV2 d=0, clipped", step, both_phases, partial(kernels.configure, dampening=0.0)),
        equations.case("Adai by equations, clipped", equations.optimizer.step, both_phases, equations.configure),
    ]
    return cases, [kernels.optimizer, low.optimizer, mixed.optimizer]


def adamw_cases(model: Model) -> list[Case]:
    """Return the cases of torch's AdamW; the fused one with clipping is the reference for a step of Adai."""
    fused = AdamW(model.params, lr=LR, fused=True)
    fused.step()
    foreach = AdamW(model.params, lr=LR, foreach=True)
    for param, state in fused.state.items():  # foreach requires its step on the host
        foreach.state[param] = {**state, "step": torch.ones(())}
    return [
        adam_case("AdamW fused", model, fused),
        adam_case(REFERENCE, model, fused, is_clipped=True),
        adam_case("AdamW foreach, clipped", model, foreach, is_clipped=True),
    ]


def adam_case(
    name: str,
    model: Model,
    optimizer: Optimizer,
    *,
    is_clipped: bool = False,
    state_dtype: torch.dtype | None = None,
    package: str = "torch",
) -> Case:
    """Return the case of a step of any Adam, optionally after ``clip_grad_norm_``.

    Args:
        state_dtype: dtype of the states; None for that of the parameters.
    """

    def clipped() -> None:
        model.clip()
        optimizer.step()

    traffic = ADAM + CLIP if is_clipped else ADAM
    run: Callable[[], Any] = clipped if is_clipped else optimizer.step
    num_bytes = model.num_bytes(traffic, (state_dtype or model.dtype).itemsize)
    return Case(name, package, run, num_bytes, bytes_of_states(optimizer))


def bytes_of_states(optimizer: Optimizer) -> int:
    """Return the bytes of all states, without scalars such as step counts."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor) and value.ndim > 0)


def _share_remainders(optimizer: Optimizer, owner: Optimizer) -> None:
    """Give ``optimizer`` the master weights of ``owner``, which steps the same parameters."""
    states: dict[Tensor, dict[str, Tensor]] = owner.state
    for param, state in states.items():
        if MASTER in state:
            optimizer.state[param][MASTER] = state[MASTER]


def _share_states(optimizer: Optimizer, owner: Optimizer, copied: tuple[str, ...]) -> None:
    """Give ``optimizer`` the states of ``owner``, some of them as copies."""
    states: dict[Tensor, dict[str, Tensor]] = owner.state
    for param, state in states.items():
        optimizer.state[param] = {name: value.clone() if name in copied else value for name, value in state.items()}
