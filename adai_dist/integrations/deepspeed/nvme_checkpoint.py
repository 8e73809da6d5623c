"""Checkpoints of states on NVMe: what DeepSpeed copies there is read again, which DeepSpeed itself does not do.

It copies the files of the swapped sub-groups into the checkpoint and back, but then takes the master weights alone from
them: all states start anew, their step too, and so do the sub-groups that are too small to be swapped.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, OPTIMIZER_STATE_DICT, PARAM_GROUPS

from adai_dist.integrations.deepspeed.files import load_file
from adai_dist.integrations.deepspeed.zero_mean import ZeroMean
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.state import new_state, step_tensor
from adai_dist.sharding.param_shard import STATE_NAMES

IN_MEMORY_FILE = "adai_dist_in_memory.pt"
"""Beside the files of the swapped tensors, while DeepSpeed copies them: what is not among them."""


def wrap_nvme_checkpoints(wrapper: Any, optimizer: AdaptiveInertia, source: ZeroMean) -> None:
    """Let ``engine.load_checkpoint`` restore everything where ZeRO 3 keeps states on NVMe.

    The number of ranks and the sub-groups must be those of the run that saved. A checkpoint that was saved without this
    package raises FileNotFoundError.

    Args:
        wrapper: ``engine.optimizer`` of ZeRO 3, of which this instance alone is changed.
        optimizer: ``engine.basic_optimizer``.
        source: of its mean.

    **Collective**: none here; what is added to loading is called by all ranks, as loading itself.
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
        """DeepSpeed calls it once its files are back, and nowhere else."""
        try:
            _restore(wrapper, optimizer, source, in_memory_path)
        finally:
            in_memory_path.unlink(missing_ok=True)

    in_memory_path.unlink(missing_ok=True)  # of a run that was killed in the middle
    wrapper.state_dict, wrapper.checkpoint_event_epilogue = state_dict, checkpoint_event_epilogue
    wrapper.reset_swap_buffers = reset_swap_buffers


def _restore(wrapper: Any, optimizer: AdaptiveInertia, source: ZeroMean, in_memory_path: Path) -> None:
    if not in_memory_path.is_file():
        raise FileNotFoundError(
            f"a checkpoint with states on NVMe must hold {IN_MEMORY_FILE} in offloaded_tensors, but there is "
            "none: it was saved without adai_dist. Load the weights only, or continue with the optimizer that saved it"
        )
    saved: dict[str, Any] = load_file(in_memory_path)
    states, flats = saved[OPTIMIZER_STATE_DICT]["state"], wrapper.fp32_partitioned_groups_flat
    param_groups = saved[OPTIMIZER_STATE_DICT][PARAM_GROUPS]
    if len(saved[FP32_FLAT_GROUPS]) != len(flats) or len(param_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the run must have the sub-groups and param groups of the checkpoint, {len(saved[FP32_FLAT_GROUPS])} and "
            f"{len(param_groups)}, but it has {len(flats)} and {len(optimizer.param_groups)}; use the same model, the "
            'same groups and the same "sub_group_size"'
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
    """From the files that were copied back; the sub-group must be in memory. Releasing it writes them again."""
    if not saved:  # saved before the first step
        return
    if not optimizer.state.get(flat):
        optimizer.state[flat] = new_state(flat)
        for name in STATE_NAMES:
            path = Path(wrapper.optimizer_swapper.swap_folder) / f"{name}-{flat.ds_id}.tensor.swp"
            if not path.is_file():
                raise FileNotFoundError(
                    f"the checkpoint must hold {path.name!r} in offloaded_tensors, but there is none: DeepSpeed names "
                    "the files by counting the parameters of all engines of a process; load in a new process, into the "
                    "first engine"
                )
            state = optimizer.state[flat][name]
            state.copy_(torch.from_file(str(path), shared=False, size=state.numel(), dtype=state.dtype))
    optimizer.state[flat]["step"] = step_tensor(saved["step"], flat)
