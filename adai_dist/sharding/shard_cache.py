"""The owned shards of every step, and a cache of what stays the same between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adai_dist import equations
from adai_dist.eight_bits import SMALLEST_COMPLEMENT
from adai_dist.equations import LocalTensors
from adai_dist.hyper import Hyper
from adai_dist.kernels import Backends
from adai_dist.precision import Precision
from adai_dist.rounding import key_of
from adai_dist.sharding.global_index import origin_of
from adai_dist.sharding.local_tensor import aligned_gradient, is_dtensor, local_tensor
from adai_dist.sharding.missing_gradients import checksum_terms
from adai_dist.sharding.owned_shards import OwnedShards, ShardConstants, ShardRounding
from adai_dist.sharding.param_shard import ParamShard, check_state_is_complete
from adai_dist.sharding.plan import ShardingPlan, ShardingPlanner, plan_sharding

States = Mapping[Tensor, dict[str, Any]]


class ShardCache:
    """Lists the owned shards of every step.

    Every entry is derived from parameters and states, and is recomputed if it is missing or out of date: the sharding
    plan if parameters were replaced, a :class:`ParamShard` if its parameter or a state was replaced, the record of
    exp_avg_sq in it if the state was replaced or written to.
    """

    def __init__(self, backends: Backends, precision: Precision) -> None:
        self.backends = backends
        self.precision = precision
        self._plan: ShardingPlan | None = None
        self._planner: ShardingPlanner | None = None
        self._checksum_terms: dict[Tensor, int] = {}
        self._roundings: dict[Tensor, ShardRounding] = {}
        self._constants: dict[tuple[Any, ...], ShardConstants] = {}
        self._param_shards: dict[int, ParamShard] = {}  # by id: hashing a tensor is slow

    def plan(self, param_groups: list[dict[str, Any]], planner: ShardingPlanner | None) -> ShardingPlan:
        """Return the sharding plan of these parameters. Collective: none."""
        params = [param for param_group in param_groups for param in param_group["params"]]
        if self._plan is None or self._planner is not planner or not self._plan.fits(params):
            self._plan = plan_sharding(params, planner)
            self._planner = planner
            self._checksum_terms = checksum_terms(params, self._plan)
            ordinals = {param: ordinal for ordinal, param in enumerate(params)} | self._plan.ordinals
            self._roundings = {
                param: ShardRounding(key_of(self.precision.seed, ordinals[param]), origin_of(param, self._plan.starts))
                for param in params
                if self.precision.is_rounding(param)
            }
            self._constants.clear()
            self._param_shards.clear()
        return self._plan

    def owned_shards(
        self,
        param_groups: list[dict[str, Any]],
        states: States,
        planner: ShardingPlanner | None,
        fill_missing: bool = False,
    ) -> list[OwnedShards]:
        """Group the local tensors of all parameters with a gradient by parameter group, device, dtypes and backend.

        Args:
            fill_missing: take the gradient of a DTensor parameter as zeros if this rank lacks it.

        Collective: if a gradient's placements differ from its parameter's, all ranks of the parameter's mesh.
        """
        plan = self.plan(param_groups, planner)
        found: dict[tuple[Any, ...], list[tuple[ParamShard, Tensor]]] = {}
        for index, param_group in enumerate(param_groups):
            for param in param_group["params"]:
                grad = aligned_gradient(param)
                if grad is None and fill_missing and is_dtensor(param) and param.requires_grad:
                    grad = torch.zeros_like(param)
                if grad is not None:
                    grad = local_tensor(grad)
                    shard = self._param_shard(param, grad, states[param])
                    key = (index, param.device, param.dtype, grad.dtype, shard.exp_avg_sq.dtype, shard.backend)
                    found.setdefault(key, []).append((shard, grad))
        hypers = Hyper.from_param_groups(param_groups)
        return [self._owned(key, pairs, hypers[key[0]], plan) for key, pairs in found.items()]

    def _param_shard(self, param: Tensor, grad: Tensor, state: dict[str, Any]) -> ParamShard:
        shard = self._param_shards.get(id(param))
        if shard is None or not shard.is_of(param, state):
            shard = self._param_shards[id(param)] = ParamShard(param, state, self.precision)
        gradient_form = (grad.dtype, grad.shape, grad.stride())
        if gradient_form != shard.gradient_form:
            shard.check_shape("grad", grad)
            shard.backend = self.backends.of((shard.local_param, *shard.states, grad))
            shard.gradient_form = gradient_form
        return shard

    def _owned(
        self,
        key: tuple[Any, ...],
        pairs: list[tuple[ParamShard, Tensor]],
        hyper: Hyper,
        plan: ShardingPlan,
    ) -> OwnedShards:
        param_shards = [shard for shard, _ in pairs]
        if param_shards[0].exp_avg_sq.dtype == torch.uint8:
            _check_eps(hyper)
        constants = self._constants.get(key)
        if constants is None or not constants.fits(param_shards):
            constants = self._constants[key] = ShardConstants.of(
                param_shards, plan.weights, self._checksum_terms, self._roundings
            )
        try:
            steps = [shard.state["step"] for shard in param_shards]
            next_steps = torch.stack(steps).double() + 1.0
        except (KeyError, TypeError):
            for shard in param_shards:
                check_state_is_complete(shard.state)
            raise
        return OwnedShards(
            hyper=hyper,
            backend=key[-1],
            constants=constants,
            param_shards=param_shards,
            tensors=LocalTensors(
                param=[shard.local_param for shard in param_shards],
                grad=[grad for _, grad in pairs],
                exp_avg=[shard.exp_avg for shard in param_shards],
                exp_avg_sq=[shard.exp_avg_sq for shard in param_shards],
                beta1_prod=[shard.beta1_prod for shard in param_shards if shard.beta1_prod is not None],
                remainder=[shard.remainder for shard in param_shards if shard.remainder is not None],
            ),
            steps=steps,
            correction=equations.bias_correction(hyper.beta2, next_steps),
        )


def _check_eps(hyper: Hyper) -> None:
    if hyper.eps < SMALLEST_COMPLEMENT:
        raise ValueError(
            f"eps must be at least {SMALLEST_COMPLEMENT:.2g} for state_dtype='mixed8', the smallest difference from 1 "
            f"of its products of inertias, got {hyper.eps!r}; use state_dtype='bfloat16'"
        )
