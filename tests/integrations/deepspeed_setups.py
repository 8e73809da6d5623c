"""Prescribed problems and the DeepSpeed configurations under which the tests run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch.torch_version import TorchVersion

from tests.problems import Problem, Spec

WORLD_SIZE = 2
STATE_NAMES = ("exp_avg", "exp_avg_sq", "beta1_prod")

# Numbers of elements not divisible by any number of ranks; each group has its own lr, decay and betas.
PROBLEM = Problem(
    groups=(
        (
            {"lr": 0.4, "weight_decay": 0.02, "decoupled": True},
            (Spec("first.matrix", (13, 17)), Spec("first.vector", (7,), scale=2.0)),
        ),
        (
            {"lr": 0.1, "betas": (0.2, 0.97), "eps": 0.01, "weight_decay": 0.05, "decoupled": True},
            (
                Spec("second.matrix", (11, 5), scale=4.0),
                Spec("second.one", (1,)),
                Spec("second.three", (3,), scale=2.0),
            ),
        ),
        (
            {"lr": 2.0, "betas": (0.1, 0.999), "weight_decay": 0.01, "decoupled": True},
            (
                Spec("third.matrix", (9, 4), scale=0.5),
                Spec("third.cube", (3, 1, 5), scale=0.6),
                Spec("third.two", (2,)),
            ),
        ),
    ),
    steps=12,
    dtype=torch.float32,
)
CLIPPED = replace(PROBLEM, max_grad_norm=35.0)  # below the norm in about half of the steps
# Ten times the decay, which through the gradient changes the mean by several percent.
COUPLED = replace(
    CLIPPED,
    groups=tuple(
        (hyper | {"weight_decay": 10 * hyper["weight_decay"], "decoupled": False}, specs)
        for hyper, specs in PROBLEM.groups
    ),
)
# One parameter is unused in every third step, and a whole group in every fourth.
UNUSED = replace(
    CLIPPED,
    groups=(
        (PROBLEM.groups[0][0], (replace(PROBLEM.groups[0][1][0], missing_every=3), PROBLEM.groups[0][1][1])),
        (PROBLEM.groups[1][0], tuple(replace(spec, missing_every=4) for spec in PROBLEM.groups[1][1])),
        PROBLEM.groups[2],
    ),
)
BF16 = {"bf16": {"enabled": True}}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}  # selects BF16_Optimizer with bf16 and stage 1
CPU_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def has_deepspeed(release: str) -> bool:
    """Return whether this release of DeepSpeed, or a newer one, is installed."""
    return find_spec("deepspeed") is not None and TorchVersion(version("deepspeed")) >= release


def zero(stage: int, **options: Any) -> dict[str, Any]:
    """Return the ZeRO section of a DeepSpeed configuration."""
    return {"zero_optimization": {"stage": stage, **options}}


@dataclass(frozen=True)
class Setup:
    """Problem together with a DeepSpeed configuration."""

    config: Mapping[str, Any]
    problem: Problem = PROBLEM
    optimizer: str = "AdaiV2"
    """Type in the configuration; "naive" and "torch.AdamW" are created by the test as client optimizers."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of an optimizer of this package, beyond those of its parameter groups."""
    num_micro_batches: int = 1
    sets_boundary: bool = False
    """Whether the training loop, and not the configuration, tells DeepSpeed which micro-batch is the last of a step."""
    used_only_in: Mapping[str, int] = field(default_factory=dict)
    """Parameters that only one micro-batch of each step uses, with its index."""
    bad_steps: tuple[int, ...] = ()
    """Steps in which only rank 1 has an inf gradient."""

    @property
    def dtype(self) -> torch.dtype:
        for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if self.config.get(key, {}).get("enabled"):
                return dtype
        return torch.bfloat16 if "torch_autocast" in self.config else self.problem.dtype

    @property
    def has_linked_masters(self) -> bool:
        """Whether DeepSpeed's safe_get functions are correct; they are wrong under round_robin_gradients."""
        options = self.config.get("zero_optimization", {})
        return options.get("parameter_alignment", False) or not options.get("round_robin_gradients", False)

    @property
    def stage(self) -> int:
        return self.config["zero_optimization"]["stage"]

    @property
    def rounded(self) -> Problem:
        """The problem with initial values and gradients that the model's dtype represents exactly."""
        return replace(self.problem, dtype=self.dtype)
