"""The local tensors of one step, listed the way the equations and the kernels take them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import LocalTensors, StepScalars, compute_dtype
from adai_dist.hyper import Hyper
from adai_dist.kernels import Backend
from adai_dist.sharding.mean import GlobalMean
from adai_dist.sharding.ownership import PLAIN_TYPES, is_dtensor, local_tensor, num_padding

STATE_NAMES = ("exp_avg", "exp_avg_sq", "beta1_prod")
"""beta1_prod is not there once it is retired (:mod:`adai_dist.optimizer.retirement`)."""


class Holding:
    """The elements of one parameter that this rank holds, maybe none, and those of its states.

    Finding them takes many small calls; a holding serves for as long as parameter and states stay the same objects.

    Raises:
        ValueError: a state is incomplete, or differs from the parameter in its local shape.
        TypeError: a state has another dtype than the parameter asks for.
        RuntimeError: parameter or state were made in inference mode.
    """

    __slots__ = (
        *("_is_complex", "_source", "_states", "num_writes", "row", "whole_exp_avg"),
        *("backend", "beta1_prod", "exp_avg", "exp_avg_sq", "gradient_form", "local_param", "param", "state"),
    )

    def __init__(self, param: Tensor, state: dict[str, Any]) -> None:
        self.param = param
        self.state = state
        self._source = _source(param)
        self._is_complex = param.is_complex()
        check_is_complete(state)
        check_not_of_inference(param, state)
        self._states = tuple(state.get(name) for name in STATE_NAMES)
        # The parameter itself where possible: it follows when a user sets param.data.
        self.local_param: Tensor = local_tensor(param) if self._is_complex else self._source
        self.exp_avg: Tensor = local_tensor(state["exp_avg"])
        self.exp_avg_sq: Tensor = local_tensor(state["exp_avg_sq"])
        self.beta1_prod: Tensor | None = local_tensor(state["beta1_prod"]) if "beta1_prod" in state else None
        for name, tensor in zip(STATE_NAMES, self.states, strict=False):
            self.check_shape(name, tensor)
            if tensor.dtype != compute_dtype(param.dtype):
                raise TypeError(
                    f"{name} must be {compute_dtype(param.dtype)}, as its parameter is {param.dtype}, got "
                    f"{tensor.dtype}; convert it"
                )
        self.whole_exp_avg: Tensor | None = state["exp_avg"] if is_dtensor(state["exp_avg"]) else None
        """If it is a DTensor."""
        self.row: tuple[Tensor, int] | None = None
        """Where the last step has kept what it left of exp_avg_sq: a tensor, and the index of the row."""
        self.num_writes: int = 0
        """:func:`num_writes` after the last step."""
        self.gradient_form: tuple[Any, ...] = ()
        """Dtype, shape and strides of the gradient for which the backend was chosen."""
        self.backend: Backend | None = None

    @property
    def states(self) -> list[Tensor]:
        """The local states, in the order of ``STATE_NAMES``."""
        states = [self.exp_avg, self.exp_avg_sq]
        return states if self.beta1_prod is None else [*states, self.beta1_prod]

    def is_of(self, param: Tensor, state: dict[str, Any]) -> bool:
        """Whether parameter and state are the same objects still."""
        exp_avg, exp_avg_sq, beta1_prod = self._states
        try:
            return (
                self.param is param
                and self.state is state
                and state["exp_avg_sq"] is exp_avg_sq
                and state["exp_avg"] is exp_avg
                and state.get("beta1_prod") is beta1_prod
                and self._source is (param if type(param) in PLAIN_TYPES else _source(param))
                and not self._is_complex
            )
        except KeyError:
            return False

    def check_shape(self, name: str, tensor: Tensor) -> None:
        shape = self.local_param.shape
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have the local shape of its parameter, {tuple(shape)}, got {tuple(tensor.shape)}; a "
                "state_dict must be loaded into the layout that it was saved from (torch.distributed.checkpoint "
                "converts between layouts)"
            )

    def kept_row(self) -> tuple[Tensor, int] | None:
        """Where it is kept what exp_avg_sq is, unless torch knows that a moment was written to since; the kernels see
        other writes."""
        return self.row if self.num_writes == num_writes([self])[0] else None


def num_writes(holdings: list[Holding]) -> list[int]:
    """How many writes to the moments torch has recorded; it counts those to a DTensor and to its local tensor apart."""
    return [
        h.exp_avg_sq._version + h.exp_avg._version + (0 if h.whole_exp_avg is None else h.whole_exp_avg._version)
        for h in holdings
    ]


def check_is_complete(state: dict[str, Any]) -> None:
    """Raises: ValueError: a state lacks what every state has."""
    names = ("step", *STATE_NAMES[:2])
    missing = [name for name in names if not isinstance(state.get(name), Tensor)]
    if missing:
        raise ValueError(
            f"a state must have tensors {', '.join(names)}, got one without {', '.join(missing)}; to start a parameter "
            "anew, delete all of its state"
        )


def check_not_of_inference(param: Tensor, state: dict[str, Any]) -> None:
    """Raises: RuntimeError: a tensor may not be written to outside of inference mode, as it was made there."""
    tensors = {"parameter": param, **state}
    made_there = [name for name, value in tensors.items() if isinstance(value, Tensor) and value.is_inference()]
    if made_there:
        raise RuntimeError(
            "parameters and states must be made outside of torch.inference_mode(), got one from within it "
            f"({', '.join(made_there)}, of shape {tuple(param.shape)}); make or load the model outside, or train a "
            "copy.deepcopy() of it, made outside"
        )


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
    share: int
    """Of the gradients of all of them together, see :mod:`adai_dist.sharding.presence`."""
    kept: Tensor
    """float64, two per parameter: what every step keeps of exp_avg_sq for the next (see :class:`Backend`)."""
    rows: list[tuple[Tensor, int]]
    """``kept``, with the index of each parameter."""
    halves: tuple[Tensor, ...]
    """int64: where the retired parameters are, and where the others; empty unless there are both."""

    @classmethod
    def of(cls, holdings: list[Holding], param_weights: dict[Tensor, float], shares: dict[Tensor, int]) -> Layout:
        params = [holding.param for holding in holdings]
        device = params[0].device
        weights = [param_weights[param] for param in params]
        local_sizes, retired = _forms(holdings)
        num_elements = sum(
            (size - num_padding(param)) * weight
            for param, size, weight in zip(params, local_sizes, weights, strict=True)
        )
        halves = [[i for i, is_retired in enumerate(retired) if is_retired is wanted] for wanted in (True, False)]
        kept = torch.full((len(params), 2), torch.nan, dtype=torch.float64, device=device)
        return cls(
            params=params,
            local_sizes=local_sizes,
            retired=retired,
            weights=torch.tensor(weights, dtype=torch.float64, device=device),
            num_elements=torch.tensor(num_elements, dtype=torch.float64, device=device),
            share=sum(shares.get(param, 0) for param in params),
            kept=kept,
            rows=[(kept, index) for index in range(len(params))],
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
    shards: LocalTensors
    """Of beta1_prod, those that are not retired."""
    steps: list[Tensor]
    """``step``: 0-dim, float32."""
    correction: Tensor
    """``1 - beta2^t`` of this step, if it counts; float64."""
    written: list[Holding] = field(default_factory=list)
    """Those to whose moments others have written, or which have not been stepped yet, as :meth:`observe` has found."""

    def observe(self, expected: Tensor, moving: float) -> Tensor:
        """The sums of :class:`adai_dist.sharding.mean.Sums` over these shards, in one tensor, weighted.

        Args:
            expected: the coefficient of the gradients that is expected; 0-dim, float64.
            moving: added to the signals unless the learning rate is 0.

        Collective: none.
        """
        dtype = self.shards.exp_avg_sq[0].dtype
        c = (self.hyper.sign * expected).to(dtype)
        norms, v_sums = self.backend.observe(self.shards, self.hyper, c, self._kept_rows())
        terms = equations.mean_terms(norms, v_sums, self.correction, self.hyper, expected, dtype)
        of_shards = (torch.stack([norms.grad_grad, *terms]) * self.layout.weights).sum(1)
        signal = equations.scalar_tensor((self.hyper.lr != 0) * moving, expected)
        return torch.cat([of_shards, torch.stack([self.layout.num_elements, signal])])

    def advance(self, mean: GlobalMean) -> None:
        """One step, in place. Collective: none."""
        scalars = mean.step_scalars(self.hyper, self.correction, self.shards.exp_avg[0].dtype)
        rows = self._advance_halves(scalars) if self.layout.halves else self._advance(self.shards, scalars)
        if rows is not None:
            self.layout.kept.copy_(rows)  # in place, as a replayed CUDA graph needs it
        for holding, row, count in zip(self.holdings, self.layout.rows, num_writes(self.holdings), strict=True):
            holding.row, holding.num_writes = row, count
        # With alpha torch takes the tensor as a tensor; without, it reads it on the host as a number.
        torch._foreach_add_(self.steps, mean.is_live.to(self.steps[0].dtype), alpha=1.0)

    def _advance(self, shards: LocalTensors, scalars: StepScalars) -> Tensor | None:
        return self.backend.advance(shards, self.hyper, scalars)

    def _advance_halves(self, scalars: StepScalars) -> Tensor | None:
        rows: Tensor | None = None
        for half, is_retired in zip(self.layout.halves, (True, False), strict=True):
            shards = LocalTensors(
                *(_where(self.layout.retired, is_retired, tensors) for tensors in self.shards[:-1]),
                beta1_prod=[] if is_retired else self.shards.beta1_prod,
            )
            of_half = self._advance(shards, scalars._replace(inverse_means=scalars.inverse_means[half]))
            if of_half is not None:
                rows = torch.empty_like(self.layout.kept) if rows is None else rows
                rows[half] = of_half
        return rows

    def _kept_rows(self) -> Tensor:
        """What the last step of each parameter has kept of exp_avg_sq; NaN where there was none, or others wrote."""
        counts = num_writes(self.holdings)
        rows = [h.row if h.num_writes == count else None for h, count in zip(self.holdings, counts, strict=True)]
        if all(map(operator.is_, rows, self.layout.rows)):
            return self.layout.kept
        self.written = [holding for holding, row in zip(self.holdings, rows, strict=True) if row is None]
        nothing = torch.full_like(self.layout.kept[0], torch.nan)
        return torch.stack([nothing if row is None else row[0][row[1]] for row in rows])


def _where(retired: list[bool], wanted: bool, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor, is_retired in zip(tensors, retired, strict=True) if is_retired is wanted]
