"""The torch.optim side of the optimizer: parameter groups, states, checkpoints, copies."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from adai_dist.hyper import Hyper
from adai_dist.optimizer.likely_mistakes import warn_of_misspelt_keys, warn_of_other_precision
from adai_dist.optimizer.proxies import SharedAttribute, init_shared_attributes, unproxied
from adai_dist.optimizer.retirement import Retirement
from adai_dist.optimizer.state import add_remainder, new_state, restore_states, saved_state, step_tensor
from adai_dist.optimizer.state_dict_validation import check_is_mapping, check_state_dict
from adai_dist.precision import Precision
from adai_dist.rounding import LOW_DTYPES


class StatefulOptimizer(torch.optim.Optimizer):
    """A torch optimizer with the hyperparameters of :class:`adai_dist.hyper.Hyper` and a state for every parameter.

    Args:
        params: parameters, named parameters, or parameter groups.
        hyper: default hyperparameters of the parameter groups.
        precision: what is stored in 16 bits.
    """

    _kept_by_copies: ClassVar[tuple[str, ...]] = ("_hyper", "precision")
    """Attributes that copies and pickles of the optimizer contain in addition to torch's."""

    if not TYPE_CHECKING:  # type checkers take them from torch
        state = SharedAttribute()
        param_groups = SharedAttribute()

    def __init__(self, params: ParamsT, hyper: Hyper, precision: Precision) -> None:
        self._hyper = hyper
        self.precision: Precision = precision
        self._retirement = Retirement()
        self._given: dict[int, weakref.ref[Tensor]] = {}
        super().__init__(params, hyper.as_defaults())
        # With betas among the defaults, OneCycleLR and CyclicLR would silently cycle betas[0] as a momentum.
        del self.defaults["betas"]

    def params(self) -> list[Tensor]:
        """Return the parameters of all parameter groups, in order."""
        return [param for param_group in self.param_groups for param in param_group["params"]]

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; on a rank without parameters, the current accelerator."""
        for param_group in self.param_groups:
            for param in param_group["params"]:
                return param.device
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")

    @property
    def replaced_params(self) -> list[Tensor]:
        """Listed parameters that were passed neither to the constructor nor to :meth:`add_param_group`."""
        return [param for param in self.params() if self._given.get(id(param), _gone)() is not param]

    def create_states(self, params: Iterable[Tensor]) -> None:
        """Create the missing states of parameters that require a gradient or have one.

        States are created without a gradient too: ranks must have the same states, or checkpoints hang or lack keys.

        Collective: none.
        """
        state = self.state
        for param in params:
            if (param.requires_grad or param.grad is not None) and not state[param]:
                state[param] = new_state(param, self.precision)
            elif param.dtype in LOW_DTYPES and state[param]:
                add_remainder(state[param], param, self.precision)

    def refresh(self) -> None:
        """Clear everything that is derived from parameters and states; the next step recomputes it."""
        raise NotImplementedError

    def _begin_copy(self) -> None:
        """Initialise the attributes that copies and pickles do not take over."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, optionally with their own hyperparameters; also during training.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if isinstance(param_group, dict):  # pyright: ignore[reportUnnecessaryIsInstance] torch refuses the others
            if "params" not in param_group:
                raise ValueError(
                    f"a parameter group must have the key 'params', got {sorted(param_group)}; list its parameters "
                    "under that key"
                )
            Hyper(**{name: param_group.get(name, value) for name, value in self._hyper.as_defaults().items()})
            warn_of_misspelt_keys(param_group, self.param_groups)
            param_group.setdefault("betas", self._hyper.betas)
        super().add_param_group(param_group)
        self._given.update((id(param), weakref.ref(param)) for param in self.param_groups[-1]["params"])

    def state_dict(self) -> dict[str, Any]:
        """Return :meth:`torch.optim.Optimizer.state_dict` with states that every mode loads, and the mode.

        ``beta1_prod`` is in float32 at least and 0 once retired, and ``master_param`` has the float32 master weights of
        16-bit parameters; both are new tensors. The mode is under the key ``precision``.

        Collective: none.
        """
        state_dict = super().state_dict()
        params = {id(state): param for param, state in self.state.items()}
        for key, state in state_dict["state"].items():
            if id(state) in params:
                state_dict["state"][key] = saved_state(state, params[id(state)])
        state_dict["precision"] = self.precision.as_saved()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer in any mode, or of the authors' Adai and AdaiV2.

        The mode of this optimizer stays. A checkpoint in another mode, or with another seed, is logged.

        Raises:
            TypeError, ValueError: the checkpoint is of another optimizer, model or layout, or incomplete; parameters,
                states and hyperparameters are unchanged.

        Collective: none.
        """
        optimizer = unproxied(self)
        if optimizer is not self:  # torch would assign new states and parameter groups to the proxy
            optimizer.load_state_dict(state_dict)
            return
        check_is_mapping(state_dict)
        loaded: dict[str, Any] = {}

        def check_and_keep(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            check_state_dict(final, self.param_groups)
            loaded.update(final)

        hook = self.register_load_state_dict_pre_hook(check_and_keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        restore_states(self.state, self.param_groups, loaded, self.precision)
        warn_of_other_precision(self.precision, loaded)
        self._retirement.check_after_next_step()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in self._kept_by_copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, or take over what :meth:`load_state_dict` has loaded."""
        is_copy = "_hyper" in state
        if is_copy:
            init_shared_attributes(self)
        shared = {name for name in state if isinstance(getattr(type(self), name, None), SharedAttribute)}
        for name in shared:
            setattr(self, name, state[name])
        super().__setstate__({name: value for name, value in state.items() if name not in shared})
        if is_copy:
            self._retirement = Retirement()
            self._given = {id(param): weakref.ref(param) for param in self.params()}
            self._begin_copy()
        for param_group in self.param_groups:
            for name, value in self._hyper.as_defaults().items():
                param_group.setdefault(name, value)
            for param in param_group["params"]:
                if "step" in self.state.get(param, {}):
                    self.state[param]["step"] = step_tensor(self.state[param]["step"], param)
        self.refresh()


def _gone() -> None:
    """Stand in for a weak reference whose parameter is gone."""
