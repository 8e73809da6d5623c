"""ZeRO stages 1 and 2, with one part per parameter group."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import Tensor

from adai_dist.integrations.deepspeed.adapters.reduced_gradients import ReducedGradients
from adai_dist.integrations.deepspeed.adapters.zero_wrapper import Fragment, ZeroWrapper, wait_for_copies, without_none

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from adai_dist.integrations.deepspeed.zero_mean_source import ZeroMeanSource


class Stage1And2(ZeroWrapper):
    """Interface to ``DeepSpeedZeroOptimizer``."""

    def tables(self) -> tuple[str, ...]:
        of_offload = "DeepSpeedZeroOptimizer with offload"
        return (*super().tables(), of_offload) if getattr(self.wrapper, "cpu_offload", False) else super().tables()

    def flat_partitions(self) -> list[Tensor]:
        return self.wrapper.single_partition_of_fp32_groups

    def model_groups(self) -> list[list[Any]]:
        return self.wrapper.bit16_groups

    def _find_fragments(self, part: int) -> list[Fragment]:
        # DeepSpeed's own mapping (_hp_mapping) has the wrong order under round_robin_gradients.
        params = self.wrapper.round_robin_bit16_groups[part]
        sizes = [int(meta.numel()) for meta in self.wrapper.round_robin_bit16_meta[part]]
        size = self.flat_partitions()[part].numel()
        first = size * dist.get_rank(self.wrapper.real_dp_process_group[part])
        found: list[Fragment] = []
        for param, num_elements, start in zip(params, sizes, self._offsets(part, sizes), strict=True):
            begin, end = max(start - first, 0), min(start + num_elements - first, size)
            if begin < end:
                found.append(Fragment(begin, end - begin, param, self._is_counted(param)))
        return found

    def _offsets(self, part: int, sizes: list[int]) -> list[int]:
        """Return the offset of each parameter in the flat group, of which each rank holds a partition."""
        if self.release.has_aligned_params:
            return self.wrapper.round_robin_bit16_offsets[part]
        return list(itertools.accumulate(sizes[:-1], initial=0))

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
        if self._has_uncounted_experts():
            raise RuntimeError(
                "every expert must count in the gradient norm, got tensor parallelism under ZeRO stage 1 or 2, where "
                "DeepSpeed counts only the experts of the first tensor-parallel rank; use ZeRO stage 0, or bf16 with "
                'ZeRO stage 1 and "data_types": {"grad_accum_dtype": "fp32"}'
            )
        return without_none(self.wrapper.dp_process_group, self.wrapper.model_parallel_group)

    def _has_uncounted_experts(self) -> bool:
        """Return whether tensor-parallel ranks hold different experts, of which DeepSpeed counts those of the first."""
        if self.wrapper.model_parallel_group is None or bwc_tensor_model_parallel_world_size(self.wrapper.mpu) == 1:
            return False
        params = itertools.chain.from_iterable(self.model_groups())
        return any(is_moe_param(param) and not is_model_parallel_parameter(param) for param in params)

    def collect_late_gradients(self) -> None:
        wrapper = self.wrapper
        if not wrapper.cpu_offload:
            return
        if not self.release.accumulates_offloaded_gradients:
            self._check_number_of_backward_passes()
        if not self.release.keeps_late_gradients:
            self._use_late_gradients()
        elif wrapper._offload_accumulated_param_ids - wrapper.norm_for_param_grads.keys():
            wrapper._finalize_cpu_offload_gradient_accumulation()

    def _check_number_of_backward_passes(self) -> None:
        wrapper = self.wrapper
        num_passes = wrapper.micro_step_id + 1
        if wrapper.partition_gradients and wrapper.gradient_accumulation_steps == 1 and num_passes > 1:
            raise RuntimeError(
                "under CPU offload with ZeRO 2, a step must take as many backward passes as "
                f"gradient_accumulation_steps says before DeepSpeed 0.19.0, got {num_passes} instead of 1, of which "
                "it would use the last alone; set gradient_accumulation_steps, or install deepspeed>=0.19.0"
            )

    def _use_late_gradients(self) -> None:
        """Copy gradients that only earlier micro-batches have to where the step reads them."""
        wrapper = self.wrapper
        if wrapper.accumulated_grads_in_cpu:
            wait_for_copies()
        for param in itertools.chain.from_iterable(wrapper.params_in_partition):
            param_id = wrapper.get_param_id(param)
            if param_id not in wrapper.norm_for_param_grads and param_id in wrapper.accumulated_grads_in_cpu:
                part, source, destination, size = wrapper.grad_position[param_id]
                gradient = wrapper.accumulated_grads_in_cpu[param_id].view(-1).narrow(0, source, size)
                self.flat_partitions()[part].grad.view(-1).narrow(0, destination, size).copy_(gradient)
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                wrapper.norm_for_param_grads[param_id] = norm
                wrapper.local_overflow = wrapper.local_overflow or not bool(norm.isfinite())

    def clear_stale_gradients(self, part: int) -> None:
        wrapper = self.wrapper
        if wrapper.cpu_offload:
            for fragment in self.fragments(part):
                if wrapper.get_param_id(fragment.param) not in wrapper.norm_for_param_grads:
                    fragment.view_of(self.flat_partitions()[part].grad).zero_()

    def clear_accumulated_gradients(self) -> None:
        if self.wrapper.cpu_offload:
            for buffer in self.wrapper.accumulated_grads_in_cpu.values():
                buffer.zero_()

    def check_universal_offsets(self) -> None:
        wrapper = self.wrapper
        if not wrapper.round_robin_gradients:
            return
        for part, (params, order) in enumerate(zip(self.model_groups(), wrapper.round_robin_bit16_groups, strict=True)):
            is_aligned = self.release.has_aligned_params and any(wrapper.round_robin_bit16_padding[part])
            if any(a is not b for a, b in zip(params, order, strict=True)) and not is_aligned:
                raise ValueError(
                    '"round_robin_gradients" must be false in a run that loads a universal checkpoint, got true, for '
                    "which DeepSpeed's offsets of the parameters are wrong; remove it"
                )

    def attach(self, source: ZeroMeanSource) -> None:
        super().attach(source)
        wrapper = self.wrapper
        self._reduced = ReducedGradients(wrapper, wrapper.dp_process_group, is_sorted=False)
        norms: list[Any] = []
        if hasattr(wrapper, "compute_grad_norm"):
            wrapper.compute_grad_norm = True  # the mean needs the norms, also under "compute_grad_norm": false

        def recording(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def norm_of_group(*args: Any, **kwargs: Any) -> Any:
                norm = original(*args, **kwargs)
                norms.append(norm)
                # In 0.16, offload returns the integer -1 for infinities, with which the norms cannot be stacked.
                return float(norm) if isinstance(norm, int) else norm

            return norm_of_group

        original_global_norm, original_unscale = wrapper.scaled_global_norm, wrapper.unscale_and_clip_grads

        @functools.wraps(original_global_norm)
        def scaled_global_norm(norm_type: int = 2) -> Any:
            norms.clear()
            global_norm = original_global_norm(norm_type)
            self._observe(source, norms)
            return global_norm

        @functools.wraps(original_unscale)
        def unscale_and_clip_grads(grad_groups_flat: Any, total_norm: Any) -> None:
            # The optimizer scales gradients as it reads them. Applied to a 1, the original yields the coefficient.
            if not source.has_mean:
                one = torch.ones(1, dtype=torch.float64, device=source.device)
                original_unscale([one], total_norm)
                source.compute_mean(one, self.global_grad_norm())

        for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
            setattr(wrapper, name, recording(getattr(wrapper, name)))
        wrapper.scaled_global_norm = scaled_global_norm
        wrapper.unscale_and_clip_grads = unscale_and_clip_grads
        if wrapper.overlap_comm and not wrapper.partition_gradients:
            self._reduce_gradients_of_all_micro_batches()
        if wrapper.cpu_offload and not self.release.accumulates_offloaded_gradients:
            self._keep_all_accumulated_gradients()

    def _reduce_gradients_of_all_micro_batches(self) -> None:
        """Reduce also the gradients of parameters that the last micro-batch does not use.

        Under ZeRO 1 with overlap_comm, DeepSpeed reduces a gradient when the last micro-batch adds to it, and steps the
        local gradient of any other parameter. Without overlap_comm it reduces all of them after that micro-batch.
        """
        wrapper = self.wrapper
        original = wrapper.reduce_independent_p_g_buckets_and_remove_grads
        original_epilogue = wrapper.overlapping_partition_gradients_reduce_epilogue
        is_added: set[int] = set()

        @functools.wraps(original)
        def reduce_independent_p_g_buckets_and_remove_grads(param: Tensor, i: int) -> None:
            is_added.add(id(param))
            original(param, i)

        @functools.wraps(original_epilogue)
        def overlapping_partition_gradients_reduce_epilogue() -> None:
            for i, params in enumerate(self.model_groups()):
                for param in params:
                    if id(param) not in is_added and wrapper.get_gradient_for_reduction(param) is not None:
                        original(param, i)
            is_added.clear()
            original_epilogue()

        wrapper.reduce_independent_p_g_buckets_and_remove_grads = reduce_independent_p_g_buckets_and_remove_grads
        wrapper.overlapping_partition_gradients_reduce_epilogue = overlapping_partition_gradients_reduce_epilogue

    def _keep_all_accumulated_gradients(self) -> None:
        """Store the sum of the gradients after every micro-batch, of which DeepSpeed stores the first alone."""
        wrapper = self.wrapper
        original = wrapper.async_accumulate_grad_in_cpu_via_gpu

        @functools.wraps(original)
        def async_accumulate_grad_in_cpu_via_gpu(param: Any) -> None:
            original(param)
            stored = wrapper.accumulated_grads_in_cpu[wrapper.get_param_id(param)]
            stored.copy_(wrapper.get_param_gradient_attribute(param).view(-1), non_blocking=True)

        wrapper.async_accumulate_grad_in_cpu_via_gpu = async_accumulate_grad_in_cpu_via_gpu
