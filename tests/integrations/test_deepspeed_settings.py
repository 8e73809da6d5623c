"""Settings of DeepSpeed that change who holds, reduces or accumulates what: the trajectory stays the oracle's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integrations.deepspeed_engines import (
    Family,
    Prescribed,
    Seen,
    gather,
    note_step,
    set_environment,
    start,
    walk,
)
from tests.integrations.deepspeed_oracle_check import check_all_ranks
from tests.integrations.deepspeed_setups import (
    BF16,
    CLIPPED,
    COUPLED,
    CPU_OFFLOAD,
    FP32_GRADIENTS,
    UNUSED,
    Setup,
    zero,
)

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

NOT_SCATTERED = {"reduce_scatter": False}  # DeepSpeed requires it for a divisor before the reduction in stages 2 and 3
MEASURED = {
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "dump_state": True,
    "disable_python_gc": True,
    "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": "/dev/null"},
    "comms_logger": {"enabled": True},
}
OPTIONS = Family(
    {
        "stage-1-small-buckets": Setup(zero(1, reduce_bucket_size=60, allgather_bucket_size=60), CLIPPED),
        "stage-2-small-buckets": Setup(zero(2, reduce_bucket_size=60, allgather_bucket_size=60), CLIPPED),
        "stage-3-small-buckets": Setup(zero(3, reduce_bucket_size=60), CLIPPED),
        "stage-1-single-rank-buckets": Setup(zero(1, use_multi_rank_bucket_allreduce=False), CLIPPED),
        "stage-2-broadcast-partitions": Setup(zero(2, allgather_partitions=False), CLIPPED),
        "stage-2-measured": Setup(zero(2) | MEASURED, CLIPPED),
        "stage-2-expert-topology": Setup(zero(2) | {"use_data_before_expert_parallelism": True}, CLIPPED),
        "stage-3-all-reduced-parameters": Setup(zero(3, stage3_use_all_reduce_for_fetch_params=True), CLIPPED),
        "stage-3-sequential-gathers": Setup(zero(3, stage3_allgather_sequential=True), CLIPPED),
        "stage-3-nothing-persistent": Setup(zero(3, stage3_param_persistence_threshold=0), CLIPPED),
        "stage-3-partly-persistent": Setup(
            zero(3, stage3_param_persistence_threshold=20, stage3_model_persistence_threshold=40), CLIPPED
        ),
        "stage-3-few-live-parameters": Setup(
            zero(3, stage3_max_live_parameters=10, stage3_max_reuse_distance=10, stage3_prefetch_bucket_size=10),
            CLIPPED,
        ),
        "stage-3-plain-linear": Setup(zero(3, memory_efficient_linear=False, override_module_apply=False), CLIPPED),
        "stage-3-checked": Setup(zero(3, enable_sanity_checks=True, log_trace_cache_warnings=True), CLIPPED),
        "stage-3-quantized-gradients-on-one-host": Setup(zero(3, zero_quantized_gradients=True) | BF16, CLIPPED),
        "stage-1-prescaled": Setup(zero(1) | {"prescale_gradients": True}, CLIPPED),
        "stage-2-dtypes": Setup(
            zero(2) | BF16 | {"data_types": {"param_dtype": "bf16", "buffer_dtype": "fp32"}}, CLIPPED
        ),
        "stage-2-fp16-auto-cast": Setup(
            zero(2) | {"fp16": {"enabled": True, "auto_cast": True, "loss_scale": 8}}, CLIPPED
        ),
        "stage-3-autocast-modules": Setup(
            zero(3)
            | {
                "torch_autocast": {
                    "enabled": True,
                    "dtype": "bfloat16",
                    "lower_precision_safe_modules": ["torch.nn.Linear"],
                }
            },
            CLIPPED,
        ),
        "bf16-optimizer-immediate-update": Setup(
            zero(1) | {"bf16": {"enabled": True, "immediate_grad_update": True}} | FP32_GRADIENTS,
            CLIPPED,
            num_micro_batches=2,
        ),
        "stage-3-hybrid-engine-offload": Setup(
            zero(3, **CPU_OFFLOAD) | BF16 | {"hybrid_engine": {"enabled": True}}, CLIPPED
        ),
    }
    | {
        f"stage-{stage}-{name}": Setup(zero(stage, **options) | config, CLIPPED)
        for stage in (0, 1, 2, 3)
        for name, options, config in (
            ("predivided", NOT_SCATTERED if stage > 1 else {}, {"gradient_predivide_factor": 4.0}),
            ("communicated-in-fp32", {}, BF16 | {"communication_data_type": "fp32"}),
            ("hybrid-engine", {}, {"hybrid_engine": {"enabled": True}}),
        )
    }
    | {
        f"stage-{stage}-accumulated-in-fp32{suffix}": Setup(
            zero(stage, **options) | BF16 | FP32_GRADIENTS, CLIPPED, num_micro_batches=2
        )
        for stage in (2, 3)
        for suffix, options in {"": {}, "-offload": CPU_OFFLOAD}.items()
    }
)


@pytest.mark.parametrize("name", OPTIONS.setups)
def test_every_setting_follows_the_oracle(name: str) -> None:
    check_all_ranks(OPTIONS, name)


# -- ways to accumulate gradients and to reduce them -------------------------------------------------------------------

Loss = Callable[[int], torch.Tensor]
"""The loss of a micro-batch, by its index."""


def walk_with(setup: Setup, backward: Callable[[Any, Loss, int], None], loss_divisor: int = 1) -> Seen:
    """Take all steps, with another loop over the micro-batches than the usual one. Collective: all ranks."""
    return take_steps(setup, Prescribed(setup), start, backward, loss_divisor)


def take_steps(
    setup: Setup,
    model: Prescribed,
    create: Callable[[Setup, Prescribed], Any],
    backward: Callable[[Any, Loss, int], None],
    loss_divisor: int,
) -> Seen:
    engine = create(setup, model)
    seen = Seen()
    num_parts = dist.get_world_size() * setup.num_micro_batches
    for step in range(setup.problem.steps):

        def loss(micro_batch: int, step: int = step) -> torch.Tensor:
            part = dist.get_rank() * setup.num_micro_batches + micro_batch
            return engine(step, part, num_parts) / loss_divisor

        backward(engine, loss, setup.num_micro_batches)
        seen.unscaled_by.append(1.0)
        note_step(engine, seen)
    gather(engine, model.by_name(), seen)
    engine.destroy()
    return seen


def usual(engine: Any, loss: Loss, num_micro_batches: int) -> None:
    for micro_batch in range(num_micro_batches):
        engine.backward(loss(micro_batch))
        engine.step()


def with_a_single_step(engine: Any, loss: Loss, num_micro_batches: int) -> None:
    for micro_batch in range(num_micro_batches):
        engine.backward(loss(micro_batch))
    engine.step()


def with_no_sync(engine: Any, loss: Loss, num_micro_batches: int) -> None:
    for micro_batch in range(num_micro_batches - 1):
        with engine.no_sync():
            engine.backward(loss(micro_batch))
        engine.step()
    engine.backward(loss(num_micro_batches - 1))
    engine.step()


def with_coalesced_reduction(engine: Any, loss: Loss, num_micro_batches: int) -> None:
    with engine.coalesce_grad_reduction():
        for micro_batch in range(num_micro_batches):
            engine.backward(loss(micro_batch))
    engine.step()


def with_explicit_boundaries(engine: Any, loss: Loss, num_micro_batches: int) -> None:
    for micro_batch in range(num_micro_batches):
        engine.set_gradient_accumulation_boundary(micro_batch == num_micro_batches - 1)
        engine.backward(loss(micro_batch))
    engine.step()


def with_backward_of_torch(engine: Any, loss: Loss, num_micro_batches: int) -> None:
    for micro_batch in range(num_micro_batches):
        loss(micro_batch).backward()
        engine.step()


def with_flags_of_muon(engine: Any, loss: Loss, num_micro_batches: int) -> None:
    for parameter in engine.module.parameters():
        parameter.use_muon = parameter.dim() > 1
    usual(engine, loss, num_micro_batches)


UNMANAGED = {"managed_gradient_accumulation": False}
ONE_MICRO_BATCH = {"gradient_accumulation_steps": 1}


def accumulating(stages: tuple[int, ...], config: dict[str, Any], **options: Any) -> dict[str, Setup]:
    """Return setups of two micro-batches without and with offload, which uses unused parameters, and BF16_Optimizer."""
    setups = {f"stage-{stage}": Setup(zero(stage) | config, CLIPPED, num_micro_batches=2) for stage in stages}
    setups |= {
        f"stage-{stage}-offload-bf16": Setup(
            zero(stage, **CPU_OFFLOAD) | BF16 | config, UNUSED, num_micro_batches=2, **options
        )
        for stage in stages
        if stage
    }
    return setups


BF16_OPTIMIZER = zero(1) | BF16 | FP32_GRADIENTS
ACCUMULATION: dict[str, Family] = {
    backward.__name__: Family(setups, functools.partial(walk_with, backward=backward, loss_divisor=divisor))
    for backward, setups, divisor in (
        (
            with_a_single_step,
            accumulating((0, 1, 2, 3), UNMANAGED)
            | {"bf16-optimizer": Setup(BF16_OPTIMIZER | UNMANAGED, CLIPPED, num_micro_batches=2)},
            1,
        ),
        (
            with_no_sync,
            accumulating((0, 1), {}) | {"bf16-optimizer": Setup(BF16_OPTIMIZER, CLIPPED, num_micro_batches=2)},
            1,
        ),
        (with_coalesced_reduction, accumulating((1, 2, 3), ONE_MICRO_BATCH), 2),
        (with_explicit_boundaries, accumulating((0, 1, 2, 3), {}), 1),
        (with_backward_of_torch, accumulating((1, 2, 3), {}), 1),
        (with_flags_of_muon, accumulating((1, 2, 3), {}), 1),
    )
}
SUMMED = Family(
    {
        f"stage-{stage}{suffix}": Setup(zero(stage) | dtype | {"gradient_allreduce_op": "sum"}, CLIPPED)
        for stage in (0, 1, 2)
        for suffix, dtype in {"": {}, "-bf16": BF16}.items()
    },
    functools.partial(walk_with, backward=usual, loss_divisor=2),
)


@pytest.mark.parametrize(
    ("way", "name"), [(way, name) for way, family in ACCUMULATION.items() for name in family.setups]
)
def test_every_way_to_accumulate_follows_the_oracle(way: str, name: str) -> None:
    check_all_ranks(ACCUMULATION[way], name)


@pytest.mark.parametrize("name", SUMMED.setups)
def test_summed_gradients_follow_the_oracle(name: str) -> None:
    check_all_ranks(SUMMED, name)


# -- ZeRO++ and sequence parallelism, on two groups of two ranks -------------------------------------------------------

# Multiples of 4 elements on each rank, and on two ranks of 8, which quantization needs.
EVEN = replace(
    CLIPPED,
    groups=tuple(
        (hyper, tuple(replace(spec, shape=(16, *spec.shape[1:])) for spec in specs)) for hyper, specs in CLIPPED.groups
    ),
    max_grad_norm=70.0,
)
HPZ: dict[str, Family] = {
    title: Family(
        {
            f"stage-3{suffix}": Setup(zero(3, zero_hpz_partition_size=2, **options) | config, problem)
            for suffix, options, config, problem in (
                ("", {}, {}, problem),
                ("-bf16", {"sub_group_size": 50}, BF16, problem.with_all(decoupled=False)),
                ("-offload", CPU_OFFLOAD, {}, problem),
            )
        },
        functools.partial(walk_with, backward=usual),
        world_size=4,
    )
    for title, problem in {"even": EVEN, "uneven": CLIPPED}.items()
}


def walk_sequence_parallel(setup: Setup) -> Seen:
    """Take all steps with two sequence-parallel ranks in each replica. Collective: all ranks."""
    # DeepSpeed adds up the gradients of a replica's ranks, but under ZeRO 3 it averages over all ranks.
    return take_steps(setup, Prescribed(setup), start_sequence_parallel, usual, 1 if setup.stage == 3 else 2)


def start_sequence_parallel(setup: Setup, model: Prescribed) -> Any:
    set_environment()
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(2)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=setup.problem.param_groups(model.by_name()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": setup.problem.max_grad_norm or 0.0,
            "optimizer": {"type": setup.optimizer, "params": {"lr": 1.0}},
            **setup.config,
        },
        mpu=parallel_state_sp,
        dist_init_required=False,
    )
    return engine


SEQUENCE_PARALLEL = Family(
    {
        "stage-0": Setup(zero(0), CLIPPED),
        "stage-0-bf16": Setup(zero(0) | BF16, COUPLED),
        "stage-1": Setup(zero(1), CLIPPED),
        "stage-2-bf16": Setup(zero(2) | BF16, COUPLED),
        "stage-2-offload": Setup(zero(2, **CPU_OFFLOAD), CLIPPED),
        "stage-3": Setup(zero(3, sub_group_size=50), COUPLED),
        "stage-3-offload-bf16": Setup(zero(3, **CPU_OFFLOAD) | BF16, CLIPPED),
    },
    walk_sequence_parallel,
    world_size=4,
)


@pytest.mark.parametrize(("title", "name"), [(title, name) for title, family in HPZ.items() for name in family.setups])
def test_secondary_partitions_follow_the_oracle(title: str, name: str) -> None:
    check_all_ranks(HPZ[title], name)


@pytest.mark.parametrize("name", SEQUENCE_PARALLEL.setups)
def test_sequence_parallelism_follows_the_oracle(name: str) -> None:
    check_all_ranks(SEQUENCE_PARALLEL, name)


# -- quantized weights -------------------------------------------------------------------------------------------------


class Quantizer:
    """The arithmetic of DeepSpeed's CUDA operator for quantized weights, which has no version for a CPU."""

    Symmetric = None
    num_calls = 0

    def quantize(
        self, tensor: torch.Tensor, groups: int, bits: int, symmetric: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_calls += 1
        rows = tensor.float().view(groups, -1)
        scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        return (rows / scales).round().to(torch.int8).view(tensor.shape), scales.view(-1)

    def dequantize(
        self, values: torch.Tensor, scales: torch.Tensor, groups: int, bits: int, symmetric: None
    ) -> torch.Tensor:
        return (values.view(groups, -1).float() * scales.view(groups, 1)).half().view(values.shape)


def walk_quantized(setup: Setup) -> Seen:
    """Take all steps with the operator replaced by its arithmetic. Collective: all ranks."""
    set_environment()
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    CUDAQuantizer.quantizer_cuda_module = Quantizer()
    seen = walk(setup)
    assert CUDAQuantizer.quantizer_cuda_module.num_calls > 0
    return seen


QWZ = {"zero_quantized_weights": True, "stage3_param_persistence_threshold": 0}
QUANTIZED = Family(
    {
        "stage-3-bf16": Setup(zero(3, **QWZ) | BF16, EVEN),
        "stage-3-offload-bf16": Setup(zero(3, **QWZ, **CPU_OFFLOAD) | BF16, EVEN.with_all(decoupled=False)),
    },
    walk_quantized,
)


@pytest.mark.parametrize("name", QUANTIZED.setups)
def test_quantized_weights_follow_the_oracle(name: str) -> None:
    check_all_ranks(QUANTIZED, name)
