"""A prescribed problem under FullyShardedDataParallel (FSDP1), whose parameters are slices of flat ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullOptimStateDictConfig, ShardingStrategy, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from adai_dist import AdaiV2
from tests.distributed.layouts import CollectiveCounter, Prescribed, Walk, backward, full
from tests.problems import Problem, to_numpy

FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD, NO_SHARD = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.HYBRID_SHARD,
    ShardingStrategy.NO_SHARD,
)
BLOCKS = ("first", "second", "root")


@dataclass(frozen=True)
class UnderFSDP1(Problem):
    """A problem as FSDP1 sees it: a block's gradient is one flat tensor, in which missing gradients are zeros."""

    def oracle_gradients(self, step: int) -> dict[str, np.ndarray[Any, Any] | None]:
        gradients = super().oracle_gradients(step)
        used = {name.split(".")[0] for name, gradient in gradients.items() if gradient is not None}
        return {
            spec.name: np.zeros(spec.shape)
            if gradients[spec.name] is None and spec.name.split(".")[0] in used
            else gradients[spec.name]
            for spec in self.specs()
        }

    @classmethod
    def of(cls, problem: Problem) -> UnderFSDP1:
        return cls(**vars(problem))


@dataclass(frozen=True)
class Layout:
    world_size: int
    use_orig_params: bool
    strategy: ShardingStrategy = FULL_SHARD
    strategy_of_second: ShardingStrategy | None = None
    """Strategy of the block "second", if different."""
    ignored: tuple[str, ...] = ()
    """Parameters that FSDP1 ignores: plain copies on every rank."""
    num_all_reduces: int = 1


def _both(name: str, world_size: int, **options: Any) -> dict[str, Layout]:
    return {f"{name}-{kind}": Layout(world_size, kind == "orig", **options) for kind in ("orig", "flat")}


IGNORED = ("root.table", "root.gain")
LAYOUTS: dict[str, Layout] = {
    **_both("full-shard-2", 2),
    **_both("full-shard-3", 3),
    **_both("full-shard-4", 4),
    **_both("shard-grad-op-2", 2, strategy=SHARD_GRAD_OP),
    **_both("hybrid-2x2", 4, strategy=HYBRID_SHARD, num_all_reduces=2),
    **_both("no-shard-block-2", 2, strategy_of_second=NO_SHARD),
    **_both("no-shard-block-in-hybrid-2x2", 4, strategy=HYBRID_SHARD, strategy_of_second=NO_SHARD, num_all_reduces=3),
    **_both("ignored-2", 2, ignored=IGNORED),
    **_both("ignored-in-hybrid-2x2", 4, strategy=HYBRID_SHARD, ignored=IGNORED, num_all_reduces=2),
    **_both("everything-4", 4, strategy_of_second=NO_SHARD, ignored=IGNORED),
}


def wrap(model: Prescribed, layout: Layout) -> FSDP:
    """Wrap each block as a unit, and the model around them. Collective: all ranks."""
    ignored = [getattr(model.owner(block), leaf) for block, leaf in (name.split(".") for name in layout.ignored)]
    options: dict[str, Any] = {
        "device_id": torch.device("cpu"),
        "use_orig_params": layout.use_orig_params,
    }
    meshes: dict[ShardingStrategy, Any] = {}
    if layout.strategy == HYBRID_SHARD:
        meshes[HYBRID_SHARD] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def unit(module: nn.Module, strategy: ShardingStrategy) -> FSDP:
        mine = [parameter for parameter in module.parameters() if any(parameter is other for other in ignored)]
        return FSDP(
            module, sharding_strategy=strategy, device_mesh=meshes.get(strategy), ignored_states=mine, **options
        )

    model.add_module("first", unit(model.get_submodule("first"), layout.strategy))
    model.add_module("second", unit(model.get_submodule("second"), layout.strategy_of_second or layout.strategy))
    return unit(model, layout.strategy)


def param_groups(model: Prescribed, wrapped: FSDP, layout: Layout) -> list[dict[str, Any]]:
    """Return the parameter groups: one per block, in the order of the problem."""
    if layout.use_orig_params:
        return model.problem.param_groups(model.by_name())
    units: dict[str, Any] = {"first": model.first, "second": model.second, "root": wrapped}
    by_block = {block: [unit._flat_param] for block, unit in units.items()}
    for name in layout.ignored:
        block, leaf = name.split(".")
        by_block[block].append(getattr(model.owner(block), leaf))
    return [
        model.problem.hyperparameters(k) | {"params": by_block[specs[0].name.split(".")[0]]}
        for k, (_, specs) in enumerate(model.problem.groups)
    ]


def whole_parameters(model: Prescribed, wrapped: FSDP) -> dict[str, np.ndarray[Any, Any]]:
    """Gather all parameters. Collective: all ranks."""
    with FSDP.summon_full_params(wrapped, writeback=False):
        return {name: to_numpy(full(parameter)) for name, parameter in model.by_name().items()}


def whole_states(wrapped: FSDP, optimizer: AdaiV2) -> dict[str, dict[str, Any]]:
    """Gather all states as FSDP1 does for a checkpoint. Collective: all ranks."""
    # With offload_to_cpu (the default), all states of a parameter become one tensor if they are on the CPU already.
    in_place = FullOptimStateDictConfig(offload_to_cpu=False)
    with FSDP.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, optim_state_dict_config=in_place):
        gathered = FSDP.optim_state_dict(wrapped, optimizer)["state"]
    return {
        name if "." in name else f"root.{name}": {key: to_numpy(value) for key, value in state.items()}
        for name, state in gathered.items()
    }


def walk(
    layout: Layout,
    problem: Problem,
    before_step: Callable[[Prescribed, FSDP, AdaiV2], None] | None = None,
    gather_states: bool = True,
) -> Walk:
    """Take all steps of a problem. Collective: all ranks."""
    model = Prescribed(problem)
    wrapped = wrap(model, layout)
    optimizer = AdaiV2(param_groups(model, wrapped, layout), lr=1.0, max_grad_norm=problem.max_grad_norm)
    optimizer.configure_sharding(model=wrapped)
    seen = Walk({}, {})
    for step in range(problem.steps):
        backward(wrapped, optimizer, step)
        if before_step is not None:
            before_step(model, wrapped, optimizer)
        with CollectiveCounter() as counter:
            optimizer.step()
        seen.collectives.append(counter.calls)
        seen.means.append(optimizer.inertia_mean.item())
        seen.grad_norms.append(optimizer.grad_norm.item())
    seen.num_skipped_steps = int(optimizer.num_skipped_steps.item())
    seen.parameters = whole_parameters(model, wrapped)
    if gather_states:
        seen.states = whole_states(wrapped, optimizer)
    return seen
