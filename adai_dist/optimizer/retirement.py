"""Retirement of the product of inertias: the state is freed once it has no effect; no bit of the trajectory changes.

The product P of all inertias never grows, and only ``1 - P`` is used. Once P is at most a quarter of the spacing of
numbers above 1 (2^-25 in float32), ``1 - P`` rounds to 1 from then on. As inertia is at most ``1 - eps``, every element
of P reaches this after at most ln(2^-25) / ln(1 - eps) steps: 17,321 at eps=1e-3. This saves 4 bytes of state per
element, and 8 bytes of memory traffic per element and step.

In bfloat16 and in 8 bits, ``Q = 1 - P`` is stored, and set to 1 as soon as it may be
(:func:`adai_dist.rounding.settled_below`): at eps=1e-3 after 6,236 steps. It retires once all of its elements are 1.

The state of a retired parameter has no product; checkpoints store zeros as ``beta1_prod`` in its place (``1 - 0`` is
the same 1), which retire again after the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adai_dist.optimizer.host_copy import HostCopy
from adai_dist.sharding.local_tensor import local_tensor
from adai_dist.storage import product_of

STEPS_BETWEEN_CHECKS = 500

Products = list[tuple[dict[str, Any], Tensor]]
"""Pairs of a state and its product."""


class _Check:
    """A check of the largest elements of products of one device and dtype."""

    def __init__(self) -> None:
        self._products: Products = []
        self._largest = HostCopy()

    def start(self, products: Products) -> None:
        self._products = products
        tensors = [local_tensor(product) for _, product in products]
        is_complement = tensors[0].dtype in (torch.bfloat16, torch.uint8)
        largest = [product_of(q.min()) for q in tensors] if is_complement else torch._foreach_norm(tensors, torch.inf)
        self._largest.start(torch.stack(list(largest)))

    def retire(self) -> None:
        """Free the products that are small enough, once the numbers have arrived."""
        largest = self._largest.take()
        if largest is None:
            return
        small = largest <= torch.finfo(largest.dtype).eps / 4
        for (state, product), is_small in zip(self._products, small.tolist(), strict=True):
            if is_small and state.get("beta1_prod") is product:  # it may have been replaced since the check
                del state["beta1_prod"]
        self._products = []


class Retirement:
    """Checks the products every few hundred steps, without making the host wait for a device."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._checks: dict[tuple[torch.device, torch.dtype], _Check] = {}
        self._is_captured = False

    def check_after_next_step(self) -> None:
        """Check after the next step: a loaded state stores zeros for a retired beta1_prod."""
        self._num_steps = STEPS_BETWEEN_CHECKS - 1

    def after_step(self, states: Iterable[dict[str, Any]], device: torch.device) -> None:
        """Retire the products that are small enough; every parameter separately, and ranks may differ.

        Args:
            states: states of the parameters that were stepped.
            device: device of these parameters.

        Collective: none.
        """
        # A CUDA graph of the step writes to the products in every replay, so they must never be freed.
        self._is_captured |= device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self._is_captured:
            return
        self._num_steps += 1
        if self._num_steps % STEPS_BETWEEN_CHECKS == 0:
            for kind, products in _by_kind(states).items():
                self._checks.setdefault(kind, _Check()).start(products)
        for check in self._checks.values():
            check.retire()


def is_retired(state: Mapping[str, Any]) -> bool:
    """Return whether the product has been retired from the state."""
    return "exp_avg" in state and "beta1_prod" not in state


def _by_kind(states: Iterable[dict[str, Any]]) -> dict[tuple[torch.device, torch.dtype], Products]:
    found: dict[tuple[torch.device, torch.dtype], Products] = {}
    for state in states:
        product = state.get("beta1_prod")
        if product is not None and not product.is_meta and local_tensor(product).numel():
            found.setdefault((product.device, product.dtype), []).append((state, product))
    return found
