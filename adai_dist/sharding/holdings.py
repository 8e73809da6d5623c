"""What a rank holds of a model, and what is worth keeping of it between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import LocalTensors
from adai_dist.hyper import Hyper
from adai_dist.kernels import Backends
from adai_dist.sharding import presence
from adai_dist.sharding.ownership import aligned_gradient, is_dtensor, local_tensor
from adai_dist.sharding.plan import ModelSharding, ShardingPlan, plan_sharding
from adai_dist.sharding.shards import Holding, Layout, OwnedShards, check_is_complete

States = Mapping[Tensor, dict[str, Any]]


class Holdings:
    """Lists the owned shards of every step.

    Everything kept here follows from parameters and states, and is found again where it is missing or out of date: the
    sharding plan when parameters were replaced, local tensors when parameter or state were, what was kept of exp_avg_sq
    when the state was replaced or written to.
    """

    def __init__(self, backends: Backends) -> None:
        self.backends = backends
        self._plan: ShardingPlan | None = None
        self._sharding: ModelSharding | None = None
        self._shares: dict[Tensor, int] = {}
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._holdings: dict[int, Holding] = {}  # by id: hashing a tensor is slow

    def plan(self, param_groups: list[dict[str, Any]], sharding: ModelSharding | None) -> ShardingPlan:
        """The sharding of these parameters. Collective: none."""
        params = [param for param_group in param_groups for param in param_group["params"]]
        if self._plan is None or self._sharding is not sharding or not self._plan.fits(params):
            self._plan = plan_sharding(params, sharding)
            self._sharding = sharding
            self._shares = presence.shares(params, self._plan)
            self._layouts.clear()
            self._holdings.clear()
        return self._plan

    def owned_shards(
        self,
        param_groups: list[dict[str, Any]],
        states: States,
        sharding: ModelSharding | None,
        fill_missing: bool = False,
    ) -> list[OwnedShards]:
        """Local tensors of all parameters that have a gradient, by parameter group, device, dtypes and backend.

        Args:
            fill_missing: take the gradient of a DTensor parameter as zeros where this rank lacks it.

        Collective: where a gradient is placed unlike its parameter, all ranks of the parameter's mesh.
        """
        plan = self.plan(param_groups, sharding)
        found: dict[tuple[Any, ...], list[tuple[Holding, Tensor]]] = {}
        for index, param_group in enumerate(param_groups):
            for param in param_group["params"]:
                grad = aligned_gradient(param)
                if grad is None and fill_missing and is_dtensor(param) and param.requires_grad:
                    grad = torch.zeros_like(param)
                if grad is not None:
                    grad = local_tensor(grad)
                    holding = self._holding(param, grad, states[param])
                    key = (index, param.device, param.dtype, grad.dtype, holding.backend)
                    found.setdefault(key, []).append((holding, grad))
        hypers = Hyper.from_param_groups(param_groups)
        return [self._owned(key, pairs, hypers[key[0]], plan) for key, pairs in found.items()]

    def _holding(self, param: Tensor, grad: Tensor, state: dict[str, Any]) -> Holding:
        holding = self._holdings.get(id(param))
        if holding is None or not holding.is_of(param, state):
            holding = self._holdings[id(param)] = Holding(param, state)
        gradient_form = (grad.dtype, grad.shape, grad.stride())
        if gradient_form != holding.gradient_form:
            holding.check_shape("grad", grad)
            holding.backend = self.backends.of((holding.local_param, *holding.states, grad))
            holding.gradient_form = gradient_form
        return holding

    def _owned(
        self,
        key: tuple[Any, ...],
        pairs: list[tuple[Holding, Tensor]],
        hyper: Hyper,
        plan: ShardingPlan,
    ) -> OwnedShards:
        holdings = [holding for holding, _ in pairs]
        layout = self._layouts.get(key)
        if layout is None or not layout.fits(holdings):
            layout = self._layouts[key] = Layout.of(holdings, plan.weights, self._shares)
        try:
            steps = [holding.state["step"] for holding in holdings]
            next_steps = torch.stack(steps).double() + 1.0
        except (KeyError, TypeError):
            for holding in holdings:
                check_is_complete(holding.state)
            raise
        return OwnedShards(
            hyper=hyper,
            backend=key[-1],
            layout=layout,
            holdings=holdings,
            shards=LocalTensors(
                param=[holding.local_param for holding in holdings],
                grad=[grad for _, grad in pairs],
                exp_avg=[holding.exp_avg for holding in holdings],
                exp_avg_sq=[holding.exp_avg_sq for holding in holdings],
                beta1_prod=[holding.beta1_prod for holding in holdings if holding.beta1_prod is not None],
            ),
            steps=steps,
            correction=equations.bias_correction(hyper.beta2, next_steps),
        )
