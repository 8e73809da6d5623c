"""Asynchronous copies of a few numbers from a device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Copies a small tensor to the host in the background, one at a time; pinned memory and event are reused.

    The event is recorded on the current stream of the tensor's device, which need not be the current device.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._event: torch.Event | None = None
        self._source: Tensor | None = None
        """Tensor that is being copied, kept alive until the copy has ended."""

    @property
    def is_under_way(self) -> bool:
        """Whether a copy has been started and not taken."""
        return self._source is not None

    def start(self, tensor: Tensor) -> None:
        """Start copying ``tensor``, of any shape and dtype; an earlier copy that was not taken is dropped."""
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
        """Return the numbers on the host, valid until the next :meth:`start`; None if they have not arrived."""
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
        """Wait for the numbers and return them as :meth:`take`; None if nothing is being copied."""
        if self._source is not None and self._event is not None:
            self._event.synchronize()
        return self.take()
