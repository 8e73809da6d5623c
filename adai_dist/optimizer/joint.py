"""Several optimizers of one model with one mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.mean_source import SharedMean
from adai_dist.optimizer.shared import itself
from adai_dist.sharding.configured import NumReplicas, configured_sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def share_mean(
    optimizers: Sequence[AdaptiveInertia],
    process_group: ProcessGroup | None = None,
    num_replicas: NumReplicas = None,
    *,
    model: nn.Module | None = None,
    stages: ProcessGroup | None = None,
) -> None:
    """Let several optimizers of one model step with one mean, for trainers that make one per part of the model.

    The first of them to step observes the gradients of all, communicates, and hands the mean to the others; so all must
    step after the same backward pass, in any order. ``clip_grad_norm_()`` of any of them clips all.

    Args:
        optimizers: on every rank those of the parts that it holds, in the same order where ranks hold the same.

    The other arguments are those of :meth:`AdaptiveInertia.configure_sharding`; ``stages`` for interleaved pipelines.

    Raises:
        TypeError: one is no optimizer of this package; an argument is none of these.
        ValueError: there is none, or one twice; and as :meth:`AdaptiveInertia.configure_sharding`.
        RuntimeError: as :meth:`AdaptiveInertia.configure_sharding`.

    Collective: none here; in a step, as :meth:`AdaptiveInertia.step`, by the first optimizer alone.
    """
    given = tuple(optimizers)
    for optimizer in given:
        if not isinstance(optimizer, AdaptiveInertia):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"optimizers must be Adai, AdaiW or AdaiV2, got one of type {type(optimizer).__name__}")
        optimizer.mean_source.check_allows("share_mean()", "leave it out")
    members = tuple(map(itself, given))
    if not members or len(set(members)) < len(members):
        raise ValueError(f"optimizers must be one or more, each once, got {len(members)}, {len(set(members))} distinct")
    sharding = configured_sharding(process_group, num_replicas, model, stages)
    shared = SharedMean(members, sharding)
    for optimizer in members:
        optimizer.mean_source = shared
