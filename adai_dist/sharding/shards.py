"""The local tensors of one step, listed the way the equations and the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adai_dist.equations import Shards, StepScalars
from adai_dist.hyper import Hyper
from adai_dist.kernels import Backend
from adai_dist.sharding.ownership import is_dtensor, local_tensor, num_padding

STATE_NAMES = ("exp_avg", "exp_avg_sq", "beta1_prod")
"""beta1_prod is not there once it is retired (:mod:`adai_dist.optimizer.retirement`)."""


class Holding:
    """The elements of one parameter that this rank holds, maybe none, and those of its states.

    Finding them takes many small calls; a holding serves for as long as parameter and states stay the same objects.

    Raises:
        ValueError: a state differs from the parameter in its local shape.
    """

    __slots__ = (
        *("_exp_avg_sq_sum", "_source", "_states"),
        *("backend", "beta1_prod", "exp_avg", "exp_avg_sq", "gradient_form", "local_param", "param", "state"),
    )

    def __init__(self, param: Tensor, state: dict[str, Any]) -> None:
        self.param = param
        self.state = state
        self._source = _source(param)
        self._states = tuple(state.get(name) for name in STATE_NAMES)
        # The parameter itself where possible: it follows when a user sets param.data.
        self.local_param: Tensor = self._source if not param.is_complex() else local_tensor(param)
        self.exp_avg: Tensor = local_tensor(state["exp_avg"])
        self.exp_avg_sq: Tensor = local_tensor(state["exp_avg_sq"])
        self.beta1_prod: Tensor | None = local_tensor(state["beta1_prod"]) if "beta1_prod" in state else None
        for name, tensor in zip(STATE_NAMES, self.states, strict=False):
            self.check_shape(name, tensor)
        self._exp_avg_sq_sum: tuple[Tensor, int, int] | None = None
        self.gradient_form: tuple[Any, ...] = ()
        """Dtype and strides of the gradient for which the backend was chosen."""
        self.backend: Backend | None = None

    @property
    def states(self) -> list[Tensor]:
        """The local states, in the order of ``STATE_NAMES``."""
        states = [self.exp_avg, self.exp_avg_sq]
        return states if self.beta1_prod is None else [*states, self.beta1_prod]

    def is_of(self, param: Tensor, state: dict[str, Any]) -> bool:
        """Whether parameter and state are the same objects still."""
        exp_avg, exp_avg_sq, beta1_prod = self._states
        return (
            self.param is param
            and self.state is state
            and state["exp_avg_sq"] is exp_avg_sq
            and state["exp_avg"] is exp_avg
            and state.get("beta1_prod") is beta1_prod
            and self._source is _source(param)
            and not param.is_complex()
        )

    def check_shape(self, name: str, tensor: Tensor) -> None:
        shape = self.local_param.shape
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have the local shape of its parameter, {tuple(shape)}, got {tuple(tensor.shape)}; a "
                "state_dict must be loaded into the layout that it was saved from (torch.distributed.checkpoint "
                "converts between layouts)"
            )

    def keep_sum(self, sums: Tensor, index: int) -> None:
        """Keep the sum of exp_avg_sq as it stands: entry ``index`` of ``sums``."""
        self._exp_avg_sq_sum = (sums, index, self.exp_avg_sq._version)

    def kept_sum(self) -> tuple[Tensor, int] | None:
        """What was kept, unless exp_avg_sq was written to since."""
        if self._exp_avg_sq_sum is None or self._exp_avg_sq_sum[2] != self.exp_avg_sq._version:
            return None
        return self._exp_avg_sq_sum[:2]


def _source(param: Tensor) -> Tensor:
    """The tensor whose memory a parameter shows: engines replace it within a DTensor."""
    return param._local_tensor if is_dtensor(param) else param


@dataclass(frozen=True)
class Layout:
    """Constants of a list of parameters, kept on their device between steps."""

    params: list[Tensor]
    """Parameters with a gradient; also those of which this rank holds no element."""
    local_sizes: list[int]
    retired: list[bool]
    """Whether the parameter's beta1_prod is retired."""
    weights: Tensor
    """float64, one per parameter: weight of its elements in the mean."""
    num_elements: Tensor
    """float64, 0-dim: weighted number of elements of all of them together."""
    exp_avg_sq_sums: Tensor
    """float64, one per parameter: written by every step for the next, in place, as a replayed CUDA graph needs it."""
    halves: tuple[Tensor, ...]
    """int64: where the retired parameters are, and where the others; empty unless there are both."""

    @classmethod
    def of(cls, holdings: list[Holding], param_weights: dict[Tensor, float]) -> Layout:
        params = [holding.param for holding in holdings]
        device = params[0].device
        weights = [param_weights[param] for param in params]
        local_sizes, retired = _forms(holdings)
        num_elements = sum(
            (size - num_padding(param)) * weight
            for param, size, weight in zip(params, local_sizes, weights, strict=True)
        )
        halves = [[i for i, is_retired in enumerate(retired) if is_retired is wanted] for wanted in (True, False)]
        return cls(
            params=params,
            local_sizes=local_sizes,
            retired=retired,
            weights=torch.tensor(weights, dtype=torch.float64, device=device),
            num_elements=torch.tensor(num_elements, dtype=torch.float64, device=device),
            exp_avg_sq_sums=torch.zeros(len(params), dtype=torch.float64, device=device),
            halves=tuple(torch.tensor(half, device=device) for half in halves) if all(halves) else (),
        )

    def fits(self, holdings: list[Holding]) -> bool:
        return _forms(holdings) == (self.local_sizes, self.retired) and all(
            holding.param is param for holding, param in zip(holdings, self.params, strict=True)
        )


def _forms(holdings: list[Holding]) -> tuple[list[int], list[bool]]:
    sizes = [holding.local_param.numel() for holding in holdings]
    return sizes, [holding.beta1_prod is None for holding in holdings]


@dataclass
class OwnedShards:
    """What this rank holds of one parameter group, on one device, in one dtype of parameters and one of gradients."""

    hyper: Hyper
    backend: Backend
    layout: Layout
    holdings: list[Holding]
    """One per parameter of the layout, and so in the following."""
    shards: Shards
    """Of beta1_prod, those that are not retired."""
    steps: list[Tensor]
    """``step``: 0-dim, float32."""
    correction: Tensor
    """``1 - beta2^t`` of this step, if it counts; float64."""

    def advance(self, scalars: StepScalars) -> Tensor:
        """One step, in place; returns the sums of the new exp_avg_sq, float64, one per parameter."""
        if not self.layout.halves:
            return self.backend.advance(self.shards, self.hyper, scalars)
        sums = torch.empty_like(self.correction)
        for half, is_retired in zip(self.layout.halves, (True, False), strict=True):
            shards = Shards(
                *(_where(self.layout.retired, is_retired, tensors) for tensors in self.shards[:-1]),
                beta1_prod=[] if is_retired else self.shards.beta1_prod,
            )
            of_half = scalars._replace(inverse_means=scalars.inverse_means[half])
            sums[half] = self.backend.advance(shards, self.hyper, of_half)
        return sums


def _where(retired: list[bool], wanted: bool, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor, is_retired in zip(tensors, retired, strict=True) if is_retired is wanted]
