"""What DeepSpeed reads of a model once, when the engine is made, and would not notice to have changed."""

from __future__ import annotations

from torch import nn

from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

_NAMED = 3
"""How many parameters a message names."""


class ModelSnapshot:
    """Which parameters of a model are trained, in which parameter groups, as of its construction."""

    def __init__(self, model: nn.Module, optimizer: AdaptiveInertia) -> None:
        self._model = model
        self._optimizer = optimizer
        self._trained = self._trained_now()
        self._num_groups = len(optimizer.param_groups)

    def _trained_now(self) -> dict[str, tuple[int, bool]]:
        return {name: (id(param), param.requires_grad) for name, param in self._model.named_parameters()}

    def check(self) -> None:
        """Refuse a step of a model that has changed since.

        Raises:
            RuntimeError: parameters were frozen, unfrozen, added, removed or replaced, or parameter groups were added.

        Collective: none; the same on all ranks that have changed their model alike.
        """
        now = self._trained_now()
        if now != self._trained:
            names = now.keys() | self._trained.keys()
            changed = sorted(name for name in names if now.get(name) != self._trained.get(name))
            found = ", ".join(changed[:_NAMED])
            more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            raise RuntimeError(
                "with DeepSpeed the same parameters must be trained from deepspeed.initialize() on, got others frozen, "
                f"unfrozen, added, removed or replaced since: {found}{more}; save a checkpoint, make a new engine, and "
                "load the weights"
            )
        if len(self._optimizer.param_groups) != self._num_groups:
            raise RuntimeError(
                "with DeepSpeed the parameter groups must stay those of deepspeed.initialize(), "
                f"{self._num_groups}, got {len(self._optimizer.param_groups)}; list all parameters before"
            )
