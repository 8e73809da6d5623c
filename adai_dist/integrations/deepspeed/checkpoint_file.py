"""Safe reading of DeepSpeed's checkpoint files, without executing code from them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

_SAFE_CLASSES: list[Any] = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
"""Classes that DeepSpeed pickles into its files, in addition to tensors and plain values."""


def load_checkpoint_file(path: Path) -> Any:
    """Load a file with its tensors memory-mapped where the format allows it.

    Raises:
        ValueError: the file is damaged, or contains objects that DeepSpeed does not write.
    """
    try:
        with torch.serialization.safe_globals(_SAFE_CLASSES):
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"a checkpoint file must be complete and hold only tensors and plain values, got {str(path)!r}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; use another checkpoint"
        ) from error
