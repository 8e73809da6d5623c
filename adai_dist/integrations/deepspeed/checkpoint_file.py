"""Reading the files of DeepSpeed's checkpoints, in which nothing is executed."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

_RECORDS: list[Any] = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
"""What DeepSpeed's own files have in them beside tensors and plain values."""


def load_checkpoint_file(path: Path) -> Any:
    """Load without reading the tensors where possible: they stay in the file until they are used.

    Raises:
        ValueError: the file is damaged, or has objects in it that a checkpoint of DeepSpeed does not have.
    """
    try:
        with torch.serialization.safe_globals(_RECORDS):
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"a checkpoint must hold tensors and plain values alone, and be whole, got {str(path)!r}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; use another checkpoint"
        ) from error
