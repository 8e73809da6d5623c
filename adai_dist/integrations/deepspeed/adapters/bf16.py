"""ZeRO stage 1 with float32 gradients of bf16 parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deepspeed import __version__ as deepspeed_version
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from torch import Tensor

from adai_dist.integrations.deepspeed.adapters.names import check_names
from adai_dist.integrations.deepspeed.adapters.releases import Release
from adai_dist.integrations.deepspeed.adapters.zero_wrapper import Fragment, ZeroWrapper, without_none

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class BF16(ZeroWrapper):
    """Interface to ``BF16_Optimizer``, which steps all groups in one call, after clipping by their total norm."""

    def __init__(self, wrapper: Any, release: Release) -> None:
        super().__init__(wrapper, release)
        check_names(wrapper.bf16_groups[0][0], release, "parameter of BF16_Optimizer")
        if not release.reduces_bf16_gradients and not wrapper.immediate_grad_update:
            raise RuntimeError(
                "BF16_Optimizer must reduce the gradients of a step before it steps them, which DeepSpeed "
                f'{deepspeed_version} does only with "bf16": {{"immediate_grad_update": true}}, got false; set it, use '
                "ZeRO stage 2, or install deepspeed>=0.19.0"
            )

    def flat_partitions(self) -> list[Tensor]:
        return self.wrapper.fp32_groups_flat_partition

    def model_groups(self) -> list[list[Any]]:
        return self.wrapper.bf16_groups

    def _find_fragments(self, part: int) -> list[Fragment]:
        found: list[Fragment] = []
        for param in self.model_groups()[part]:
            mapping: Any = param._hp_mapping  # location of the parameter's states, for checkpoints
            if mapping is not None:
                address = mapping.get_hp_fragment_address()
                found.append(Fragment(int(address.start), int(address.numel), param, self._is_counted(param)))
        return found

    def _is_counted(self, param: Tensor) -> bool:
        if getattr(param, "ds_pipe_replicated", False):
            return False
        mpu = self.wrapper.mpu
        return is_model_parallel_parameter(param) or is_moe_param(param) or tensor_parallel_rank(mpu) == 0

    def gradients(self, part: int) -> Iterator[tuple[Fragment, Tensor]]:
        for fragment in self.fragments(part):
            if fragment.is_counted:
                yield fragment, fragment.view_of(self.wrapper.fp32_groups_gradient_flat_partition[part])

    def collect_late_gradients(self) -> None:
        """Count gradients that only other ranks have in the norm, as those ranks do; the buffers of others are zero."""
        for has_gradients in self.wrapper.fp32_groups_has_gradients:
            has_gradients[:] = [True] * len(has_gradients)

    def process_groups(self) -> tuple[ProcessGroup, ...]:
        mpu = self.wrapper.mpu
        return without_none(self.wrapper.dp_process_group, None if mpu is None else mpu.get_model_parallel_group())


def tensor_parallel_rank(mpu: Any) -> int:
    """Return this rank's index among the ranks that share each layer, 0 without tensor parallelism."""
    return int(bwc_tensor_model_parallel_rank(mpu))
