"""The hyperparameters of Adaptive Inertia: names, defaults and ranges, each declared once.

Constructors, configuration files and command lines all pass through :class:`Hyper`; no other file states a default or
checks a range.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

MIN_EPS = 2.0**-24
"""Smallest eps: below it, ``1 - eps`` is 1 in float32, inertia can reach 1, and bias correction divides by zero."""

ROUNDING = 1e-8
"""Largest rounding error by which a schedule in float64 may leave a range."""

ROUNDING_FLOAT32 = 1e-4
"""Largest rounding error by which a schedule in float32 (tensors, NumPy scalars) may leave a range."""


class Range(NamedTuple):
    """The values that a number may take, both ends included."""

    lower: float
    upper: float
    rule: str
    """The range as errors state it, after "must be"."""
    is_scheduled: bool = True
    """Whether a value that rounding has moved out of the range is replaced by the end of the range."""

    def contains(self, value: float) -> bool:
        return self.lower <= value <= self.upper


_BELOW_ONE = math.nextafter(1.0, 0.0)
_NOT_NEGATIVE = Range(0.0, sys.float_info.max, "finite and >= 0")

RANGES = {
    "lr": _NOT_NEGATIVE,
    "eps": Range(MIN_EPS, _BELOW_ONE, "in [2**-24, 1)", is_scheduled=False),
    "weight_decay": _NOT_NEGATIVE,
    "dampening": Range(0.0, 1.0, "in [0, 1]"),
}
"""Ranges of the fields of :class:`Hyper` that are numbers. The remaining fields are ``betas`` and flags."""

BETA_RANGES = {"betas[0] (beta0)": _NOT_NEGATIVE, "betas[1] (beta2)": Range(0.0, _BELOW_ONE, "in [0, 1)")}

KERNEL_SCALARS = (
    *("beta0", "beta2", "one_minus_beta2", "max_inertia", "coupled_decay", "decoupled_decay"),
    *("dampening", "inertia_exponent", "lr_factor"),
)
"""Attributes of :class:`Hyper` passed to the compiled kernels, in the order of ``ADAI_HYPER`` in adai_math.h."""


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Hyperparameters of one parameter group, as float64 scalars.

    The symbols are those of :mod:`adai_dist.equations`.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of its range.
    """

    lr: float | Tensor
    """Learning rate, >= 0; a one-element tensor is read on the device, in every step."""
    betas: tuple[float, float] = (0.1, 0.99)
    """``(beta0, beta2)``: scale of ``1 - inertia``, >= 0; decay rate of the second moment, in [0, 1)."""
    eps: float = 1e-3
    """Distance of the largest inertia, ``1 - eps``, from 1; in [2^-24, 1)."""
    weight_decay: float = 0.0
    """Decay rate, >= 0."""
    dampening: float = 1.0
    """``d`` of AdaiV2, in [0, 1]; 1 is Adai."""
    decoupled: bool = False
    """Decay the parameter (True, AdaiW) or add the decay to the gradient (False, L2)."""
    maximize: bool = False
    """Ascend instead of descend."""
    foreach: bool | None = None
    """Step many tensors per operation (None and True) or one at a time (False), without compiled kernels; the results
    are the same."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if name == "lr":
                object.__setattr__(self, name, _learning_rate(value))
            elif name == "betas":
                object.__setattr__(self, name, _betas(value))
            elif name in RANGES:
                object.__setattr__(self, name, _number_in_range(name, value))
            elif not isinstance(value, bool) and not (value is None and getattr(Hyper, name) is None):
                raise TypeError(f"{name} must be a bool, got {value!r}")

    @classmethod
    def from_param_group(cls, param_group: Mapping[str, Any]) -> Hyper:
        """Read the record from a ``param_groups`` entry, ignoring keys that are not hyperparameters.

        Schedulers write to these entries. A value that rounding has moved out of its range is moved back to its end.
        """
        values = {name: param_group[name] for name in FIELD_NAMES}
        try:
            return cls(**values)
        except ValueError:
            return cls(**(values | _moved_into_range(values)))

    @classmethod
    def from_param_groups(cls, param_groups: Sequence[Mapping[str, Any]]) -> list[Hyper]:
        """Read the records of all parameter groups with :meth:`from_param_group`.

        Raises:
            TypeError, ValueError: a value is invalid; the message states the index of its parameter group.
        """
        return [_of_param_group(index, param_group) for index, param_group in enumerate(param_groups)]

    def as_defaults(self) -> dict[str, Any]:
        """Return the record as entries of a parameter group."""
        return {name: getattr(self, name) for name in FIELD_NAMES}

    @property
    def beta0(self) -> float:
        return self.betas[0]

    @property
    def beta2(self) -> float:
        return self.betas[1]

    @property
    def one_minus_beta2(self) -> float:
        return 1.0 - self.beta2

    @property
    def max_inertia(self) -> float:
        return 1.0 - self.eps

    @property
    def inertia_exponent(self) -> float:
        """``1 / (3 - 2 d)``, the power of the ratio in the inertia."""
        return 1.0 / (3.0 - 2.0 * self.dampening)

    @property
    def lr_factor(self) -> float:
        """``beta0^(1 - d)``, which multiplies lr."""
        return math.pow(self.beta0, 1.0 - self.dampening)

    @property
    def coupled_decay(self) -> float:
        """The decay that enters the gradient (L2)."""
        return 0.0 if self.decoupled else self.weight_decay

    @property
    def decoupled_decay(self) -> float:
        """The decay that shrinks the parameter."""
        return self.weight_decay if self.decoupled else 0.0

    @property
    def sign(self) -> float:
        return -1.0 if self.maximize else 1.0


def _of_param_group(index: int, param_group: Mapping[str, Any]) -> Hyper:
    try:
        return Hyper.from_param_group(param_group)
    except (TypeError, ValueError) as error:
        name = f" ({param_group['name']!r})" if "name" in param_group else ""
        raise type(error)(f"param_groups[{index}]{name}: {error}") from None


FIELD_NAMES = tuple(field.name for field in fields(Hyper))


def max_grad_norm_in_range(name: str, value: float | None) -> float | None:
    """Check a bound of the global gradient norm: None, or a number > 0 (infinity measures without clipping)."""
    if value is None:
        return None
    bound = _number(name, value)
    if not bound > 0:  # NaN is refused
        raise ValueError(f"{name} must be > 0 (use None for no clipping), got {value!r}")
    return bound


def _number(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def _number_in_range(name: str, value: Any) -> float:
    number, allowed = _number(name, value), RANGES[name]
    if not allowed.contains(number):
        raise ValueError(f"{name} must be {allowed.rule}, got {number!r}")
    return number


def _learning_rate(lr: Any) -> float | Tensor:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {tuple(lr.shape)}")
        if lr.device.type != "cpu":
            return lr  # reading it would wait for the device
    value = _number_in_range("lr", lr)
    return lr if isinstance(lr, Tensor) else value


def _betas(betas: Any) -> tuple[float, float]:
    if isinstance(betas, (str, bytes)) or not isinstance(betas, (Sequence, Tensor)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair (beta0, beta2), got {betas!r}")
    beta0, beta2 = (_number(f"betas[{i}]", betas[i]) for i in range(2))
    for value, (name, allowed) in zip((beta0, beta2), BETA_RANGES.items(), strict=True):
        if not allowed.contains(value):
            raise ValueError(f"{name} must be {allowed.rule}, got {betas!r}")
    return beta0, beta2


def _moved_into_range(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduled values, with the end of a range for each that rounding has moved out of it."""
    moved: dict[str, Any] = {}
    for name, allowed in RANGES.items():
        value = values.get(name)
        is_on_host = not isinstance(value, Tensor) or (value.numel() == 1 and value.device.type == "cpu")
        if allowed.is_scheduled and is_on_host:
            moved[name] = _nearest(value, allowed)
    betas = values.get("betas")
    if isinstance(betas, (Sequence, Tensor)) and len(betas) == 2:
        beta0, beta2 = BETA_RANGES.values()
        moved["betas"] = (_nearest(betas[0], beta0), _nearest(betas[1], beta2))
    return moved


def _nearest(value: Any, allowed: Range) -> Any:
    """Return the end of a range if ``value`` is within rounding of it, else ``value``."""
    if isinstance(value, (str, bytes, bool)):
        return value
    rounding = ROUNDING if isinstance(value, (int, float)) else ROUNDING_FLOAT32
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return value
    if allowed.lower - rounding <= number < allowed.lower:
        return allowed.lower
    return allowed.upper if allowed.upper < number <= allowed.upper + rounding else value
