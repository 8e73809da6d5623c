"""engine=deepspeed: with every shipped configuration and launcher, a recipe has the losses of DDP."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from adai_dist.recipes import deepspeed_engine
from adai_dist.recipes.job import World
from adai_dist.recipes.recipe import RecipeError, load_recipe
from tests.recipe_runs import (
    ACCELERATE,
    LAUNCHERS,
    LLAMA,
    ROOT,
    cli_command,
    free_port,
    losses,
    read_lines,
    run_cli,
    run_command,
    write_recipe,
)
from tests.spawn import run_ranks

pytestmark = pytest.mark.deepspeed("AsyncIO")

# NVMe first: DeepSpeed numbers its swap files by the parameters of all engines in the process.
CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"), key=lambda path: ("nvme" not in path.stem, path.stem))
NAMES = tuple(path.stem for path in CONFIGS)
# DeepSpeed keeps sub-groups below 1 MiB in memory; this model has larger ones, which go to the disk.
LARGER = LLAMA.replace("16", "128").replace("32", "512")
AS_THE_CONFIGS = {"batch: 8": "batch: 16", "lr: 2.0": "lr: 4.0", "warmup: 2": "warmup: 2, shape: constant"}
STEPS = 4

SCRIPT = """
import json, sys
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DummyOptim
from adai_dist.recipes.recipe import load_recipe
from adai_dist.recipes.train import load_task

recipe, output = load_recipe(sys.argv[1], sys.argv[3:]), sys.argv[2]
accelerator = Accelerator()
task = load_task(recipe)
model = task.build_model(recipe.run.seed)
model, optimizer = accelerator.prepare(model, DummyOptim(model.parameters()))
curve = {}
for step in range(recipe.run.steps):
    # With DeepSpeed on the CPU, accelerate reports a single process.
    (rows,) = task.train_rows(recipe.run.seed, step, dist.get_rank(), dist.get_world_size())
    for param_group in optimizer.param_groups:
        param_group["lr"] = recipe.learning_rate(step)
    loss = task.scores(model, (rows.to(accelerator.device),))["loss"].mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    curve[step + 1] = mean.item()
if dist.get_rank() == 0:
    with open(output, "w") as file:
        json.dump(curve, file)
