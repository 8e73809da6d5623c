"""The example of docs/engines.md on two ranks, compared with one process that has the whole model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adai_dist import AdaiV2, MeanSource
from tests.problems import to_numpy
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
STEPS = 8


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 3))


def data(step: int, rank: int) -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(100 * step + rank))


def names_of_example(model: nn.Module) -> dict[str, Any]:
    names: dict[str, Any] = {"model": model}
    exec(compile(EXAMPLE, "example", "exec"), names)
    return names


def walk() -> dict[str, Any]:
    """Run the example's engine, and an optimizer with the whole model and the gradients of both ranks."""
    model = make_model()
    whole = copy.deepcopy(model)
    engine = names_of_example(model)["engine"]
    optimizer = AdaiV2(whole.parameters(), lr=0.5, dampening=0.0, max_grad_norm=1.0)
    means: list[tuple[float, float]] = []
    for step in range(STEPS):
        model.zero_grad()
        model(data(step, dist.get_rank())).square().mean().backward()
        engine.step()
        optimizer.zero_grad()
        for rank in range(2):
            (whole(data(step, rank)).square().mean() / 2).backward()
        optimizer.step()
        means.append((engine.optimizer.inertia_mean.item(), optimizer.inertia_mean.item()))
    return {
        "means": means,
        "parameters": [to_numpy(param) for param in model.parameters()],
        "whole": [to_numpy(param) for param in whole.parameters()],
        "num_states": len(engine.optimizer.state),
    }


def test_the_engine_takes_the_steps_of_one_process() -> None:
    first, second = run_ranks(walk, 2)
    assert (first["num_states"], second["num_states"]) == (3, 3)
    for found, expected in first["means"]:
        assert found == pytest.approx(expected, rel=1e-6)
    for of_first, of_second, expected in zip(first["parameters"], second["parameters"], first["whole"], strict=True):
        assert (of_first == of_second).all()
        assert of_first == pytest.approx(expected, abs=1e-6)


def errors() -> list[str]:
    engine = names_of_example(make_model())["engine"]
    found: list[str] = []
    for call in (
        engine.optimizer.step,
        lambda: engine.optimizer.clip_grad_norm_(1.0),
        lambda: engine.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        engine.optimizer.configure_sharding,
    ):
        for param in engine.optimizer.params():
            param.grad = torch.ones_like(param)
        try:
            call()
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_calls_that_the_engine_does_not_support_are_refused() -> None:
    for messages in run_ranks(errors, 2):
        assert [re.sub(r".*got (a step|[a-z_]+\(\)).*", r"\1", message) for message in messages] == [
            "a step",
            "clip_grad_norm_()",
            "add_param_group()",
            "configure_sharding()",
        ]


def test_every_method_of_a_source_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)\(", PAGE.read_text(), re.MULTILINE)
    assert rows == [name for name in vars(MeanSource) if not name.startswith("_")]
