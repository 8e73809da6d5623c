"""ZeRO stage 3, with one part per sub-group."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed import __version__ as deepspeed_version
from deepspeed.checkpoint.constants import PARAM
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from adai_dist.integrations.deepspeed.adapters.names import check_names
from adai_dist.integrations.deepspeed.adapters.reduced_gradients import ReducedGradients
from adai_dist.integrations.deepspeed.adapters.releases import Release
from adai_dist.integrations.deepspeed.adapters.zero_wrapper import Fragment, ZeroWrapper, wait_for_copies, without_none
from adai_dist.integrations.deepspeed.checkpoint_file import load_checkpoint_file

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from adai_dist.integrations.deepspeed.zero_mean_source import ZeroMeanSource


class Stage3(ZeroWrapper):
    """Interface to ``DeepSpeedZeroOptimizer_Stage3``."""

    def __init__(self, wrapper: Any, release: Release) -> None:
        super().__init__(wrapper, release)
        self._has_accumulated = True
        """Whether the buffer of gradients may hold the sums of several backward passes."""
        self._params: list[Any] = [param for params in self.model_groups() for param in params]
        check_names(self._params[0], release, "parameter of DeepSpeedZeroOptimizer_Stage3")
        if wrapper.swap_optimizer:
            check_names(wrapper.optimizer_swapper, release, "optimizer_swapper of DeepSpeedZeroOptimizer_Stage3")

    def tables(self) -> tuple[str, ...]:
        settings = (("offload", "offload_optimizer"), ("NVMe", "swap_optimizer"))
        conditional = (
            f"DeepSpeedZeroOptimizer_Stage3 with {name}"
            for name, attribute in settings
            if getattr(self.wrapper, attribute, False)
        )
        return (*super().tables(), *conditional)

    def flat_partitions(self) -> list[Tensor]:
        return self.wrapper.fp32_partitioned_groups_flat

    def group_indices(self) -> list[int]:
        return [self.wrapper.sub_group_to_group_id[part] for part in range(len(self.flat_partitions()))]

    def model_groups(self) -> list[list[Any]]:
        return self.wrapper.fp16_groups

    def _find_fragments(self, part: int) -> list[Fragment]:
        counts_all = self._counts_every_rank(self.model_groups()[part])
        found: list[Fragment] = []
        start = 0
        for param in self.model_groups()[part]:
            size = int(param.partition_numel())
            first = size * self.partition_rank(param)
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

    # -- the ranks over which parameters are partitioned -----------------------------------------------------------

    def _partition_group(self, param: Any) -> ProcessGroup:
        if self.release.has_groups_per_param:
            return self.wrapper._get_param_partition_group(param)
        return self.wrapper.dp_process_group

    def partition_rank(self, param: Any) -> int:
        """Return the index of the partition of a parameter that this rank holds."""
        if self.release.has_groups_per_param:
            return self.wrapper._get_param_partition_rank(param)
        return dist.get_rank(self.wrapper.dp_process_group)

    def _counts_every_rank(self, params: list[Any]) -> bool:
        if not self.release.has_tensor_parallel_partitions:
            return False
        return self.wrapper._grad_norm_counts_every_rank(params, self._partition_group(self._params[0]))

    def process_groups(self) -> tuple[ProcessGroup, ...]:
        partition_group, model_parallel_group = (
            self._partition_group(self._params[0]),
            self.wrapper.model_parallel_group,
        )
        if any(self._partition_group(param) is not partition_group for param in self._params):
            raise RuntimeError(
                "under ZeRO stage 3 all parameters must be partitioned over the same ranks, got several process groups "
                "(AutoEP experts); use ZeRO stage 1 or 2"
            )
        if not self.release.has_tensor_parallel_partitions and _has_several_ranks(model_parallel_group):
            raise RuntimeError(
                "tensor parallelism with ZeRO stage 3 must have a gradient norm that counts every element once, got "
                f"DeepSpeed {deepspeed_version}, which does not; install deepspeed>=0.19.8, or use ZeRO stage 1 or 2"
            )
        if self._counts_every_rank(self._params):
            return (partition_group,)
        return without_none(partition_group, model_parallel_group)

    # -- swapped sub-groups ----------------------------------------------------------------------------------------

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

    # -- gradients of parameters that a micro-batch does not use ---------------------------------------------------

    def collect_late_gradients(self) -> None:
        wrapper = self.wrapper
        # Without a record of the parameters that a step uses, the buffer must hold zeros for the others.
        self._has_accumulated = wrapper.micro_step_id > 0 or not self.release.keeps_late_gradients
        if not wrapper.offload_optimizer:
            return
        if not self.release.keeps_late_gradients:
            self._use_late_gradients()
            return
        accumulated = (p for p in self._params if p.ds_id in wrapper._offload_boundary_param_ids)
        if any(wrapper.get_param_id(param) not in wrapper.norm_for_param_grads for param in accumulated):
            wrapper._finalize_offload_gradient_accumulation()

    def _use_late_gradients(self) -> None:
        """Copy gradients that only earlier micro-batches have, or zeros, to where the step reads them."""
        wrapper = self.wrapper
        wait_for_copies()
        buffers = wrapper._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for part, flat in enumerate(self.flat_partitions()):
            late = [
                (fragment, buffers[_ds_id(fragment.param)].view(-1).narrow(0, 0, fragment.num_elements))
                for fragment in self.fragments(part)
                if fragment.num_elements and wrapper.get_param_id(fragment.param) not in wrapper.norm_for_param_grads
            ]
            for fragment, gradient in late:
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                wrapper.norm_for_param_grads[wrapper.get_param_id(fragment.param)] = norm
                if not self.is_swapped(part):
                    fragment.view_of(flat.grad).copy_(gradient)
            if late and self.is_swapped(part):
                wrapper.optimizer_swapper.swap_out_gradients(
                    parameter=flat,
                    gradient_offsets=[fragment.start for fragment, _ in late],
                    gradient_tensors=[gradient.float() for _, gradient in late],
                )

    def clear_stale_gradients(self, part: int) -> None:
        for index, fragment in enumerate(self.fragments(part)):
            if fragment.num_elements and not self._has_gradient(fragment.param):
                if self.wrapper.offload_optimizer:
                    fragment.view_of(self.flat_partitions()[part].grad).zero_()
                else:
                    self.wrapper.averaged_gradients[part][index].zero_()

    def _has_gradient(self, param: Any) -> bool:
        """Return whether the buffer that the step reads holds a gradient of this step, or zeros."""
        if self.wrapper.offload_optimizer:
            return self.wrapper.get_param_id(param) in self.wrapper.norm_for_param_grads
        return not self.release.keeps_late_gradients or param.ds_id in self.wrapper._offload_boundary_param_ids

    def clear_accumulated_gradients(self) -> None:
        if self._has_accumulated:
            self.wrapper.grad_partitions_flat_buffer.zero_()

    # -- universal checkpoints -------------------------------------------------------------------------------------

    def load_part(self, part: int, folders: list[Path], key: str) -> Tensor:
        """Return this rank's flat partition of a state of a part, from the folders of its parameters."""
        loaded = torch.zeros_like(self.flat_partitions()[part])
        start = 0
        for param, folder in zip(self.model_groups()[part], folders, strict=True):
            partition = self._load_partition(param, folder, key)
            loaded.narrow(0, start, partition.numel()).copy_(partition)
            start += int(param.partition_numel())
        return loaded

    def _load_partition(self, param: Any, folder: Path, key: str) -> Tensor:
        if self.release.has_groups_per_param:
            return self.wrapper.load_hp_checkpoint_state(str(folder), key, param=param)
        # DeepSpeed's method takes the partition of the local rank in 0.16, and none of these dictionaries.
        content: Any = load_checkpoint_file(folder / f"{key}.pt")
        full: Tensor = (content[PARAM] if isinstance(content, dict) else content).view(-1)
        size = int(param.partition_numel())
        return full[size * self.partition_rank(param) :][:size]

    def copy_to_model(self) -> None:
        """Copy the float32 partitions to those of the model's parameters."""
        wrapper = self.wrapper
        for part, flat in enumerate(self.flat_partitions()):
            low_precision = wrapper.fp16_partitioned_groups_flat[part]
            if flat.numel():
                low_precision.data.copy_(flat.data)
            params = wrapper.fp16_partitioned_groups[part]
            for param, value in zip(params, wrapper.unflatten(low_precision, params), strict=True):
                param.data = value.data

    # -- a step ----------------------------------------------------------------------------------------------------

    def attach(self, source: ZeroMeanSource) -> None:
        super().attach(source)
        wrapper = self.wrapper
        self._reduced = ReducedGradients(wrapper, self.process_groups()[0], is_sorted=True)
        original_norm_groups, original_unscale = wrapper._get_norm_groups, type(wrapper).unscale_and_clip_grads

        @functools.wraps(original_norm_groups)
        def _get_norm_groups() -> list[Any]:
            source.check_coupled_decay()
            norms = original_norm_groups()
            self._observe(source, norms)
            return norms

        @functools.wraps(original_unscale)
        def unscale_and_clip_grads(sub_group_id: int, total_norm: Any) -> None:
            if self.is_swapped(sub_group_id):
                self.clear_stale_gradients(sub_group_id)  # not in memory before this point
            if not source.has_mean:
                one = torch.ones(1, dtype=torch.float64, device=source.device)
                original_unscale(_UnitGradientWrapper(wrapper, sub_group_id, one), sub_group_id, total_norm)
                source.compute_mean(one, self.global_grad_norm())

        wrapper._get_norm_groups = _get_norm_groups
        wrapper.unscale_and_clip_grads = unscale_and_clip_grads


class _UnitGradientWrapper:
    """Proxy of a stage-3 wrapper in which the gradient of a sub-group is a single 1."""

    def __init__(self, wrapper: Any, sub_group_id: int, one: Tensor) -> None:
        self._wrapper = wrapper
        self.fp32_partitioned_groups_flat = {sub_group_id: SimpleNamespace(grad=one)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


def _ds_id(param: Any) -> int:
    return param.ds_id  # set by stage 3


def _has_several_ranks(process_group: ProcessGroup | None) -> bool:
    return process_group is not None and dist.get_world_size(process_group) > 1
