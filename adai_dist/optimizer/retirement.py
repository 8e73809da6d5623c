"""Retirement of beta1_prod: freed once it has no effect any more, so that not a bit of the trajectory changes.

The product P of all inertias never grows, and only ``1 - P`` is ever used. Once P is at most a quarter of the spacing
of numbers above 1 (2^-25 in float32), ``1 - P`` rounds to 1 for good. As inertia is at most ``1 - eps``, all of P gets
there after ln(2^-25) / ln(1 - eps) steps at the latest: 17,321 at eps=1e-3. From then on a parameter needs 4 bytes of
state less per element, and a step moves 8 bytes less.

The state of a retired parameter has no ``beta1_prod``; checkpoints have zeros in its place (``1 - 0`` is the same 1),
which retire again after the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adai_dist.optimizer.host_copy import HostCopy
from adai_dist.sharding.ownership import local_tensor

STEPS_BETWEEN_LOOKS = 500

States = Mapping[Tensor, dict[str, Any]]


Products = list[tuple[dict[str, Any], Tensor]]
"""(state, its beta1_prod)."""


class _Look:
    """Finds the largest entries of some products, of one device and dtype."""

    def __init__(self) -> None:
        self._products: Products = []
        self._largest = HostCopy()

    def start(self, products: Products) -> None:
        self._products = products
        largest = torch._foreach_norm([local_tensor(product) for _, product in products], torch.inf)
        self._largest.start(torch.stack(largest))

    def retire(self) -> None:
        """Free what can be freed, once the numbers have arrived."""
        largest = self._largest.take()
        if largest is None:
            return
        small = largest <= torch.finfo(largest.dtype).eps / 4
        for (state, product), is_small in zip(self._products, small.tolist(), strict=True):
            if is_small and state.get("beta1_prod") is product:  # it may have been loaded anew meanwhile
                del state["beta1_prod"]
        self._products = []


class Retirement:
    """Looks at the products now and then, without making the host wait for a device."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._looks: dict[tuple[torch.device, torch.dtype], _Look] = {}
        self._is_captured = False

    def look_after_next_step(self) -> None:
        """For states that were loaded, in which zeros stand for what was retired."""
        self._num_steps = STEPS_BETWEEN_LOOKS - 1

    def after_step(self, states: Iterable[dict[str, Any]], device: torch.device) -> None:
        """Retire the products that have become small enough. Every parameter by its own; ranks need not agree.

        Args:
            states: of the parameters that were stepped.
            device: of these parameters.

        Collective: none.
        """
        # A CUDA graph of the step writes to the products in every replay, so they must stay for good.
        self._is_captured |= device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._is_captured:
            return
        self._num_steps += 1
        if self._num_steps % STEPS_BETWEEN_LOOKS == 0:
            for kind, products in _by_kind(states).items():
                self._looks.setdefault(kind, _Look()).start(products)
        for look in self._looks.values():
            look.retire()


def is_retired(state: Mapping[str, Any]) -> bool:
    return "exp_avg" in state and "beta1_prod" not in state


def with_zeros(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as checkpoints have it: zeros for a retired product."""
    return {**state, "beta1_prod": torch.zeros_like(state["exp_avg"])} if is_retired(state) else dict(state)


def _by_kind(states: Iterable[dict[str, Any]]) -> dict[tuple[torch.device, torch.dtype], Products]:
    found: dict[tuple[torch.device, torch.dtype], Products] = {}
    for state in states:
        product = state.get("beta1_prod")
        if product is not None and not product.is_meta and local_tensor(product).numel():
            found.setdefault((product.device, product.dtype), []).append((state, product))
    return found
