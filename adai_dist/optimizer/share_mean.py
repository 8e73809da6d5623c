"""One mean for several optimizers of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.mean_source import SharedMean
from adai_dist.optimizer.proxies import unproxied
from adai_dist.sharding.planners import NumReplicas, make_planner

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
    """Make several optimizers of one model step with one mean, for trainers that make one per part of the model.

    The first optimizer to step observes the gradients of all, communicates, and hands the mean to the others. So all
    must step after the same backward pass, in any order. ``clip_grad_norm_()`` of any optimizer clips all gradients.

    Args:
        optimizers: the optimizers of the parts that this rank holds; ranks with the same parts use the same order.

    The other arguments are those of :meth:`AdaptiveInertia.configure_sharding`; ``stages`` for interleaved pipelines.

    Raises:
        TypeError: an optimizer is not of this package; another argument has a wrong type.
        ValueError: the list is empty or has duplicates; and as :meth:`AdaptiveInertia.configure_sharding`.
        RuntimeError: as :meth:`AdaptiveInertia.configure_sharding`.

    Collective: none here; in a step, as :meth:`AdaptiveInertia.step`, by the first optimizer only.
    """
    given = tuple(optimizers)
    for optimizer in given:
        if not isinstance(optimizer, AdaptiveInertia):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"optimizers must be Adai, AdaiW or AdaiV2, got one of type {type(optimizer).__name__}")
        optimizer.mean_source.check_allows("share_mean()", "leave it out")
    members = tuple(map(unproxied, given))
    if not members or len(set(members)) < len(members):
        raise ValueError(f"optimizers must be one or more, each once, got {len(members)}, {len(set(members))} distinct")
    shared = SharedMean(members, make_planner(process_group, num_replicas, model, stages))
    for optimizer in members:
        optimizer.mean_source = shared
