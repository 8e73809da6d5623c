"""What a rank holds of a model, and what is worth keeping of it between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import Shards
from adai_dist.hyper import Hyper
from adai_dist.sharding.ownership import ModelSharding, ShardingPlan, aligned_gradient, local_tensor, plan_sharding
from adai_dist.sharding.shards import Layout, OwnedShards, split

States = Mapping[Tensor, dict[str, Any]]


class StoredSums(NamedTuple):
    """Sums of a parameter's exp_avg_sq, one per piece, and what they were taken from."""

    exp_avg_sq: Tensor
    version: int
    sums: Tensor


class Holdings:
    """Lists the owned shards of every step.

    Everything kept here follows from parameters and states, and is found again where it is missing or out of date: the
    sharding plan when parameters were replaced, the sums of exp_avg_sq when the state was replaced or written to.
    """

    def __init__(self, sharding: ModelSharding | None = None) -> None:
        self.sharding = sharding
        self._plan: ShardingPlan | None = None
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._stored_sums: dict[Tensor, StoredSums] = {}

    def plan(self, param_groups: list[dict[str, Any]]) -> ShardingPlan:
        """The sharding of these parameters. Collective: none."""
        params = [param for param_group in param_groups for param in param_group["params"]]
        if self._plan is None or not self._plan.fits(params):
            self._plan = plan_sharding(params, self.sharding)
            self._layouts.clear()
        return self._plan

    def owned_shards(self, param_groups: list[dict[str, Any]], states: States) -> list[OwnedShards]:
        """Local tensors of all parameters that have a gradient, by parameter group, device and dtypes.

        Collective: where a gradient is placed unlike its parameter, all ranks of the parameter's mesh.
        """
        found: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
        for index, param_group in enumerate(param_groups):
            for param in param_group["params"]:
                grad = aligned_gradient(param)
                if grad is not None:
                    found.setdefault((index, param.device, param.dtype, grad.dtype), []).append((param, grad))
        plan = self.plan(param_groups)
        hypers = [Hyper.from_param_group(param_group) for param_group in param_groups]
        return [self._shards_of(key, pairs, hypers[key[0]], states, plan) for key, pairs in found.items()]

    def exp_avg_sq_sums(self, owned: OwnedShards, states: States) -> Tensor:
        """Sums of exp_avg_sq as it stands, float64, one per piece: the stored ones, or one more read."""
        pieces = owned.by_param(owned.pieces.exp_avg_sq)
        return torch.cat(
            [
                self._sums(states[param]["exp_avg_sq"], param, of_param)
                for param, of_param in zip(owned.layout.params, pieces, strict=True)
            ]
        )

    def store_sums(self, owned: OwnedShards, states: States, sums: Tensor) -> None:
        """Keep the sums of exp_avg_sq, float64, one per piece, for the next step."""
        for param, param_sums in zip(owned.layout.params, torch.split(sums, owned.layout.num_pieces), strict=True):
            exp_avg_sq = states[param]["exp_avg_sq"]
            self._stored_sums[param] = StoredSums(exp_avg_sq, local_tensor(exp_avg_sq)._version, param_sums)

    def _shards_of(
        self,
        key: tuple[Any, ...],
        pairs: list[tuple[Tensor, Tensor]],
        hyper: Hyper,
        states: States,
        plan: ShardingPlan,
    ) -> OwnedShards:
        params = [param for param, _ in pairs]
        split_params = [split(param, grad, states[param]) for param, grad in pairs]
        num_pieces = [len(pieces) for pieces in split_params]
        listed = [piece for pieces in split_params for piece in pieces]
        pieces = Shards(*([piece[column] for piece in listed] for column in range(len(Shards._fields))))
        layout = self._layouts.get(key)
        if layout is None or not layout.fits(params, num_pieces):
            layout = Layout.of(params, num_pieces, pieces.param, plan.weights)
            self._layouts[key] = layout
        steps = [states[param]["step"] for param in params]
        correction = equations.bias_correction(hyper.beta2, torch.stack(steps).double()[layout.owners] + 1.0)
        return OwnedShards(hyper, layout, pieces, steps, correction)

    def _sums(self, exp_avg_sq: Tensor, param: Tensor, pieces: list[Tensor]) -> Tensor:
        stored = self._stored_sums.get(param)
        if stored and stored.exp_avg_sq is exp_avg_sq and stored.version == local_tensor(exp_avg_sq)._version:
            return stored.sums
        return equations.sums(pieces) if pieces else torch.zeros(0, dtype=torch.float64, device=param.device)
