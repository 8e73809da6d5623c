"""Loading checkpoints under DeepSpeed: nothing of Adai's state is lost, and no other optimizer's is taken for it."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed import __version__ as deepspeed_version
from deepspeed.checkpoint.constants import PARAM_GROUPS
from deepspeed.runtime.base_optimizer import ZeROOptimizer

from adai_dist.integrations.deepspeed.checkpoint_file import load_checkpoint_file
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.state import new_state

LOAD_STAGE_3 = "load_hp_checkpoint_state_from_checkpoint_dir_stage3"
LOAD_OTHERS = "load_hp_checkpoint_state_from_checkpoint_dir"


def wrap_checkpoint_loading(wrapper: Any, optimizer: AdaptiveInertia) -> None:
    """Complete what DeepSpeed loads, from ordinary and from universal checkpoints.

    After it, loading a universal checkpoint restores ``beta1_prod`` and each param group's own hyperparameters under
    every ZeRO stage (ZeRO 3 by itself reads Adam's two states only, and gives all groups the hyperparameters of the
    first); a checkpoint without ``beta1_prod`` raises ValueError on all ranks, before anything is changed.

    Args:
        wrapper: ``engine.optimizer``, of which this instance alone is changed; ``optimizer`` itself without ZeRO.
        optimizer: ``engine.basic_optimizer``.

    Raises:
        RuntimeError: this version of DeepSpeed loads universal checkpoints in an unknown way.

    **Collective**: none here, nor in what is added to loading; all ranks must see the same checkpoint folder.
    """
    optimizer.register_load_state_dict_pre_hook(_refuse_other_states)
    if isinstance(wrapper, ZeROOptimizer):
        _wrap_zero(wrapper, optimizer)


def _wrap_zero(wrapper: Any, optimizer: AdaptiveInertia) -> None:
    is_stage_3 = hasattr(wrapper, LOAD_STAGE_3)
    name = LOAD_STAGE_3 if is_stage_3 else LOAD_OTHERS
    load: Any = getattr(wrapper, name, None)
    if load is None:
        raise RuntimeError(
            f"{type(wrapper).__name__} of DeepSpeed must have {name}(), but version {deepspeed_version} has not; use a "
            "version that this package was tested with"
        )

    def load_stage_3(checkpoint_dir: str) -> None:
        checkpoint = UniversalCheckpoint(checkpoint_dir)
        names = [[wrapper.param_names[param] for param in params] for params in wrapper.fp16_groups]
        checkpoint.check((name for sub_group in names for name in sub_group), optimizer)
        load(checkpoint_dir)
        checkpoint.load_beta1_prod(names, wrapper, optimizer)
        checkpoint.restore_param_groups(optimizer)

    def load_others(lp_groups_name: str, checkpoint_dir: str) -> None:
        checkpoint = UniversalCheckpoint(checkpoint_dir)
        param_groups: list[list[Any]] = getattr(wrapper, lp_groups_name)
        names = [wrapper.param_names[param] for params in param_groups for param in params]
        checkpoint.check(names, optimizer)
        _check_links(wrapper)
        with _no_group_without_elements(wrapper, param_groups, checkpoint.step(names)):
            load(lp_groups_name, checkpoint_dir)
        for param_group in optimizer.param_groups:
            flat_param = param_group["params"][0]
            optimizer.state[flat_param] = {**new_state(flat_param), **optimizer.state[flat_param]}

    setattr(wrapper, name, load_stage_3 if is_stage_3 else load_others)
    if not is_stage_3:
        _link_after(wrapper, "_load_legacy_checkpoint")
        _link_after(wrapper, "reload_states")


def _check_links(wrapper: Any) -> None:
    """DeepSpeed writes what it loads to where it takes the parameters to be, which is wrong in this case."""
    if not getattr(wrapper, "round_robin_gradients", False):
        return
    groups = zip(wrapper.bit16_groups, wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_padding, strict=True)
    for params, order, padding in groups:
        if any(a is not b for a, b in zip(params, order, strict=True)) and not any(padding):
            raise ValueError(
                '"round_robin_gradients" must be false in a run that loads a universal checkpoint: with it, DeepSpeed '
                "does not know where its parameters are; leave it out"
            )


def _link_after(wrapper: Any, name: str) -> None:
    """Let ``safe_get_full_optimizer_state`` find the states after a method that puts others in their place.

    DeepSpeed drops its links to the states there, and makes new ones in the very first step alone.
    """
    original: Any = getattr(wrapper, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def and_link(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()
        wrapper._hp_optimizer_states_linked = False  # the states may be there from the next step on only

    setattr(wrapper, name, and_link)


class UniversalCheckpoint:
    """The folder ``zero`` of a universal checkpoint: one folder per parameter, and what concerns all of them."""

    def __init__(self, checkpoint_dir: str) -> None:
        self.zero_folder: Path = Path(checkpoint_dir) / "zero"
        path = self.zero_folder / "optimizer_state.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"a universal checkpoint must have {str(path)!r}, but there is none; make one with "
                "'adai-dist to-universal IN OUT'"
            )
        # Of a checkpoint of ZeRO 3 it may hold rank 0's states too: leave them in the file.
        content = load_checkpoint_file(path)
        self.param_groups: list[dict[str, Any]] = content[PARAM_GROUPS]

    def check(self, param_names: Iterable[str], optimizer: AdaptiveInertia) -> None:
        """Refuse what cannot be continued; on all ranks alike, since it looks at all parameters.

        Raises:
            ValueError: a parameter has states, but no ``beta1_prod``; or the number of param groups differs.
        """
        folders = [self.zero_folder / name for name in param_names]
        missing = [f.name for f in folders if (f / "exp_avg.pt").exists() and not (f / "beta1_prod.pt").exists()]
        if missing:
            raise ValueError(
                f"a universal checkpoint must hold beta1_prod.pt beside each exp_avg.pt, but in "
                f"{str(self.zero_folder)!r} {len(missing)} of {len(folders)} parameters have none, such as "
                f"{missing[0]!r}: DeepSpeed's own converter drops it, and it cannot be computed from the other states. "
                "Convert the original checkpoint again, with 'adai-dist to-universal IN OUT'"
            )
        if len(self.param_groups) != len(optimizer.param_groups):
            raise ValueError(
                f"the optimizer must have the param groups of the checkpoint, {len(self.param_groups)}, but it has "
                f"{len(optimizer.param_groups)}; build the same ones"
            )

    def step(self, param_names: Iterable[str]) -> Any:
        """The step of any parameter; all have the same."""
        for name in param_names:
            path = self.zero_folder / name / "step.pt"
            if path.is_file():
                return load_checkpoint_file(path)
        return None

    def load_beta1_prod(self, names: list[list[str]], wrapper: Any, optimizer: AdaptiveInertia) -> None:
        """As the loader of ZeRO 3 does with ``exp_avg``: this rank's part of each parameter, one behind the other."""
        sub_groups = zip(wrapper.fp16_groups, names, wrapper.fp32_partitioned_groups_flat, strict=True)
        for params, param_names, flat_param in sub_groups:
            beta1_prod = torch.ones_like(flat_param)
            offset = 0
            for param, name in zip(params, param_names, strict=True):
                part = wrapper.load_hp_checkpoint_state(str(self.zero_folder / name), "beta1_prod", param=param)
                beta1_prod.narrow(0, offset, part.numel()).copy_(part)
                offset += part.numel()
            optimizer.state[flat_param]["beta1_prod"] = beta1_prod

    def restore_param_groups(self, optimizer: AdaptiveInertia) -> None:
        """Each group's own hyperparameters."""
        for param_group, saved in zip(optimizer.param_groups, self.param_groups, strict=True):
            param_group.update({key: value for key, value in saved.items() if key != "params"})


