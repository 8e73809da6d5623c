"""Recorded trajectories of the reference implementation, as test cases. Imports nothing from the package."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).parent / "reference"

Array = npt.NDArray[np.float64]
Named = dict[str, Array]


@dataclass(frozen=True)
class Trajectory:
    """One recorded run. Parameters are named "G.P": parameter P of group G."""

    name: str
    settings: dict[str, Any]
    groups: list[dict[str, Any]]
    init: Named
    gradients: list[Named] = field(repr=False)
    parameters: list[Named] = field(repr=False)
    final: dict[str, Named] = field(repr=False)

    @property
    def dampening(self) -> float:
        """Dampening of the run; 1 for plain Adai, which has no such argument."""
        return 1.0 if self.settings["dampening"] is None else self.settings["dampening"]

    def names_of(self, index: int) -> tuple[str, ...]:
        """Return the names of the parameters of one group."""
        return tuple(name for name in self.init if name.startswith(f"{index}."))

    def hyperparameters(self, index: int) -> dict[str, Any]:
        """Return all hyperparameters of one group, by the optimizer's argument names."""
        group = self.groups[index]
        return {
            "lr": group["lr"],
            "betas": tuple(group["betas"]),
            "eps": self.settings["eps"],
            "weight_decay": self.settings["weight_decay"],
            "dampening": self.dampening,
            "decoupled": self.settings["decoupled"],
        }


def load_trajectories() -> list[Trajectory]:
    """Read every recorded run."""
    cases = json.loads((FOLDER / "trajectories.json").read_text())
    with np.load(FOLDER / "trajectories.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return [_trajectory(case, arrays) for case in cases]


def _trajectory(case: dict[str, Any], arrays: Named) -> Trajectory:
    def named(part: str) -> Named:
        prefix = f"{case['name']}/{part}/"
        return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    steps = range(case["steps"])
    return Trajectory(
        name=case["name"],
        settings={key: case[key] for key in ("optimizer", "eps", "weight_decay", "decoupled", "dampening")},
        groups=case["groups"],
        init=named("init"),
        gradients=[named(f"grad{k:02d}") for k in steps],
        parameters=[named(f"param{k:02d}") for k in steps],
        final={part: named(part) for part in ("exp_avg", "exp_avg_sq", "beta1_prod", "step")},
    )


TRAJECTORIES = load_trajectories()
