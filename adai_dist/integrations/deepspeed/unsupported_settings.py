"""Checks that refuse DeepSpeed settings under which the algorithm cannot be exact, before the first step."""

from __future__ import annotations

import itertools
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adai_dist.hyper import Hyper
from adai_dist.integrations.deepspeed.adapters.engine import model_parallel_group, requested, setting
from adai_dist.integrations.deepspeed.adapters.releases import installed_release
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.precision import Precision

NUM_SWAPPED_TENSORS = 5
"""Number of tensors per parameter in the NVMe swapper's buffers: parameter, gradient and three states."""

IDENTIFYING_KEYS = {"dampening", "decoupled", "maximize", "betas"}
"""Keys that together only parameter groups of this package have."""


class UnsupportedSetting(ValueError):
    """Error for a DeepSpeed setting under which these optimizers cannot be exact."""


def check_has_lr(engine: Any) -> None:
    """Refuse a configuration that names an optimizer without its learning rate.

    Raises:
        UnsupportedSetting: ``lr`` is missing.
    """
    params: dict[str, Any] = engine.optimizer_params() or {}
    if "lr" not in params:
        name = engine.optimizer_name()
        raise UnsupportedSetting(
            f"optimizer.params in DeepSpeed's configuration must have lr, got {sorted(params) or 'no params'}; write "
            f'"optimizer": {{"type": "{name}", "params": {{"lr": 1.0}}}}, with a learning rate for your model'
        )


def check_config(engine: Any) -> None:
    """Refuse unsupported settings of the configuration.

    Raises:
        UnsupportedSetting: a setting is not supported; the message names an alternative.

    Collective: none; the same on all ranks.
    """
    offload = engine.zero_offload_optimizer()
    if setting(engine, "zenflow_config") is not None:
        _refuse("zero_optimization.zenflow", "steps some columns with its own Adam", "remove it")
    if setting(engine, "super_offload"):
        _refuse(
            "zero_optimization.offload_optimizer.super_offload",
            "steps parameters with its own Adam during the backward pass",
            'use "offload_optimizer": {"device": "cpu"} without it',
        )
    if engine.zero_partial_offload() < 1.0:
        _refuse(
            f"zero_optimization.offload_optimizer.ratio = {engine.zero_partial_offload()!r}",
            "steps the rest of the parameters with its own AdamW",
            "set it to 1.0",
        )
    if engine.zero_elastic_checkpoint():
        _refuse(
            "zero_optimization.elastic_checkpoint",
            "saves checkpoints that cannot be loaded",
            "remove it, and use `adai-dist to-universal` to change the number of ranks",
        )
    if setting(engine, "torch_autocast_enabled") and setting(engine, "torch_autocast_dtype") == torch.float16:
        if engine.zero_optimization():
            _refuse(
                'torch_autocast.dtype = "float16" with zero_optimization',
                "updates the loss scale between the parts of one step",
                'use "bfloat16", or the fp16 section instead of torch_autocast',
            )
    elif engine.fp16_enabled() and not engine.zero_optimization() and not installed_release().scales_loss_without_zero:
        _refuse(
            f"fp16 without ZeRO in DeepSpeed {deepspeed.__version__}",
            "unscales gradients of a loss that was not scaled, so that the model would not train",
            "use bf16, or ZeRO stage 1 to 3",
        )
    _check_precision(engine)
    _check_parallelism(engine)
    if _is_on_nvme(offload):
        _check_nvme(offload, engine.zero_optimization_stage())
        if engine.load_universal_checkpoint():
            _refuse(
                "checkpoint.load_universal with NVMe offload",
                "loads nothing into tensors that are on disk",
                'load it once with "device": "cpu" and save an ordinary checkpoint',
            )
    if engine.scheduler_name() == "OneCycle" and (engine.scheduler_params() or {}).get("cycle_momentum", True):
        _refuse(
            "scheduler.params.cycle_momentum of OneCycle (true by default)",
            "would cycle betas[0], which is not a momentum",
            'set "cycle_momentum": false',
        )


