"""Universal checkpoints with Adai's states: DeepSpeed's converter, run so that ``beta1_prod`` survives."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed import __version__ as deepspeed_version
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    CAT_DIM,
    DS_VERSION,
    FP32_FLAT_GROUPS,
    GROUP_PADDINGS,
    MODEL_FILE_PREFIX,
    MODEL_FILE_SUFFIX,
    OPTIM_FILE_SUFFIX,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_ALIGNMENT_PADDINGS,
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    ZERO_FILE_PREFIX,
)

from adai_dist.integrations.deepspeed.checkpoint_file import load_checkpoint_file

FIRST_STAGE_3_FILE_PREFIX = f"{ZERO_FILE_PREFIX}0_{MODEL_FILE_PREFIX}"


def to_universal(input_folder: Path, output_folder: Path, num_workers: int = 1) -> None:
    """Convert a ZeRO checkpoint into a universal one, which other numbers of ranks and other stages can load.

    The result has the layout of DeepSpeed's own converter and, beside ``exp_avg.pt`` of each parameter, its
    ``beta1_prod.pt``; ``optimizer_state.pt`` has what the loaders of ZeRO 1, 2 and 3 look for, so that the stage may
    change too. DeepSpeed's converter unpickles: convert only what you trust.

    Args:
        input_folder: one checkpoint: the folder named after the tag, with ``*_optim_states.pt`` in it.
        output_folder: where the result appears, complete or not at all; ``latest_universal`` beside it will name it.
        num_workers: processes that read and write, each with one rank's file in memory.

    Raises:
        FileNotFoundError: ``input_folder`` does not exist, or holds no ZeRO checkpoint.
        NotADirectoryError: ``input_folder``, or what is to hold ``output_folder``, is a file.
        FileExistsError: ``output_folder`` is not empty.
        ValueError: ``output_folder`` is within ``input_folder``, or ``num_workers`` is less than 1; the optimizer of
            the checkpoint has no ``beta1_prod``, or DeepSpeed's converter would not make of it what it says: states
            on NVMe, experts, round_robin_gradients.
    """
    source, target = Path(input_folder).absolute(), Path(output_folder).absolute()
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}; 1 converts in this process alone")
    shards = _shards(source)
    _check_output(source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work_name:
        work = Path(work_name)
        result = work / target.name
        _convert(source, result, num_workers)
        if not _has_beta1_prod(result):
            disguised = work / "disguised"
            _disguise(source, shards, disguised)
            _convert(disguised, work / "beta1_prod", num_workers)
            shutil.rmtree(disguised)
            _move_beta1_prod(work / "beta1_prod", result)
        _complete(result, shards[0])
        result.rename(target)
        latest = work / "latest_universal"  # where DeepSpeed has written the temporary names
        latest.write_text(target.name)
        os.replace(latest, target.parent / latest.name)


# -- what is there -----------------------------------------------------------------------------------------------------


def _shards(source: Path) -> list[Path]:
    """The files with optimizer states, after a look into each."""
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        kind = NotADirectoryError if source.exists() else FileNotFoundError
        raise kind(
            f"the input must be the folder of one ZeRO checkpoint, got {str(source)!r}, which {what}; name another"
        )
    shards = sorted(source.glob(f"*{OPTIM_FILE_SUFFIX}"))
    if not shards:
        hint = (
            "name the folder of one checkpoint; without ZeRO there is nothing to convert: any number of ranks loads it"
        )
        if (source / "latest").is_file():
            hint = (
                f"name the folder of one checkpoint, such as {str(source / (source / 'latest').read_text().strip())!r}"
            )
        raise FileNotFoundError(
            f"the input must hold a ZeRO checkpoint (*{OPTIM_FILE_SUFFIX}), got {str(source)!r}"
            f"{'' if any(source.iterdir()) else ', which is empty'}; {hint}"
        )
    if (source / "offloaded_tensors").exists():
        raise ValueError(
            f"the optimizer states must be in the checkpoint itself, but those of {str(source)!r} were on NVMe, which "
            "DeepSpeed's converter cannot read; offload to the CPU in runs that are to be converted"
        )
    if any(source.glob("layer_*_expert_*")):
        raise ValueError(
            f"a model that is to be converted must have no experts, but {str(source)!r} has some: each rank calls its "
            "own by the same names, which DeepSpeed's converter takes for parts of one; as many ranks as have saved it "
            "can load it as it is"
        )
    for shard in shards:
        _check_states(shard)
    _check_links(source, shards)
    return shards


def _check_output(source: Path, target: Path) -> None:
    if source.resolve() in target.resolve().parents:
        raise ValueError(
            f"the output must be outside of the input, got {str(target)!r} within {str(source)!r}; name another one"
        )
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FileExistsError(f"the output must be a new or an empty folder, got {str(target)!r}; name another one")
    nearest = next(folder for folder in target.parents if folder.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"the output must be a new folder in a folder, got {str(target)!r}, but {str(nearest)!r} is a file; name "
            "another one"
        )


def _check_states(shard: Path) -> None:
    content = load_checkpoint_file(shard)
    states = _base_state(content)["state"]
    missing = [index for index, state in states.items() if "beta1_prod" not in state]
    if missing or not states:
        raise ValueError(
            f"the checkpoint must hold beta1_prod for every state, but in {str(shard)!r} "
            f"{f'states {missing} have none' if states else 'there is no state at all'}; convert checkpoints of Adai, "
            "AdaiW or AdaiV2 that were saved after the first step"
        )
    # BF16_Optimizer counts all padding of a group to the last rank's partition; the converter then fails on it.
    paddings = content[OPTIMIZER_STATE_DICT].get(GROUP_PADDINGS) or []
    for index, (padding, state) in enumerate(zip(paddings, states.values(), strict=False)):
        if padding > state["beta1_prod"].numel():
            raise ValueError(
                f"DeepSpeed's converter needs param groups with more elements than padding, but group {index} has "
                f"less, and was stepped by BF16_Optimizer; put its parameters into another group, or leave out "
                '"grad_accum_dtype" under "data_types"'
            )


def _check_links(source: Path, shards: list[Path]) -> None:
    """Compare where DeepSpeed says that the parameters are with the order in which they are flattened.

    Under round_robin_gradients of ZeRO 1 and 2 it mixes them up, which shows only here: in a universal checkpoint
    parameters would have elements of others.
    """
    linked: dict[tuple[str, int], dict[str, None]] = {}  # names in order, by model-parallel rank and param group
    for shard in sorted(shards, key=_ranks):
        zero_state = load_checkpoint_file(shard)[OPTIMIZER_STATE_DICT]
        paddings = zero_state.get(PARAM_ALIGNMENT_PADDINGS) or []
        for index, mapping in enumerate(zero_state.get(PARAM_SLICE_MAPPINGS) or []):
            if index >= len(paddings) or not any(paddings[index]):  # with these it links correctly
                names = linked.setdefault((_ranks(shard)[0], index), {})
                names.update(dict.fromkeys(sorted(mapping, key=lambda name: mapping[name].start)))
    for (rank, index), names in linked.items():
        shapes = load_checkpoint_file(source / f"{MODEL_FILE_PREFIX}{rank}{MODEL_FILE_SUFFIX}")[PARAM_SHAPES]
        if list(names) != [name for name in shapes[index] if name in names]:
            raise ValueError(
                '"round_robin_gradients" must be false in a run that is to be converted: with it, DeepSpeed does not '
                f"know where in param group {index} of {str(source)!r} its parameters are. As many ranks as have saved "
                "it can load it as it is; zero_to_fp32.py makes the weights alone of it"
            )


def _ranks(shard: Path) -> tuple[str, int]:
    """The model-parallel rank as it is written in the names of files, and the data-parallel rank."""
    match = re.search(rf"{ZERO_FILE_PREFIX}(\d+)_{MODEL_FILE_PREFIX}(\d+)", shard.name)
    if match is None:
        raise ValueError(f"a file with optimizer states must name its ranks, got {str(shard)!r}")
    return match[2], int(match[1])


def _base_state(shard: dict[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` of the wrapped optimizer; ZeRO 3 and the others keep it under different names."""
    zero_state = shard[OPTIMIZER_STATE_DICT]
    return zero_state[BASE_OPTIMIZER_STATE if BASE_OPTIMIZER_STATE in zero_state else OPTIMIZER_STATE_DICT]


