"""Checkpoints of states on NVMe, from which DeepSpeed alone restores only the master weights.

DeepSpeed copies the files of the swapped sub-groups into the checkpoint and back, but resets all optimizer states,
including their step, and the sub-groups that are too small to be swapped.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, OPTIMIZER_STATE_DICT, PARAM_GROUPS

from adai_dist.integrations.deepspeed.checkpoint_file import load_checkpoint_file
from adai_dist.integrations.deepspeed.zero_mean_source import ZeroMeanSource
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.state import new_state, step_tensor
from adai_dist.sharding.param_shard import STATE_NAMES

IN_MEMORY_FILE = "adai_dist_in_memory.pt"
"""File with everything that is not swapped, written next to the swap files while DeepSpeed copies them."""


def wrap_nvme_checkpoints(wrapper: Any, optimizer: AdaptiveInertia, source: ZeroMeanSource) -> None:
    """Make ``engine.load_checkpoint`` restore everything when ZeRO 3 keeps states on NVMe.

    The number of ranks and the sub-groups must be those of the run that saved. A checkpoint that was saved without this
    package raises FileNotFoundError.

    Args:
        wrapper: ``engine.optimizer`` under ZeRO 3; only this instance is changed.
        optimizer: ``engine.basic_optimizer``.
        source: the source of its mean.

    **Collective**: none here; loading must be called by all ranks, as before.
    """
    in_memory_path = Path(wrapper.optimizer_swapper.swap_folder) / IN_MEMORY_FILE
    original_state_dict, original_epilogue = wrapper.state_dict, wrapper.checkpoint_event_epilogue

    @functools.wraps(original_state_dict)
    def state_dict() -> dict[str, Any]:
        content = original_state_dict()
        torch.save(content, in_memory_path)  # swapped tensors are empty in it
        return content

    @functools.wraps(original_epilogue)
    def checkpoint_event_epilogue() -> None:
        in_memory_path.unlink(missing_ok=True)
        original_epilogue()

    @functools.wraps(wrapper.reset_swap_buffers)
    def reset_swap_buffers() -> None:
        """Restore the states; DeepSpeed calls this only after copying its files back."""
        try:
            _restore(wrapper, optimizer, source, in_memory_path)
        finally:
            in_memory_path.unlink(missing_ok=True)

    in_memory_path.unlink(missing_ok=True)  # left by a run that was killed while saving or loading
    wrapper.state_dict, wrapper.checkpoint_event_epilogue = state_dict, checkpoint_event_epilogue
    wrapper.reset_swap_buffers = reset_swap_buffers


def _restore(wrapper: Any, optimizer: AdaptiveInertia, source: ZeroMeanSource, in_memory_path: Path) -> None:
    if not in_memory_path.is_file():
        raise FileNotFoundError(
            f"a checkpoint with states on NVMe must contain {IN_MEMORY_FILE} in offloaded_tensors, got none: it was "
            "saved without adai_dist; load only the weights, or continue with the optimizer that saved it"
        )
    saved: dict[str, Any] = load_checkpoint_file(in_memory_path)
    states, flats = saved[OPTIMIZER_STATE_DICT]["state"], wrapper.fp32_partitioned_groups_flat
    param_groups = saved[OPTIMIZER_STATE_DICT][PARAM_GROUPS]
    if len(saved[FP32_FLAT_GROUPS]) != len(flats) or len(param_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the run must have {len(saved[FP32_FLAT_GROUPS])} sub-groups and {len(param_groups)} parameter groups, as "
            f"the checkpoint has, got {len(flats)} and {len(optimizer.param_groups)}; use the same model, the same "
            'groups and the same "sub_group_size"'
        )
    for param_group, saved_group in zip(optimizer.param_groups, param_groups, strict=True):
        param_group.update({key: value for key, value in saved_group.items() if key != "params"})
    timer_names: set[str] = set()
    for index, flat in enumerate(flats):
        wrapper._prepare_sub_group(index, timer_names)
        if wrapper._swappable_optimizer_subgroup(index):
            _read_states(wrapper, optimizer, flat, states.get(index))
        else:
            flat.data.copy_(saved[FP32_FLAT_GROUPS][index])
            optimizer.state[flat] = {key: value.to(flat.device) for key, value in states.get(index, {}).items()}
        wrapper._reassign_or_swap_out_partitioned_parameters(index)
        wrapper._release_sub_group(index, timer_names)
    source.after_loading()


def _read_states(wrapper: Any, optimizer: AdaptiveInertia, flat: Any, saved: dict[str, Any] | None) -> None:
    """Read the states of a sub-group from the swap files; it must be in memory, and is written when released."""
    if not saved:  # the checkpoint is from before the first step
        return
    if not optimizer.state.get(flat):
        optimizer.state[flat] = new_state(flat, optimizer.precision)
        for name in STATE_NAMES:
            path = Path(wrapper.optimizer_swapper.swap_folder) / f"{name}-{flat.ds_id}.tensor.swp"
            if not path.is_file():
                raise FileNotFoundError(
                    f"the checkpoint must contain {path.name!r} in offloaded_tensors, got none; load into the first "
                    "engine of a new process, since DeepSpeed numbers the files by the parameters of all engines of a "
                    "process"
                )
            state = optimizer.state[flat][name]
            state.copy_(torch.from_file(str(path), shared=False, size=state.numel(), dtype=state.dtype))
    optimizer.state[flat]["step"] = step_tensor(saved["step"], flat)
