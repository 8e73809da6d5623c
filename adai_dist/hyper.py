"""The hyperparameters of Adaptive Inertia: their names, defaults and ranges, declared once.

Constructors, configuration files and command lines all pass through :class:`Hyper`; no other file states a default or
checks a range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

MIN_EPS = 2.0**-24
"""Below this bound ``1 - eps`` is 1 in float32, the inertia can reach 1, and the bias correction divides by zero."""

ROUNDING = 1e-8
"""How far outside of its range rounding may take a number that a schedule computes in float64, ..."""

ROUNDING_FLOAT32 = 1e-4
"""... and one that it computes in float32, as tensors and NumPy scalars are."""


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
    """Inertia stays at or below ``1 - eps``; in [2^-24, 1)."""
    weight_decay: float = 0.0
    """Decay rate, >= 0."""
    dampening: float = 1.0
    """``d`` of AdaiV2, in [0, 1]; 1 is Adai."""
    decoupled: bool = False
    """Decay the parameter (True, AdaiW) or add the decay to the gradient (False, L2)."""
    maximize: bool = False
    """Ascend instead of descend."""
    foreach: bool | None = None
    """Where no kernels are compiled: step many tensors per operation (None and True) or one at a time (False), with the
    same results."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", _learning_rate(self.lr))
        object.__setattr__(self, "betas", _betas(self.betas))
        for name in ("eps", "weight_decay", "dampening"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        _check(MIN_EPS <= self.eps < 1, "eps must be in [2**-24, 1)", self.eps)
        _check(0 <= self.weight_decay < math.inf, "weight_decay must be finite and >= 0", self.weight_decay)
        _check(0 <= self.dampening <= 1, "dampening must be in [0, 1]", self.dampening)
        for name in ("decoupled", "maximize", "foreach"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "foreach" and value is None):
                raise TypeError(f"{name} must be a bool, got {value!r}")

    @classmethod
    def from_param_group(cls, param_group: Mapping[str, Any]) -> Hyper:
        """Read the record back from a ``param_groups`` entry; keys of other owners in it are ignored.

        Schedulers write there. A number that rounding alone can have taken out of its range is taken as the end of it.
        """
        values = {name: param_group[name] for name in FIELD_NAMES}
        try:
            return cls(**values)
        except ValueError:
            return cls(**(values | _within_rounding(values)))

    @classmethod
    def from_param_groups(cls, param_groups: Sequence[Mapping[str, Any]]) -> list[Hyper]:
        """The records of all groups, each as :meth:`from_param_group` reads it.

        Raises:
            TypeError, ValueError: a value is none, which the message names with the index of its group.
        """
        return [_of_group(index, param_group) for index, param_group in enumerate(param_groups)]

    def as_defaults(self) -> dict[str, Any]:
        """The record as entries of a parameter group."""
        return {name: getattr(self, name) for name in FIELD_NAMES}

    @property
    def beta0(self) -> float:
        return self.betas[0]

    @property
    def beta2(self) -> float:
        return self.betas[1]

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


def _of_group(index: int, param_group: Mapping[str, Any]) -> Hyper:
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
    _check(bound > 0, f"{name} must be > 0 (use None for no clipping)", value)
    return bound


def _check(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {got!r}")


def _within_rounding(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of which rounding alone can have brought them out of their range, as the ends of it."""
    ends: dict[str, Any] = {}
    for name, upper in (("lr", math.inf), ("weight_decay", math.inf), ("dampening", 1.0)):
        value = values.get(name)
        if not (isinstance(value, Tensor) and (value.numel() != 1 or value.device.type != "cpu")):
            ends[name] = _end(value, upper)
    betas = values.get("betas")
    if isinstance(betas, (Sequence, Tensor)) and len(betas) == 2:
        ends["betas"] = (_end(betas[0], math.inf), _end(betas[1], math.nextafter(1.0, 0.0)))
    return ends


def _end(value: Any, upper: float) -> Any:
    if isinstance(value, (str, bytes, bool)):
        return value
    rounding = ROUNDING if isinstance(value, (int, float)) else ROUNDING_FLOAT32
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return value
    if -rounding <= number < 0:
        return 0.0
    return upper if upper < number <= upper + rounding else value


def _number(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes, bool)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def _learning_rate(lr: Any) -> float | Tensor:
    if isinstance(lr, Tensor):
        _check(lr.numel() == 1, "Tensor lr must be 1-element", tuple(lr.shape))
        if lr.device.type != "cpu":
            return lr  # reading it would wait for the device
    value = _number("lr", lr)
    _check(0 <= value < math.inf, "lr must be finite and >= 0", value)
    return lr if isinstance(lr, Tensor) else value


def _betas(betas: Any) -> tuple[float, float]:
    if isinstance(betas, (str, bytes)) or not isinstance(betas, (Sequence, Tensor)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair (beta0, beta2), got {betas!r}")
    beta0, beta2 = (_number(f"betas[{i}]", betas[i]) for i in range(2))
    _check(0 <= beta0 < math.inf, "betas[0] (beta0) must be finite and >= 0", betas)
    _check(0 <= beta2 < 1, "betas[1] (beta2) must be in [0, 1)", betas)
    return beta0, beta2
