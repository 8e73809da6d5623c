"""Names of the tensors of this rank that are not finite, for messages; reads all tensors and waits for devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adai_dist.sharding.local_tensor import local_tensor
from adai_dist.sharding.param_shard import STATE_NAMES
from adai_dist.storage import moment_of


@torch.no_grad()
def describe_nonfinite(param_groups: list[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]) -> str:
    """Name the first parameter with a non-finite gradient, value or state, one of each kind; empty if all are finite.

    Collective: none.
    """
    names = _names(param_groups)
    kinds: dict[str, list[tuple[str, Any]]] = {"grad": [], "value": [], **{name: [] for name in STATE_NAMES}}
    for index, param in enumerate(dict.fromkeys([*names, *states])):  # between steps, ZeRO 3 empties the groups
        name = names.get(param, f"parameter {index}")
        kinds["grad"].append((name, param.grad))
        kinds["value"].append((name, param))
        for state_name in STATE_NAMES:
            kinds[state_name].append((name, states.get(param, {}).get(state_name)))
    found: list[str] = []
    for kind, named in kinds.items():
        tensors = [(name, _numbers(kind, value)) for name, value in named if isinstance(value, Tensor)]
        bad = _not_finite((name, tensor) for name, tensor in tensors if tensor.numel() and not tensor.is_meta)
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            found.append(f"{kind} of {bad[0]}{more}")
    return ", ".join(found)


def _numbers(kind: str, tensor: Tensor) -> Tensor:
    """Return the local elements of a tensor as floating-point numbers; none of a product in 8 bits, always finite."""
    local = local_tensor(tensor.detach())
    if local.dtype != torch.uint8:
        return local
    return moment_of(local, torch.Size([-1])) if kind == "exp_avg_sq" else local.new_empty(0)


def _names(param_groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {}
    for param_group in param_groups:
        given = param_group.get("param_names", [])
        for index, param in enumerate(param_group["params"]):
            names[param] = repr(given[index]) if index < len(given) else f"parameter {len(names)}"
    return names


def _not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        largest = torch.linalg.vector_norm(tensor, torch.inf).float()
        by_device.setdefault(tensor.device, []).append((name, largest))
    return [
        name
        for pairs in by_device.values()
        for (name, _), is_finite in zip(pairs, torch.stack([x for _, x in pairs]).isfinite().tolist(), strict=True)
        if not is_finite
    ]
