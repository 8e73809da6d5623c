"""A few numbers on their way from a device to the host, which does not wait for them."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies a small tensor to the host in the background; pinned memory and event serve for one copy after the other.

    The event is recorded on the current stream of the tensor's own device, which need not be the current device.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._event: torch.Event | None = None
        self._source: Tensor | None = None
        """What is being copied: it must stay alive until then."""

    @property
    def is_under_way(self) -> bool:
        return self._source is not None

    def start(self, tensor: Tensor) -> None:
        """Copy ``tensor``, of any shape and dtype; a copy that is still under way is given up."""
        self._source = tensor
        if tensor.device.type == "cpu":
            return
        if self._event is None or self._event.device != tensor.device:
            self._event = torch.Event(tensor.device)
        if self._buffer is None or self._buffer.shape != tensor.shape or self._buffer.dtype != tensor.dtype:
            self._buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._buffer.copy_(tensor, non_blocking=True)
        self._event.record(torch.accelerator.current_stream(tensor.device))

    def take(self) -> Tensor | None:
        """The numbers on the host, valid until the next :meth:`start`; None while they are not there."""
        source = self._source
        if source is None:
            return None
        if source.device.type == "cpu":
            self._source = None
            return source
        assert self._event is not None
        if not self._event.query():
            return None
        self._source = None
        return self._buffer

    def wait(self) -> Tensor | None:
        """As :meth:`take`, once they are there; None if nothing is being copied."""
        if self._source is not None and self._event is not None:
            self._event.synchronize()
        return self.take()
