"""A common interface to ZeRO's optimizer wrappers, which keep a model in different attributes.

A *part* is the unit that a wrapper passes to the optimizer: this rank's flat float32 partition of a parameter group
(stages 1 and 2, BF16_Optimizer) or of a sub-group (stage 3). A *fragment* (DeepSpeed's word) is the range of a flat
partition that belongs to one parameter of the model, without padding.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Fragment(NamedTuple):
    """Range of a flat partition that belongs to one parameter, as in ``deepspeed.utils.tensor_fragment``."""

    start: int
    num_elements: int
    param: Tensor
    """The parameter of the model."""
    is_counted: bool
    """False for a copy that another rank counts, by ZeRO's rule for the gradient norm."""

    def view_of(self, flat: Tensor | None) -> Tensor:
        """Return the view of the fragment's elements in its flat partition, or in a tensor of the same shape."""
        assert flat is not None  # under CPU offload, gradients are never freed
        return flat.view(-1).narrow(0, self.start, self.num_elements)


class ZeroWrapper:
    """Interface to one of ZeRO's wrappers, with what the mean depends on."""

    signatures: ClassVar[dict[str, tuple[str, ...]]] = {"step": ("closure",), "state_dict": (), "load_state_dict": ()}
    """Parameter names of the methods that the binding replaces or calls."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self._fragments: dict[int, list[Fragment]] = {}

    def flat_partitions(self) -> list[Tensor]:
        """Return the flat float32 partition of every part."""
        raise NotImplementedError

    def group_indices(self) -> list[int]:
        """Return the index of the parameter group of every part."""
        raise NotImplementedError

    def fragments(self, part: int) -> list[Fragment]:
        """Return the fragments of a part on this rank, in the order of the parameters; they never change."""
        if part not in self._fragments:
            self._fragments[part] = self._find_fragments(part)
        return self._fragments[part]

    def _find_fragments(self, part: int) -> list[Fragment]:
        raise NotImplementedError

    def gradients(self, part: int) -> Iterator[tuple[Fragment, Tensor]]:
        """Yield the counted fragments with their scaled gradients, before the optimizer is called."""
        raise NotImplementedError

    def process_groups(self) -> tuple[ProcessGroup, ...]:
        """Return the process groups; reducing over them in order counts every element of the model once."""
        raise NotImplementedError

    def is_swapped(self, part: int) -> bool:
        """Return whether the part is on disk between its steps."""
        return False

    @contextmanager
    def in_memory(self, part: int) -> Generator[None]:
        """Keep the part in memory within the context, reading it from disk if it is swapped."""
        yield

    def collect_late_gradients(self) -> None:
        """Collect the gradients of parameters unused in the last micro-batch, which DeepSpeed drops under offload."""

    def clear_stale_gradients(self, part: int) -> None:
        """Zero the gradients of an earlier step of parameters that have none in this step."""

    def clear_accumulated_gradients(self) -> None:
        """Zero the buffers in which micro-batches accumulate gradients, after a step."""


class Stage1And2(ZeroWrapper):
    """Interface to ``DeepSpeedZeroOptimizer``, with one part per parameter group."""

    signatures: ClassVar[dict[str, tuple[str, ...]]] = {
        **ZeroWrapper.signatures,
        "scaled_global_norm": ("norm_type",),
        "get_grad_norm_direct": ("gradients", "params", "norm_type"),
        "complete_grad_norm_calculation_for_cpu_offload": ("params",),
        "unscale_and_clip_grads": ("grad_groups_flat", "total_norm"),
        "get_param_id": ("param",),
        "_finalize_cpu_offload_gradient_accumulation": (),
    }

    def flat_partitions(self) -> list[Tensor]:
        return self.wrapper.single_partition_of_fp32_groups

    def group_indices(self) -> list[int]:
        return list(range(len(self.flat_partitions())))

    def _find_fragments(self, part: int) -> list[Fragment]:
        # DeepSpeed's own mapping (_hp_mapping) has the wrong order under round_robin_gradients.
        params, starts = self.wrapper.round_robin_bit16_groups[part], self.wrapper.round_robin_bit16_offsets[part]
        size = self.flat_partitions()[part].numel()
        first = size * dist.get_rank(self.wrapper.real_dp_process_group[part])
        found: list[Fragment] = []
        for param, meta, start in zip(params, self.wrapper.round_robin_bit16_meta[part], starts, strict=True):
            begin, end = max(start - first, 0), min(start + meta.numel() - first, size)
            if begin < end:
                found.append(Fragment(begin, end - begin, param, self._is_counted(param)))
        return found

    def _is_counted(self, param: Tensor) -> bool:
        if getattr(param, "ds_pipe_replicated", False):
            return False
        return is_model_parallel_parameter(param) or self.wrapper.model_parallel_rank == 0

    def gradients(self, part: int) -> Iterator[tuple[Fragment, Tensor]]:
        fragments = {id(fragment.param): fragment for fragment in self.fragments(part) if fragment.is_counted}
        if self.wrapper.cpu_offload:
            for fragment in fragments.values():
                yield fragment, fragment.view_of(self.flat_partitions()[part].grad)
            return
        gradients = (g for g in self.wrapper.averaged_gradients[part] if not getattr(g, "_zero_padding", False))
        for param, gradient in zip(self.wrapper.params_in_partition[part], gradients, strict=False):
            if id(param) in fragments:
                yield fragments[id(param)], gradient.view(-1)

    def process_groups(self) -> tuple[ProcessGroup, ...]:
        return _without_none(self.wrapper.dp_process_group, self.wrapper.model_parallel_group)

    def collect_late_gradients(self) -> None:
        wrapper = self.wrapper
        if wrapper.cpu_offload and wrapper._offload_accumulated_param_ids - wrapper.norm_for_param_grads.keys():
            wrapper._finalize_cpu_offload_gradient_accumulation()

    def clear_stale_gradients(self, part: int) -> None:
        wrapper = self.wrapper
        if wrapper.cpu_offload:
            for fragment in self.fragments(part):
                if wrapper.get_param_id(fragment.param) not in wrapper.norm_for_param_grads:
                    fragment.view_of(self.flat_partitions()[part].grad).zero_()

    def clear_accumulated_gradients(self) -> None:
        if self.wrapper.cpu_offload and self.wrapper.gradient_accumulation_steps > 1:
            for buffer in self.wrapper.accumulated_grads_in_cpu.values():
                buffer.zero_()


class Stage3(ZeroWrapper):
    """Interface to ``DeepSpeedZeroOptimizer_Stage3``, with one part per sub-group."""

    signatures: ClassVar[dict[str, tuple[str, ...]]] = {
        **ZeroWrapper.signatures,
        "_get_norm_groups": (),
        "_finalize_offload_gradient_accumulation": (),
        "unscale_and_clip_grads": ("sub_group_id", "total_norm"),
        "get_param_id": ("param",),
        "_get_param_partition_group": ("param",),
        "_get_param_partition_rank": ("param",),
        "_grad_norm_counts_every_rank": ("params", "process_group"),
        "_swappable_optimizer_subgroup": ("sub_group_id",),
        "_prepare_sub_group": ("sub_group_id", "timer_names"),
        "_release_sub_group": ("sub_group_id", "timer_names"),
    }

    def flat_partitions(self) -> list[Tensor]:
        return self.wrapper.fp32_partitioned_groups_flat

    def group_indices(self) -> list[int]:
        return [self.wrapper.sub_group_to_group_id[part] for part in range(len(self.flat_partitions()))]

    def _find_fragments(self, part: int) -> list[Fragment]:
        params = self.wrapper.fp16_groups[part]
        counts_all = self.wrapper._grad_norm_counts_every_rank(params, self._partition_group())
        found: list[Fragment] = []
        start = 0
        for param in params:
            size = int(param.partition_numel())
            first = size * self.wrapper._get_param_partition_rank(param)
            num_elements = max(0, min(size, int(param.ds_numel) - first))  # the remainder is padding
            is_counted = counts_all or is_model_parallel_parameter(param) or self.wrapper.model_parallel_rank == 0
            found.append(Fragment(start, num_elements, param, is_counted))
            start += size
        return found

    def gradients(self, part: int) -> Iterator[tuple[Fragment, Tensor]]:
        averaged = None if self.wrapper.offload_optimizer else self.wrapper.averaged_gradients[part]
        for index, fragment in enumerate(self.fragments(part)):
            if not fragment.is_counted:
                continue
            if averaged is None:
                yield fragment, fragment.view_of(self.flat_partitions()[part].grad)
            else:
                yield fragment, averaged[index].view(-1)[: fragment.num_elements]

    def process_groups(self) -> tuple[ProcessGroup, ...]:
        params = [param for params in self.wrapper.fp16_groups for param in params]
        partition_group = self._partition_group()
        if any(self.wrapper._get_param_partition_group(param) is not partition_group for param in params):
            raise RuntimeError(
                "under ZeRO stage 3 all parameters must be partitioned over the same ranks, got several process groups "
                "(AutoEP experts); use ZeRO stage 1 or 2"
            )
        if self.wrapper._grad_norm_counts_every_rank(params, partition_group):
            return (partition_group,)
        return _without_none(partition_group, self.wrapper.model_parallel_group)

    def _partition_group(self) -> ProcessGroup:
        return self.wrapper._get_param_partition_group(self.wrapper.fp16_groups[0][0])

    def is_swapped(self, part: int) -> bool:
        return bool(self.wrapper._swappable_optimizer_subgroup(part))

    @contextmanager
    def in_memory(self, part: int) -> Generator[None]:
        if not self.is_swapped(part):
            yield
            return
        timer_names: set[str] = set()
        self.wrapper._prepare_sub_group(part, timer_names)
        try:
            yield
        finally:
            self.wrapper._release_sub_group(part, timer_names)

    def collect_late_gradients(self) -> None:
        wrapper = self.wrapper
        if wrapper.offload_optimizer:
            params = [
                fragment.param for part in range(len(self.flat_partitions())) for fragment in self.fragments(part)
            ]
            accumulated = (p for p in params if _ds_id(p) in wrapper._offload_boundary_param_ids)
            if any(wrapper.get_param_id(param) not in wrapper.norm_for_param_grads for param in accumulated):
                wrapper._finalize_offload_gradient_accumulation()

    def clear_stale_gradients(self, part: int) -> None:
        wrapper = self.wrapper
        for index, fragment in enumerate(self.fragments(part)):
            if wrapper.offload_optimizer:
                if wrapper.get_param_id(fragment.param) not in wrapper.norm_for_param_grads:
                    fragment.view_of(self.flat_partitions()[part].grad).zero_()
            elif fragment.num_elements and _ds_id(fragment.param) not in wrapper._offload_boundary_param_ids:
                wrapper.averaged_gradients[part][index].zero_()

    def clear_accumulated_gradients(self) -> None:
        if self.wrapper.gradient_accumulation_steps > 1:
            self.wrapper.grad_partitions_flat_buffer.zero_()


def _ds_id(param: Any) -> int:
    return param.ds_id  # set by stage 3


class BF16(ZeroWrapper):
    """Interface to ``BF16_Optimizer``, which steps all groups in one call, after clipping by their total norm."""

    def flat_partitions(self) -> list[Tensor]:
        return self.wrapper.fp32_groups_flat_partition

    def group_indices(self) -> list[int]:
        return list(range(len(self.flat_partitions())))

    def _find_fragments(self, part: int) -> list[Fragment]:
        found: list[Fragment] = []
        for param in self.wrapper.bf16_groups[part]:
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

    def process_groups(self) -> tuple[ProcessGroup, ...]:
        mpu = self.wrapper.mpu
        return _without_none(self.wrapper.dp_process_group, None if mpu is None else mpu.get_model_parallel_group())


def tensor_parallel_rank(mpu: Any) -> int:
    return int(bwc_tensor_model_parallel_rank(mpu))


def _without_none(*process_groups: ProcessGroup | None) -> tuple[ProcessGroup, ...]:
    return tuple(process_group for process_group in process_groups if process_group is not None)


ZERO_WRAPPERS: dict[type, type[ZeroWrapper]] = {
    DeepSpeedZeroOptimizer: Stage1And2,
    DeepSpeedZeroOptimizer_Stage3: Stage3,
    BF16_Optimizer: BF16,
}


def wrapper_of(engine: Any) -> ZeroWrapper | None:
    """Return the interface to ``engine.optimizer``, or None without ZeRO.

    Raises:
        RuntimeError: the wrapper's class is not supported.
    """
    wrapper = engine.optimizer
    if type(wrapper) in ZERO_WRAPPERS:
        return ZERO_WRAPPERS[type(wrapper)](wrapper)
    if wrapper is engine.basic_optimizer or type(wrapper) is FP16_UnfusedOptimizer:
        return None
    raise RuntimeError(
        f"DeepSpeed must step Adai through one of {[cls.__name__ for cls in (*ZERO_WRAPPERS, FP16_UnfusedOptimizer)]}, "
        f"got {type(wrapper).__name__}, which this release of adai_dist does not support; use ZeRO stage 1 to 3"
    )
