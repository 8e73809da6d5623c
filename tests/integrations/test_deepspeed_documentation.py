"""The DeepSpeed examples of the documentation run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.deepspeed_engines import set_environment
from tests.spawn import run_ranks
from tests.test_documentation import Model

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

ROOT = Path(__file__).parents[2]


def run(example: str) -> tuple[str, int]:
    set_environment()
    names: dict[str, Any] = {"model": Model(), "data": [torch.randn(4, 8)]}
    exec(compile(example, "example", "exec"), names)
    optimizer = names["engine"].basic_optimizer
    return type(optimizer).__name__, int(next(iter(optimizer.state.values()))["step"])


def test_the_example_takes_a_step() -> None:
    page = (ROOT / "docs/deepspeed.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (example,) = (block for block in blocks if "deepspeed.initialize" in block)
    assert run_ranks(run, 1, example) == [("AdaiV2", 1)]
