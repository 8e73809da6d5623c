"""What FSDP1 (``FullyShardedDataParallel``) knows of its parameters, and their tensors do not show.

Its flat parameter is a run of elements of many parameters, of which every rank holds an equal piece, with padding at
the end. With ``use_orig_params=True`` the optimizer sees the original parameters, cut down to what lies in this rank's
piece: maybe nothing, and then FSDP1 leaves out the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adai_dist.sharding.plan import Spread, spreads_of_tensor


@dataclass(frozen=True)
class FSDP1Parameters:
    """The parameters that FSDP1 modules of a model have sharded, or copied."""

    spreads: dict[Tensor, tuple[Spread, ...]]
    """Of every flat parameter, and of the original ones in it where the optimizer sees those."""

    @classmethod
    def of(cls, model: nn.Module) -> FSDP1Parameters:
        """Read the handles of all FSDP1 modules in ``model``.

        Raises:
            RuntimeError: FSDP1 shards what tensor parallelism has sharded before.

        Collective: none.
        """
        from torch.distributed.fsdp import FullyShardedDataParallel

        spreads: dict[Tensor, tuple[Spread, ...]] = {}
        for module in FullyShardedDataParallel.fsdp_modules(model):
            handle: Any = module._handle
            if handle is None:  # all parameters of the module are in other modules, or ignored
                continue
            _check_no_dtensors(handle.flat_param)
            of_module = (Spread(handle.process_group, handle.uses_sharded_strategy),)
            inter_node: Any = getattr(module, "_inter_node_pg", None)
            if inter_node is not None:  # a hybrid strategy
                of_module += (Spread(inter_node, is_sharded=False),)
            spreads.update(dict.fromkeys((handle.flat_param, *(handle.flat_param._params or ())), of_module))
        return cls(spreads)

    def spreads_of(self, param: Tensor) -> Sequence[Spread]:
        """Over which process groups a parameter of the optimizer is spread.

        Raises:
            ValueError: it belongs to an FSDP1 module that is not in the model.
        """
        if param in self.spreads:
            return self.spreads[param]
        if getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                "model must contain every FSDP1 module whose parameters are optimized, got one in whose FSDP1 modules "
                f"a parameter of local shape {tuple(param.shape)} is not; pass the whole model"
            )
        return spreads_of_tensor(param)


def _check_no_dtensors(flat_param: Any) -> None:
    if any(extension is not None for extension in flat_param._param_extensions):
        raise RuntimeError(
            "parameters that are tensor parallel must be sharded further by FSDP2, got FSDP1 over DTensors, whose "
            "flat parameter mixes sharded and copied elements; use torch.distributed.fsdp.fully_shard"
        )
