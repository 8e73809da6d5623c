"""The examples of docs/checkpoints.md, on two ranks of FSDP2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.layouts import SHARDED, backward, gather, make
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def save_and_load(folder: str) -> list[bool]:
    """Return whether each example restores parameters and states that were overwritten after the save."""
    model, wrapped, optimizer = make("fsdp2-2", SHARDED)
    backward(wrapped, optimizer, 0)
    optimizer.step()
    optimizer.zero_grad()
    saved = gather(model, optimizer)
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "folder": folder}
    whole: list[bool] = []
    for example in EXAMPLES:
        exec(compile(example, "example", "exec"), names)
        loaded = gather(model, optimizer)
        same = [(loaded.parameters[name] == value).all() for name, value in saved.parameters.items()]
        same += [(loaded.states[name]["exp_avg"] == state["exp_avg"]).all() for name, state in saved.states.items()]
        whole.append(bool(all(same)))
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(100.0)
                optimizer.state[param]["exp_avg"].fill_(100.0)
    return whole


def test_every_example_restores_what_was_saved(tmp_path: Path) -> None:
    assert len(EXAMPLES) == 2
    assert run_ranks(save_and_load, 2, str(tmp_path)) == [[True, True]] * 2
