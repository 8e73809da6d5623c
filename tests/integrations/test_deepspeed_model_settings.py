"""Settings of DeepSpeed that depend on the model, or round its gradients, compared with the recorded gradients."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.integrations.deepspeed_engines import Family, set_environment
from tests.integrations.deepspeed_models import Captured, capture, check_captured, walk_tensor_parallel
from tests.integrations.deepspeed_setups import BF16, CPU_OFFLOAD, FP32_GRADIENTS, Setup, zero
from tests.integrations.test_deepspeed_models import CLIPPED, CLIPPED_COUPLED, DECOUPLED

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.down = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self.up(inputs).tanh())


class Nested(nn.Module):
    """Linear layers, two of them in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 6)
        self.block = Block()
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.block(self.first(inputs).tanh())).square().mean()


class ConfigOfExperts:
    """The attributes by which AutoEP recognizes a model."""

    model_type = "mixtral"
    num_local_experts = 4
    num_experts_per_tok = 2
    hidden_size = 8
    intermediate_size = 6


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.5 * torch.randn(4, 12, 8))
        self.down_proj = nn.Parameter(0.5 * torch.randn(4, 8, 6))


class Routed(nn.Module):
    """Block that AutoEP replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = Experts()
        self.top_k = 2


class WithExperts(nn.Module):
    """Model with the module names of Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ConfigOfExperts()
        layer = nn.Module()
        layer.up, layer.down, layer.mlp = nn.Linear(8, 6), nn.Linear(6, 8), Routed()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])
        self.lm_head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        layer = self.model.layers[0]
        hidden = layer.down(layer.up(inputs).tanh()).tanh()
        return self.lm_head(hidden + layer.mlp(hidden)).square().mean()


def inputs_of(setup: Setup, shape: tuple[int, ...], step: int) -> dict[str, Tensor]:
    num_copies = setup.config.get("tensor_parallel", {}).get("autotp_size", 1)  # tensor-parallel ranks share a batch
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank() // num_copies)
    return {"inputs": 3 * torch.randn(shape, generator=generator).to(setup.dtype)}


def name_only(name: str, parameter: nn.Parameter) -> str:
    return name


def initialize() -> None:
    set_environment()
    import deepspeed

    torch.manual_seed(0)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def walk_nested(setup: Setup) -> Captured:
    """Train the linear layers. Collective: all ranks."""
    initialize()
    return capture(setup, Nested(), name_only, functools.partial(inputs_of, setup, (7, 20)))


def walk_initialized(setup: Setup) -> Captured:
    """Train a model that is partitioned while it is created. Collective: all ranks."""
    initialize()
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 1, **setup.config}):
        torch.manual_seed(0)
        model = Nested()
    return capture(setup, model, name_only, functools.partial(inputs_of, setup, (7, 20)))


def walk_compiled(setup: Setup) -> Captured:
    """Train a compiled model, without generated code. Collective: all ranks."""
    initialize()
    from torch._dynamo.utils import counters

    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    captured = capture(
        setup,
        Nested(),
        name_only,
        functools.partial(inputs_of, setup, (7, 20)),
        prepare=lambda engine: engine.compile(backend="eager"),
    )
    assert counters["frames"]["ok"] > 0
    return captured


def walk_autoep(setup: Setup) -> Captured:
    """Train experts that AutoEP spreads over the ranks. Collective: all ranks."""
    initialize()
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.runtime.utils import is_model_parallel_parameter

    num_parts = setup.config["expert_parallel"]["autoep_size"]

    def key(name: str, parameter: nn.Parameter) -> str:
        is_divided = is_moe_param(parameter) or is_model_parallel_parameter(parameter)
        return f"{name}@{dist.get_rank() % num_parts}" if is_divided else name

    return capture(setup, WithExperts(), key, functools.partial(inputs_of, setup, (2, 6, 8)))


def problem(stage: int) -> Any:
    return CLIPPED if stage else DECOUPLED  # without ZeRO, the recorded gradients are not yet clipped


