"""The shards that one call of ``observe`` or ``advance`` takes together, and what stays constant for them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import LocalTensors, StepScalars
from adai_dist.hyper import Hyper
from adai_dist.kernels import Backend
from adai_dist.rounding import Origin, Rounding, settled_below, streams
from adai_dist.sharding.local_tensor import num_padding
from adai_dist.sharding.mean import GlobalMean
from adai_dist.sharding.param_shard import ParamShard, count_writes


class ShardRounding(NamedTuple):
    """What stays constant in the rounding of one shard."""

    key: tuple[int, int]
    """See :func:`adai_dist.rounding.key_of`."""
    origin: Origin


@dataclass(frozen=True)
class ShardConstants:
    """Constants of a list of parameter shards, kept on their device between steps."""

    params: list[Tensor]
    """Parameters with a gradient, including those of which this rank holds no element."""
    local_sizes: list[int]
    retired: list[bool]
    """Whether beta1_prod is retired, per parameter."""
    weights: Tensor
    """Weight of each parameter's elements in the mean; float64, shape (number of parameters,)."""
    num_elements: Tensor
    """Weighted number of elements of all parameters; float64, 0-dim."""
    checksum: int
    """Sum of the parameters' terms, see :mod:`adai_dist.sharding.missing_gradients`."""
    kept: Tensor
    """Record of each exp_avg_sq from one step to the next (see :class:`Backend`); float64, shape (number of
    parameters, 2)."""
    rows: list[tuple[Tensor, int]]
    """``kept``, with the index of each parameter."""
    halves: tuple[Tensor, ...]
    """Indices of the retired parameters and of the others, int64; empty unless there are both."""
    keys: Tensor | None = None
    """Keys of the random bits, int32, shape (number of parameters, 2); None if nothing is rounded stochastically."""
    origins: Tensor | None = None
    """Global indices of the elements, int64, shape (number of parameters, 3)."""

    @classmethod
    def of(
        cls,
        param_shards: list[ParamShard],
        param_weights: dict[Tensor, float],
        checksum_terms: dict[Tensor, int],
        roundings: dict[Tensor, ShardRounding],
    ) -> ShardConstants:
        """Compute the constants of these shards."""
        params = [shard.param for shard in param_shards]
        device = params[0].device
        weights = [param_weights[param] for param in params]
        local_sizes, retired = _sizes_and_retired(param_shards)
        num_elements = sum(
            (size - num_padding(param)) * weight
            for param, size, weight in zip(params, local_sizes, weights, strict=True)
        )
        halves = [[i for i, is_retired in enumerate(retired) if is_retired is wanted] for wanted in (True, False)]
        is_rounding = params[0] in roundings
        keys, origins = zip(*(roundings[param] for param in params), strict=True) if is_rounding else ((), ())
        kept = torch.full((len(params), 2), torch.nan, dtype=torch.float64, device=device)
        return cls(
            params=params,
            local_sizes=local_sizes,
            retired=retired,
            weights=torch.tensor(weights, dtype=torch.float64, device=device),
            num_elements=torch.tensor(num_elements, dtype=torch.float64, device=device),
            checksum=sum(checksum_terms.get(param, 0) for param in params),
            kept=kept,
            rows=[(kept, index) for index in range(len(params))],
            halves=tuple(torch.tensor(half, device=device) for half in halves) if all(halves) else (),
            keys=torch.tensor(keys, dtype=torch.int32, device=device) if is_rounding else None,
            origins=torch.tensor(origins, dtype=torch.int64, device=device) if is_rounding else None,
        )

    def fits(self, param_shards: list[ParamShard]) -> bool:
        """Return whether the constants are those of these shards."""
        return _sizes_and_retired(param_shards) == (self.local_sizes, self.retired) and all(
            shard.param is param for shard, param in zip(param_shards, self.params, strict=True)
        )


def _sizes_and_retired(param_shards: list[ParamShard]) -> tuple[list[int], list[bool]]:
    sizes = [shard.local_param.numel() for shard in param_shards]
    return sizes, [shard.beta1_prod is None for shard in param_shards]


