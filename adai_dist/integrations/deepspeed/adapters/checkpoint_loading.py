"""Loading of checkpoints under DeepSpeed with all of Adai's states, and refusal of other optimizers' states."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT, PARAM_GROUPS

from adai_dist.integrations.deepspeed.adapters.stage_3 import Stage3
from adai_dist.integrations.deepspeed.adapters.zero_wrapper import ZeroWrapper
from adai_dist.integrations.deepspeed.checkpoint_file import load_checkpoint_file
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.likely_mistakes import warn_of_other_precision
from adai_dist.optimizer.state import new_state, restored_state
from adai_dist.sharding.param_shard import STATE_NAMES


def wrap_checkpoint_loading(engine: Any, zero_wrapper: ZeroWrapper | None) -> None:
    """Make DeepSpeed load all states from ordinary and universal checkpoints.

    A universal checkpoint then restores ``beta1_prod`` and the hyperparameters of each parameter group under every
    ZeRO stage. (DeepSpeed's ZeRO 3 reads only Adam's two states, and gives all groups the hyperparameters of the
    first.) A checkpoint without ``beta1_prod`` raises ValueError on all ranks, before anything is changed. With
    ``load_optimizer_states=False`` only the weights are loaded, of any optimizer's checkpoint. (DeepSpeed's ZeRO 1 and
    2 would load the states nevertheless.)

    Args:
        engine: the engine, of which only the optimizer and the wrapper are changed.
        zero_wrapper: interface to ``engine.optimizer``; None without ZeRO.

    **Collective**: none, here or in loading; all ranks must see the same checkpoint folder.
    """
    optimizer: AdaptiveInertia = engine.basic_optimizer
    optimizer.register_load_state_dict_pre_hook(_refuse_other_states)
    if isinstance(zero_wrapper, Stage3):
        _replace_universal_loading_of_stage_3(zero_wrapper, optimizer, engine.param_names)
    elif zero_wrapper is not None:
        _wrap_universal_loading(zero_wrapper, optimizer)
        _relink_after(zero_wrapper.wrapper, "_load_universal_checkpoint")
        _relink_after(zero_wrapper.wrapper, "_load_legacy_checkpoint")
        if hasattr(zero_wrapper.wrapper, "reload_states"):
            _relink_after(zero_wrapper.wrapper, "reload_states")


def _replace_universal_loading_of_stage_3(
    zero_wrapper: Stage3, optimizer: AdaptiveInertia, param_names: dict[Any, str]
) -> None:
    wrapper = zero_wrapper.wrapper
    original = wrapper.load_hp_checkpoint_state_from_checkpoint_dir_stage3

    @functools.wraps(original)
    def load_hp_checkpoint_state_from_checkpoint_dir_stage3(checkpoint_dir: str, *_: Any) -> None:
        checkpoint = UniversalCheckpoint(checkpoint_dir)
        checkpoint.check([param_names[param] for params in zero_wrapper.model_groups() for param in params], optimizer)
        wrapper._load_global_state_stage3(checkpoint.content)
        step = checkpoint.content[OPTIMIZER_STATE_DICT]["state"][0]["step"]
        for part, flat in enumerate(zero_wrapper.flat_partitions()):
            folders = [checkpoint.zero_folder / param_names[param] for param in zero_wrapper.model_groups()[part]]
            loaded = {key: zero_wrapper.load_part(part, folders, key) for key in ("fp32", *STATE_NAMES)}
            flat.data.copy_(loaded.pop("fp32"))
            optimizer.state[flat] = restored_state({"step": step, **loaded}, flat, optimizer.precision)
        checkpoint.restore_param_groups(optimizer)
        zero_wrapper.copy_to_model()
        checkpoint.warn_of_other_precision(optimizer)

    wrapper.load_hp_checkpoint_state_from_checkpoint_dir_stage3 = load_hp_checkpoint_state_from_checkpoint_dir_stage3


def _wrap_universal_loading(zero_wrapper: ZeroWrapper, optimizer: AdaptiveInertia) -> None:
    wrapper = zero_wrapper.wrapper
    original = wrapper._load_universal_checkpoint

    @functools.wraps(original)
    def _load_universal_checkpoint(checkpoint_folder: str, load_optimizer_states: bool, *others: Any) -> None:
        checkpoint = UniversalCheckpoint(checkpoint_folder)
        param_groups = zero_wrapper.model_groups()
        names = [wrapper.param_names[param] for params in param_groups for param in params]
        checkpoint.check(names if load_optimizer_states else (), optimizer)
        zero_wrapper.check_universal_offsets()
        kept = {flat: dict(optimizer.state.get(flat, {})) for flat in zero_wrapper.flat_partitions()}
        with (
            nullcontext() if load_optimizer_states else _states_kept(optimizer),
            _placeholders_in_empty_groups(wrapper, param_groups, checkpoint.step(names)),
        ):
            original(checkpoint_folder, load_optimizer_states, *others)
        _relink_master_weights(zero_wrapper)
        for flat, before in kept.items():
            # Only what DeepSpeed has replaced is in the form of checkpoints.
            loaded = {key: value for key, value in optimizer.state[flat].items() if value is not before.get(key)}
            restored = restored_state(loaded, flat, optimizer.precision)
            optimizer.state[flat] = {**new_state(flat, optimizer.precision), **before, **restored}
        if load_optimizer_states:
            checkpoint.warn_of_other_precision(optimizer)

    wrapper._load_universal_checkpoint = _load_universal_checkpoint


def _relink_master_weights(zero_wrapper: ZeroWrapper) -> None:
    """Make ``safe_get_full_fp32_param``, and the next loading, find the master weights.

    DeepSpeed leaves its links to them at the state that it has loaded last.
    """
    for flat, params in zip(zero_wrapper.flat_partitions(), zero_wrapper.model_groups(), strict=True):
        for mapping in [param._hp_mapping for param in params if param._hp_mapping is not None]:
            address = mapping.hp_fragment_address
            mapping.hp_fragment = flat.narrow(0, address.start, address.numel)


def _relink_after(wrapper: Any, name: str) -> None:
    """Make ``safe_get_full_optimizer_state`` find the states after a method that replaces them.

    DeepSpeed drops its links to the states there, and creates new ones in the first step only.
    """
    original: Any = getattr(wrapper, name)

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
        self.content: dict[str, Any] = load_checkpoint_file(path)
        self.param_groups: list[dict[str, Any]] = self.content[PARAM_GROUPS]

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

    def warn_of_other_precision(self, optimizer: AdaptiveInertia) -> None:
        """Warn about a checkpoint in another mode, or with another seed."""
        warn_of_other_precision(optimizer.precision, self.content.get(OPTIMIZER_STATE_DICT, {}))

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
