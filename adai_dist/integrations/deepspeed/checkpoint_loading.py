"""Loading of checkpoints under DeepSpeed with all of Adai's states, and refusal of other optimizers' states."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
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
    """Make DeepSpeed load all states from ordinary and universal checkpoints.

    A universal checkpoint then restores ``beta1_prod`` and the hyperparameters of each parameter group under every
    ZeRO stage. (DeepSpeed's ZeRO 3 reads only Adam's two states, and gives all groups the hyperparameters of the
    first.) A checkpoint without ``beta1_prod`` raises ValueError on all ranks, before anything is changed. With
    ``load_optimizer_states=False`` only the weights are loaded, of any optimizer's checkpoint. (DeepSpeed's ZeRO 1 and
    2 would load the states nevertheless.)

    Args:
        wrapper: ``engine.optimizer``; only this instance is changed. Without ZeRO it is ``optimizer``.
        optimizer: ``engine.basic_optimizer``.

    Raises:
        RuntimeError: this version of DeepSpeed has no known method to load universal checkpoints.

    **Collective**: none, here or in loading; all ranks must see the same checkpoint folder.
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
            f"{type(wrapper).__name__} of DeepSpeed must have {name}(), got none in version {deepspeed_version}; use a "
            "version that this release of adai_dist supports"
        )

    def load_stage_3(checkpoint_dir: str) -> None:
        checkpoint = UniversalCheckpoint(checkpoint_dir)
        names = [[wrapper.param_names[param] for param in params] for params in wrapper.fp16_groups]
        checkpoint.check((name for sub_group in names for name in sub_group), optimizer)
        load(checkpoint_dir)
        checkpoint.load_beta1_prod(names, wrapper, optimizer)
        checkpoint.restore_param_groups(optimizer)

    loads_states = True

    def load_others(lp_groups_name: str, checkpoint_dir: str) -> None:
        checkpoint = UniversalCheckpoint(checkpoint_dir)
        param_groups: list[list[Any]] = getattr(wrapper, lp_groups_name)
        names = [wrapper.param_names[param] for params in param_groups for param in params]
        checkpoint.check(names if loads_states else (), optimizer)
        _check_offsets(wrapper)
        with (
            nullcontext() if loads_states else _states_kept(optimizer),
            _placeholders_in_empty_groups(wrapper, param_groups, checkpoint.step(names)),
        ):
            load(lp_groups_name, checkpoint_dir)
        for param_group in optimizer.param_groups:
            flat_param = param_group["params"][0]
            optimizer.state[flat_param] = {**new_state(flat_param), **optimizer.state[flat_param]}

    setattr(wrapper, name, load_stage_3 if is_stage_3 else load_others)
    if not is_stage_3:
        original = wrapper._load_universal_checkpoint

        @functools.wraps(original)
        def load_universal(checkpoint_folder: str, load_optimizer_states: bool, *others: Any) -> None:
            nonlocal loads_states
            loads_states = load_optimizer_states
            original(checkpoint_folder, load_optimizer_states, *others)

        wrapper._load_universal_checkpoint = load_universal
        _relink_after(wrapper, "_load_universal_checkpoint")
        _relink_after(wrapper, "_load_legacy_checkpoint")
        _relink_after(wrapper, "reload_states")


def _check_offsets(wrapper: Any) -> None:
    """Refuse ``round_robin_gradients``, under which DeepSpeed loads states to the offsets of other parameters."""
    if not getattr(wrapper, "round_robin_gradients", False):
        return
    groups = zip(wrapper.bit16_groups, wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_padding, strict=True)
    for params, order, padding in groups:
        if any(a is not b for a, b in zip(params, order, strict=True)) and not any(padding):
            raise ValueError(
                '"round_robin_gradients" must be false in a run that loads a universal checkpoint, got true, for which '
                "DeepSpeed's offsets of the parameters are wrong; remove it"
            )


