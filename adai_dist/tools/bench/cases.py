"""What is measured: the copy, the phases and steps of Adai, and the optimizers beside it.

All cases have the same gradients, and those of one package the same parameters and, where they can, states, so that a
large model fits into memory. Clipping cuts to the norm that the gradients keep; it costs the same in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from adai_dist.kernels.backends import ENVIRONMENT_VARIABLE
from adai_dist.kernels.toolchain import environment
from adai_dist.optimizer import Adai
from adai_dist.sharding import global_mean
from adai_dist.sharding.mean import GlobalMean
from adai_dist.sharding.owned_shards import OwnedShards
from adai_dist.tools.bench.shapes import Shape
from adai_dist.tools.bench.traffic import ADAM, ADVANCE, ADVANCE_RETIRED, CLIP, OBSERVE, OBSERVE_COUPLED, Traffic

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Size of the tensor that is copied: far beyond any cache, and on a GPU long beside the launch of a kernel."""

COPY, REFERENCE, STEP = "copy", "AdamW fused, clipped", "Adai, clipped"
LR, WEIGHT_DECAY = 1e-3, 1e-4


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    name: str
    package: str
    """Whose it is."""
    run: Callable[[], object]
    """What is timed."""
    num_bytes: int
    """That it has to move."""
    prepare: Callable[[], object] = _nothing
    """Called before every run; not timed."""


@dataclass(frozen=True)
class Model:
    """Parameters and gradients of random numbers."""

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

    def for_another(self) -> Model:
        """Parameters of their own with the same gradients, for optimizers that turn low precision into NaN."""
        params = [nn.Parameter(param.detach().clone()) for param in self.params]
        for param, other in zip(params, self.params, strict=True):
            param.grad = other.grad
        return replace(self, params=params)

    def num_bytes(self, traffic: Traffic, state_dtype: torch.dtype) -> int:
        return self.numel * traffic.bytes_per_parameter(self.dtype.itemsize, state_dtype.itemsize)

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.params, self.max_norm)


def copy_case(device: torch.device) -> Case:
    source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return Case(COPY, "torch", lambda: target.copy_(source), 2 * COPY_BYTES[device.type])


@dataclass
class Ours:
    """One optimizer whose settings change from case to case: a step reads them anew."""

    model: Model
    optimizer: Adai
    shards: list[OwnedShards] = field(default_factory=list[OwnedShards])
    mean: GlobalMean | None = None

    def set(self, dampening: float = 1.0, weight_decay: float = 0.0, is_clipped: bool = True) -> None:
        self.optimizer.param_groups[0].update(dampening=dampening, weight_decay=weight_decay)
        self.optimizer.max_grad_norm = self.model.max_norm if is_clipped else None

    def list_shards(self) -> None:
        self.set()
        self.shards = self.optimizer.owned_shards()

    def find_mean(self) -> None:
        self.list_shards()
        self.mean = self._mean()

    def observe(self) -> None:
        self.optimizer.observe(self.shards)

    def advance(self) -> None:
        assert self.mean is not None
        self.optimizer.advance(self.shards, self.mean)

    def step_retired(self) -> None:
        """A step after beta1_prod has fallen below 2^-25, and its correction is 1 for good."""
        self.shards = [
            replace(owned, tensors=owned.tensors._replace(beta1_prod=[])) for owned in self.optimizer.owned_shards()
        ]
        self.mean = self._mean()
        self.advance()

    def _mean(self) -> GlobalMean:
        sums = self.optimizer.observe(self.shards)
        return global_mean(sums, self.optimizer.mean_group, max_norm=self.optimizer.max_grad_norm)

    def case(self, name: str, run: Callable[[], object], traffic: Traffic, prepare: Callable[[], object]) -> Case:
        return Case(name, "adai_dist", run, self.model.num_bytes(traffic, torch.float32), prepare)


def our_cases(model: Model) -> tuple[list[Case], Adai]:
    """The cases of this package, and the optimizer that the kernels step."""
    ours = Ours(model, Adai(model.params, lr=LR))
    with environment({ENVIRONMENT_VARIABLE: "off"}):
        equations = Ours(model, Adai(model.params, lr=LR))
    ours.optimizer.step()
    _share_states(equations.optimizer, ours.optimizer, own=("step", "exp_avg_sq"))
    step, whole = ours.optimizer.step, OBSERVE + ADVANCE
    cases = [
        ours.case("observe", ours.observe, OBSERVE, ours.list_shards),
        ours.case("advance", ours.advance, ADVANCE, ours.find_mean),
        ours.case("Adai", step, whole, lambda: ours.set(is_clipped=False)),
        ours.case(STEP, step, whole, ours.set),
        ours.case("Adai, clipped, retired", ours.step_retired, OBSERVE + ADVANCE_RETIRED, ours.set),
        ours.case(
            "Adai, clipped, coupled decay",
            step,
            OBSERVE_COUPLED + ADVANCE,
            lambda: ours.set(weight_decay=WEIGHT_DECAY),
        ),
        ours.case("AdaiV2 d=0, clipped", step, whole, lambda: ours.set(dampening=0.0)),
        equations.case("Adai by equations, clipped", equations.optimizer.step, whole, equations.set),
    ]
    return cases, ours.optimizer


def adamw_cases(model: Model) -> list[Case]:
    """torch's AdamW; with clipping it is what a step of Adai is compared to."""
    fused = AdamW(model.params, lr=LR, fused=True)
    fused.step()
    foreach = AdamW(model.params, lr=LR, foreach=True)
    for param, state in fused.state.items():  # foreach wants its step on the host
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
    """A step of any Adam, without or with ``clip_grad_norm_`` before it.

    Args:
        state_dtype: of its states; None for that of the parameters.
    """

    def clipped() -> None:
        model.clip()
        optimizer.step()

    traffic = ADAM + CLIP if is_clipped else ADAM
    run: Callable[[], Any] = clipped if is_clipped else optimizer.step
    return Case(name, package, run, model.num_bytes(traffic, state_dtype or model.dtype))


def _share_states(optimizer: Optimizer, owner: Optimizer, own: tuple[str, ...]) -> None:
    """Give ``optimizer`` the states of ``owner``, and copies of those that it has to have for itself."""
    states: dict[Tensor, dict[str, Tensor]] = owner.state
    for param, state in states.items():
        optimizer.state[param] = {name: value.clone() if name in own else value for name, value in state.items()}
