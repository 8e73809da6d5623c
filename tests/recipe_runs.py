"""Shared parts of the tests of the training program: a small recipe, generated text, and real processes."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORDS = (
    "adapt",
    "inertia",
    "saddle",
    "minimum",
    "gradient",
    "momentum",
    "shard",
    "mesh",
    "rank",
    "step",
    "layer",
    "token",
)

LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "accelerate")
_BIN = Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, str(_BIN / "deepspeed")]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
MPIRUN = [str(_BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe"]

LLAMA = "architecture: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
GPT2 = "architecture: gpt2, n_embd: 16, n_layer: 2, n_head: 2, n_positions: 16"  # tied weights, dropout
TINY_RECIPE = """
run: {{seed: 3, out: {out}, steps: 6, log_every: 1, eval_every: 2, checkpoint_every: 2, keep_checkpoints: 5}}
model: {{{model}}}
data: {{source: path, path: {text}, seq_len: 16, batch: 8, val_fraction: 0.2, val_windows: 13}}
engine: fsdp2
device: cpu
optimizer: adaiv2
optimizers:
  adaiv2: {{lr: 2.0, dampening: 0.0}}
  adai: {{lr: 1.0}}
  adaiw: {{lr: 1.0, weight_decay: 1.0e-3}}
  adamw: {{lr: 1.0e-2}}
  sgd: {{lr: 0.3, momentum: 0.9}}
schedule: {{warmup: 2}}
"""


def write_text(folder: Path, num_files: int = 12, num_words: int = 300) -> Path:
    """Write a folder of text files, the same on every call, and return it."""
    numbers = random.Random(0)
    folder.mkdir(parents=True)
    for index in range(num_files):
        words = (numbers.choice(WORDS) for _ in range(num_words))
        (folder / f"text{index:02}.txt").write_text(" ".join(words))
    return folder


def write_recipe(folder: Path, model: str = LLAMA) -> Path:
    """Write a text folder and a recipe that reads it, with runs in FOLDER/runs; return the path of the recipe."""
    path = folder / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(out=folder / "runs", text=write_text(folder / "text"), model=model))
    return path


def run_cli(
    *arguments: str | Path, num_ranks: int = 1, launcher: str = "torchrun", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command line in one process, or in several under a launcher."""
    return run_command(cli_command(*arguments, num_ranks=num_ranks, launcher=launcher), timeout)


def run_command(
    command: list[str], timeout: float = 120, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**cli_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def cli_command(*arguments: str | Path, num_ranks: int = 1, launcher: str = "torchrun") -> list[str]:
    before = launch_module(launcher, num_ranks) if num_ranks > 1 else [sys.executable, "-m"]
    return [*before, "adai_dist", *map(str, arguments)]


def launch_module(launcher: str, num_ranks: int) -> list[str]:
    """Return the command that starts a module on several ranks, up to the module's name."""
    port = str(free_port())
    if launcher == "torchrun":
        return [*TORCHRUN, "--standalone", f"--nproc-per-node={num_ranks}", "-m"]
    if launcher == "deepspeed":
        return [*DEEPSPEED, "--num_gpus", str(num_ranks), "--master_port", port, "--module"]
    if launcher == "accelerate":
        count = ["--num_processes", str(num_ranks), "--num_machines", "1", "--main_process_port", port]
        return [*ACCELERATE, "--multi_gpu", *count, "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    assert launcher == "mpirun"
    rendezvous = ["-x", "MASTER_ADDR=127.0.0.1", "-x", f"MASTER_PORT={port}"]
    return [*MPIRUN, "-np", str(num_ranks), *rendezvous, sys.executable, "-m"]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def cli_environment() -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # DeepSpeed decorates functions with torch.compile, whose import costs seconds.
    deepspeed = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    on_cpu = {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **threads, **deepspeed, **on_cpu, "PYTHONPATH": str(ROOT)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path, key: str = "loss") -> dict[int, float]:
    """Return the logged values of a metric by step."""
    return {line["step"]: line[key] for line in read_lines(run / "metrics.jsonl") if key in line}
