"""Prescribed optimization problems: given initial parameters, and gradients that are a function of step and name.

The gradients do not depend on the parameters, so every layout of the same problem must take the same steps, and the
oracle needs no gathered gradients.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.oracle import Array, Observation, Oracle, OracleGroup

DEFAULTS: dict[str, Any] = {
    "betas": (0.1, 0.99),
    "eps": 1e-3,
    "weight_decay": 0.0,
    "dampening": 1.0,
    "decoupled": False,
    "maximize": False,
}


@dataclass(frozen=True)
class Spec:
    """One parameter: its name "block.leaf", its shape, and the scale and schedule of its gradients."""

    name: str
    shape: tuple[int, ...]
    scale: float = 1.0
    first_step: int = 0
    """First step with a gradient."""
    missing_every: int | None = None
    """Period of the steps without a gradient; None if every step has one."""
    zeros: int = 0
    """Number of first steps whose gradients are zero."""
    strided: bool = False
    """Whether the tensor is a transposed view, not contiguous."""


@dataclass(frozen=True)
class Problem:
    """Parameter groups, each (hyperparameters, parameters), and the number of steps."""

    groups: tuple[tuple[dict[str, Any], tuple[Spec, ...]], ...]
    steps: int = 60
    max_grad_norm: float | None = None
    dtype: torch.dtype = torch.float64
    grad_dtype: torch.dtype | None = None
    """Dtype of the gradients; that of the parameters if None."""

    def specs(self) -> Iterator[Spec]:
        for _, specs in self.groups:
            yield from specs

    def hyperparameters(self, index: int) -> dict[str, Any]:
        """Return all hyperparameters of a group, including defaults."""
        return DEFAULTS | self.groups[index][0]

    def with_all(self, **hyperparameters: Any) -> Problem:
        """Return the same problem with these hyperparameters set in all groups."""
        return replace(self, groups=tuple((hyper | hyperparameters, specs) for hyper, specs in self.groups))

    def initial(self, spec: Spec) -> Tensor:
        """Return the initial value of a parameter, in the dtype of the problem."""
        return self._tensor(spec, "start", 1.0, self.dtype)

    def gradient(self, spec: Spec, step: int) -> Tensor | None:
        """Return the gradient of a parameter in a step, or None if it has none."""
        if step < spec.first_step or (spec.missing_every and step % spec.missing_every == spec.missing_every - 1):
            return None
        scale = 0.0 if step < spec.zeros else spec.scale
        return self._tensor(spec, str(step), scale, self.grad_dtype or self.dtype)

    def _tensor(self, spec: Spec, key: str, scale: float, dtype: torch.dtype) -> Tensor:
        values = scale * _numbers(f"{spec.name}/{key}", spec.shape, dtype.is_complex)
        tensor = torch.from_numpy(np.array(values)).to(dtype)
        return tensor.mT.contiguous().mT if spec.strided else tensor

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {spec.name: torch.nn.Parameter(self.initial(spec)) for spec in self.specs()}

    def param_groups(self, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer, with every hyperparameter explicit."""
        return [
            self.hyperparameters(k) | {"params": [parameters[spec.name] for spec in specs]}
            for k, (_, specs) in enumerate(self.groups)
        ]

    def set_gradients(self, parameters: dict[str, torch.nn.Parameter], step: int) -> None:
        for spec in self.specs():
            gradient = self.gradient(spec, step)
            parameters[spec.name].grad = None if gradient is None else gradient.to(parameters[spec.name].dtype)

    def oracle(self) -> Oracle:
        groups = [
            OracleGroup(tuple(spec.name for spec in specs), **self.hyperparameters(k))
            for k, (_, specs) in enumerate(self.groups)
        ]
        starts = {spec.name: to_numpy(self.initial(spec)) for spec in self.specs()}
        return Oracle(starts, groups, self.max_grad_norm)

    def oracle_gradients(self, step: int) -> dict[str, np.ndarray[Any, Any] | None]:
        gradients = {spec.name: self.gradient(spec, step) for spec in self.specs()}
        return {name: None if value is None else to_numpy(value) for name, value in gradients.items()}

    def solve(self) -> tuple[Oracle, list[Observation]]:
        """Run the oracle over all steps. Equal problems share the result: do not modify it."""
        key = repr(self)
        if key not in _solutions:
            oracle = self.oracle()
            _solutions[key] = oracle, [oracle.step(self.oracle_gradients(step)) for step in range(self.steps)]
        return _solutions[key]


@functools.lru_cache(maxsize=1024)
def _numbers(name: str, shape: tuple[int, ...], is_complex: bool) -> np.ndarray[Any, Any]:
    """Return normally distributed numbers with mean 0.3, the same in every call and on every rank."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    numbers = generator.standard_normal(shape) + 0.3
    return numbers + 1j * generator.standard_normal(shape) if is_complex else numbers


_solutions: dict[str, tuple[Oracle, list[Observation]]] = {}


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a copy in float64 or complex128."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).numpy().copy()


def as_pairs(array: np.ndarray[Any, Any]) -> Array:
    """Return complex numbers as pairs of real ones, the form of the oracle."""
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else array


def relative_error(parameters: dict[str, Any], oracle: Oracle, problem: Problem) -> float:
    """Return the distance of all parameters from the oracle's, relative to the distance that the oracle travelled."""
    error, travelled = 0.0, 0.0
    for spec in problem.specs():
        value, expected = parameters[spec.name], oracle.parameters[spec.name]
        value = to_numpy(value) if isinstance(value, Tensor) else value
        error += float(np.sum((as_pairs(value) - expected) ** 2))
        travelled += float(np.sum((as_pairs(to_numpy(problem.initial(spec))) - expected) ** 2))
    return float(np.sqrt(error / travelled))


def worst_relative_error(parameters: dict[str, Any], oracle: Oracle, problem: Problem) -> float:
    """Return the largest `relative_error` of a single parameter, among those that have moved."""
    errors = [0.0]
    for spec in problem.specs():
        value, expected = parameters[spec.name], oracle.parameters[spec.name]
        value = as_pairs(to_numpy(value) if isinstance(value, Tensor) else value)
        travelled = np.linalg.norm(as_pairs(to_numpy(problem.initial(spec))) - expected)
        if travelled > 0:
            errors.append(float(np.linalg.norm(value - expected) / travelled))
    return max(errors)


# Covers all critical shapes, gradients over four decades, and late, missing and zero gradients.
THREE_GROUPS = Problem(
    groups=(
        (
            {"lr": 0.5},
            (Spec("a.scalar", ()), Spec("a.vector", (7,), scale=3.0), Spec("a.matrix", (5, 3), scale=0.1)),
        ),
        (
            {"lr": 0.05, "betas": (0.2, 0.97), "eps": 0.01, "weight_decay": 0.02},
            (Spec("b.one", (1,), missing_every=3), Spec("b.large", (2**16 + 1,)), Spec("b.none", (0,))),
        ),
        (
            {"lr": 0.2, "betas": (0.05, 0.999), "eps": 1e-4, "weight_decay": 0.1},
            (
                Spec("c.strided", (4, 3), strided=True, scale=0.01),
                Spec("c.late", (2, 3, 2), first_step=20),
                Spec("c.cube", (3, 1, 5), missing_every=7, zeros=5),
            ),
        ),
    )
)
