"""The examples of docs/sharding.md, on two ranks that hold different parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Linear(4, 3)
        self.rest = self.embedding = nn.Linear(3, 2)


def run_all() -> list[list[float]]:
    """Return the means of all optimizers after a step with gradients of 1 on rank 0 and of 2 on rank 1."""
    means: list[list[float]] = []
    for example in EXAMPLES:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
        names: dict[str, Any] = {
            "model": Model(),
            "device": torch.device("cpu"),
            "mesh": mesh,
            "stage_module": Model(),
            "model_parts": [Model(), Model()],
        }
        exec(compile(example, "example", "exec"), names)
        optimizers = names.get("optimizers") or [names["optimizer"]]
        for optimizer in optimizers:
            for param in optimizer.params():
                is_copy = param in names.get("tied", ()) or ("experts" in names and param not in names["experts"])
                param.grad = torch.full_like(param, 1.0 if is_copy else dist.get_rank() + 1.0)
                if padding := getattr(param, "_shard_numel_padded", 0):
                    param.grad[-padding:] = 0.0
        for optimizer in optimizers:
            optimizer.step()
        means.append([optimizer.inertia_mean.item() for optimizer in optimizers])
    return means


def test_the_ranks_of_every_example_share_one_mean() -> None:
    assert len(EXAMPLES) == 5
    first, second = run_ranks(run_all, 2)
    assert first == second
    fsdp1, pipeline, interleaved, tied, experts = first
    num_elements, num_of_experts = 23, 15
    first_piece = 12  # elements of the flat parameter; the second shard has 11 and padding
    assert fsdp1 == pytest.approx([(first_piece + 4 * (num_elements - first_piece)) / num_elements], rel=1e-5)
    assert pipeline == pytest.approx([2.5], rel=1e-6)
    assert interleaved == pytest.approx([2.5, 2.5], rel=1e-6)
    num_others = num_elements - num_of_experts
    counted_once = (num_of_experts + 4 * num_of_experts + num_others) / (2 * num_of_experts + num_others)
    assert tied == pytest.approx([counted_once], rel=1e-6)
    assert experts == pytest.approx([counted_once], rel=1e-6)
