"""Which tensors of this rank are not finite, for messages: reads all of them, and waits for their devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adai_dist.sharding.ownership import local_tensor
from adai_dist.sharding.shards import STATE_NAMES


@torch.no_grad()
def what_is_not_finite(param_groups: list[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]) -> str:
    """Name the first parameter of which gradient, value or a state is not finite, each; empty if all are finite.

    Collective: none.
    """
    names = _names(param_groups)
    kinds: dict[str, list[tuple[str, Any]]] = {"grad": [], "value": [], **{name: [] for name in STATE_NAMES}}
    for index, param in enumerate(dict.fromkeys([*names, *states])):  # ZeRO 3 lists no parameters between steps
        name = names.get(param, f"parameter {index}")
        kinds["grad"].append((name, param.grad))
        kinds["value"].append((name, param))
        for state_name in STATE_NAMES:
            kinds[state_name].append((name, states.get(param, {}).get(state_name)))
    found: list[str] = []
    for kind, named in kinds.items():
        tensors = [(name, local_tensor(value.detach())) for name, value in named if isinstance(value, Tensor)]
        bad = _not_finite((name, tensor) for name, tensor in tensors if tensor.numel() and not tensor.is_meta)
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            found.append(f"{kind} of {bad[0]}{more}")
    return ", ".join(found)


def _names(param_groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {}
    for param_group in param_groups:
        given = param_group.get("param_names", [])
        for index, param in enumerate(param_group["params"]):
            names[param] = repr(given[index]) if index < len(given) else f"parameter {len(names)}"
    return names


def _not_finite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    on_devices: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        largest = torch.linalg.vector_norm(tensor, torch.inf).float()
        on_devices.setdefault(tensor.device, []).append((name, largest))
    return [
        name
        for pairs in on_devices.values()
        for (name, _), is_finite in zip(pairs, torch.stack([x for _, x in pairs]).isfinite().tolist(), strict=True)
        if not is_finite
    ]
