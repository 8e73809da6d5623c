"""First moments that others have written to: no step reads them before it is taken, so they are looked at here."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from adai_dist.optimizer.host_copy import HostCopy


class UnreadStates:
    """Looks at tensors in every step until the host knows that they are finite, without waiting for a device."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, list[Tensor]] = {}
        self._in_copy: set[Hashable] = set()
        self._copy = HostCopy()

    def add(self, key: Hashable, tensors: list[Tensor]) -> None:
        """Look at the tensors of a parameter from now on, in the place of those that it had.

        Args:
            tensors: real, of any dtype and device.
        """
        self._in_copy.discard(key)
        self._tensors[key] = [tensor for tensor in tensors if tensor.numel() and not tensor.is_meta]

    def clear(self) -> None:
        """Look at nothing."""
        self._tensors.clear()
        self._in_copy.clear()

    def look(self, device: torch.device) -> Tensor | None:
        """0 where all are finite, else NaN, as a 0-dim float64 tensor on the device; None where there is nothing to do.

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
            self._drop_finite()  # on a CPU the number is there at once
        return found

    def _drop_finite(self) -> None:
        arrived = self._copy.take()
        if arrived is not None and bool(arrived == 0):
            for key in self._in_copy:
                self._tensors.pop(key, None)
