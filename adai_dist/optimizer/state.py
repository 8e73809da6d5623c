"""The optimizer state of a parameter: initialisation, and restoring it from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adai_dist.equations import compute_dtype
from adai_dist.sharding.local_tensor import local_tensor
from adai_dist.sharding.param_shard import STATE_NAMES


def state_dtype(param: Tensor) -> torch.dtype:
    """Return float32 or float64, or its complex counterpart; never less, as 0.999 rounds to 1 in bfloat16."""
    dtype = compute_dtype(param.dtype)
    return dtype.to_complex() if param.dtype.is_complex else dtype


def new_state(param: Tensor) -> dict[str, Tensor]:
    """Return the state before the first step, shaped and sharded like ``param`` (a DTensor's states are DTensors).

    ``step`` is a 0-dim float32 tensor on the parameter's device, because whether a step counts is known only there.
    """
    dtype = state_dtype(param)
    beta1_prod = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    local_tensor(beta1_prod).fill_(1.0)  # real and imaginary parts
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        "beta1_prod": beta1_prod,
    }


def step_tensor(step: Any, param: Tensor) -> Tensor:
    """Convert a ``step`` (a number in older checkpoints, or a tensor) to a 0-dim float32 tensor on the device."""
    value = step.detach() if isinstance(step, Tensor) else torch.tensor(float(step))
    return value.reshape(()).to(device=param.device, dtype=torch.float32, copy=True)


def restore_states(
    states: Mapping[Tensor, dict[str, Any]],
    param_groups: list[dict[str, Any]],
    state_dict: Mapping[str, Any],
) -> None:
    """Undo the cast to the parameter's dtype in :meth:`torch.optim.Optimizer.load_state_dict`.

    torch casts every floating-point state except ``step`` (https://github.com/pytorch/pytorch/issues/75224), which
    would round beta1_prod to 1 under bfloat16 parameters; so the values are copied from ``state_dict`` once more.
    """
    saved_ids = chain.from_iterable(param_group["params"] for param_group in state_dict["param_groups"])
    params = chain.from_iterable(param_group["params"] for param_group in param_groups)
    for saved_id, param in zip(saved_ids, params, strict=True):
        saved = state_dict["state"].get(saved_id)
        if not saved:
            continue
        state = states[param]
        for name in STATE_NAMES:
            if name in saved and state[name].dtype != state_dtype(param):
                state[name] = saved[name].detach().to(device=param.device, dtype=state_dtype(param), copy=True)
        if "step" in saved:
            state["step"] = step_tensor(saved["step"], param)
