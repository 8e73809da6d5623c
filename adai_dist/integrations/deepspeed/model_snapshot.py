"""Detection of changes to a model that DeepSpeed, which reads it once in `initialize`, would not notice."""

from __future__ import annotations

from torch import nn

from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

_NUM_NAMED = 3
"""Maximum number of parameters that an error names."""


class ModelSnapshot:
    """The trainable parameters of a model and the number of parameter groups at the time of construction."""

    def __init__(self, model: nn.Module, optimizer: AdaptiveInertia) -> None:
        self._model = model
        self._optimizer = optimizer
        self._trained = self._trained_now()
        self._num_groups = len(optimizer.param_groups)

    def _trained_now(self) -> dict[str, tuple[int, bool]]:
        return {name: (id(param), param.requires_grad) for name, param in self._model.named_parameters()}

    def check(self) -> None:
        """Refuse a model that has changed since construction.

        Raises:
            RuntimeError: parameters were frozen, unfrozen, added, removed or replaced, or parameter groups were added.

        Collective: none; ranks with the same changes raise the same error.
        """
        now = self._trained_now()
        if now != self._trained:
            names = now.keys() | self._trained.keys()
            changed = sorted(name for name in names if now.get(name) != self._trained.get(name))
            found = ", ".join(changed[:_NUM_NAMED])
            more = f" and {len(changed) - _NUM_NAMED} more" if len(changed) > _NUM_NAMED else ""
            raise RuntimeError(
                "under DeepSpeed the trainable parameters must not change after deepspeed.initialize(), got parameters "
                f"frozen, unfrozen, added, removed or replaced: {found}{more}; save a checkpoint, create a new engine, "
                "and load the weights"
            )
        if len(self._optimizer.param_groups) != self._num_groups:
            raise RuntimeError(
                f"under DeepSpeed the optimizer must keep the {self._num_groups} parameter groups that it had in "
                f"deepspeed.initialize(), got {len(self._optimizer.param_groups)}; create all groups before"
            )
