"""Comparison of the records of ranks under DeepSpeed with the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.integrations.deepspeed_engines import Family, Seen
from tests.integrations.deepspeed_setups import STATE_NAMES, Setup
from tests.oracle import Array, Observation, Oracle
from tests.problems import Problem, relative_error, worst_relative_error


def gradients_under_zero(problem: Problem, step: int) -> dict[str, Any]:
    """Return the gradients of a step, with zeros for a parameter that has none."""
    gradients: dict[str, Any] = {spec.name: np.zeros(spec.shape) for spec in problem.specs()}
    return gradients | {name: g for name, g in problem.oracle_gradients(step).items() if g is not None}


def solve(setup: Setup, seen: Seen | None = None) -> tuple[Oracle, list[Observation | None]]:
    """Run the oracle without the skipped steps and with zero gradients for unused parameters."""
    problem = setup.rounded
    oracle, observations = problem.oracle(), list[Observation | None]()
    for step in range(problem.steps):
        gradients = gradients_under_zero(problem, step)
        if seen is not None:
            gradients = {name: g * seen.unscaled_by[step] for name, g in gradients.items()}
        is_skipped = seen is not None and seen.was_skipped[step]
        observations.append(None if is_skipped else oracle.step(gradients))
    return oracle, observations


def parameter_error(seen: Seen, setup: Setup) -> float:
    """Return the largest error of a parameter, relative to its distance travelled."""
    return worst_relative_error(seen.parameters, solve(setup, seen)[0], setup.rounded)


def whole_error(seen: Seen, setup: Setup) -> float:
    """Return the error of all parameters together."""
    return relative_error(seen.parameters, solve(setup, seen)[0], setup.rounded)


def check(seen: Seen, setup: Setup, tolerance: float = 1e-5) -> float:
    """Assert that parameters, states, means and norms are the oracle's, and return the largest error."""
    oracle, observations = solve(setup, seen)
    errors = {"parameters": worst_relative_error(seen.parameters, oracle, setup.rounded)}
    for key in STATE_NAMES if setup.has_linked_masters else ():
        errors[key] = max(
            state_error(seen.states[name][key], getattr(state, key)) for name, state in oracle.states.items()
        )
    for step, expected in enumerate(observations):
        if expected is not None:
            norm = reported_norm(setup, seen, expected.grad_norm, step)
            errors[f"mean of step {step}"] = abs(seen.means[step] / expected.mean - 1)
            errors[f"norm of step {step}"] = abs(seen.grad_norms[step] / norm - 1)
    wrong = {key: error for key, error in errors.items() if not error < tolerance}
    assert not wrong, wrong
    return max(errors.values())


def check_all_ranks(family: Family, name: str) -> None:
    """Check the records of all ranks of a setup without skipped steps, and print the errors."""
    for rank, seen in enumerate(family.ranks(name)):
        assert not any(seen.was_skipped)
        print(f"{name} on rank {rank}: {check(seen, family.setups[name]):.1e}")


def state_error(value: Array, expected: Array) -> float:
    """Return the error relative to the state's norm, or to 1 if a zero inertia made all of beta1_prod zero."""
    return float(np.linalg.norm(value - expected) / (np.linalg.norm(expected) or 1.0))


def reported_norm(setup: Setup, seen: Seen, norm: float, step: int) -> float:
    """Return the expected `grad_norm`; without ZeRO's wrappers, the optimizer sees gradients that DeepSpeed clipped."""
    if setup.stage == 0 and seen.wrapper != "BF16_Optimizer" and setup.problem.max_grad_norm is not None:
        return norm * min(1.0, setup.problem.max_grad_norm / (norm + 1e-6))
    return norm if setup.stage == 3 else norm / seen.unscaled_by[step]
