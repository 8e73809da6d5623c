"""Validation of a state_dict before it is loaded, so that an invalid one changes nothing.

A checkpoint may be of another optimizer, model or layout, or damaged. Each case is one error, raised before the
optimizer is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from adai_dist.hyper import Hyper
from adai_dist.precision import Precision
from adai_dist.sharding.local_tensor import is_dtensor, local_tensor
from adai_dist.sharding.param_shard import MASTER, STATE_NAMES

_OWN = "load the state_dict() of an Adai, AdaiW or AdaiV2"
_LAYOUTS = "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict converts between layouts"
_ALWAYS_SAVED = ("lr", "betas", "eps", "weight_decay")
"""Hyperparameters in the parameter groups of every version, including the authors'."""

_NUM_NAMED = 3
"""Largest number of states that a message names."""


class _SavedState(NamedTuple):
    """The state of one parameter in a checkpoint."""

    name: str
    """Path in the state_dict, for messages."""
    param: Tensor
    state: Mapping[str, Any]


def check_is_mapping(state_dict: object) -> None:
    """Check the type of a state_dict; :meth:`torch.optim.Optimizer.load_state_dict` copies it before any hook runs.

    Raises:
        TypeError: it is not a dictionary.

    Collective: none.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict, got {_brief(state_dict)}; {_OWN}")


def check_state_dict(state_dict: object, param_groups: list[dict[str, Any]]) -> None:
    """Validate a state_dict for the optimizer with these parameter groups; changes neither.

    Args:
        state_dict: as :meth:`torch.optim.Optimizer.load_state_dict` takes it, after all hooks.
        param_groups: the parameter groups of the optimizer.

    Raises:
        TypeError: an entry has the wrong type.
        ValueError: it is of another optimizer, model or layout, incomplete, or a value is out of range.

    Collective: none. Each rank checks its own elements, so an error may be raised on some ranks only; loading has no
    collective either, so the others do not wait.

    Numerics: reads all states once; the results are copied from each device in one transfer.
    """
    check_is_mapping(state_dict)
    whole = cast("Mapping[str, Any]", state_dict)
    for key in ("state", "param_groups"):
        if key not in whole:
            raise ValueError(f"state_dict must have the keys 'state' and 'param_groups', got {_keys(whole)}; {_OWN}")
    states, saved_groups = whole["state"], whole["param_groups"]
    if not isinstance(states, Mapping):
        raise TypeError(f"state_dict['state'] must be a dict, got {_brief(states)}; {_OWN}")
    _check_groups(saved_groups, param_groups)
    saved_states = list(_saved_states(cast("Mapping[Any, Any]", states), saved_groups, param_groups))
    if "precision" in whole:  # the authors' code, and torch's tools for distributed checkpoints, have none
        _check_precision(whole["precision"])
    for saved in saved_states:
        _check_state(saved)
    _check_steps(saved_states)
    _check_numbers(saved_states)
    for index, saved_group in enumerate(saved_groups):  # last: the states identify another optimizer more clearly
        _check_hyper(index, saved_group)


def _check_groups(saved_groups: Any, param_groups: list[dict[str, Any]]) -> None:
    if not isinstance(saved_groups, (list, tuple)):
        raise TypeError(f"state_dict['param_groups'] must be a list, got {_brief(saved_groups)}; {_OWN}")
    for index, saved in enumerate(cast("list[Any]", saved_groups)):
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), (list, tuple)):
            raise TypeError(
                f"state_dict['param_groups'][{index}] must be a dict with a list 'params', got {_brief(saved)}; {_OWN}"
            )
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (param_groups, saved_groups))
    if len(sizes) != len(saved_sizes):
        raise ValueError(
            f"state_dict must have {len(sizes)} parameter groups, as this optimizer has, got a different number of "
            f"parameter groups, {len(saved_sizes)}; make the optimizer with the parameter groups that were saved"
        )
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict['param_groups'] must have {sizes} parameters, as in this optimizer, got {saved_sizes}, which "
            "doesn't match; make the model and the parameter groups that were saved"
        )
    _check_ids([group["params"] for group in saved_groups])


def _check_ids(ids_by_group: list[list[Any]]) -> None:
    ids = list(chain.from_iterable(ids_by_group))
    if not all(isinstance(each, (int, str)) for each in ids):
        wrong = next(each for each in ids if not isinstance(each, (int, str)))
        raise TypeError(f"'params' of a saved parameter group must list numbers or names, got {_brief(wrong)}; {_OWN}")
    if len(set(ids)) != len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise ValueError(f"'params' of the saved parameter groups must differ, got {twice!r} twice; {_OWN}")


def _check_hyper(index: int, saved: Mapping[str, Any]) -> None:
    missing = [name for name in _ALWAYS_SAVED if name not in saved]
    if missing:
        raise ValueError(
            f"state_dict['param_groups'][{index}] must have {', '.join(_ALWAYS_SAVED)}, got {_keys(saved)}; {_OWN}"
        )
    try:
        Hyper.from_param_group({**Hyper(lr=0.0).as_defaults(), **saved})
    except (TypeError, ValueError) as error:
        raise type(error)(f"state_dict['param_groups'][{index}]: {error}; {_OWN}") from None


def _saved_states(
    states: Mapping[Any, Any], saved_groups: list[Mapping[str, Any]], param_groups: list[dict[str, Any]]
) -> Iterator[_SavedState]:
    """Yield the saved states; parameters without one have not been stepped yet."""
    params: dict[Any, Tensor] = {}
    for saved_group, param_group in zip(saved_groups, param_groups, strict=True):
        params.update(zip(saved_group["params"], param_group["params"], strict=True))
    for param_id, state in states.items():
        if param_id not in params:
            # Other entries belong to the user, unless they look like a state.
            if isinstance(state, Mapping) and not {"step", *STATE_NAMES}.isdisjoint(cast("Mapping[Any, Any]", state)):
                raise ValueError(
                    f"state_dict['state'] must have states of the parameters in 'param_groups', got one of "
                    f"{param_id!r}, which is not in any parameter group; {_OWN}"
                )
        elif not isinstance(state, Mapping):
            raise TypeError(f"state_dict['state'][{param_id!r}] must be a dict, got {_brief(state)}; {_OWN}")
        elif state:
            name = f"state_dict['state'][{param_id!r}]"
            yield _SavedState(name, params[param_id], cast("Mapping[str, Any]", state))


def _check_state(saved: _SavedState) -> None:
    missing = [name for name in ("step", *STATE_NAMES) if name not in saved.state]
    if missing:
        raise ValueError(
            f"{saved.name} must have step, {', '.join(STATE_NAMES)}, got {_keys(saved.state)} without "
            f"{', '.join(missing)}: another optimizer's, or incomplete; {_OWN}, or start without loading"
        )
    for name in _tensors_of(saved):
        value = saved.state[name]
        where = f"{saved.name}[{name!r}]"
        if not isinstance(value, Tensor):
            raise TypeError(f"{where} must be a tensor, got {_brief(value)}; {_OWN}")
        _check_values(where, value, saved.param)
        _check_placement(where, value, saved.param)


def _tensors_of(saved: _SavedState) -> tuple[str, ...]:
    """Return the keys of the tensors that are shaped like the parameter."""
    return (*STATE_NAMES, MASTER) if MASTER in saved.state else STATE_NAMES


def _check_precision(saved: object) -> None:
    if not isinstance(saved, Mapping):
        raise TypeError(f"state_dict['precision'] must be a dict, got {_brief(saved)}; {_OWN}")
    values = cast("Mapping[str, Any]", saved)
    names = Precision().as_saved()
    if values.keys() != names.keys():
        raise ValueError(f"state_dict['precision'] must have the keys {', '.join(names)}, got {_keys(values)}; {_OWN}")
    try:
        Precision(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"state_dict['precision']: {error}; {_OWN}") from None


def _check_values(where: str, value: Tensor, param: Tensor) -> None:
    fits = value.is_complex() if param.is_complex() else value.is_floating_point()
    if not fits:
        must = "complex" if param.is_complex() else "floating-point"
        raise TypeError(f"{where} must be {must}, as its parameter is {param.dtype}, got {value.dtype}; {_OWN}")
    if value.layout != torch.strided or (value.is_meta and not param.is_meta):
        raise ValueError(
            f"{where} must be a dense tensor with values, got one on {value.device} with layout {value.layout}; read "
            "the checkpoint onto the CPU or the parameter's device"
        )


def _check_placement(where: str, value: Tensor, param: Tensor) -> None:
    if is_dtensor(param) and is_dtensor(value):
        same_mesh = value.device_mesh == param.device_mesh or (
            value.device_mesh.device_type == param.device_mesh.device_type
            and torch.equal(value.device_mesh.mesh, param.device_mesh.mesh)
        )
        if not same_mesh or value.placements != param.placements:
            _refuse_placement(
                f"{where} must be sharded like its parameter, {tuple(param.placements)} over {param.device_mesh}",
                f"{tuple(value.placements)} over {value.device_mesh}",
            )
    elif is_dtensor(param) or is_dtensor(value):
        kinds = ("a DTensor", "a plain tensor")
        must, got = kinds if is_dtensor(param) else reversed(kinds)
        _refuse_placement(f"{where} must be {must} like its parameter", f"{got} of shape {tuple(value.shape)}")
    if value.shape != param.shape or local_tensor(value).shape != local_tensor(param).shape:
        local = "" if not is_dtensor(param) else f", {tuple(local_tensor(param).shape)} on this rank"
        got = "" if not is_dtensor(value) else f", {tuple(local_tensor(value).shape)} on this rank"
        _refuse_placement(
            f"{where} must have the shape of its parameter, {tuple(param.shape)}{local}", f"{tuple(value.shape)}{got}"
        )


def _refuse_placement(must: str, got: str) -> NoReturn:
    raise ValueError(
        f"{must}, got {got}; load into the model, world size and layout that were saved; otherwise {_LAYOUTS}"
    )


def _check_steps(saved_states: list[_SavedState]) -> None:
    """Check all steps; those of a device are read in one transfer, as each read waits for the device."""
    by_device: dict[torch.device, list[tuple[_SavedState, Tensor]]] = {}
    for saved in saved_states:
        step = saved.state["step"]
        if not isinstance(step, Tensor):
            is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
            _check_step(saved, float(step) if is_number else None)
        elif step.numel() != 1 or step.is_complex() or step.dtype == torch.bool or is_dtensor(step) or step.is_meta:
            _check_step(saved, None)
        else:
            by_device.setdefault(step.device, []).append((saved, step.detach().reshape(())))
    for pairs in by_device.values():
        values = torch.stack([step.double() if step.device.type != "mps" else step.float() for _, step in pairs])
        for (saved, _), value in zip(pairs, values.tolist(), strict=True):
            _check_step(saved, value)


def _check_step(saved: _SavedState, value: float | None) -> None:
    must = f"{saved.name}['step'] must be a whole number >= 0, as a number or a plain tensor of one element"
    if value is None:
        raise TypeError(f"{must}, got {_brief(saved.state['step'])}; {_OWN}")
    if not (value >= 0 and value.is_integer()):  # is_integer() is False for inf and NaN
        raise ValueError(f"{must}, got {value!r}; the checkpoint is damaged, load another one")


def _check_numbers(saved_states: list[_SavedState]) -> None:
    """Refuse inf or NaN in any state, and negative second moments."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for saved in saved_states:
        for name in _tensors_of(saved):
            value = local_tensor(saved.state[name].detach())
            if value.numel() and not value.is_meta:
                ends = torch.stack(value.aminmax())  # both NaN if there is a NaN
                ends = ends.double() if ends.device.type != "mps" else ends.float()
                by_device.setdefault(value.device, []).append((f"{saved.name}[{name!r}]", ends))
    wrong: list[str] = []
    for named in by_device.values():
        found = torch.stack([ends for _, ends in named]).tolist()
        for (where, _), (smallest, largest) in zip(named, found, strict=True):
            if not (math.isfinite(smallest) and math.isfinite(largest)):
                wrong.append(f"inf or NaN in {where}")
            elif smallest < 0 and where.endswith("['exp_avg_sq']"):
                wrong.append(f"{smallest!r} in {where}")
    if wrong:
        more = f" and {len(wrong) - _NUM_NAMED} more" if len(wrong) > _NUM_NAMED else ""
        raise ValueError(
            "states must be finite, and second moments >= 0, got "
            f"{', '.join(wrong[:_NUM_NAMED])}{more}; the checkpoint is damaged, load another one"
        )


def _keys(mapping: Mapping[Any, Any]) -> str:
    names = sorted(map(repr, mapping))
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no keys"


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:60]}..."
