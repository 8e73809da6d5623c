"""Models that DeepSpeed itself shards (experts, tensor-parallel layers), with their recorded gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.integrations.deepspeed_engines import Seen, gather, note_step, set_environment, unpartitioned
from tests.integrations.deepspeed_oracle_check import state_error
from tests.integrations.deepspeed_setups import STATE_NAMES, Setup
from tests.oracle import Array, Oracle, OracleGroup
from tests.problems import to_numpy


@dataclass
class Captured:
    """Tensors of one rank, by names that two ranks share exactly for replicas."""

    starts: dict[str, Array]
    group_indices: dict[str, int]
    gradients: list[dict[str, Array]] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)


def walk_experts(setup: Setup, ep_size: int, prepare: Callable[[Any], None] | None = None) -> Captured:
    """Train two experts, one per rank (`ep_size` 2) or both on both ranks (1). Collective: all ranks."""
    set_environment()
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

    class WithExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.experts = MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=ep_size, min_capacity=8)
            self.head = nn.Linear(8, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs, balance, _ = self.experts(self.first(inputs).tanh())
            return self.head(outputs).square().mean() + 0.1 * balance

    torch.manual_seed(0)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = WithExperts()
    generator = torch.Generator().manual_seed(1 + dist.get_rank() * (ep_size - 1))
    for name, parameter in model.named_parameters():
        if "deepspeed_experts" in name:
            parameter.data.normal_(generator=generator)

    def key(name: str, parameter: nn.Parameter) -> str:
        return f"{name}@{dist.get_rank()}" if is_moe_param(parameter) and ep_size > 1 else name

    def inputs(step: int) -> dict[str, Tensor]:
        seeded = torch.Generator().manual_seed(10 * step + dist.get_rank())
        return {"inputs": 3 * torch.randn(12, 6, generator=seeded).to(setup.dtype)}

    return capture(setup, model, key, inputs, split_params_into_different_moe_groups_for_optimizer, prepare)


def walk_tensor_parallel(setup: Setup) -> Captured:
    """Train a small Llama that DeepSpeed shards over two ranks. Collective: all ranks."""
    set_environment()
    import deepspeed
    from deepspeed.runtime.utils import is_model_parallel_parameter
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=False,
        use_cache=False,
    )

    def key(name: str, parameter: nn.Parameter) -> str:
        return f"{name}@{dist.get_rank()}" if is_model_parallel_parameter(parameter) else name

    def inputs(step: int) -> dict[str, Tensor]:
        tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(step))
        return {"input_ids": tokens, "labels": tokens}

    return capture(setup, LlamaForCausalLM(config), key, inputs, list)


def capture(
    setup: Setup,
    model: nn.Module,
    key: Callable[[str, nn.Parameter], str],
    inputs: Callable[[int], dict[str, Tensor]],
    split: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
    prepare: Callable[[Any], None] | None = None,
) -> Captured:
    """Train a model with its own gradients, which are recorded for the oracle. Collective: all ranks.

    Args:
        key: name of a parameter in the record, which ranks share for replicas.
        inputs: arguments of the model in a step.
        split: function of the parameter groups that returns those to train.
        prepare: called with the engine before the first step.
    """
    import deepspeed

    groups = [{**setup.problem.hyperparameters(k), "params": [], "name": f"{k}"} for k in range(3)]
    group_of = {name: _group_of(name, parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        groups[group_of[name]]["params"].append(parameter)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=split(groups),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": setup.problem.max_grad_norm or 0.0,
            "optimizer": {"type": setup.optimizer, "params": {"lr": 1.0, **setup.arguments}},
            **setup.config,
        },
        dist_init_required=False,
    )
    if prepare is not None:
        prepare(engine)
    parameters = {key(name, parameter): parameter for name, parameter in engine.module.named_parameters()}
    captured = Captured(
        starts={name: to_numpy(full_tensor(engine, parameter, "fp32_param")) for name, parameter in parameters.items()},
        group_indices={
            key(name, parameter): group_of.get(name, 0) for name, parameter in engine.module.named_parameters()
        },
    )
    for step in range(setup.problem.steps):
        outputs = engine(**inputs(step))
        engine.backward(outputs if isinstance(outputs, Tensor) else outputs.loss)
        gradients = {name: to_numpy(full_tensor(engine, parameter, "grad")) for name, parameter in parameters.items()}
        captured.gradients.append(gradients)
        engine.step()
        note_step(engine, captured.seen)
    gather(engine, parameters, captured.seen)
    return captured


def _group_of(name: str, parameter: nn.Parameter) -> int:
    if name.startswith(("head", "lm_head", "model.embed")):
        return 2
    return 0 if parameter.dim() > 1 else 1


def full_tensor(engine: Any, parameter: nn.Parameter, what: str) -> Tensor:
    """Return the master weight ("fp32_param") or the gradient ("grad") of a parameter. Collective: all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    masters = unpartitioned(engine)
    if masters is not None:
        return parameter.grad if what == "grad" else masters[parameter]
    if what == "grad" and hasattr(engine.optimizer, "bf16_groups"):
        return parameter._hp_grad.view_as(parameter)  # before 0.19.7, safe_get_full_grad returns the local gradient
    return safe_get_full_grad(parameter) if what == "grad" else safe_get_full_fp32_param(parameter)


def oracle_of(ranks: list[Captured], setup: Setup) -> tuple[Oracle, dict[str, Array]]:
    """Return the oracle of the model of all ranks before the first step, and its initial values."""
    starts = {name: start for rank in ranks for name, start in rank.starts.items()}
    indices = {name: index for rank in ranks for name, index in rank.group_indices.items()}
    groups = [
        OracleGroup(tuple(name for name in starts if indices[name] == k), **setup.problem.hyperparameters(k))
        for k in range(3)
    ]
    return Oracle(starts, groups, setup.problem.max_grad_norm), starts


def gradients_of(ranks: list[Captured], step: int) -> dict[str, Array]:
    return {name: gradient for rank in ranks for name, gradient in rank.gradients[step].items()}


# At an inertia of 1 - 1e-3, float32 resolves its complement to 6e-5, which cancels in the parameters, not in exp_avg.
STATE_TOLERANCE = 6e-5


def check_captured(ranks: list[Captured], setup: Setup, tolerance: float = 1e-5) -> float:
    """Assert that all ranks together followed the oracle, and return the largest error."""
    oracle, starts = oracle_of(ranks, setup)
    errors: dict[str, float] = {}
    for step in range(setup.problem.steps):
        expected = oracle.step(gradients_of(ranks, step))
        assert expected.grad_norm > (setup.problem.max_grad_norm or 0.0), "the bound has no effect"
        for rank in ranks:
            errors[f"mean of step {step}"] = abs(rank.seen.means[step] / expected.mean - 1)
            errors[f"norm of step {step}"] = abs(rank.seen.grad_norms[step] / expected.grad_norm - 1)
    for rank in ranks:
        for name, value in rank.seen.parameters.items():
            travelled = np.linalg.norm(oracle.parameters[name] - starts[name])
            errors[name] = float(np.linalg.norm(value - oracle.parameters[name]) / travelled)
            for state_name in STATE_NAMES:
                state = getattr(oracle.states[name], state_name)
                errors[f"{state_name} of {name}"] = state_error(rank.seen.states[name][state_name], state)
    allowed = {name: STATE_TOLERANCE if " of " in name and "step" not in name else tolerance for name in errors}
    wrong = {name: error for name, error in errors.items() if not error < allowed[name]}
    assert not wrong, wrong
    return max(errors.values())
