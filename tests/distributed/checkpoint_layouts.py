"""A prescribed problem in every layout of torch and on any number of ranks, for checkpoints between layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from adai_dist import AdaiV2
from tests.distributed import fsdp1_layouts
from tests.distributed.layouts import Prescribed, Walk, backward, ddp, fsdp2, full, plain
from tests.problems import Problem, Spec, to_numpy

SAVED_AFTER = 5
STATE_NAMES = ("step", "exp_avg", "exp_avg_sq", "beta1_prod")

# Under FSDP1 either all gradients of a block are present or none; those of "second" are missing in some steps.
PROBLEM = Problem(
    groups=(
        (
            {"lr": 0.4, "weight_decay": 0.02},
            (Spec("first.weight", (7, 6)), Spec("first.bias", (7,), scale=2.0), Spec("first.one", (1,))),
        ),
        (
            {"lr": 0.2, "betas": (0.2, 0.97), "eps": 0.01, "weight_decay": 0.05, "dampening": 0.5, "decoupled": True},
            (
                Spec("second.weight", (8, 6), scale=0.1, missing_every=3),
                Spec("second.three", (3,), missing_every=3),
            ),
        ),
        (
            {"lr": 0.3, "betas": (0.1, 0.999), "dampening": 0.0, "decoupled": True},
            (Spec("root.table", (9, 4), scale=0.3), Spec("root.gain", (2,), zeros=4), Spec("root.five", (5,))),
        ),
    ),
    steps=10,
    max_grad_norm=10.0,
)
PROBLEMS = {"float64": PROBLEM, "bfloat16": replace(PROBLEM, dtype=torch.bfloat16)}


def fsdp1(model: Prescribed, use_orig_params: bool, **options: Any) -> FSDP:
    """Wrap with a device mesh; without, torch saves no checkpoint if a rank holds no element of a parameter."""
    options = {
        "device_id": torch.device("cpu"),
        "device_mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "use_orig_params": use_orig_params,
    } | options
    for block in ("first", "second"):
        model.add_module(block, FSDP(model.get_submodule(block), **options))
    return FSDP(model, **options)


WRAPPED_BY: dict[str, Callable[[Prescribed], nn.Module]] = {
    "plain": plain,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp1-orig": lambda model: fsdp1(model, use_orig_params=True),
    "fsdp1-flat": lambda model: fsdp1(model, use_orig_params=False),
}


class Training:
    """A model in a layout and its optimizer. Collective: all ranks, in every method."""

    def __init__(self, layout: str, problem: Problem, **options: Any) -> None:
        self.problem = problem
        self.model = Prescribed(problem)
        self.wrapped = WRAPPED_BY[layout](self.model)
        groups = problem.param_groups(self.model.by_name())
        if isinstance(self.wrapped, FSDP):
            of_fsdp1 = fsdp1_layouts.Layout(dist.get_world_size(), use_orig_params=layout == "fsdp1-orig")
            groups = fsdp1_layouts.param_groups(self.model, self.wrapped, of_fsdp1)
        self.optimizer = AdaiV2(groups, lr=1.0, max_grad_norm=problem.max_grad_norm, **options)
        if isinstance(self.wrapped, FSDP):
            self.optimizer.configure_sharding(model=self.wrapped)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            backward(self.wrapped, self.optimizer, step)
            self.optimizer.step()

    def corrupt(self) -> None:
        """Overwrite the parameters; FSDP1's padding, which is in no checkpoint, stays zero."""
        with torch.no_grad():
            for parameter in self.wrapped.parameters():
                parameter.mul_(100.0)

    def state(self) -> dict[str, Any]:
        """Return the state that torch.distributed.checkpoint saves, and loads into."""
        model_state, optimizer_state = get_state_dict(self.wrapped, self.optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    def take(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.wrapped, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )

    def save(self, folder: str | Path, alone: bool = False) -> None:
        """Load a checkpoint; with `alone`, on this rank only."""
        dcp.save(self.state(), checkpoint_id=folder, no_dist=alone)

    def load(self, folder: str | Path, alone: bool = False) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=alone)
        self.take(state)

    def seen(self) -> Walk:
        """Gather parameters and states as in checkpoints, with zeros for a retired beta1_prod."""
        if not isinstance(self.wrapped, FSDP):
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            states = {params[index]: state for index, state in self.optimizer.state_dict()["state"].items()}
            walk = Walk({}, {})
            for name, parameter in self.model.by_name().items():
                walk.parameters[name] = to_numpy(full(parameter))
                walk.states[name] = {key: to_numpy(full(value)) for key, value in states[parameter].items()}
            return walk
        parameters = fsdp1_layouts.whole_parameters(self.model, self.wrapped)
        return Walk(parameters, fsdp1_layouts.whole_states(self.wrapped, self.optimizer))

    def state_dtypes(self) -> set[torch.dtype]:
        states = [self.optimizer.state[p] for group in self.optimizer.param_groups for p in group["params"]]
        return {state[name].dtype for state in states for name in STATE_NAMES[1:] if name in state}


def assert_same_bits(a: Walk, b: Walk) -> None:
    for name, parameter in a.parameters.items():
        np.testing.assert_array_equal(b.parameters[name], parameter)
        for key, value in a.states[name].items():
            np.testing.assert_array_equal(b.states[name][key], value, err_msg=f"{name}: {key}")
