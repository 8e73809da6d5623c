"""Tests that the examples of the documentation run and that its links resolve."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adai_dist.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "configs/README.md",
    ROOT / "launch/README.md",
]
NEED_RANKS = ("sharding.md", "checkpoints.md", "engines.md")  # tests/distributed/test_documentation_of_*.py
EXAMPLES = [
    pytest.param(block, id=f"{page.name}-{k}")
    for page in PAGES
    if page.name not in NEED_RANKS
    for k, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    if "deepspeed.initialize" not in block  # needs an engine: tests/integrations/test_deepspeed_documentation.py
]


class Model(torch.nn.Module):
    """Placeholder for the reader's model: returns an object with a loss for a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, batch: torch.Tensor) -> Any:
        return SimpleNamespace(loss=self.layer(batch).square().mean())


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_runs_and_takes_a_step(example: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"model": Model(), "data": [torch.randn(4, 8)]}
    exec(compile(example, "example", "exec"), names)
    parameter = next(names["model"].parameters())
    assert names["optimizer"].state[parameter]["step"].item() == 1


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


def test_the_commands_of_the_readme_exist() -> None:
    shell = "".join(re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    targets = re.findall(r"^make ([a-z-]+)", shell, re.MULTILINE)
    assert targets == ["train", "test"]
    rules = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", rules, re.MULTILINE)] == []
    (command,) = re.findall(r"^adai-dist (.*)$", shell, re.MULTILINE)
    assert build_parser().parse_args(command.split()).run
    extras = set(re.findall(r"[a-z]+", " ".join(re.findall(r"\[(.*?)\]", shell))))
    assert extras <= set(distribution("adai-dist").metadata.get_all("Provides-Extra") or ())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_path_in_the_file_map_exists() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    paths = [
        path for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for path in re.findall(r"`([^`]+)`", row)
    ]
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / path).exists()] == []