def _relink_after(wrapper: Any, name: str) -> None:
    """Make ``safe_get_full_optimizer_state`` find the states after a method that replaces them.

    DeepSpeed drops its links to the states there, and creates new ones in the first step only.
    """
    original: Any = getattr(wrapper, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def with_links(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()
        wrapper._hp_optimizer_states_linked = False  # the states may not exist before the next step

    setattr(wrapper, name, with_links)


class UniversalCheckpoint:
    """The folder ``zero`` of a universal checkpoint: a folder per parameter, and a file of common settings."""

    def __init__(self, checkpoint_dir: str) -> None:
        self.zero_folder: Path = Path(checkpoint_dir) / "zero"
        path = self.zero_folder / "optimizer_state.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"a universal checkpoint must contain {str(path)!r}, got none; create one with "
                "'adai-dist to-universal IN OUT'"
            )
        # From ZeRO 3 the file may also hold the states of rank 0, which stay memory-mapped.
        content = load_checkpoint_file(path)
        self.param_groups: list[dict[str, Any]] = content[PARAM_GROUPS]

    def check(self, param_names: Iterable[str], optimizer: AdaptiveInertia) -> None:
        """Refuse a checkpoint that the run cannot continue; checks all parameters, so that all ranks agree.

        Raises:
            ValueError: a parameter has states but no ``beta1_prod``, or the number of parameter groups differs.
        """
        folders = [self.zero_folder / name for name in param_names]
        missing = [f.name for f in folders if (f / "exp_avg.pt").exists() and not (f / "beta1_prod.pt").exists()]
        if missing:
            raise ValueError(
                f"a universal checkpoint must hold beta1_prod.pt next to each exp_avg.pt, got none for {len(missing)} "
                f"of {len(folders)} parameters in {str(self.zero_folder)!r}, such as {missing[0]!r}; DeepSpeed's own "
                "converter drops it, and it cannot be computed from the other states: convert the original checkpoint "
                "again with 'adai-dist to-universal IN OUT', or load only the weights with load_optimizer_states=False"
            )
        if len(self.param_groups) != len(optimizer.param_groups):
            raise ValueError(
                f"the optimizer must have {len(self.param_groups)} parameter groups, as the checkpoint has, got "
                f"{len(optimizer.param_groups)}; create the same groups"
            )

    def step(self, param_names: Iterable[str]) -> Any:
        """Return the step count of any parameter; all have the same."""
        for name in param_names:
            path = self.zero_folder / name / "step.pt"
            if path.is_file():
                return load_checkpoint_file(path)
        return None

    def load_beta1_prod(self, names: list[list[str]], wrapper: Any, optimizer: AdaptiveInertia) -> None:
        """Load this rank's partition of ``beta1_prod`` of each parameter, as ZeRO 3 loads ``exp_avg``."""
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
        """Restore the hyperparameters of each parameter group."""
        for param_group, saved in zip(optimizer.param_groups, self.param_groups, strict=True):
            param_group.update({key: value for key, value in saved.items() if key != "params"})


class _Placeholder:
    """Placeholder for the parameters of a group of which this rank holds only padding."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self._hp_mapping = self

    def load_hp_checkpoint_state(self, *_: Any, **__: Any) -> Any:
        return self._step

    def get_optim_state_keys(self) -> list[str]:
        return []


@contextmanager
def _placeholders_in_empty_groups(wrapper: Any, param_groups: list[list[Any]], step: Any) -> Generator[None]:
    """Add a placeholder to groups without elements on this rank, where DeepSpeed's loader of ZeRO 1 and 2 fails."""
    added = [(params, _Placeholder(step)) for params in param_groups if all(p._hp_mapping is None for p in params)]
    for params, placeholder in added:
        params.append(placeholder)
        wrapper.param_names[placeholder] = "no element on this rank"
    try:
        yield
    finally:
        for params, placeholder in added:
            params.remove(placeholder)
            del wrapper.param_names[placeholder]


@contextmanager
def _states_kept(optimizer: AdaptiveInertia) -> Generator[None]:
    """Keep states and hyperparameters of the optimizer while DeepSpeed loads others."""
    states = {param: dict(state) for param, state in optimizer.state.items()}
    param_groups = [dict(param_group) for param_group in optimizer.param_groups]
    try:
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(states)
        for param_group, kept in zip(optimizer.param_groups, param_groups, strict=True):
            param_group.clear()
            param_group.update(kept)


def _refuse_other_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse states of another optimizer; each rank checks its own file, and all files have the same keys."""
    others = sorted({key for state in state_dict["state"].values() if "beta1_prod" not in state for key in state})
    if others:
        raise ValueError(
            f"the checkpoint must hold beta1_prod in every state of {type(optimizer).__name__}, got states with only "
            f"{others}, of another optimizer; load only the weights with engine.load_checkpoint(..., "
            "load_module_only=True, load_optimizer_states=False), or continue with the optimizer that saved it"
        )
