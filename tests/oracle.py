"""Adaptive inertia in float64 NumPy: the algorithm read literally, in two passes, to judge the implementation by.

Imports nothing of the package and no torch, so that it can share no fault with what it judges. It follows the authors'
code except where the package differs from it on purpose:

1. 0/0. While the mean is 0 (nothing but zero gradients so far) inertia is undefined: decoupled decay is applied and the
   step does not count. A step with neither gradient nor learning rate while all second moments are 0 is no step either,
   also where coupled decay would have made the mean positive.
2. A non-finite gradient anywhere: nothing at all happens.
3. Gradients handed in are never written to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Gradients = Mapping[str, "npt.ArrayLike | None"]


@dataclass
class OracleGroup:
    """One parameter group: the names of its parameters and their hyperparameters."""

    names: tuple[str, ...]
    lr: float
    betas: tuple[float, float] = (0.1, 0.99)
    eps: float = 1e-3
    weight_decay: float = 0.0
    dampening: float = 1.0
    decoupled: bool = False
    maximize: bool = False


@dataclass
class OracleState:
    exp_avg: Array
    exp_avg_sq: Array
    beta1_prod: Array
    step: int = 0


@dataclass(frozen=True)
class Observation:
    """What a step saw before it moved anything.

    Args:
        mean: the mean of the bias-corrected second moment over all elements that take part.
        grad_norm: the 2-norm of all gradients, before clipping.
        skipped: whether a gradient was not finite, so that nothing happened.
        undefined: whether inertia was 0/0, so that only decoupled decay happened.
    """

    mean: float
    grad_norm: float
    skipped: bool = False
    undefined: bool = False


def as_real(array: npt.ArrayLike) -> Array:
    """A float64 copy; complex numbers become pairs along a last dimension."""
    array = np.asarray(array)
    if np.iscomplexobj(array):
        array = np.stack([array.real, array.imag], axis=-1)
    return np.array(array, dtype=np.float64)


@dataclass
class Oracle:
    """The optimizer. `parameters` and `states` are plain dictionaries by name, open to a test's eyes and hands."""

    parameters: dict[str, Array]
    groups: list[OracleGroup]
    max_grad_norm: float | None = None
    states: dict[str, OracleState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = {name: as_real(value) for name, value in self.parameters.items()}
        for group in self.groups:
            self._make_states(group.names)

    def add_group(self, group: OracleGroup, parameters: Mapping[str, npt.ArrayLike]) -> None:
        self.parameters |= {name: as_real(value) for name, value in parameters.items()}
        self.groups.append(group)
        self._make_states(group.names)

    def _make_states(self, names: Iterable[str]) -> None:
        for name in names:
            shape = self.parameters[name].shape
            self.states.setdefault(name, OracleState(np.zeros(shape), np.zeros(shape), np.ones(shape)))

    def observe(self, gradients: Gradients) -> Observation:
        """What the next step would see, without taking it."""
        return self._step(gradients, commit=False)

    def step(self, gradients: Gradients) -> Observation:
        """Take one step. A name that is missing or None has no gradient in this step."""
        return self._step(gradients, commit=True)

    def _step(self, gradients: Gradients, commit: bool) -> Observation:
        taking_part = [
            (group, name, as_real(gradients[name]))
            for group in self.groups
            for name in group.names
            if gradients.get(name) is not None
        ]
        if not all(np.isfinite(g).all() for _, _, g in taking_part):
            return Observation(mean=float("nan"), grad_norm=float("nan"), skipped=True)
        grad_norm = float(np.sqrt(sum(np.sum(g * g) for _, _, g in taking_part)))
        coefficient = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (grad_norm + 1e-6))

        is_rehearsal = all(
            group.lr == 0 and not self.states[name].exp_avg_sq.any() and not g.any() for group, name, g in taking_part
        )

        # First pass: the second moment of every parameter, and the mean over all of them.
        moments: dict[str, tuple[Array, Array, Array]] = {}
        total, count = 0.0, 0
        for group, name, g in taking_part:
            state, beta2 = self.states[name], group.betas[1]
            g = coefficient * (-g if group.maximize else g)
            if not group.decoupled:
                g = g + group.weight_decay * self.parameters[name]
            v = beta2 * state.exp_avg_sq + (1 - beta2) * g * g
            vhat = v / (1 - beta2 ** (state.step + 1))
            moments[name] = (g, v, vhat)
            total += float(np.sum(vhat))
            count += vhat.size
        mean = total / count if count else 0.0
        if mean == 0 or is_rehearsal:
            if commit:
                self._decay(taking_part)
            return Observation(mean=0.0, grad_norm=grad_norm, undefined=True)

        # Second pass: everything that needs the mean.
        if commit:
            self._decay(taking_part)
            for group, name, _ in taking_part:
                self._advance(group, name, moments[name], mean)
        return Observation(mean=mean, grad_norm=grad_norm)

    def _decay(self, taking_part: list[tuple[OracleGroup, str, Array]]) -> None:
        for group, name, _ in taking_part:
            if group.decoupled:
                self.parameters[name] = self.parameters[name] * (1 - group.lr * group.weight_decay)

    def _advance(self, group: OracleGroup, name: str, moments: tuple[Array, Array, Array], mean: float) -> None:
        state, (g, v, vhat) = self.states[name], moments
        beta0, d = group.betas[0], group.dampening
        beta1 = np.clip(1 - beta0 * (vhat / mean) ** (1 / (3 - 2 * d)), 0, 1 - group.eps)
        state.step += 1
        state.exp_avg_sq = v
        state.beta1_prod = state.beta1_prod * beta1
        state.exp_avg = beta1 * state.exp_avg + (1 - beta1) ** d * g
        m_hat = state.exp_avg / (1 - state.beta1_prod)
        self.parameters[name] = self.parameters[name] - group.lr * beta0 ** (1 - d) * m_hat