accelerator.end_training()
"""


def write_fitting_recipe(folder: Path, model: str = LLAMA) -> Path:
    """Write a recipe that agrees with the shipped configurations on two ranks, and return its path."""
    recipe = write_recipe(folder, model)
    text = recipe.read_text()
    for old, new in AS_THE_CONFIGS.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    return recipe


def run(recipe: str, *overrides: str, **settings: Any) -> Path:
    """Train on the ranks of the existing process group, and return the folder of the run."""
    from adai_dist.recipes.job import join_world
    from adai_dist.recipes.train import train

    loaded = load_recipe(recipe, overrides).replaced(**{"steps": STEPS, "checkpoint_every": 2, **settings})
    with join_world(loaded.device) as world:
        return Path(train(loaded, world)["folder"])


def cut_after_step_2(uninterrupted: Path) -> Path:
    """Copy a run without its last checkpoint, so that it resumes after step 2. Collective: all ranks."""
    cut = uninterrupted.with_name(f"{uninterrupted.name}-resumed")
    if dist.get_rank() == 0:
        shutil.copytree(uninterrupted, cut)
        shutil.rmtree(cut / "checkpoints" / f"step_{STEPS:08d}")
    dist.barrier()
    return cut


def write_variant(config: Path, folder: Path, **changes: Any) -> Path:
    path = folder / f"{config.stem}-{'-'.join(changes)}.json"
    path.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return path


def try_every_way(recipe: str, larger: str) -> str:
    """Run every configuration and its reference for a few steps; return the error of a configuration to be refused."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed decorates functions with torch.compile, which costs seconds
    os.chdir(Path(recipe).parent)  # the shipped path for NVMe is relative
    from deepspeed.ops.op_builder import AsyncIOBuilder

    for name, text in (("", recipe), ("larger-", larger)):
        for precision in ("fp32", "bf16"):
            run(text, "engine=ddp", f"precision={precision}", name=f"{name}{precision}", checkpoint_every=0)
    for config in CONFIGS:
        text = larger if "nvme" in config.stem else recipe
        if "nvme" in config.stem and not AsyncIOBuilder().is_compatible():
            continue
        overrides = ("engine=deepspeed", f"deepspeed.config={config}")
        uninterrupted = run(text, *overrides, name=config.stem)
        cut = cut_after_step_2(uninterrupted)
        if "nvme" not in config.stem:
            run(text, *overrides, name=cut.name, resume=True)
        exact = write_variant(config, Path.cwd(), bf16={"enabled": False})
        run(text, "engine=deepspeed", f"deepspeed.config={exact}", name=f"{config.stem}-fp32", checkpoint_every=0)
    zero2 = ROOT / "configs" / "deepspeed" / "zero2.json"
    in_fp32 = {"bf16": {"enabled": False}}
    in_parts = {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 4}
    variants = {
        "accumulated": (in_fp32 | in_parts, ("grad_accumulation=2",)),
        "unclipped": (in_fp32 | {"gradient_clipping": 0}, ("max_grad_norm=null",)),
        "without-zero": ({"zero_optimization": {"stage": 0}}, ()),
        "adamw": (in_fp32 | {"optimizer": None}, ("optimizer=adamw",)),
    }
    for name, (changes, overrides) in variants.items():
        path = write_variant(zero2, Path.cwd(), **changes)
        run(recipe, "engine=deepspeed", f"deepspeed.config={path}", *overrides, name=name, checkpoint_every=0)
        if name in ("unclipped", "adamw"):
            run(recipe, "engine=ddp", *overrides, name=f"{name}-ddp", checkpoint_every=0)
    inexact = {"stage": 2, "zenflow": {"topk_ratio": 0.1}, "offload_optimizer": {"device": "cpu"}}
    path = write_variant(zero2, Path.cwd(), zero_optimization=inexact)
    with pytest.raises(RecipeError) as caught:
        run(recipe, "engine=deepspeed", f"deepspeed.config={path}", name="refused")
    return str(caught.value)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fitting_recipe(tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def refusal(recipe: Path) -> str:
    larger = recipe.with_name("larger.yaml")
    larger.write_text(recipe.read_text().replace(LLAMA, LARGER))
    of_ranks = run_ranks(try_every_way, 2, str(recipe), str(larger), timeout=240)
    assert of_ranks[0] == of_ranks[1]
    return of_ranks[0]


@pytest.fixture(scope="module")
def runs(recipe: Path, refusal: str) -> Path:
    return recipe.parent / "runs"


def needs_run(runs: Path, name: str) -> Path:
    if not (runs / name).exists():
        pytest.skip("DeepSpeed's async_io needs libaio: install libaio-dev")
    return runs / name


def reference(runs: Path, name: str, precision: str) -> Path:
    return runs / f"{'larger-' if 'nvme' in name else ''}{precision}"


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_configuration_trains_as_ddp_does(runs: Path, name: str) -> None:
    in_bf16, in_fp32 = needs_run(runs, name), needs_run(runs, f"{name}-fp32")
    assert json.loads((in_bf16 / "summary.json").read_text())["precision"] == "bf16"
    for key in ("loss", "val_loss"):
        # Parameters are in bf16 under DeepSpeed, and in float32 under autocast; the measured difference is 2.2e-3.
        assert losses(in_bf16, key) == pytest.approx(losses(reference(runs, name, "bf16"), key), rel=4.4e-3)
        assert losses(in_fp32, key) == pytest.approx(losses(reference(runs, name, "fp32"), key), rel=2e-6)
    norms = losses(in_fp32, "grad_norm")
    assert norms == pytest.approx(losses(reference(runs, name, "fp32"), "grad_norm"), rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(recipe: Path, runs: Path, name: str) -> None:
    uninterrupted = needs_run(runs, name)
    resumed = runs / f"{name}-resumed"
    if "nvme" in name:  # resumes in new processes only
        arguments = ("train", "--config", resumed / "config.yaml", f"run.name={resumed.name}", "--resume")
        result = run_command(cli_command(*arguments, num_ranks=2), cwd=recipe.parent)
        assert result.returncode == 0, result.stderr
    for key in ("loss", "val_loss", "grad_norm"):
        assert losses(resumed, key) == losses(uninterrupted, key)
    assert (resumed / "inertia.jsonl").read_text() == (uninterrupted / "inertia.jsonl").read_text()
    assert sorted(path.name for path in (resumed / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_the_inertia_is_that_of_ddp(runs: Path, name: str) -> None:
    run = needs_run(runs, f"{name}-fp32")
    expected = reference(runs, name, "fp32")
    assert (run / "inertia.png").exists()
    for a, b in zip(read_lines(run / "inertia.jsonl"), read_lines(expected / "inertia.jsonl"), strict=True):
        assert list(a["layers"]) == list(b["layers"]) == ["embed_tokens", "block 0", "block 1", "norm", "lm_head"]
        for layer, shares in a["layers"].items():
            assert sum(shares) == pytest.approx(1.0, abs=1e-3)
            assert shares == pytest.approx(b["layers"][layer], abs=0.01)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "like"), [("accumulated", "fp32"), ("unclipped", "unclipped-ddp"), ("without-zero", "zero2")]
)
def test_accumulation_no_clipping_and_no_zero_follow_the_same_algorithm(runs: Path, name: str, like: str) -> None:
    assert losses(runs / name) == pytest.approx(losses(runs / like), rel=2e-6)
    assert (runs / name / "inertia.png").exists()


@pytest.mark.distributed
def test_other_optimizers_run_under_deepspeed_too_and_have_no_inertia(runs: Path) -> None:
    assert losses(runs / "adamw") == pytest.approx(losses(runs / "adamw-ddp"), rel=2e-6)
    assert not (runs / "adamw" / "inertia.png").exists()


@pytest.mark.distributed
def test_the_configuration_for_nvme_keeps_the_states_on_the_disk(runs: Path) -> None:
    swapped = [path.name for path in needs_run(runs, "zero3_nvme").rglob("*.swp")]
    for state in ("exp_avg-", "exp_avg_sq-", "beta1_prod-"):
        assert any(name.startswith(state) for name in swapped), swapped


@pytest.mark.distributed
def test_an_inexact_deepspeed_setting_is_refused_in_one_line(refusal: str) -> None:
    assert refusal.startswith("deepspeed.config: ")
    assert "zenflow" in refusal.lower()
    assert "\n" not in refusal


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_ends_at_the_loss_of_ddp(recipe: Path, runs: Path, launcher: str) -> None:
    config = recipe.parent / "zero2-bf16.json"
    overrides = [f"run.steps={STEPS}", f"run.name={launcher}", "run.checkpoint_every=0"]
    engine = ["engine=deepspeed", f"deepspeed.config={config}"]
    result = run_cli("train", "--config", recipe, *overrides, *engine, num_ranks=2, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert "held-out loss" in result.stdout
    summary = json.loads((runs / launcher / "summary.json").read_text())
    expected = json.loads((runs / "fp32" / "summary.json").read_text())
    assert (summary["engine"], summary["world_size"]) == ("deepspeed", 2)
    assert summary["num_parameters"] == expected["num_parameters"]
    assert summary["val_loss"] == pytest.approx(expected["val_loss"], rel=2e-6)
    assert losses(runs / launcher) == pytest.approx(losses(runs / "fp32"), rel=2e-6)


@pytest.mark.distributed
def test_a_script_written_with_accelerate_trains_as_the_recipe_does(recipe: Path, runs: Path) -> None:
    script, output = recipe.parent / "script.py", recipe.parent / "curve.json"
    script.write_text(SCRIPT)
    settings = ["--use_deepspeed", "--deepspeed_config_file", str(recipe.parent / "zero2-bf16.json")]
    ranks = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", str(free_port())]
    arguments = [str(recipe), str(output), f"run.steps={STEPS}"]
    command = [*ACCELERATE, *settings, *ranks, "-m", "adai_dist", "run", str(script)]
    result = run_command([*command, *arguments])
    assert result.returncode == 0, result.stderr
    curve = {int(step): loss for step, loss in json.loads(output.read_text()).items()}
    assert curve == pytest.approx(losses(runs / "fp32"), rel=2e-6)


@pytest.mark.distributed
def test_the_command_to_universal_converts_a_checkpoint_of_a_run(runs: Path, tmp_path: Path) -> None:
    checkpoint = runs / "zero2" / "checkpoints" / f"step_{STEPS:08d}" / "deepspeed"
    result = run_cli("to-universal", checkpoint, tmp_path / "universal")
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "universal") in result.stdout
    assert (tmp_path / "universal" / "zero" / "lm_head.weight" / "beta1_prod.pt").exists()


@pytest.mark.distributed
def test_one_rank_trains_without_a_launcher_and_cannot_continue_what_two_ranks_wrote(recipe: Path, runs: Path) -> None:
    config = write_variant(
        ROOT / "configs" / "deepspeed" / "zero3.json", recipe.parent, train_micro_batch_size_per_gpu=16
    )
    arguments = ("train", "--config", runs / "zero3" / "config.yaml", f"deepspeed.config={config}")
    result = run_cli(*arguments, "run.name=zero3", "--resume")
    assert result.returncode == 2, result.stderr
    assert "a DeepSpeed checkpoint is continued by as many ranks as wrote it; got 1; start 2 ranks" in result.stderr
    result = run_cli(*arguments, "run.name=alone")
    assert result.returncode == 0, result.stderr
    assert losses(runs / "alone") == pytest.approx(losses(runs / "zero3"), rel=4.4e-3)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "data.batch=32": ({}, "train_micro_batch_size_per_gpu in .* must be 16, as .*data.batch=32.* on 2 ranks; got 8"),
    "grad_accumulation=2": ({}, "train_micro_batch_size_per_gpu in .* must be 4, .*; got 8; change one of the two"),
    "grad_accumulation=1": (
        {"gradient_accumulation_steps": 4},
        "gradient_accumulation_steps in .* must be 1, as the recipe has grad_accumulation=1; got 4; ",
    ),
    "run.steps=5": (
        {"train_batch_size": 8},
        "train_batch_size in .* must be 16, as the recipe has data.batch=16; got 8",
    ),
    "max_grad_norm=0.5": ({}, "gradient_clipping in .* must be 0.5, as the recipe has max_grad_norm=0.5; got 1.0; "),
    "max_grad_norm=null": ({}, "gradient_clipping in .* must be 0.0, as the recipe has max_grad_norm=None; got 1.0; "),
    "precision=fp32": ({}, "the precision of .* must be that of the recipe, fp32; got 'bf16'; set precision=auto"),
    "precision=bf16": ({"fp16": {"enabled": True}, "bf16": {}}, "a recipe trains in fp32 or bf16, .*; got 'fp16'; "),
    "optimizer=adamw": ({}, "optimizer.type in .* must be that of the recipe, adamw; got 'AdaiV2'; "),
    "optimizers.adaiv2.lr=1.0": ({}, "optimizer.params.lr in .* must be that of the recipe, 1.0; got 4.0; "),
    "optimizers.adaiv2.betas=[0.1,0.9]": (
        {},
        r"optimizer.params.betas in .* the recipe, \(0.1, 0.9\); got \(0.1, 0.99\)",
    ),
    "run.seed=1": (
        {"optimizer": {"type": "adaiv2", "params": {"momentum": 0.9}}},
        "optimizer.params in .* must be arguments of adaiv2; got 'momentum'",
    ),
    "run.seed=2": (
        {"scheduler": {"type": "WarmupLR"}},
        "scheduler must not be set in .*; the schedule of the recipe sets",
    ),
    "run.seed=3": ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel must not be set in .* for a recipe; got "),
}


@pytest.mark.parametrize("override", CONTRADICTIONS)
def test_a_contradiction_between_file_and_recipe_is_refused_in_one_line(tmp_path: Path, override: str) -> None:
    changes, message = CONTRADICTIONS[override]
    path = write_variant(ROOT / "configs" / "deepspeed" / "zero2.json", tmp_path, **changes)
    overrides = ["engine=deepspeed", f"deepspeed.config={path}", override]
    recipe = load_recipe(write_fitting_recipe(tmp_path), overrides)
    with pytest.raises(RecipeError, match=message) as caught:
        deepspeed_engine.read_settings(recipe, World(0, 2, torch.device("cpu")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be a file, or the name of a shipped one; got "),
        ("{", "must be a readable JSON file; got "),
        ("[]", "must hold a JSON object"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused_in_one_line(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    recipe = load_recipe(write_recipe(tmp_path), ["engine=deepspeed", f"deepspeed.config={path}"])
    with pytest.raises(RecipeError, match=f"deepspeed.config {message}") as caught:
        deepspeed_engine.read_settings(recipe, World(0, 2, torch.device("cpu")))
    assert "\n" not in str(caught.value)
