"""The placements of FSDP1 parameters (``FullyShardedDataParallel``), which their tensors do not show.

A flat parameter concatenates many parameters, with padding at the end; every rank holds an equal slice of it. With
``use_orig_params=True`` the optimizer sees the original parameters, each reduced to its part of this rank's slice. The
part may be empty, and FSDP1 then sets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adai_dist.sharding.plan import GroupPlacement, placements_of_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class FSDP1Parameters:
    """The placements of the parameters that FSDP1 modules of a model shard or replicate."""

    placements: dict[Tensor, tuple[GroupPlacement, ...]]
    """Placements by flat parameter, and by original parameter if the optimizer sees those."""
    starts: dict[Tensor, int]
    """Index, in the whole parameter, of the first element of this rank's part."""

    @classmethod
    def of(cls, model: nn.Module) -> FSDP1Parameters:
        """Read the handles of all FSDP1 modules in ``model``.

        Raises:
            RuntimeError: FSDP1 shards parameters that tensor parallelism has already sharded, or does not reduce
                gradients over the replicas.

        Collective: none.
        """
        from torch.distributed.fsdp import FullyShardedDataParallel

        placements: dict[Tensor, tuple[GroupPlacement, ...]] = {}
        starts: dict[Tensor, int] = {}
        for module in FullyShardedDataParallel.fsdp_modules(model):
            handle: Any = module._handle
            if handle is None:  # all parameters of the module belong to other modules, or are ignored
                continue
            _check_no_dtensors(handle.flat_param)
            of_module = (GroupPlacement(handle.process_group, handle.uses_sharded_strategy),)
            inter_node: Any = getattr(module, "_inter_node_pg", None)
            if inter_node is not None:  # a hybrid strategy
                _check_has_shards(handle, inter_node)
                of_module += (GroupPlacement(inter_node, is_sharded=False),)
            flat_param, originals = handle.flat_param, handle.flat_param._params or ()
            placements.update(dict.fromkeys((flat_param, *originals), of_module))
            if handle.uses_sharded_strategy:
                starts[flat_param] = handle.rank * flat_param._sharded_size.numel()
                infos = flat_param._shard_param_infos if originals else ()
                starts.update((x, info.intra_param_start_idx or 0) for x, info in zip(originals, infos, strict=True))
        return cls(placements, starts)

    def placements_of(self, param: Tensor) -> Sequence[GroupPlacement]:
        """Return the placements of a parameter of the optimizer.

        Raises:
            ValueError: it belongs to an FSDP1 module outside of the model.
        """
        if param in self.placements:
            return self.placements[param]
        if getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                "model must contain every FSDP1 module whose parameters are optimized, got one without the FSDP1 "
                f"module of a parameter of local shape {tuple(param.shape)}; pass the whole model"
            )
        return placements_of_tensor(param)


def _check_no_dtensors(flat_param: Any) -> None:
    if any(extension is not None for extension in flat_param._param_extensions):
        raise RuntimeError(
            "tensor-parallel parameters must be sharded further by FSDP2, got FSDP1 over DTensors, whose flat "
            "parameter mixes sharded and replicated elements; use torch.distributed.fsdp.fully_shard"
        )


def _check_has_shards(handle: Any, inter_node: ProcessGroup) -> None:
    if not handle.uses_sharded_strategy and inter_node.size() > 1:
        raise RuntimeError(
            "under a hybrid strategy, FSDP1 must shard over at least two ranks, got one, for which it switches to "
            "NO_SHARD and reduces no gradients over the replicas; use ShardingStrategy.NO_SHARD, or "
            "DistributedDataParallel"
        )
