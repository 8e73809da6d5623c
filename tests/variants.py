"""Variants of one problem, and their solutions by the package and by plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.nn import Parameter

from adai_dist import AdaiV2
from tests.plain import PlainAdai
from tests.problems import THREE_GROUPS, Problem

# Largest error of float64 relative to the distance travelled; 2e-15 was measured.
FLOAT64_TOLERANCE = 1e-14

VARIANTS: dict[str, Problem] = {
    "l2": THREE_GROUPS,
    "decoupled": THREE_GROUPS.with_all(decoupled=True),
    "dampening-0.5": THREE_GROUPS.with_all(decoupled=True, dampening=0.5),
    "dampening-0": THREE_GROUPS.with_all(decoupled=True, dampening=0.0),
    "l2-dampening-0.25": THREE_GROUPS.with_all(dampening=0.25),
    "no-decay": THREE_GROUPS.with_all(weight_decay=0.0),
    "maximize": THREE_GROUPS.with_all(maximize=True),
    "maximize-decoupled": THREE_GROUPS.with_all(maximize=True, decoupled=True, dampening=0.5),
    "clipping": replace(THREE_GROUPS, max_grad_norm=30.0),
    "clipping-l2-strong": replace(THREE_GROUPS.with_all(weight_decay=0.3, dampening=0.0), max_grad_norm=1.0),
    "clipping-decoupled-maximize": replace(THREE_GROUPS.with_all(decoupled=True, maximize=True), max_grad_norm=30.0),
    "no-clipping-needed": replace(THREE_GROUPS, max_grad_norm=1e6),
    "mixed-groups": replace(
        THREE_GROUPS,
        groups=tuple(
            (hyper | extra, specs)
            for (hyper, specs), extra in zip(
                THREE_GROUPS.groups,
                ({"dampening": 0.0, "decoupled": True, "weight_decay": 0.01}, {"maximize": True}, {"dampening": 0.5}),
                strict=True,
            )
        ),
    ),
    "beta2-zero": THREE_GROUPS.with_all(betas=(0.1, 0.0)),
    "beta0-large": THREE_GROUPS.with_all(betas=(2.0, 0.9), dampening=0.5),
    "beta0-zero": THREE_GROUPS.with_all(betas=(0.0, 0.9)),
    "all-zero-at-first": replace(
        THREE_GROUPS,
        groups=tuple(
            (hyper | {"decoupled": True}, tuple(replace(spec, zeros=4) for spec in specs))
            for hyper, specs in THREE_GROUPS.groups
        ),
    ),
}


def solve(problem: Problem, foreach: bool | None = None, optimizer_class: Any = AdaiV2) -> dict[str, Parameter]:
    """Run the package's optimizer over all steps of a problem."""
    parameters = problem.parameters()
    optimizer = optimizer_class(
        problem.param_groups(parameters), lr=1.0, foreach=foreach, max_grad_norm=problem.max_grad_norm
    )
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        optimizer.step()
    return parameters


def solve_plainly(problem: Problem) -> dict[str, Parameter]:
    """Run plain PyTorch over all steps of a problem."""
    parameters = problem.parameters()
    plain = PlainAdai(problem.param_groups(parameters), problem.max_grad_norm)
    for step in range(problem.steps):
        problem.set_gradients(parameters, step)
        plain.step()
    return parameters