def _check_precision(engine: Any) -> None:
    for section, key in (
        ("bf16", "bf16_master_weights_and_grads"),
        ("bfloat16", "bf16_master_weights_and_grads"),
        ("fp16", "fp16_master_weights_and_grads"),
    ):
        if requested(engine, section, key):
            _refuse(
                f"{section}.{key}",
                "rounds the weights to 16 bits after every step",
                "remove it, so that float32 copies of the weights are stepped; to halve the states, write "
                '"state_dtype": "bfloat16" among the params of the optimizer',
            )
    accelerator: Any = get_accelerator()
    is_scattered = requested(engine, "zero_optimization", "contiguous_gradients") is False
    is_reduced = accelerator.device_name() != "cpu" or installed_release().reduces_scattered_gradients_on_cpu
    if is_scattered and not is_reduced and engine.zero_optimization_stage() in (1, 2):
        _refuse(
            f"zero_optimization.contiguous_gradients = False on a CPU in DeepSpeed {deepspeed.__version__}",
            "steps gradients that are not reduced over the ranks",
            "remove it",
        )
    if requested(engine, "compile", "deepcompile"):
        # Its graph reduces gradients past ZeRO's hooks, by which the binding knows the parameters used in a step.
        _refuse(
            "compile.deepcompile",
            "reduces gradients without recording which parameters have one",
            "remove it; engine.compile() without it is supported",
        )


def _check_parallelism(engine: Any) -> None:
    stage = engine.zero_optimization_stage()
    num_micro_batches = engine.gradient_accumulation_steps()
    has_stages = engine.pipeline_parallelism and engine.module.num_stages > 1
    if has_stages and num_micro_batches > 1 and not installed_release().scales_pipeline_stages_alike:
        _refuse(
            f"a pipeline with {num_micro_batches} micro-batches per step in DeepSpeed {deepspeed.__version__}",
            "divides the gradients of each stage but the last by that number again",
            "install deepspeed>=0.19.3, or set gradient_accumulation_steps to 1",
        )
    if (requested(engine, "tensor_parallel", "autotp_size") or 0) > 1 and not installed_release().has_tested_autotp:
        _refuse(
            f"tensor_parallel.autotp_size in DeepSpeed {deepspeed.__version__}",
            "has not been tested with Adai",
            "install deepspeed>=0.18.6, or remove it",
        )
    if (requested(engine, "zero_optimization", "mics_shard_size") or -1) > 0:
        _refuse(
            "zero_optimization.mics_shard_size",
            "partitions the model over a part of the ranks, with other gradient norms",
            "remove it; zero_hpz_partition_size is supported",
        )
    accelerator: Any = get_accelerator()
    num_devices: int = accelerator.device_count()
    if engine.zero_quantized_gradients() and engine.world_size > num_devices and stage == 3:
        _refuse(
            f"zero_optimization.zero_quantized_gradients with {engine.world_size} ranks on hosts of {num_devices}",
            "rounds gradients to 4 bits between hosts, which has not been verified",
            "remove it",
        )
    if stage == 3 and requested(engine, "expert_parallel", "enabled"):
        _refuse(
            "expert_parallel with ZeRO stage 3",
            "partitions experts over other ranks than the rest of the model",
            "use ZeRO stage 0, 1 or 2",
        )
    if engine.sequence_parallel_size <= 1:
        return
    if engine.mesh_device is not None:
        _refuse(
            "sequence_parallel_size with data_parallel_size, or mesh_param",
            "reduces no gradients over the sequence-parallel ranks, so that their copies of the model drift apart",
            "call deepspeed.runtime.sequence_parallel.parallel_state_sp.initialize_sequence_parallel(size), and pass "
            "that module to deepspeed.initialize as mpu",
        )
    dtypes = (torch.bfloat16, torch.float32)
    if stage == 1 and engine.get_data_types() == dtypes and not engine.zero_cpu_offload():
        _refuse(
            'data_types.grad_accum_dtype = "fp32" with bf16, ZeRO stage 1 and sequence parallelism',
            "leaves gradients of all sequence-parallel ranks but the first out of the norm",
            "use ZeRO stage 2",
        )


def _is_on_nvme(offload: Any) -> bool:
    return offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme"


def _offloads_to_nvme(engine: Any) -> bool:
    """Return whether states are on disk; with ZeRO 1 and 2, DeepSpeed keeps them in CPU memory."""
    return engine.zero_optimization_stage() == 3 and _is_on_nvme(engine.zero_offload_optimizer())


def _check_nvme(offload: Any, stage: int) -> None:
    if stage != 3:
        return  # DeepSpeed keeps the states in CPU memory
    if not installed_release().swaps_optimizer_states:
        _refuse(
            f'zero_optimization.offload_optimizer.device = "nvme" in DeepSpeed {deepspeed.__version__}',
            "ends in a failed assertion of DeepSpeed with any optimizer",
            'install deepspeed>=0.19.4, or offload to "cpu"',
        )
    num_tiles = 1 + bool(offload.pipeline_read) + bool(offload.pipeline_write)
    needed = NUM_SWAPPED_TENSORS * num_tiles
    if offload.buffer_count < needed:
        _refuse(
            f"zero_optimization.offload_optimizer.buffer_count = {offload.buffer_count!r}",
            f"is too small for parameter, gradient and three states of {num_tiles} sub-group(s)",
            f"set it to {needed} or more",
        )


