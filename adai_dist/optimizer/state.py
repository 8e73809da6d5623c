"""The state of a parameter: how it is made, and how it comes back from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adai_dist.equations import compute_dtype
from adai_dist.sharding.ownership import local_tensor
from adai_dist.sharding.shards import STATE_NAMES


def state_dtype(param: Tensor) -> torch.dtype:
    """float32 or float64, or their complex counterparts: never below float32, where 0.999 would round to 1."""
    dtype = compute_dtype(param.dtype)
    return dtype.to_complex() if param.dtype.is_complex else dtype


def new_state(param: Tensor) -> dict[str, Tensor]:
    """State before the first step: shaped, placed and sharded like ``param`` (a DTensor's states are DTensors).

    ``step`` is a 0-dim float32 tensor on the parameter's device, because whether a step counts is known only there.
    """
    dtype = state_dtype(param)
    beta1_prod = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    local_tensor(beta1_prod).fill_(1.0)  # both parts of a complex number
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        "beta1_prod": beta1_prod,
    }


def step_tensor(step: Any, param: Tensor) -> Tensor:
    """A ``step`` of any origin (a number in older checkpoints, a CPU tensor) as this package keeps it."""
    value = step.detach() if isinstance(step, Tensor) else torch.tensor(float(step))
    return value.reshape(()).to(device=param.device, dtype=torch.float32, copy=True)


def restore_states(
    states: Mapping[Tensor, dict[str, Any]],
    param_groups: list[dict[str, Any]],
    state_dict: Mapping[str, Any],
) -> None:
    """Undo the cast to the parameter's dtype that :meth:`torch.optim.Optimizer.load_state_dict` makes.

    torch casts every floating-point state but ``step`` (https://github.com/pytorch/pytorch/issues/75224), which would
    round beta1_prod to 1 under bfloat16 parameters; so the values are taken again from the ``state_dict`` just loaded.
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
