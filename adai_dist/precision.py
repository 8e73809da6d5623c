"""What an optimizer stores in 16 or 8 bits: the modes, and the dtypes of states that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from adai_dist.equations import compute_dtype
from adai_dist.rounding import LOW_DTYPES

StateDtype = Literal["float32", "bfloat16", "mixed8"]
STATE_DTYPES: tuple[StateDtype, ...] = get_args(StateDtype)
MasterWeights = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What is stored in 16 or 8 bits, and the seed of the random rounding.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of its range.
    """

    state_dtype: StateDtype = "float32"
    """Dtype of the moments and of the product of inertias: float32 takes 12 bytes per parameter (8 once the product has
    retired), bfloat16 takes 6 (4), rounded stochastically. mixed8 takes 4.06 (3.06): the first moment in bfloat16, the
    others in 8 bits (:mod:`adai_dist.eight_bits`); parameters that are no matrices keep states in bfloat16. Float64 and
    complex parameters keep states in full."""
    master_weights: MasterWeights = "auto"
    """Whether the optimizer keeps the float32 value of bfloat16 and float16 parameters, as a remainder of 2 bytes per
    parameter. "auto" does; True also warns if no parameter needs one. False rounds parameters stochastically."""
    seed: int = 0
    """Seed of the stochastic rounding, in [0, 2^64); the same on all ranks."""

    def __post_init__(self) -> None:
        if self.state_dtype not in STATE_DTYPES:
            raise ValueError(
                f"state_dtype must be one of {', '.join(map(repr, STATE_DTYPES))}, got {self.state_dtype!r}"
            )
        if self.master_weights is not True and self.master_weights is not False and self.master_weights != "auto":
            raise ValueError(f"master_weights must be 'auto', True or False, got {self.master_weights!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed!r}")

    def as_saved(self) -> dict[str, Any]:
        """Return the record as checkpoints contain it."""
        return asdict(self)

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Describe how a record from a checkpoint differs, as far as it matters for what follows.

        The seed matters only if something is rounded with it.
        """
        found = Precision(**{**asdict(self), **saved})
        names = ["state_dtype", "master_weights"]
        if self.state_dtype != "float32" or self.master_weights is False:
            names.append("seed")
        pairs = ((name, getattr(found, name), getattr(self, name)) for name in names)
        return [f"{name}={theirs!r} instead of {ours!r}" for name, theirs, ours in pairs if theirs != ours]

    def state_dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the states of a parameter in ``dtype``, complex for complex parameters.

        In mixed8, those of some parameters have fewer bits (:func:`adai_dist.sharding.records.records_shape`).
        """
        if dtype.is_complex:
            return compute_dtype(dtype).to_complex()
        wide = compute_dtype(dtype)
        return torch.bfloat16 if self.state_dtype != "float32" and wide == torch.float32 else wide

    def has_remainder(self, dtype: torch.dtype) -> bool:
        """Return whether a parameter in ``dtype`` has a remainder, and so float32 master weights."""
        return dtype in LOW_DTYPES and self.master_weights is not False

    def is_rounding(self, param: Tensor) -> bool:
        """Return whether a step rounds the parameter or its states stochastically."""
        is_low = param.dtype in LOW_DTYPES and not self.has_remainder(param.dtype)
        return is_low or self.state_dtype_of(param.dtype) in LOW_DTYPES