def check_no_max_grad_norm(optimizer: AdaptiveInertia) -> None:
    """Refuse ``max_grad_norm``, which would have no effect because DeepSpeed clips.

    Raises:
        UnsupportedSetting: ``max_grad_norm`` is set.
    """
    if optimizer.max_grad_norm is not None:
        raise UnsupportedSetting(
            f"gradients must be clipped by DeepSpeed, got max_grad_norm={optimizer.max_grad_norm!r}; "
            'set "gradient_clipping" in its configuration instead'
        )


def check_state_dtype(engine: Any, optimizer: AdaptiveInertia) -> None:
    """Refuse dtypes of the states that the engine cannot keep.

    Raises:
        UnsupportedSetting: ``state_dtype`` is neither float32 nor bfloat16, or is bfloat16 under NVMe offload.
    """
    state_dtype: str = optimizer.precision.state_dtype
    if state_dtype == "float32":
        return
    if state_dtype != "bfloat16":
        _refuse(
            f"state_dtype = {state_dtype!r}",
            "stores records of 32 elements, which ZeRO's flat partitions cut",
            'use "bfloat16" or "float32"',
        )
    if _offloads_to_nvme(engine):
        _refuse(
            'state_dtype = "bfloat16" with "offload_optimizer" on NVMe',
            "swaps tensors of one dtype, that of the float32 parameters",
            'offload to "cpu", or use "float32"',
        )


def check_same_places(engine: Any, places: dict[Tensor, tuple[int, int]]) -> None:
    """Refuse stochastic rounding if copies of a parameter on model-parallel ranks would be rounded differently.

    Tensor parallelism copies small parameters, and a pipeline the layers that stages share.

    Args:
        places: ordinal and global index of the first element of each parameter of the model, from which its random
            bits are derived.

    Raises:
        UnsupportedSetting: a parameter of the same name has another place on another rank.

    Collective: all ranks, two objects gathered, if something is rounded and the engine has an mpu; otherwise none.
    """
    process_group = model_parallel_group(engine)
    precision: Precision = engine.basic_optimizer.precision
    is_rounding = precision.state_dtype != "float32" or precision.master_weights is False
    if process_group is None or not is_rounding:
        return
    found: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, {engine.param_names[param]: place for param, place in places.items()}, process_group)
    of_name: dict[str, set[tuple[int, int]]] = {}
    for name, place in itertools.chain.from_iterable(of_rank.items() for of_rank in found):
        of_name.setdefault(name, set()).add(place)
    moved: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(moved, next((name for name, found in of_name.items() if len(found) > 1), None))
    name = next(filter(None, moved), None)
    if name is not None:
        _refuse(
            f"state_dtype = {precision.state_dtype!r} and master_weights = {precision.master_weights!r} with {name!r} "
            "at different offsets on model-parallel ranks",
            "would round its copies differently",
            "leave both out",
        )


def check_no_coupled_decay(optimizer: AdaptiveInertia) -> None:
    """Refuse coupled decay under NVMe offload, which has one sub-group at a time in memory.

    Coupled decay needs the inner products of all gradients and parameters before the first sub-group is stepped.

    Raises:
        UnsupportedSetting: a parameter group has coupled decay.
    """
    for param_group in optimizer.param_groups:
        if Hyper.from_param_group(param_group).coupled_decay:
            _refuse(
                f"weight_decay = {param_group['weight_decay']!r} with decoupled = False under NVMe offload",
                "needs the inner products of gradients with parameters that are on disk",
                'use decoupled decay (AdaiW, or "decoupled": true), or offload to "cpu"',
            )


def check_not_replaced(optimizer: Any, expected: type[AdaptiveInertia] | None = None) -> None:
    """Refuse an optimizer that has replaced one of this package.

    Args:
        optimizer: the optimizer that DeepSpeed was given or will step.
        expected: its required class, if known.

    Raises:
        UnsupportedSetting: the optimizer has another class.
    """
    param_groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    has_own_keys = any(param_group.keys() >= IDENTIFYING_KEYS for param_group in param_groups)
    if not isinstance(optimizer, expected or AdaptiveInertia) and (expected or has_own_keys):
        _refuse(
            f"an Adai optimizer replaced by {type(optimizer).__name__}",
            "is what accelerate does to a client optimizer under offload_optimizer",
            'set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration, or name the optimizer there '
            'and pass accelerate.utils.DummyOptim: "optimizer": {"type": "Adai", "params": {"lr": ...}}',
        )


def _refuse(setting: str, reason: str, remedy: str) -> None:
    raise UnsupportedSetting(f"DeepSpeed's settings must keep Adai exact, got {setting}, which {reason}; {remedy}")