class _NoParameter:
    """Stands for the parameters of a group of which this rank holds padding alone."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self._hp_mapping = self

    def load_hp_checkpoint_state(self, *_: Any, **__: Any) -> Any:
        return self._step

    def get_optim_state_keys(self) -> list[str]:
        return []


@contextmanager
def _no_group_without_elements(wrapper: Any, param_groups: list[list[Any]], step: Any) -> Generator[None]:
    """DeepSpeed's loader of ZeRO 1 and 2 fails on ranks without an element of a group: it takes steps[0] of none."""
    added = [(params, _NoParameter(step)) for params in param_groups if all(p._hp_mapping is None for p in params)]
    for params, stand_in in added:
        params.append(stand_in)
        wrapper.param_names[stand_in] = "of which this rank has no element"
    try:
        yield
    finally:
        for params, stand_in in added:
            params.remove(stand_in)
            del wrapper.param_names[stand_in]


def _refuse_other_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Before ``optimizer.load_state_dict``; the states of a rank come from its own file, and all files are alike."""
    others = sorted({key for state in state_dict["state"].values() if "beta1_prod" not in state for key in state})
    if others:
        raise ValueError(
            f"the checkpoint must hold beta1_prod for every state of {type(optimizer).__name__}, but there are states "
            f"with {others} alone: it was saved by another optimizer. Load the weights only, with "
            "engine.load_checkpoint(..., load_module_only=True, load_optimizer_states=False), or continue with the "
            "optimizer that saved it"
        )
