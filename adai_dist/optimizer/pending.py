"""A mean that was found before the step that uses it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from adai_dist.sharding.mean import GlobalMean
from adai_dist.sharding.ownership import local_tensor

Versions = list[tuple[Tensor, int]]


class PendingMean(NamedTuple):
    """The mean, and the gradients that were looked at for it."""

    mean: GlobalMean
    gradients: Versions
    is_shared: bool
    """Another optimizer found it, with its own gradients and these (:func:`adai_dist.share_mean`)."""

    def check(self, now: Versions) -> None:
        """Raises: RuntimeError: the gradients are others by now."""
        before = self.gradients
        if len(now) == len(before) and all(a is b and u == v for (a, u), (b, v) in zip(now, before, strict=True)):
            return
        if self.is_shared:
            raise RuntimeError(
                "gradients must stay as they are from the first step() of the optimizers that share one mean to the "
                "last, but they changed; step all of them before the next backward pass"
            )
        raise RuntimeError(
            "gradients must stay as they are between clip_grad_norm_() and step(), but they changed; call "
            "clip_grad_norm_() after the last backward pass (and after scaler.unscale_(optimizer))"
        )


def versions(params: list[Tensor]) -> Versions:
    """The gradients of these parameters, each with what tells whether it was written to."""
    gradients = [param.grad for param in params if param.grad is not None]
    return [(grad, local_tensor(grad)._version) for grad in gradients]
