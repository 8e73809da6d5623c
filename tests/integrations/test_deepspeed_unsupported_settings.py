"""Settings that cannot be exact are refused before the first step, on all ranks, with an alternative."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from adai_dist import Adai, AdaiW
from tests.integrations.deepspeed_engines import set_environment
from tests.integrations.deepspeed_setups import BF16, FP32_GRADIENTS, zero
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

CPU = {"device": "cpu"}
NVME = {"device": "nvme", "nvme_path": "/tmp", "buffer_count": 5}
ZENFLOW = {"topk_ratio": 0.5, "select_strategy": "step", "select_interval": 2, "update_interval": 2}
ONE_CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 10}

# Refused configurations, with the setting and the remedy that the message names.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "zenflow": (zero(2, offload_optimizer=CPU, zenflow=ZENFLOW), "zenflow", "remove it"),
    "zenflow-3": (zero(3, offload_optimizer=CPU, zenflow=ZENFLOW), "zenflow", "remove it"),
    "super-offload": (zero(3, offload_optimizer=CPU | {"super_offload": True}), "super_offload", '"device": "cpu"'),
    "twin-flow": (zero(3, offload_optimizer=CPU | {"ratio": 0.5}), "ratio = 0.5", "set it to 1.0"),
    "elastic-checkpoint": (zero(1, elastic_checkpoint=True), "elastic_checkpoint", "adai-dist to-universal"),
    "autocast-fp16": (
        zero(1) | {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        'torch_autocast.dtype = "float16"',
        '"bfloat16"',
    ),
    "fp16-without-zero": ({"fp16": {"enabled": True}}, "fp16 without ZeRO in DeepSpeed 0.", "use bf16, or ZeRO"),
    "nvme-buffers": (zero(3, offload_optimizer=NVME | {"buffer_count": 4}), "buffer_count = 4", "set it to 5 or more"),
    "nvme-buffers-read": (zero(3, offload_optimizer=NVME | {"pipeline_read": True}), "= 5", "set it to 10 or more"),
    "nvme-buffers-both": (
        zero(3, offload_optimizer=NVME | {"pipeline_read": True, "pipeline_write": True, "buffer_count": 14}),
        "buffer_count = 14",
        "set it to 15 or more",
    ),
    "one-cycle": (
        zero(1) | {"scheduler": {"type": "OneCycle", "params": ONE_CYCLE}},
        "cycle_momentum",
        '"cycle_momentum": false',
    ),
    "bf16-master-weights": (
        zero(2) | {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        "bf16.bf16_master_weights_and_grads",
        'write "state_dtype": "bfloat16"',
    ),
    "fp16-master-weights": (
        zero(2, offload_optimizer=CPU) | {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
        "fp16.fp16_master_weights_and_grads",
        "remove it",
    ),
    "deep-compile": (zero(3) | {"compile": {"deepcompile": True}}, "compile.deepcompile", "remove it"),
    "autoep-3": (
        zero(3) | {"expert_parallel": {"enabled": True, "autoep_size": 2}},
        "expert_parallel with ZeRO stage 3",
        "use ZeRO stage 0, 1 or 2",
    ),
}
# Refused configurations that leave process groups behind, so that each has processes of its own.
REFUSED_ALONE: dict[str, tuple[dict[str, Any], str, str]] = {
    "quantized-gradients-between-hosts": (
        zero(3, zero_quantized_gradients=True),
        "zero_quantized_gradients with 2 ranks on hosts of 1",
        "remove it",
    ),
    "sequence-parallel-mesh": (
        zero(2) | {"sequence_parallel_size": 2, "data_parallel_size": 1},
        "sequence_parallel_size with data_parallel_size",
        "initialize_sequence_parallel(size)",
    ),
    "bf16-optimizer-with-sequence-parallelism": (
        zero(1) | {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        'grad_accum_dtype = "fp32"',
        "use ZeRO stage 2",
    ),
}


def initialize(
    config: dict[str, Any], optimizer: Any = None, *, params: dict[str, Any] | None = None, mpu: Any = None
) -> Any:
    """Create an engine of a small model; the JSON names the optimizer unless one is passed."""
    set_environment()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if config.get("fp16"):  # the CPU accelerator would refuse, although all operations are supported
        type(get_accelerator()).is_fp16_supported = lambda self: True
    model = nn.Linear(6, 3, bias=False)
    named = {} if optimizer else {"optimizer": {"type": "Adai", "params": {"lr": 0.1, **(params or {})}}}
    client = optimizer(model.parameters()) if optimizer else None
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=client,
        model_parameters=None if client else model.parameters(),
        config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, **named, **config},
        mpu=mpu,
        dist_init_required=False,
    )
    return engine


def error_of(function: Any, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Return type and message of the error of a call, or empty strings."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def refused_on_this_rank() -> dict[str, tuple[str, str]]:
    return {name: error_of(initialize, config) for name, (config, _, _) in REFUSED.items()}


def refused_alone(name: str) -> tuple[str, str]:
    set_environment()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config, _, _ = REFUSED_ALONE[name]
    if name == "quantized-gradients-between-hosts":
        type(get_accelerator()).device_count = lambda self: 1  # as on two hosts
    if "grad_accum_dtype" not in config.get("data_types", {}):
        return error_of(initialize, config)
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp.initialize_sequence_parallel(2)
    return error_of(initialize, config, mpu=parallel_state_sp)


@functools.cache
def refused_on_all_ranks() -> list[dict[str, tuple[str, str]]]:
    return run_ranks(refused_on_this_rank, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_cannot_be_exact_is_refused(name: str) -> None:
    check_refused(REFUSED[name], [errors[name] for errors in refused_on_all_ranks()])


@pytest.mark.parametrize("name", REFUSED_ALONE)
def test_a_setting_with_its_own_groups_that_cannot_be_exact_is_refused(name: str) -> None:
    check_refused(REFUSED_ALONE[name], run_ranks(refused_alone, 2, name))


def check_refused(expected: tuple[dict[str, Any], str, str], errors: list[tuple[str, str]]) -> None:
    _, setting, remedy = expected
    first, second = errors
    assert first == second
    kind, message = first
    assert kind == "UnsupportedSetting", message
    assert setting in message
    assert message.index(setting) < message.index(remedy)


# -- unsupported optimizers and versions -------------------------------------------------------------------------------


def with_a_bound_of_its_own(stage: int) -> tuple[str, str]:
    return error_of(initialize, zero(stage), lambda params: Adai(params, lr=0.1, max_grad_norm=1.0))


@pytest.mark.parametrize("stage", [0, 2])
def test_max_grad_norm_is_refused(stage: int) -> None:
    for kind, message in run_ranks(with_a_bound_of_its_own, 2, stage):
        assert kind == "UnsupportedSetting"
        assert "max_grad_norm=1.0" in message
        assert "gradient_clipping" in message


def with_bfloat16_states_on_nvme() -> list[tuple[str, str]]:
    config = zero(3, offload_optimizer=NVME)
    return [
        error_of(initialize, config, params={"state_dtype": "bfloat16"}),
        error_of(initialize, config, lambda params: Adai(params, lr=0.1, state_dtype="bfloat16")),
    ]


def test_bfloat16_states_on_nvme_are_refused() -> None:
    ranks = run_ranks(with_bfloat16_states_on_nvme, 2)
    assert ranks[0] == ranks[1]
    for kind, message in ranks[0]:
        assert kind == "UnsupportedSetting"
        assert 'got state_dtype = "bfloat16" with "offload_optimizer" on NVMe' in message
        assert message.endswith('offload to "cpu", or use "float32"')


def with_another_optimizer_in_its_place() -> list[tuple[str, str]]:
    """Replace the optimizer as accelerate does under offload."""

    def replaced(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(AdaiW(params, lr=0.1).param_groups, lr=0.1)

    def callable_client(params: Any) -> Any:
        return lambda _: replaced(params)

    return [error_of(initialize, zero(1), replaced), error_of(initialize, zero(1), callable_client)]


def test_an_optimizer_that_replaces_adai_is_refused() -> None:
    for errors in run_ranks(with_another_optimizer_in_its_place, 2):
        for kind, message in errors:
            assert kind == "UnsupportedSetting"
            assert "replaced by SGD" in message
            assert '"zero_force_ds_cpu_optimizer": false' in message
            assert "DummyOptim" in message


def stepped_without_binding(stage: int) -> tuple[str, str]:
    set_environment()
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    DeepSpeedEngine._configure_optimizer = DeepSpeedEngine._configure_optimizer.__wrapped__
    ZERO_SUPPORTED_OPTIMIZERS.append(Adai)
    engine = initialize(zero(stage))
    engine.backward(engine(torch.ones(2, 6)).sum())
    return error_of(engine.step)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_of_an_unbound_wrapper_is_refused(stage: int) -> None:
    for kind, message in run_ranks(stepped_without_binding, 2, stage):
        assert kind == "RuntimeError"
        assert message.startswith("DeepSpeed must bind Adai before it steps it")
        assert "call adai_dist.register() before deepspeed.initialize()" in message


# Settings with which some releases lose gradients, with the first and the last range of these releases.
LOSING_GRADIENTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "bf16-optimizer": (zero(1) | BF16 | FP32_GRADIENTS, "0.18.6", "0.19.0", '"immediate_grad_update": true'),
    "scattered-1": (zero(1, contiguous_gradients=False), "0.16.0", "0.19.8", "contiguous_gradients = False on a CPU"),
    "scattered-2": (zero(2, contiguous_gradients=False), "0.16.0", "0.19.8", "contiguous_gradients = False on a CPU"),
}


@pytest.mark.parametrize("name", LOSING_GRADIENTS)
def test_a_setting_with_which_this_release_loses_gradients_is_refused(name: str) -> None:
    config, first, end, words = LOSING_GRADIENTS[name]
    is_refused = first <= TorchVersion(version("deepspeed")) < end
    for _, message in run_ranks(error_of, 2, initialize, config):
        assert (words in message) == is_refused


def own_methods_while_zero_drives() -> list[tuple[str, str]]:
    optimizer = initialize(zero(1)).basic_optimizer
    return [error_of(optimizer.clip_grad_norm_, 1.0), error_of(optimizer.configure_sharding), error_of(optimizer.step)]


def test_methods_that_conflict_with_zero_raise() -> None:
    for clip, shard, step in run_ranks(own_methods_while_zero_drives, 2):
        assert clip[0] == shard[0] == step[0] == "RuntimeError"
        assert "clip_grad_norm_()" in clip[1]
        assert "configure_sharding()" in shard[1]
        assert "engine.step()" in step[1]
