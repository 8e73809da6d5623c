"""Conversion of ZeRO checkpoints to universal ones with DeepSpeed's converter, keeping ``beta1_prod``."""

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
    PARAM_GROUPS,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    ZERO_FILE_PREFIX,
)

from adai_dist.integrations.deepspeed.adapters.releases import installed_release
from adai_dist.integrations.deepspeed.checkpoint_file import load_checkpoint_file

PARAM_ALIGNMENT_PADDINGS = "param_alignment_paddings"  # DeepSpeed has this constant from 0.19.7 on
FIRST_STAGE_3_FILE_PREFIX = f"{ZERO_FILE_PREFIX}0_{MODEL_FILE_PREFIX}"


def to_universal(input_folder: Path, output_folder: Path, num_workers: int = 1) -> None:
    """Convert a ZeRO checkpoint to a universal one, which any number of ranks and any ZeRO stage can load.

    The result has the structure of DeepSpeed's own converter, with a ``beta1_prod.pt`` next to the ``exp_avg.pt`` of
    each parameter, and with the entries of ``optimizer_state.pt`` that the loaders of ZeRO 1, 2 and 3 need.
    DeepSpeed's converter unpickles the files: convert only checkpoints that you trust.

    Args:
        input_folder: folder of one checkpoint, named after its tag, with ``*_optim_states.pt`` in it.
        output_folder: folder of the result, which is created only when complete; ``latest_universal`` next to it will
            name it.
        num_workers: number of processes that convert, each with the file of one rank in memory.

    Raises:
        FileNotFoundError: ``input_folder`` does not exist, or contains no ZeRO checkpoint.
        NotADirectoryError: ``input_folder``, or a parent of ``output_folder``, is a file.
        FileExistsError: ``output_folder`` is not empty.
        ValueError: ``output_folder`` is within ``input_folder``; ``num_workers`` is less than 1; the optimizer of
            the checkpoint has no ``beta1_prod``; or DeepSpeed's converter does not support the checkpoint: states on
            NVMe, experts, round_robin_gradients.
    """
    source, target = Path(input_folder).absolute(), Path(output_folder).absolute()
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}; 1 converts in this process")
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
        _make_loadable_by_all_stages(result, shards[0])
        result.rename(target)
        latest = work / "latest_universal"  # DeepSpeed wrote the temporary name there
        latest.write_text(target.name)
        os.replace(latest, target.parent / latest.name)


# -- the input ---------------------------------------------------------------------------------------------------------


def _shards(source: Path) -> list[Path]:
    """Return the files of optimizer states, after checking each."""
    if not source.is_dir():
        fault = "is a file" if source.exists() else "does not exist"
        kind = NotADirectoryError if source.exists() else FileNotFoundError
        raise kind(
            f"the input must be the folder of one ZeRO checkpoint, got {str(source)!r}, which {fault}; name another"
        )
    shards = sorted(source.glob(f"*{OPTIM_FILE_SUFFIX}"))
    if not shards:
        hint = (
            "name the folder of one checkpoint; one saved without ZeRO needs no conversion for other numbers of ranks"
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
            f"the optimizer states must be in the checkpoint files, got {str(source)!r}, whose states were on NVMe, "
            "which DeepSpeed's converter cannot read; offload to the CPU in runs to be converted"
        )
    if any(source.glob("layer_*_expert_*")):
        raise ValueError(
            f"the model of the checkpoint must have no experts, got {str(source)!r} with experts, which have the same "
            "names on every rank, so that DeepSpeed's converter merges them; load the original checkpoint on the "
            "number of ranks that saved it"
        )
    is_stage_3 = any(source.glob(f"{FIRST_STAGE_3_FILE_PREFIX}*{MODEL_FILE_SUFFIX}"))
    if is_stage_3 and not installed_release().converts_sub_groups:
        num_sub_groups = len(load_checkpoint_file(shards[0])[OPTIMIZER_STATE_DICT][FP32_FLAT_GROUPS])
        if num_sub_groups > 1:
            raise ValueError(
                f"a checkpoint of ZeRO 3 must have one sub-group to be converted with DeepSpeed {deepspeed_version}, "
                f"got {num_sub_groups} in {str(source)!r}; install deepspeed>=0.18.6 for the conversion"
            )
    for shard in shards:
        _check_states(shard)
    _check_offsets(source, shards)
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
            f"the output must be a new folder, got {str(target)!r} below {str(nearest)!r}, which is a file; name "
            "another one"
        )


def _check_states(shard: Path) -> None:
    content = load_checkpoint_file(shard)
    states = _base_state(content)["state"]
    missing = [index for index, state in states.items() if "beta1_prod" not in state]
    if missing or not states:
        raise ValueError(
            f"the checkpoint must hold beta1_prod in every state, got {str(shard)!r} with "
            f"{f'states {missing} without it' if states else 'no states'}; convert checkpoints of Adai, AdaiW or "
            "AdaiV2 that were saved after the first step"
        )
    # BF16_Optimizer, and ZeRO 1 and 2 before 0.16.4, assign all padding of a group to the last rank's partition.
    paddings = content[OPTIMIZER_STATE_DICT].get(GROUP_PADDINGS) or []
    for index, (padding, state) in enumerate(zip(paddings, states.values(), strict=False)):
        if padding > state["beta1_prod"].numel():
            raise ValueError(
                "parameter groups must have more elements than the padding of the last rank to be converted, got "
                f"fewer in group {index} of {str(shard)!r}; move its parameters into another group, or use ZeRO "
                "stage 2 with deepspeed>=0.16.4"
            )


