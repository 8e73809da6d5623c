"""What the adapters rely on in each range of DeepSpeed's releases.

The binding replaces, calls and reads names of DeepSpeed that are not public. Every one of them is in the tables
METHODS, ATTRIBUTES and SET_BY_STEP of the range, and is checked when an optimizer is bound. Where releases differ in
what they do, a field of the range says so, next to the pull request that changed it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version

from torch.torch_version import TorchVersion

logger: logging.Logger = logging.getLogger("adai_dist")

TESTED: tuple[tuple[str, str], ...] = (("0.16.0", "0.16.9"), ("0.18.6", "0.19.8"))
"""First and last releases that pass all tests. Newer ones are tried, after a warning; all others are refused.

The releases between lose gradients in common configurations, with any optimizer: 0.17.6 to 0.18.2 those of all
micro-batches but the last under ZeRO 2, and 0.17.6 to 0.18.5 never zero them in bf16 without ZeRO.
"""

Methods = Mapping[str, Mapping[str, tuple[str, ...]]]
Attributes = Mapping[str, tuple[str, ...]]

METHODS: Methods = {
    "DeepSpeedEngine": {
        "_configure_basic_optimizer": ("model_parameters",),
        "fp16_enabled": (),
        "get_data_types": (),
        "load_universal_checkpoint": (),
        "optimizer_name": (),
        "optimizer_params": (),
        "scheduler_name": (),
        "scheduler_params": (),
        "gradient_accumulation_steps": (),
        "zero_cpu_offload": (),
        "zero_elastic_checkpoint": (),
        "zero_force_ds_cpu_optimizer": (),
        "zero_offload_optimizer": (),
        "zero_optimization": (),
        "zero_optimization_stage": (),
        "zero_partial_offload": (),
        "zero_quantized_gradients": (),
    },
    "FP16_UnfusedOptimizer": {"step": ("closure",)},
    "DeepSpeedZeroOptimizer": {
        "step": ("closure",),
        "state_dict": (),
        "load_state_dict": (),
        "scaled_global_norm": ("norm_type",),
        "get_grad_norm_direct": ("gradients", "params", "norm_type"),
        "complete_grad_norm_calculation_for_cpu_offload": ("params",),
        "unscale_and_clip_grads": ("grad_groups_flat", "total_norm"),
        "get_gradient_for_reduction": ("param",),
        "get_param_id": ("param",),
        "overlapping_partition_gradients_reduce_epilogue": (),
        "reduce_independent_p_g_buckets_and_remove_grads": ("param", "i"),
        "_lazy_init_hp_params_optimizer_state": (),
        "_load_legacy_checkpoint": (),
        "_load_universal_checkpoint": ("checkpoint_folder", "load_optimizer_states"),
    },
    "DeepSpeedZeroOptimizer with offload": {
        "async_accumulate_grad_in_cpu_via_gpu": ("param",),
        "get_param_gradient_attribute": ("param",),
    },
    "DeepSpeedZeroOptimizer_Stage3": {
        "step": ("closure",),
        "state_dict": (),
        "load_state_dict": (),
        "load_hp_checkpoint_state_from_checkpoint_dir_stage3": ("checkpoint_dir",),
        "_load_global_state_stage3": ("sd",),
        "_get_norm_groups": (),
        "unscale_and_clip_grads": ("sub_group_id", "total_norm"),
        "get_param_id": ("param",),
        "reduce_independent_p_g_buckets_and_remove_grads": ("param",),
        "unflatten": (),
        "_swappable_optimizer_subgroup": ("sub_group_id",),
        "_prepare_sub_group": ("sub_group_id", "timer_names"),
        "_release_sub_group": ("sub_group_id", "timer_names"),
    },
    "DeepSpeedZeroOptimizer_Stage3 with offload": {},
    "DeepSpeedZeroOptimizer_Stage3 with NVMe": {
        "checkpoint_event_epilogue": (),
        "reset_swap_buffers": (),
        "_reassign_or_swap_out_partitioned_parameters": ("sub_group_id",),
    },
    "BF16_Optimizer": {
        "step": ("closure",),
        "state_dict": (),
        "load_state_dict": (),
        "_lazy_init_hp_params_optimizer_state": (),
        "_load_legacy_checkpoint": (),
        "_load_universal_checkpoint": ("checkpoint_folder", "load_optimizer_states"),
    },
}
"""Names of the parameters of each method, by class, and by a setting that the method depends on."""

ATTRIBUTES: Attributes = {
    "DeepSpeedEngine": (
        *("_config", "global_rank", "mesh_device", "module", "mpu", "param_names", "pipeline_parallelism"),
        *("sequence_parallel_size", "world_size"),
    ),
    "DeepSpeedEngine after configuration": ("basic_optimizer", "has_moe_layers", "optimizer"),
    "DeepSpeedEngine with model parallelism": ("expert_data_parallel_group", "seq_data_parallel_group"),
    "FP16_UnfusedOptimizer": ("_global_grad_norm", "fp16_groups", "fp32_groups", "overflow"),
    "DeepSpeedZeroOptimizer": (
        "_global_grad_norm",
        "_hp_optimizer_states_linked",
        "averaged_gradients",
        "bit16_groups",
        "cpu_offload",
        "dp_process_group",
        "loss_scale",
        "micro_step_id",
        "model_parallel_group",
        "model_parallel_rank",
        "mpu",
        "overlap_comm",
        "param_names",
        "params_in_partition",
        "partition_gradients",
        "real_dp_process_group",
        "round_robin_bit16_groups",
        "round_robin_bit16_meta",
        "round_robin_gradients",
        "single_partition_of_fp32_groups",
    ),
    "DeepSpeedZeroOptimizer with offload": (
        "accumulated_grads_in_cpu",
        "grad_position",
        "gradient_accumulation_steps",
        "local_overflow",
        "norm_for_param_grads",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "_global_grad_norm",
        "averaged_gradients",
        "dp_process_group",
        "fp16_groups",
        "fp16_partitioned_groups",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "loss_scale",
        "micro_step_id",
        "model_parallel_group",
        "model_parallel_rank",
        "offload_optimizer",
        "sub_group_to_group_id",
        "swap_optimizer",
    ),
    "DeepSpeedZeroOptimizer_Stage3 with offload": (
        "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
        "norm_for_param_grads",
    ),
    "DeepSpeedZeroOptimizer_Stage3 with NVMe": ("optimizer_swapper",),
    "optimizer_swapper of DeepSpeedZeroOptimizer_Stage3": ("swap_folder", "swap_out_gradients"),
    "parameter of DeepSpeedZeroOptimizer_Stage3": ("ds_id", "ds_numel", "partition_numel"),
    "BF16_Optimizer": (
        "_hp_optimizer_states_linked",
        "bf16_groups",
        "dp_process_group",
        "fp32_groups_flat_partition",
        "fp32_groups_gradient_flat_partition",
        "fp32_groups_has_gradients",
        "immediate_grad_update",
        "mpu",
        "param_names",
    ),
    "parameter of BF16_Optimizer": ("_hp_mapping",),
}
"""Attributes by class, and by a setting that they depend on."""

SET_BY_STEP: Attributes = {"BF16_Optimizer": ("_global_grad_norm",)}
"""Attributes by class that exist only once its method ``step`` has set them."""


@dataclass(frozen=True)
class Release:
    """The releases of DeepSpeed from one version up to the next range."""

    since: str
    methods: Methods
    attributes: Attributes
    set_by_step: Attributes
    has_tested_autotp: bool = False
    """Whether AutoTP has been tested; before, it does not run on a CPU."""
    swaps_optimizer_states: bool = False
    """Whether ZeRO 3 can keep optimizer states on NVMe; before, its process ends in a failed assertion in C++."""
    scales_loss_without_zero: bool = True
    """Whether the gradients that the fp16 wrapper without ZeRO unscales are those of a scaled loss."""
    reduces_bf16_gradients: bool = True
    """Whether BF16_Optimizer reduces the gradients of a step over the ranks, and not what it held before the step."""
    reduces_scattered_gradients_on_cpu: bool = False
    """Whether ZeRO 1 and 2 reduce gradients on a CPU if they are not in one buffer."""
    averages_micro_batches_of_pipelines: bool = False
    """Whether a pipeline divides the gradient by the number of micro-batches, as other engines do."""
    scales_pipeline_stages_alike: bool = True
    """Whether all stages of a pipeline have gradients of the same loss."""
    converts_sub_groups: bool = False
    """Whether ``ds_to_universal`` can convert checkpoints of ZeRO 3 with several sub-groups."""
    accumulates_offloaded_gradients: bool = False
    """Whether ZeRO 1 and 2 keep, under offload, the gradients of all micro-batches between the first and the last."""
    keeps_late_gradients: bool = False
    """Whether offload can still use the gradients of parameters that the last micro-batch does not use."""
    has_groups_per_param: bool = False
    """Whether parameters of ZeRO 3 may be partitioned over different process groups."""
    clips_by_default: bool = False
    """Whether gradients are clipped at 1.0 if the configuration does not set ``gradient_clipping``."""
    has_aligned_params: bool = False
    """Whether ZeRO 1 and 2 may put padding between parameters, and hold the resulting offsets."""
    has_tensor_parallel_partitions: bool = False
    """Whether the norm of ZeRO 3 is right for parameters partitioned over tensor-parallel ranks, as under AutoTP."""

    def later(
        self,
        since: str,
        methods: Methods | None = None,
        attributes: Attributes | None = None,
        unused: tuple[str, ...] = (),
    ) -> Release:
        """Return a copy for the releases from ``since`` on, with additional, changed and unused names."""
        all_methods: dict[str, dict[str, tuple[str, ...]]] = {}
        for owner, names in self.methods.items():
            merged = {**names, **(methods or {}).get(owner, {})}
            all_methods[owner] = {name: taken for name, taken in merged.items() if name not in unused}
        all_attributes: dict[str, tuple[str, ...]] = {}
        for owner, names in self.attributes.items():
            merged = (*names, *(attributes or {}).get(owner, ()))
            all_attributes[owner] = tuple(name for name in merged if name not in unused)
        return replace(self, since=since, methods=all_methods, attributes=all_attributes)


V0_16 = Release("0.16.0", METHODS, ATTRIBUTES, SET_BY_STEP)
# torch.autocast with ZeRO: https://github.com/deepspeedai/DeepSpeed/pull/6993
# ZenFlow: https://github.com/deepspeedai/DeepSpeed/pull/7391
# offload_states under ZeRO 1 and 2: https://github.com/deepspeedai/DeepSpeed/pull/7421
# SuperOffload: https://github.com/deepspeedai/DeepSpeed/pull/7559
# Several sub-groups: https://github.com/deepspeedai/DeepSpeed/pull/7585
# The fp16 wrapper without ZeRO unscales gradients of an unscaled loss: introduced by
# https://github.com/deepspeedai/DeepSpeed/pull/7665, reported in https://github.com/deepspeedai/DeepSpeed/pull/8393
# The same pull request moved the copy of bf16 gradients behind their reduction, and scales the loss of pipelines.
V0_18_6 = replace(
    V0_16.later(
        "0.18.6",
        methods={
            "DeepSpeedEngine": {
                "super_offload": (),
                "torch_autocast_dtype": (),
                "torch_autocast_enabled": (),
                "zenflow_config": (),
            },
            "DeepSpeedZeroOptimizer": {"reload_states": ("non_blocking",)},
        },
    ),
    has_tested_autotp=True,
    converts_sub_groups=True,
    scales_loss_without_zero=False,
    reduces_bf16_gradients=False,
    averages_micro_batches_of_pipelines=True,
    scales_pipeline_stages_alike=False,
)
# https://github.com/deepspeedai/DeepSpeed/pull/7967 and https://github.com/deepspeedai/DeepSpeed/pull/7981
V0_19_0 = replace(
    V0_18_6.later(
        "0.19.0",
        unused=("async_accumulate_grad_in_cpu_via_gpu", "get_param_gradient_attribute"),
    ),
    reduces_bf16_gradients=True,
    accumulates_offloaded_gradients=True,
)
# Process groups per parameter: https://github.com/deepspeedai/DeepSpeed/pull/8060
# Clipping by default: https://github.com/deepspeedai/DeepSpeed/pull/8068
# Gradients of pipelines: https://github.com/deepspeedai/DeepSpeed/pull/8154
V0_19_3 = replace(
    V0_19_0.later(
        "0.19.3",
        methods={
            "DeepSpeedZeroOptimizer_Stage3": {
                "_get_param_partition_group": ("param",),
                "_get_param_partition_rank": ("param",),
                "load_hp_checkpoint_state": ("folder", "key", "param"),
            }
        },
    ),
    scales_pipeline_stages_alike=True,
    has_groups_per_param=True,
    clips_by_default=True,
)
# NVMe: https://github.com/deepspeedai/DeepSpeed/pull/8212
V0_19_4 = replace(V0_19_3, since="0.19.4", swaps_optimizer_states=True)
# https://github.com/deepspeedai/DeepSpeed/pull/8225
V0_19_5 = replace(
    V0_19_4.later(
        "0.19.5",
        methods={
            "DeepSpeedZeroOptimizer with offload": {"_finalize_cpu_offload_gradient_accumulation": ()},
            "DeepSpeedZeroOptimizer_Stage3 with offload": {"_finalize_offload_gradient_accumulation": ()},
        },
        attributes={
            "DeepSpeedZeroOptimizer with offload": ("_offload_accumulated_param_ids",),
            "DeepSpeedZeroOptimizer_Stage3": ("_offload_boundary_param_ids",),
        },
        unused=(
            *("grad_position", "local_overflow", "swap_out_gradients"),
            "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
        ),
    ),
    keeps_late_gradients=True,
)
# The source of 0.19.7: parameter_alignment and compute_grad_norm
V0_19_7 = replace(
    V0_19_5.later(
        "0.19.7",
        attributes={
            "DeepSpeedZeroOptimizer": ("compute_grad_norm", "round_robin_bit16_offsets", "round_robin_bit16_padding")
        },
    ),
    has_aligned_params=True,
)
# The source of 0.19.8
V0_19_8 = replace(
    V0_19_7.later(
        "0.19.8",
        methods={"DeepSpeedZeroOptimizer_Stage3": {"_grad_norm_counts_every_rank": ("params", "process_group")}},
    ),
    reduces_scattered_gradients_on_cpu=True,
    has_tensor_parallel_partitions=True,
)

RELEASES = (V0_16, V0_18_6, V0_19_0, V0_19_3, V0_19_4, V0_19_5, V0_19_7, V0_19_8)
"""All ranges, the oldest first."""


@functools.cache
def installed_release() -> Release:
    """Return the range of the installed DeepSpeed, and warn, once, if it is newer than the tested ones.

    Raises:
        RuntimeError: it is older than the tested ones, or between them.

    Collective: none.
    """
    installed, newest = TorchVersion(version("deepspeed")), TESTED[-1][1]
    if installed > newest:
        logger.warning(
            "DeepSpeed %s is newer than %s, the newest release that this release of adai_dist was tested with; the "
            "methods and attributes that it needs are checked, but a change of their meaning would not be noticed",
            *(installed, newest),
        )
    elif not any(first <= installed <= last for first, last in TESTED):
        tested = " or ".join(f"{first} to {last}" for first, last in TESTED)
        raise RuntimeError(
            f"Adai needs DeepSpeed {tested}, got {installed}; run: pip install --upgrade 'adai-dist[deepspeed]'"
        )
    return next(release for release in reversed(RELEASES) if installed >= release.since)