NESTED = Family(
    {
        f"stage-{stage}-communicated-in-{dtype}": Setup(
            zero(stage) | {"communication_data_type": dtype}, problem(stage)
        )
        for stage in (0, 1, 2, 3)
        for dtype in ("bf16", "fp16")
    }
    | {
        f"stage-{stage}-accumulated-in-bf16": Setup(zero(stage) | {"data_types": {"grad_accum_dtype": "bf16"}}, CLIPPED)
        for stage in (1, 2, 3)
    }
    | {
        "leaf-classes": Setup(zero(3, leaf_module={"classes": ["Block"]}), CLIPPED_COUPLED),
        "leaf-names-bf16": Setup(zero(3, leaf_module={"names": ["block"]}) | BF16, CLIPPED),
        "leaf-suffixes-offload": Setup(zero(3, leaf_module={"name_suffixes": ["block"]}, **CPU_OFFLOAD), CLIPPED),
        "granularity": Setup(zero(3, stage3_module_granularity_threshold=30), CLIPPED),
    },
    walk_nested,
)
INITIALIZED = Family(
    {
        "zero-init": Setup(zero(3), CLIPPED_COUPLED),
        "zero-init-offload-bf16": Setup(zero(3, **CPU_OFFLOAD) | BF16, CLIPPED),
    },
    walk_initialized,
)
COMPILED = Family({f"compiled-stage-{stage}": Setup(zero(stage), CLIPPED) for stage in (1, 3)}, walk_compiled)
AUTOEP, WHOLE = (
    {"expert_parallel": {"enabled": True, "autoep_size": size, "preset_model": "mixtral", "use_grouped_mm": False}}
    for size in (2, 1)
)
LAYER_SPECS = [
    {"patterns": [pattern], "partition_type": kind}
    for kind, pattern in {"column": ".*up\\.weight$", "row": ".*down\\.weight$", "skip": ".*"}.items()
]
AUTOTP = {
    "tensor_parallel": {
        "autotp_size": 2,
        "partition_config": {"use_default_specs": False, "layer_specs": LAYER_SPECS},
    }
}
AUTO_EXPERTS = Family(
    {
        "autoep-stage-0": Setup(zero(0) | AUTOEP, DECOUPLED),
        "autoep-stage-0-bf16": Setup(zero(0) | AUTOEP | BF16, DECOUPLED),
        "autoep-stage-1": Setup(zero(1) | AUTOEP, CLIPPED_COUPLED),
        "autoep-stage-1-whole": Setup(zero(1) | WHOLE, CLIPPED),
        "autoep-stage-2-bf16": Setup(zero(2) | AUTOEP | BF16, CLIPPED),
        "autoep-stage-2-offload": Setup(zero(2, **CPU_OFFLOAD) | AUTOEP, CLIPPED_COUPLED),
        "autoep-bf16-optimizer": Setup(zero(1) | AUTOEP | BF16 | FP32_GRADIENTS, CLIPPED),
    },
    walk_autoep,
    world_size=4,
)
FOLDED = {
    name: Family({name: setup}, walk_autoep, world_size=4)  # one at a time, because DeepSpeed keeps the process groups
    for name, setup in {
        "autoep-autotp-stage-0": Setup(zero(0) | AUTOEP | AUTOTP, DECOUPLED),
        "autoep-autotp-stage-0-bf16": Setup(zero(0) | AUTOEP | AUTOTP | BF16, DECOUPLED),
        "autoep-autotp-bf16-optimizer": Setup(zero(1) | AUTOEP | AUTOTP | BF16 | FP32_GRADIENTS, CLIPPED),
    }.items()
}
REFUSED = Family(
    {f"autoep-autotp-stage-{stage}": Setup(zero(stage) | AUTOEP | AUTOTP, CLIPPED) for stage in (1, 2)},
    walk_autoep,
    world_size=4,
)
TENSOR_PARALLEL = Family(
    {
        f"{name}-stage-{stage}": Setup(
            zero(stage) | {"tensor_parallel": {"autotp_size": 2, **options}}, replace(CLIPPED, max_grad_norm=None)
        )
        for name, stage, options in (
            ("vocabulary", 1, {"vocab_parallel_lm_head": True}),
            ("vocabulary", 3, {"vocab_parallel_lm_head": True}),
            ("overlap", 2, {"tp_overlap_comm": True}),
            ("preset", 0, {"preset_model": "llama"}),
        )
    },
    walk_tensor_parallel,
)
FAMILY_OF = {
    name: family for family in (NESTED, INITIALIZED, COMPILED, AUTO_EXPERTS, TENSOR_PARALLEL) for name in family.setups
} | FOLDED


@pytest.mark.parametrize("name", FAMILY_OF)
def test_the_setting_follows_the_oracle(name: str) -> None:
    family = FAMILY_OF[name]
    tolerance = 2e-5 if family is TENSOR_PARALLEL else 1e-5
    print(f"{name}: {check_captured(family.ranks(name), family.setups[name], tolerance):.1e}")


@pytest.mark.parametrize("name", REFUSED.setups)
def test_experts_that_only_some_tensor_parallel_ranks_count_are_refused(name: str) -> None:
    with pytest.raises(AssertionError, match="every expert must count in the gradient norm") as caught:
        REFUSED.ranks(name)
    assert str(caught.value).count("RuntimeError: every expert must count") == 4, "all ranks get the error"
