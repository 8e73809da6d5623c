"""The local tensors of one step, listed the way the equations and the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adai_dist.equations import Shards
from adai_dist.hyper import Hyper
from adai_dist.kernels import Backend
from adai_dist.sharding.ownership import is_dtensor, local_tensor

STATE_NAMES = ("exp_avg", "exp_avg_sq", "beta1_prod")


class Holding:
    """The elements of one parameter that this rank holds, maybe none, and those of its states.

    Finding them takes many small calls; a holding serves for as long as parameter and states stay the same objects.

    Raises:
        ValueError: a state differs from the parameter in its local shape.
    """

    __slots__ = (
        *("_exp_avg_sq_sum", "_source", "_states"),
        *("backend", "exp_avg_sq", "gradient_form", "param", "state", "tensors"),
    )

    def __init__(self, param: Tensor, state: dict[str, Any]) -> None:
        self.param = param
        self.state = state
        self._source = _source(param)
        self._states = tuple(state[name] for name in STATE_NAMES)
        # The parameter itself where possible: it follows when a user sets param.data.
        local_param = self._source if not param.is_complex() else local_tensor(param)
        self.tensors = (local_param, *(local_tensor(x) for x in self._states))
        for name, tensor in zip(STATE_NAMES, self.tensors[1:], strict=True):
            self.check_shape(name, tensor)
        self.exp_avg_sq = self.tensors[2]
        self._exp_avg_sq_sum: tuple[Tensor, int, int] | None = None
        self.gradient_form: tuple[Any, ...] = ()
        """Dtype and strides of the gradient for which the backend was chosen."""
        self.backend: Backend | None = None

    def is_of(self, param: Tensor, state: dict[str, Any]) -> bool:
        """Whether parameter and state are the same objects still."""
        exp_avg, exp_avg_sq, beta1_prod = self._states
        return (
            self.param is param
            and self.state is state
            and state["exp_avg_sq"] is exp_avg_sq
            and state["exp_avg"] is exp_avg
            and state["beta1_prod"] is beta1_prod
            and self._source is _source(param)
            and not param.is_complex()
        )

    def check_shape(self, name: str, tensor: Tensor) -> None:
        shape = self.tensors[0].shape
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
    weights: Tensor
    """float64, one per parameter: weight of its elements in the mean."""
    num_elements: Tensor
    """float64, 0-dim: weighted number of elements of all of them together."""
    exp_avg_sq_sums: Tensor
    """float64, one per parameter: written by every step for the next, in place, as a replayed CUDA graph needs it."""

    @classmethod
    def of(cls, params: list[Tensor], local_sizes: list[int], param_weights: dict[Tensor, float]) -> Layout:
        device = params[0].device
        weights = [param_weights[param] for param in params]
        num_elements = sum(size * weight for size, weight in zip(local_sizes, weights, strict=True))
        return cls(
            params=params,
            local_sizes=local_sizes,
            weights=torch.tensor(weights, dtype=torch.float64, device=device),
            num_elements=torch.tensor(num_elements, dtype=torch.float64, device=device),
            exp_avg_sq_sums=torch.zeros(len(params), dtype=torch.float64, device=device),
        )

    def fits(self, params: list[Tensor], local_sizes: list[int]) -> bool:
        return local_sizes == self.local_sizes and all(a is b for a, b in zip(params, self.params, strict=True))


@dataclass
class OwnedShards:
    """What this rank holds of one parameter group, on one device, in one dtype of parameters and one of gradients."""

    hyper: Hyper
    backend: Backend
    layout: Layout
    holdings: list[Holding]
    """One per parameter of the layout, and so in the following."""
    shards: Shards
    steps: list[Tensor]
    """``step``: 0-dim, float32."""
    correction: Tensor
    """``1 - beta2^t`` of this step, if it counts; float64."""
