"""The tables of configs/README.md match the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.configs.table import ROWS
from tests.recipe_runs import ROOT

CONFIGS = ROOT / "configs"
FILES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*")
    if path.is_file() and path.suffix in (".yaml", ".json")
)


def precision(content: dict[str, Any]) -> str:
    (enabled,) = [name for name in ("bf16", "fp16") if content.get(name, {}).get("enabled")] or ["fp32"]
    return enabled


def cells_of(file: str) -> dict[str, str]:
    """Return clipping, precision and batch of a file as formatted in the table."""
    path = CONFIGS / file
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        batch = content["train_micro_batch_size_per_gpu"]
        return {
            "clipping": str(content["gradient_clipping"]),
            "precision": precision(content),
            "batch per rank": str(batch),
        }
    content = yaml.safe_load(path.read_text())
    if file.startswith("recipes/"):
        batch = content["data"]["batch"]
        # `auto` is fp32 unless a DeepSpeed file overrides it.
        chosen = content.get("precision", "auto").replace("auto", "fp32")
        return {"clipping": str(content.get("max_grad_norm") or "none"), "precision": chosen, "batch": str(batch)}
    if "deepspeed_config" in content:
        return cells_of(Path(content["deepspeed_config"]["deepspeed_config_file"]).relative_to("configs").as_posix())
    return {"clipping": "script", "precision": content["mixed_precision"], "batch per rank": "script"}


def test_every_file_has_a_row_and_every_row_a_file() -> None:
    assert sorted(ROWS) == FILES


@pytest.mark.parametrize("file", FILES)
def test_clipping_precision_and_batch_match_the_file(file: str) -> None:
    cells = ROWS[file].cells
    assert {name: cells[name] for name in cells_of(file)} == cells_of(file)


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("recipes/")])
def test_the_listed_tests_read_the_file(file: str) -> None:
    folder, _, name = file.partition("/")
    reads_all = (f'"configs/{folder}"', f'"configs" / "{folder}"', *["import FILES"] * (folder == "accelerate"))
    texts = [(ROOT / test).read_text() for test in ROWS[file].tests]
    assert any(words in text for words in (*reads_all, f'"{Path(name).stem}"') for text in texts)