def _check_offsets(source: Path, shards: list[Path]) -> None:
    """Check that DeepSpeed's offsets of the parameters follow the order in which they are flattened.

    Under round_robin_gradients with ZeRO 1 and 2 they do not, and a universal checkpoint would contain permuted
    elements.
    """
    linked: dict[tuple[str, int], dict[str, None]] = {}  # ordered names, by model-parallel rank and parameter group
    for shard in sorted(shards, key=_ranks):
        zero_state = load_checkpoint_file(shard)[OPTIMIZER_STATE_DICT]
        paddings = zero_state.get(PARAM_ALIGNMENT_PADDINGS) or []
        for index, mapping in enumerate(zero_state.get(PARAM_SLICE_MAPPINGS) or []):
            if index >= len(paddings) or not any(paddings[index]):  # with padding the offsets are right
                names = linked.setdefault((_ranks(shard)[0], index), {})
                names.update(dict.fromkeys(sorted(mapping, key=lambda name: mapping[name].start)))
    for (rank, index), names in linked.items():
        shapes = load_checkpoint_file(source / f"{MODEL_FILE_PREFIX}{rank}{MODEL_FILE_SUFFIX}")[PARAM_SHAPES]
        if list(names) != [name for name in shapes[index] if name in names]:
            raise ValueError(
                '"round_robin_gradients" must be false in a run that is to be converted, got '
                f"{str(source)!r} with wrong offsets of the parameters in parameter group {index}; load it on the "
                "number of ranks that saved it, or extract the weights with zero_to_fp32.py"
            )


def _ranks(shard: Path) -> tuple[str, int]:
    """Return the model-parallel rank, as spelled in the file name, and the data-parallel rank."""
    match = re.search(rf"{ZERO_FILE_PREFIX}(\d+)_{MODEL_FILE_PREFIX}(\d+)", shard.name)
    if match is None:
        raise ValueError(
            f"a file of optimizer states must have its ranks in its name, got {str(shard)!r}; restore the name that "
            "DeepSpeed gave it"
        )
    return match[2], int(match[1])


def _base_state(shard: dict[str, Any]) -> dict[str, Any]:
    """Return the ``state_dict`` of the wrapped optimizer, whose key depends on the ZeRO stage."""
    zero_state = shard[OPTIMIZER_STATE_DICT]
    return zero_state[BASE_OPTIMIZER_STATE if BASE_OPTIMIZER_STATE in zero_state else OPTIMIZER_STATE_DICT]


def _param_folders(universal: Path) -> Iterator[Path]:
    """Yield the folders of the parameters with optimizer states; their names may contain slashes."""
    return (path.parent for path in sorted((universal / "zero").rglob("exp_avg.pt")))


def _has_beta1_prod(universal: Path) -> bool:
    return all((folder / "beta1_prod.pt").exists() for folder in _param_folders(universal))


# -- two passes of DeepSpeed's converter -------------------------------------------------------------------------------


def _convert(source: Path, target: Path, num_workers: int) -> None:
    """Run DeepSpeed's converter as its command line does."""
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=num_workers,
        num_merge_workers=num_workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # creates universal_checkpoint_info, which only Megatron-DeepSpeed writes
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(arguments)


def _disguise(source: Path, shards: list[Path], target: Path) -> None:
    """Copy the checkpoint with ``beta1_prod`` under the name ``exp_avg``, since the converter only reads Adam's states.

    https://github.com/deepspeedai/DeepSpeed/pull/8609 would make this unnecessary.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and path not in shards:
            (target / path.name).symlink_to(path)
    for path in shards:
        shard = load_checkpoint_file(path)
        for state in _base_state(shard)["state"].values():
            # torch.save writes a tensor under two names once.
            state["exp_avg"] = state["exp_avg_sq"] = state.pop("beta1_prod")
        torch.save(shard, target / path.name)


def _move_beta1_prod(disguised: Path, universal: Path) -> None:
    for folder in _param_folders(disguised):
        (folder / "exp_avg.pt").rename(universal / folder.relative_to(disguised) / "beta1_prod.pt")


# -- one format for all stages -----------------------------------------------------------------------------------------


def _make_loadable_by_all_stages(universal: Path, shard_path: Path) -> None:
    """Add the entries and file names that the loaders of the other stages read."""
    base_state = _base_state(load_checkpoint_file(shard_path))
    step = next(iter(base_state["state"].values()))["step"]
    global_state_path = universal / "zero" / "optimizer_state.pt"
    global_state = load_checkpoint_file(global_state_path)
    global_state.pop(FP32_FLAT_GROUPS, None)  # of rank 0, and not read by any loader
    global_state.setdefault(DS_VERSION, deepspeed_version)
    global_state[PARAM_GROUPS] = base_state[PARAM_GROUPS]
    global_state[OPTIMIZER_STATE_DICT] = {
        "state": {0: {"step": step}},
        PARAM_GROUPS: base_state[PARAM_GROUPS],
        "precision": base_state.get("precision", {}),
    }
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
    # Tensors in content may be memory-mapped from the file, so it is not overwritten in place.
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def _link(path: Path, other_name: Path) -> None:
    """Give a file a second name, the one that the other stages read."""
    if other_name.exists():
        return
    try:
        other_name.hardlink_to(path)
    except OSError:  # the file system has no hard links
        shutil.copy2(path, other_name)