@dataclass
class OwnedShards:
    """The parameter shards of this rank that share a parameter group, device, dtypes and backend, in one step.

    Created in every step by :class:`adai_dist.sharding.shard_cache.ShardCache`, with the gradients of that step.
    """

    hyper: Hyper
    backend: Backend
    constants: ShardConstants
    param_shards: list[ParamShard]
    """One per parameter of the constants, as in all lists below."""
    tensors: LocalTensors
    """``beta1_prod`` has only the products that are not retired."""
    steps: list[Tensor]
    """``step``: 0-dim, float32."""
    correction: Tensor
    """``1 - beta2^t`` of this step, if it counts; float64."""
    written: list[ParamShard] = field(default_factory=list)
    """Shards that are new, or whose moments have been written to outside of steps; filled by :meth:`observe`."""

    def observe(self, expected: Tensor, lr_signal: float) -> Tensor:
        """Return the weighted :class:`adai_dist.sharding.mean.Sums` of these shards, stacked.

        Args:
            expected: the coefficient of the gradients that is expected; 0-dim, float64.
            lr_signal: added to the signals unless the learning rate is 0.

        Collective: none.
        """
        dtype = equations.compute_dtype(self.tensors.param[0].dtype)
        c = (self.hyper.sign * expected).to(dtype)
        norms, v_sums = self.backend.observe(self.tensors, self.hyper, c, self._kept_rows())
        terms = equations.mean_terms(norms, v_sums, self.correction, self.hyper, expected, dtype)
        weighted = (torch.stack([norms.grad_grad, *terms]) * self.constants.weights).sum(1)
        signal = equations.scalar_tensor((self.hyper.lr != 0) * lr_signal, expected)
        return torch.cat([weighted, torch.stack([self.constants.num_elements, signal])])

    def advance(self, mean: GlobalMean) -> None:
        """Take one step, in place. Collective: none."""
        scalars = mean.step_scalars(self.hyper, self.correction, equations.compute_dtype(self.tensors.param[0].dtype))
        scalars = scalars._replace(rounding=self._rounding())
        if self.constants.halves:
            rows = self._advance_halves(scalars)
        else:
            rows = self.backend.advance(self.tensors, self.hyper, scalars)
        if rows is not None:
            self.constants.kept.copy_(rows)  # in place, as a replayed CUDA graph needs it
        counts = count_writes(self.param_shards)
        for shard, row, count in zip(self.param_shards, self.constants.rows, counts, strict=True):
            shard.row, shard.num_writes = row, count
        # With alpha torch takes the tensor as a tensor; without, it reads it on the host as a number.
        torch._foreach_add_(self.steps, mean.is_live.to(self.steps[0].dtype), alpha=1.0)

    def _rounding(self) -> Rounding | None:
        """Return the inputs of the stochastic rounding in this step, None if nothing is rounded."""
        if self.constants.keys is None or self.constants.origins is None:
            return None
        next_steps = torch.stack(self.steps) + 1.0
        settled = settled_below(self.hyper.eps, next_steps, self.tensors.exp_avg_sq[0].dtype)
        return Rounding(streams(self.constants.keys, next_steps), self.constants.origins, settled)

    def _advance_halves(self, scalars: StepScalars) -> Tensor | None:
        """Step the retired parameters and the others in one call each."""
        rows: Tensor | None = None
        for half, is_retired in zip(self.constants.halves, (True, False), strict=True):
            tensors = LocalTensors(
                *(_where(self.constants.retired, is_retired, each) for each in self.tensors[:4]),
                beta1_prod=[] if is_retired else self.tensors.beta1_prod,
                remainder=_where(self.constants.retired, is_retired, self.tensors.remainder),
            )
            rounding = None if scalars.rounding is None else Rounding(*(each[half] for each in scalars.rounding))
            half_scalars = scalars._replace(inverse_means=scalars.inverse_means[half], rounding=rounding)
            rows_of_half = self.backend.advance(tensors, self.hyper, half_scalars)
            if rows_of_half is not None:
                rows = torch.empty_like(self.constants.kept) if rows is None else rows
                rows[half] = rows_of_half
        return rows

    def _kept_rows(self) -> Tensor:
        """Return the record of each exp_avg_sq from its last step; NaN if there is none or a moment was written to."""
        counts = count_writes(self.param_shards)
        pairs = zip(self.param_shards, counts, strict=True)
        rows = [shard.row if shard.num_writes == count else None for shard, count in pairs]
        if all(map(operator.is_, rows, self.constants.rows)):
            return self.constants.kept
        self.written = [shard for shard, row in zip(self.param_shards, rows, strict=True) if row is None]
        nothing = torch.full_like(self.constants.kept[0], torch.nan)
        return torch.stack([nothing if row is None else row[0][row[1]] for row in rows])


def _where(retired: list[bool], wanted: bool, tensors: list[Tensor]) -> list[Tensor]:
    """Select the tensors of retired parameters, or of the others; none of an empty list."""
    if not tensors:
        return []
    return [tensor for tensor, is_retired in zip(tensors, retired, strict=True) if is_retired is wanted]
