"""A check of first moments that were written to outside of steps: no step reads them before they are used."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from adai_dist.optimizer.host_copy import HostCopy


class FirstMomentCheck:
    """Checks tensors in every step until the host knows that they are finite, without waiting for a device."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, list[Tensor]] = {}
        self._in_copy: set[Hashable] = set()
        self._copy = HostCopy()

    def add(self, key: Hashable, tensors: list[Tensor]) -> None:
        """Check these tensors of a parameter from now on, instead of earlier ones with the same key.

        Args:
            tensors: real, of any dtype and device.
        """
        self._in_copy.discard(key)
        self._tensors[key] = [tensor for tensor in tensors if tensor.numel() and not tensor.is_meta]

    def clear(self) -> None:
        """Remove all tensors."""
        self._tensors.clear()
        self._in_copy.clear()

    def check(self, device: torch.device) -> Tensor | None:
        """Return 0 if all tensors are finite, else NaN; 0-dim float64, on ``device``; None if there are no tensors.

        Collective: none.
        """
        if not self._tensors:
            return None
        self._drop_finite()
        tensors = [tensor for of_param in self._tensors.values() for tensor in of_param]
        if not tensors:
            self._tensors.clear()
            return None
        largest = torch.stack([x.to(device).double() for x in torch._foreach_norm(tensors, torch.inf)])
        found = (largest - largest).sum()
        is_captured = found.is_cuda and torch.cuda.is_current_stream_capturing()
        if not self._copy.is_under_way and not is_captured:
            self._in_copy = set(self._tensors)
            self._copy.start(found)
            self._drop_finite()  # on a CPU the number has arrived already
        return found

    def _drop_finite(self) -> None:
        arrived = self._copy.take()
        if arrived is not None and bool(arrived == 0):
            for key in self._in_copy:
                self._tensors.pop(key, None)
