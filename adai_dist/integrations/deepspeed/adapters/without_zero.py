"""DeepSpeed without ZeRO, where every data-parallel rank steps whole parameters in a single call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from adai_dist.integrations.deepspeed.adapters.bf16 import tensor_parallel_rank
from adai_dist.integrations.deepspeed.adapters.engine import model_parallel_group
from adai_dist.integrations.deepspeed.adapters.names import check_names
from adai_dist.integrations.deepspeed.adapters.releases import installed_release
from adai_dist.integrations.deepspeed.model_snapshot import ModelSnapshot
from adai_dist.integrations.deepspeed.zero_mean_source import mean_of_skipped_step
from adai_dist.sharding.plan import ShardingPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ModelParallel:
    """Sharding over model- and expert-parallel ranks, with whole parameters on every data-parallel rank."""

    process_groups: tuple[ProcessGroup, ...]
    weights: dict[Tensor, float]
    starts: dict[Tensor, int]
    """Global indices of the first elements of experts, see :attr:`ShardingPlan.starts`."""

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        weights = {param: self.weights[param] for param in params}
        return ShardingPlan(params, self.process_groups, weights, starts=self.starts)


class Replicated:
    """Sharding in which every rank holds all parameters, so that nothing is communicated."""

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        return ShardingPlan(params, (), dict.fromkeys(params, 1.0))


def sharding_without_zero(engine: Any) -> ModelParallel | Replicated:
    """Return which rank holds which parameters. Collective: none."""
    has_experts = engine.has_moe_layers
    process_group = model_parallel_group(engine)
    if process_group is None and not has_experts:
        return Replicated()
    check_names(engine, installed_release(), "DeepSpeedEngine with model parallelism")
    data_parallel_group: ProcessGroup = engine.seq_data_parallel_group
    weights: dict[Tensor, float] = {}
    starts: dict[Tensor, int] = {}
    for master, param in _masters_and_params(engine):
        is_expert = is_moe_param(param)
        weight = float(not getattr(param, "ds_pipe_replicated", False))  # tied layers count on their first stage
        if process_group is not None and not is_expert and not is_model_parallel_parameter(param):
            weight *= tensor_parallel_rank(engine.mpu) == 0
        if has_experts:
            expert: Any = param
            replicas = engine.expert_data_parallel_group[expert.group_name] if is_expert else data_parallel_group
            weight /= dist.get_world_size(replicas)
            if is_expert:  # other ranks hold other experts
                starts[master] = master.numel() * min(dist.get_process_group_ranks(replicas))
        weights[master] = weight
    process_groups = [data_parallel_group] if has_experts else []
    process_groups += [process_group] if process_group is not None else []
    return ModelParallel(tuple(process_groups), weights, starts)


def places_without_zero(engine: Any) -> dict[Tensor, tuple[int, int]]:
    """Return the ordinal of each parameter of the model in the optimizer, and the index 0 of its first element."""
    ordinals = {id(master): ordinal for ordinal, master in enumerate(engine.basic_optimizer.params())}
    return {param: (ordinals[id(master)], 0) for master, param in _masters_and_params(engine)}


def wrap_master_weight_step(engine: Any) -> None:
    """Make a wrapper that steps float32 master weights refuse a changed model and count skipped steps.

    Collective: none.
    """
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if wrapper is optimizer:
        return
    snapshot = ModelSnapshot(engine.module, optimizer)
    original = wrapper.step

    @functools.wraps(original)
    def step(closure: Any = None) -> Any:
        snapshot.check()
        result = original(closure)
        if wrapper.overflow:
            optimizer.record(mean_of_skipped_step(wrapper._global_grad_norm))
        return result

    wrapper.step = step


def _masters_and_params(engine: Any) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of a tensor that the optimizer steps and the model parameter that it is, or is a copy of."""
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        params = [param for param_group in wrapper.param_groups for param in param_group["params"]]
        return list(zip(params, params, strict=True))
    return [
        pair
        for masters, params in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        for pair in zip(masters, params, strict=True)
    ]
