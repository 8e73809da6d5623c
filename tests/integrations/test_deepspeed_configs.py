"""The shipped DeepSpeed configurations: each is valid unchanged, and trains without a recipe."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adai_dist.recipes import deepspeed_engine
from adai_dist.recipes.job import World
from adai_dist.recipes.recipe import load_recipe
from tests.integrations.deepspeed_engines import set_environment
from tests.recipe_runs import ROOT
from tests.spawn import run_ranks

pytestmark = pytest.mark.deepspeed("AsyncIO")

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs" / "deepspeed").glob("*.json"))}
# stage, device of the optimizer's states, device of the parameters
EXPECTED = {
    "zero1": (1, "none", "none"),
    "zero2": (2, "none", "none"),
    "zero2_offload": (2, "cpu", "none"),
    "zero3": (3, "none", "none"),
    "zero3_nvme": (3, "nvme", "cpu"),
    "zero3_offload": (3, "cpu", "cpu"),
}
STEPS = 4


def train_with_each(folder: str) -> dict[str, dict[str, Any]]:
    """Return DeepSpeed's view of each file and the losses of a few steps."""
    set_environment()
    os.chdir(folder)  # the path for NVMe is relative
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.config import DeepSpeedConfig

    deepspeed.init_distributed()
    results: dict[str, dict[str, Any]] = {}
    for name, path in CONFIGS.items():
        zero = DeepSpeedConfig(str(path)).zero_config
        offloads = (zero.offload_optimizer, zero.offload_param)
        devices = (str(getattr(offload.device, "value", offload.device)) if offload else "none" for offload in offloads)
        results[name] = {"zero": (zero.stage, *devices)}
        if "nvme" in name and not AsyncIOBuilder().is_compatible():
            continue
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 10))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(path))
        rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
        losses: list[float] = []
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(engine(rows.bfloat16()).float(), rows[:, :10].argmax(dim=1))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        results[name] |= {
            "losses": losses,
            "optimizer": type(engine.basic_optimizer).__name__,
            "clipping": engine.gradient_clipping(),
            "batch": (engine.train_batch_size(), engine.gradient_accumulation_steps()),
            "in_bf16": engine.bfloat16_enabled(),
        }
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_ranks(train_with_each, 2, str(tmp_path_factory.mktemp("configs")), timeout=240)[0]


def test_there_is_a_configuration_for_every_stage_and_offload() -> None:
    assert CONFIGS.keys() == EXPECTED.keys()


@pytest.mark.distributed
@pytest.mark.parametrize("name", EXPECTED)
def test_deepspeed_reads_each_file_and_trains_with_it(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results[name]
    assert result["zero"] == EXPECTED[name]
    if "losses" not in result:
        pytest.skip("DeepSpeed's async_io needs libaio: install libaio-dev")
    assert (result["optimizer"], result["in_bf16"]) == ("AdaiV2", True)
    assert (result["clipping"], result["batch"]) == (1.0, (16, 1))
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert result["losses"][-1] < 0.5 * result["losses"][0]
    # The stages differ only in the order of a few additions, with parameters rounded to bf16.
    assert result["losses"] == pytest.approx(results["zero1"]["losses"], rel=1e-3)


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_every_setting_that_changes_the_result_is_explicit(path: Path) -> None:
    content = json.loads(path.read_text())
    assert "gradient_clipping" in content, "its default has been 1.0 since DeepSpeed 0.19.3, and 0 before"
    assert content["bf16"] == {"enabled": True}
    assert content["optimizer"]["params"].keys() == {"lr", "betas", "eps", "weight_decay", "dampening"}
    offload = content["zero_optimization"].get("offload_optimizer", {})
    assert offload.get("device") != "nvme" or offload["buffer_count"] >= 5


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_the_recipe_of_make_train_accepts_each_file_unchanged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_engine, "_check_with_deepspeed", lambda *_: None)  # DeepSpeed itself is tested above
    settings = ["engine=deepspeed", f"deepspeed.config={path}"]
    recipe = load_recipe(ROOT / "configs" / "recipes" / "lm_tiny.yaml", settings)
    read = deepspeed_engine.read_settings(recipe, World(0, 2, torch.device("cpu")))
    assert deepspeed_engine.precision_of(read) == "bf16"
    assert (read["train_batch_size"], read["gradient_clipping"]) == (16, recipe.max_grad_norm)
