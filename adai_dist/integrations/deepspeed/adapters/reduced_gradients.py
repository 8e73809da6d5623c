"""A checksum that shows whether ranks reduce the gradients of different parameters together.

ZeRO reduces gradients over the ranks in buckets, and matches them by their position in the bucket. A rank fills its
buckets with the gradients that its own backward pass makes, in their order. If ranks use different parameters, or use
them in another order, the gradients of different parameters are added up, without an error and with any optimizer.

The checksum costs no collective: see :mod:`adai_dist.sharding.missing_gradients` for the terms of the ranks.
"""

from __future__ import annotations

import functools
import zlib
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from adai_dist.sharding.missing_gradients import CHECKSUM_MODULUS, terms_by_rank

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class ReducedGradients:
    """Record of the gradients that a wrapper reduces in a step.

    Args:
        wrapper: ZeRO's wrapper, whose method that puts a gradient into a bucket is replaced.
        process_group: ranks that must reduce the same gradients.
        is_sorted: whether ZeRO sorts the gradients of a bucket, so that only their set counts.
    """

    def __init__(self, wrapper: Any, process_group: ProcessGroup, *, is_sorted: bool) -> None:
        self._wrapper = wrapper
        self._is_sorted = is_sorted
        self._term = terms_by_rank(dist.get_world_size(process_group))[dist.get_rank(process_group)]
        self._digest = 0
        original = wrapper.reduce_independent_p_g_buckets_and_remove_grads

        @functools.wraps(original)
        def reduce_independent_p_g_buckets_and_remove_grads(param: Tensor, *args: Any, **kwargs: Any) -> None:
            if getattr(param, "ds_grad_is_ready", True):  # false for all but the last part of a tiled computation
                self._add(param)
            original(param, *args, **kwargs)

        wrapper.reduce_independent_p_g_buckets_and_remove_grads = reduce_independent_p_g_buckets_and_remove_grads

    def _add(self, param: Tensor) -> None:
        key = f"{self._wrapper.get_param_id(param)} {self._wrapper.micro_step_id}".encode()
        if self._is_sorted:
            self._digest += zlib.crc32(key)
        else:
            self._digest = zlib.crc32(key, self._digest)

    def checksum(self) -> int:
        """Return the checksum of the step so far, below CHECKSUM_MODULUS.

        If all ranks have reduced the same gradients, their checksums add up to 0 modulo CHECKSUM_MODULUS; otherwise
        they do so with a probability of about 1 in 4,000.
        """
        return self._digest * self._term % CHECKSUM_MODULUS

    def clear(self) -> None:
        """Begin the record of another step."""
        self._digest = 0
