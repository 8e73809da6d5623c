"""DeepSpeed reads every key of its files. The files train in tests/integrations/test_deepspeed_configs.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.deepspeed_keys import Recording
from tests.recipe_runs import ROOT

pytestmark = pytest.mark.deepspeed
FILES = {path.stem: path for path in sorted((ROOT / "configs/deepspeed").glob("*.json"))}
files = pytest.mark.parametrize("path", FILES.values(), ids=FILES)


def unknown_keys(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the top-level keys that DeepSpeed does not read, and so silently ignores."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()
    read = DeepSpeedConfig(Recording(copy.deepcopy(content), asked))
    assert read.train_micro_batch_size_per_gpu == content["train_micro_batch_size_per_gpu"]
    return content.keys() - asked


@files
def test_deepspeed_reads_every_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(path.read_text())
    assert unknown_keys(content, monkeypatch) == set()


def test_a_misspelt_key_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(FILES["zero3"].read_text())
    content["gradient_cliping"] = content.pop("gradient_clipping")
    assert unknown_keys(content, monkeypatch) == {"gradient_cliping"}


@pytest.mark.parametrize(
    ("name", "place", "key"),
    [
        ("zero2", ("bf16",), "enable"),
        ("zero2", ("zero_optimization",), "overlap_com"),
        ("zero3_nvme", ("zero_optimization", "offload_optimizer"), "buffer_counts"),
        ("zero3_nvme", ("zero_optimization", "offload_param"), "pinned"),
    ],
)
def test_a_misspelt_nested_key_is_refused(
    name: str, place: tuple[str, ...], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(FILES[name].read_text())
    section = content
    for part in place:
        section = section[part]
    section[key] = True
    with pytest.raises(ValueError, match=rf"(?s){key}.*Extra inputs are not permitted"):
        unknown_keys(content, monkeypatch)


@files
def test_every_key_of_the_optimizer_is_an_argument_of_its_class(path: Path) -> None:
    import torch

    import adai_dist

    section = json.loads(path.read_text())["optimizer"]
    kind = getattr(adai_dist, section["type"])
    optimizer = kind([torch.zeros(1, requires_grad=True)], **section["params"])
    assert {key: optimizer.defaults[key] for key in section["params"] if key != "betas"} == {
        key: value for key, value in section["params"].items() if key != "betas"
    }
    with pytest.raises(TypeError):
        kind([torch.zeros(1, requires_grad=True)], **section["params"] | {"learning_rate": 1.0})