def _param_folders(universal: Path) -> Iterator[Path]:
    """The folders of the parameters that the optimizer has states of; names may contain slashes."""
    return (path.parent for path in sorted((universal / "zero").rglob("exp_avg.pt")))


def _has_beta1_prod(universal: Path) -> bool:
    return all((folder / "beta1_prod.pt").exists() for folder in _param_folders(universal))


# -- two passes of DeepSpeed's converter -------------------------------------------------------------------------------


def _convert(source: Path, target: Path, num_workers: int) -> None:
    """DeepSpeed's converter, with the arguments that its command line would give it."""
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=num_workers,
        num_merge_workers=num_workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # universal_checkpoint_info, which only Megatron-DeepSpeed writes
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)


def _disguise(source: Path, shards: list[Path], target: Path) -> None:
    """A copy of the checkpoint that shows ``beta1_prod`` as ``exp_avg``, since the converter knows only Adam's states.

    https://github.com/deepspeedai/DeepSpeed/pull/8609 is to change that.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and path not in shards:
            (target / path.name).symlink_to(path)
    for path in shards:
        shard = load_checkpoint_file(path)
        for state in _base_state(shard)["state"].values():
            # One tensor under both names: torch.save writes it once.
            state["exp_avg"] = state["exp_avg_sq"] = state.pop("beta1_prod")
        torch.save(shard, target / path.name)


def _move_beta1_prod(disguised: Path, universal: Path) -> None:
    for folder in _param_folders(disguised):
        (folder / "exp_avg.pt").rename(universal / folder.relative_to(disguised) / "beta1_prod.pt")


# -- one layout for all stages -----------------------------------------------------------------------------------------


def _complete(universal: Path, shard_path: Path) -> None:
    """Add what the loader of the other stages reads: it is the converter that differs between them, not the content."""
    base_state = _base_state(load_checkpoint_file(shard_path))
    step = next(iter(base_state["state"].values()))["step"]
    global_state_path = universal / "zero" / "optimizer_state.pt"
    global_state = load_checkpoint_file(global_state_path)
    global_state.pop(FP32_FLAT_GROUPS, None)  # of rank 0, and nobody reads it
    global_state.setdefault(DS_VERSION, deepspeed_version)
    global_state[PARAM_GROUPS] = base_state[PARAM_GROUPS]
    global_state[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, PARAM_GROUPS: base_state[PARAM_GROUPS]}
    _replace(global_state, global_state_path)

    shapes = _param_shapes(universal)
    for folder in _param_folders(universal):
        if not (folder / "step.pt").exists():
            torch.save(step, folder / "step.pt")
        for path in folder.glob("*.pt"):
            tensor: Any = load_checkpoint_file(path)
            if isinstance(tensor, torch.Tensor) and path.name != "step.pt":
                name = str(folder.relative_to(universal / "zero"))
                _replace({PARAM: tensor.reshape(shapes[name]), CAT_DIM: 0}, path)

    for path in list(universal.glob(f"{MODEL_FILE_PREFIX}*{MODEL_FILE_SUFFIX}")):
        _link(path, path.with_name(f"{ZERO_FILE_PREFIX}0_{path.name}"))
    for path in list(universal.glob(f"{FIRST_STAGE_3_FILE_PREFIX}*{MODEL_FILE_SUFFIX}")):
        _link(path, path.with_name(path.name.removeprefix(f"{ZERO_FILE_PREFIX}0_")))


def _param_shapes(universal: Path) -> dict[str, torch.Size]:
    for path in universal.glob(f"{FIRST_STAGE_3_FILE_PREFIX}*{MODEL_FILE_SUFFIX}"):
        return {name: shape for shapes in load_checkpoint_file(path)[PARAM_SHAPES] for name, shape in shapes.items()}
    return {}


def _replace(content: Any, path: Path) -> None:
    # Not in place: tensors in content may be a view of the file.
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def _link(path: Path, other_name: Path) -> None:
    """The same file under the name that the other stages give it."""
    if other_name.exists():
        return
    try:
        other_name.hardlink_to(path)
    except OSError:  # not every file system has links
        shutil.copy2(path, other_name)
