"""The optimizer state of a parameter: initialisation, and its form in checkpoints, which every mode loads.

In checkpoints, ``exp_avg_sq`` is shaped like the parameter, ``beta1_prod`` is the product of inertias in float32 at
least, and ``master_param`` the float32 master weight, whatever the optimizer keeps under these keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adai_dist.optimizer.retirement import is_retired
from adai_dist.precision import Precision
from adai_dist.rounding import TO_NEAREST, join, split
from adai_dist.sharding.local_tensor import local_tensor, sharded_like
from adai_dist.sharding.param_shard import MASTER, STATE_NAMES
from adai_dist.sharding.records import records_like, records_shape, zero_records
from adai_dist.storage import moment_of, product_of, stored_moment, stored_product


def new_state(param: Tensor, precision: Precision) -> dict[str, Tensor]:
    """Return the state before the first step, shaped and sharded like ``param`` (a DTensor's states are DTensors).

    ``step`` is a 0-dim float32 tensor on the parameter's device, because whether a step counts is known only there.
    """
    dtype, records = precision.state_dtype_of(param.dtype), records_shape(param, precision)

    def zeros(dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    state = {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": zeros(dtype),
        "exp_avg_sq": zero_records(param, records) if records else zeros(dtype),
        "beta1_prod": zeros(torch.uint8 if records else dtype),
    }
    if dtype != torch.bfloat16:  # otherwise it holds 1 - 1
        local_tensor(state["beta1_prod"]).fill_(1.0)  # real and imaginary parts
    return add_remainder(state, param, precision)


def add_remainder(state: dict[str, Any], param: Tensor, precision: Precision) -> dict[str, Any]:
    """Add the remainder of a parameter whose master weight is the parameter itself, unless the state has one."""
    if precision.has_remainder(param.dtype) and MASTER not in state:
        state[MASTER] = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
    return state


def step_tensor(step: Any, param: Tensor) -> Tensor:
    """Convert a ``step`` (a number in older checkpoints, or a tensor) to a 0-dim float32 tensor on the device."""
    value = step.detach() if isinstance(step, Tensor) else torch.tensor(float(step))
    return value.reshape(()).to(device=param.device, dtype=torch.float32, copy=True)


@torch.no_grad()
def saved_state(state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """Return a state as checkpoints contain it; zeros stand for a retired product.

    Collective: none.
    """
    saved = dict(state)
    if is_retired(state):
        saved["beta1_prod"] = torch.zeros_like(state["exp_avg"], dtype=Precision().state_dtype_of(param.dtype))
    is_low = "exp_avg" in state and state["exp_avg"].dtype == torch.bfloat16
    if is_low and not is_retired(state):
        saved["beta1_prod"] = sharded_like(param, product_of(local_tensor(state["beta1_prod"])))
    if is_low and state["exp_avg_sq"].dtype == torch.uint8:
        shape = local_tensor(state["exp_avg"]).shape
        saved["exp_avg_sq"] = sharded_like(param, moment_of(local_tensor(state["exp_avg_sq"]), shape))
    if is_low and getattr(param, "_fsdp_flattened", False):
        # FSDP1 refuses to save states of several dtypes; float32 has the same numbers as bfloat16.
        saved |= {name: saved[name].float() for name in ("exp_avg", "exp_avg_sq")}
    if MASTER in state:
        saved[MASTER] = sharded_like(state[MASTER], join(local_tensor(param), local_tensor(state[MASTER])))
    # One order of keys on all ranks, of which some may have retired a product: gathering takes the states in order.
    return {name: saved[name] for name in ("step", *STATE_NAMES, MASTER) if name in saved} | saved


@torch.no_grad()
def restore_states(
    states: Mapping[Tensor, dict[str, Any]],
    param_groups: list[dict[str, Any]],
    state_dict: Mapping[str, Any],
    precision: Precision,
) -> None:
    """Convert loaded states from the form of checkpoints, without the cast by ``Optimizer.load_state_dict``.

    torch casts every floating-point state except ``step`` to the parameter's dtype
    (https://github.com/pytorch/pytorch/issues/75224), so the values are copied from ``state_dict`` once more.

    Collective: none.
    """
    saved_ids = chain.from_iterable(param_group["params"] for param_group in state_dict["param_groups"])
    params = chain.from_iterable(param_group["params"] for param_group in param_groups)
    for saved_id, param in zip(saved_ids, params, strict=True):
        saved = state_dict["state"].get(saved_id)
        if saved:
            _restore(states[param], saved, param, precision)


@torch.no_grad()
def restored_state(saved: Mapping[str, Any], param: Tensor, precision: Precision) -> dict[str, Any]:
    """Return a state, or some of its entries, as the optimizer keeps it, from its form in checkpoints.

    Collective: none.
    """
    state = dict(saved)
    _restore(state, saved, param, precision)
    return state


def _restore(state: dict[str, Any], saved: Mapping[str, Any], param: Tensor, precision: Precision) -> None:
    dtype, records = precision.state_dtype_of(param.dtype), records_shape(param, precision)
    for name in ("exp_avg", "exp_avg_sq", "beta1_prod"):
        if name in saved and state[name].dtype != dtype:
            state[name] = saved[name].detach().to(device=param.device, dtype=dtype, copy=True)
    if "exp_avg_sq" in saved and records:
        v = local_tensor(saved["exp_avg_sq"]).to(device=param.device, dtype=torch.float32)
        state["exp_avg_sq"] = records_like(param, records, stored_moment(v, torch.uint8, TO_NEAREST))
    if "beta1_prod" in saved and dtype == torch.bfloat16:
        q = 1.0 - local_tensor(saved["beta1_prod"]).to(device=param.device, dtype=torch.float32)
        state["beta1_prod"] = sharded_like(param, stored_product(q, torch.uint8 if records else dtype, TO_NEAREST))
    if "step" in saved:
        state["step"] = step_tensor(saved["step"], param)
    state.pop(MASTER, None)
    if MASTER in saved and precision.has_remainder(param.dtype):
        # The parameter may be loaded later: the remainder is that of the saved value, whatever the parameter is now.
        master = local_tensor(saved[MASTER]).to(device=param.device, dtype=torch.float32)
        remainder = torch.empty_like(local_tensor(param), dtype=torch.int16)
        state[MASTER] = sharded_like(param, remainder.copy_(split(master, param.dtype)[1]))
    add_remainder(state, param, precision)
