"""The recipe: every setting of a training run, typed, with its meaning beside it.

A recipe is a YAML file plus `key=value` overrides, read by OmegaConf. Unknown keys and impossible values are refused
before anything is built, with one line that names the key. What an optimizer takes is declared by the optimizer, not
here (see optimizers.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from adai_dist.recipes import optimizers
from adai_dist.recipes.data_config import DataConfig, TextConfig
from adai_dist.recipes.refusal import RecipeError, require, require_at_least, require_choice

ENGINES = ("ddp", "fsdp2", "deepspeed")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
SCHEDULES = ("cosine", "constant", "multistep")


@dataclass
class RunConfig:
    """What is run, for how long, and what is kept of it."""

    name: str = ""
    """Folder of the run below `out`; the name of the recipe file if empty. Taken names get a number: NAME-2."""
    out: str = "runs"
    """Folder that holds the runs."""
    seed: int = 0
    """Decides the initial weights, the order of the data and dropout."""
    steps: int = 1000
    """Number of optimizer steps."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; only then, and for checkpoints, the host waits for the device."""
    eval_every: int = 100
    """Steps between two evaluations; the last step is always evaluated."""
    checkpoint_every: int = 0
    """Steps between two checkpoints, each after a line of metrics.jsonl; 0 writes none, unless the run is stopped."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""
    resume: bool = False
    """Continue the run of this name from its newest undamaged checkpoint; start anew if it has none at all."""
    overwrite: bool = False
    """Delete a run of this name first, instead of choosing another name."""
    timeout: int = 600
    """Seconds that a rank waits for the others in a collective before the run ends with an error."""

    def __post_init__(self) -> None:
        for key, minimum in (
            ("steps", 1),
            ("log_every", 1),
            ("eval_every", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 1),
            ("timeout", 1),
        ):
            require_at_least(f"run.{key}", getattr(self, key), minimum)
        require_at_least("run.seed", self.seed, 0)
        plain = self.name not in (".", "..") and "/" not in self.name and "\\" not in self.name
        require(plain, "run.name must be the name of one folder", self.name, "use run.out for the folder around it")
        both = self.resume and self.overwrite
        require(not both, "run.resume and run.overwrite exclude each other", "both true", "drop one of them")


@dataclass
class ScheduleConfig:
    """The learning rate over time, as a factor of the optimizer's lr."""

    warmup: int = 0
    """Steps of linear warm-up."""
    shape: str = "cosine"
    """cosine: from the peak to `min_ratio` of it at the last step. constant: stays at the peak.
    multistep: times `gamma` at each of the `milestones`."""
    min_ratio: float = 0.1
    """Where cosine ends, as a share of the peak."""
    milestones: list[int] = field(default_factory=lambda: [])
    """For multistep: numbers of steps, in order, after which the learning rate falls."""
    gamma: float = 0.1
    """For multistep: the factor by which it falls."""

    def __post_init__(self) -> None:
        require_choice("schedule.shape", self.shape, SCHEDULES)
        require_at_least("schedule.warmup", self.warmup, 0)
        ratio = self.min_ratio
        require(0 <= ratio <= 1, "schedule.min_ratio must be between 0 and 1", ratio, "0.1 ends at a tenth of the peak")
        require(0 <= self.gamma <= 1, "schedule.gamma must be between 0 and 1", self.gamma, "0.1 is usual")
        is_multistep, given = self.shape == "multistep", self.milestones
        fits = bool(given) == is_multistep and given == sorted(given)
        must = "schedule.milestones must be numbers of steps, in order, with schedule.shape=multistep, and only then"
        require(fits, must, given, "write [100, 200], for example")

    def factor(self, step: int, num_steps: int) -> float:
        """The factor of the learning rate in a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        if self.shape == "multistep":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        progress = (step - self.warmup) / max(1, num_steps - 1 - self.warmup)
        return self.min_ratio + (1.0 - self.min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass
class DeepSpeedSettings:
    """What engine=deepspeed needs; other engines do not look at it."""

    config: str = ""
    """Its configuration: a JSON file, or the name of a shipped one (zero2). It must not contradict the recipe."""


@dataclass
class Recipe:
    """One training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: dict[str, Any] = field(default_factory=lambda: {})
    """For text, `architecture` (a model_type of transformers) and the settings of that architecture's config;
    for images, `architecture` (cnn, resnet18 or resnet34) and the arguments of that class in convnets.py."""
    data: DataConfig = field(default_factory=TextConfig)
    """The keys of `TextConfig`, or with a source of images those of `ImagesConfig`."""
    engine: str = "fsdp2"
    """ddp, fsdp2 or deepspeed."""
    deepspeed: DeepSpeedSettings = field(default_factory=DeepSpeedSettings)
    device: str = "auto"
    """auto: CUDA where there is any, else the CPU."""
    precision: str = "auto"
    """auto: fp32, or what the file of engine=deepspeed says.
    bf16: matrix products and communicated parameters in bfloat16, master weights and optimizer in float32."""
    grad_accumulation: int = 1
    """Backward passes per optimizer step; the batch is split, not enlarged."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this; null: no clipping."""
    optimizer: str = "adaiv2"
    """Which section of `optimizers` is used."""
    optimizers: dict[str, Any] = field(default_factory=lambda: {})
    """For each optimizer its arguments, so that changing `optimizer` alone is a fair comparison."""
    decay_vectors: bool = False
    """Whether weight decay also takes biases and the weights of norms."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        require_choice("engine", self.engine, ENGINES)
        require_choice("device", self.device, DEVICES)
        require_choice("precision", self.precision, PRECISIONS)
        has_file = self.engine != "deepspeed" or bool(self.deepspeed.config)
        advice = "set it to zero2, for example"
        require(has_file, "engine=deepspeed needs deepspeed.config", self.deepspeed.config, advice)
        require_choice("optimizer", self.optimizer, tuple(optimizers.OPTIMIZERS))
        require_at_least("grad_accumulation", self.grad_accumulation, 1)
        norm = self.max_grad_norm
        require(norm is None or norm > 0, "max_grad_norm must be positive", norm, "set it to null for no clipping")
        architecture = self.model.get("architecture")
        must = "model.architecture must name a kind of model"
        require(isinstance(architecture, str), must, architecture, "set it to llama, for example")
        require(
            "lr" in self.optimizer_arguments,
            f"optimizers.{self.optimizer}.lr must be given",
            None,
            "there is no default",
        )
        try:
            for name, arguments in self.optimizers.items():
                optimizers.check(name, dict(arguments or {}))
        except (ValueError, TypeError) as error:
            raise RecipeError(str(error)) from error

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the chosen optimizer, without the parameters and max_grad_norm."""
        return dict(self.optimizers.get(self.optimizer) or {})

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return float(self.optimizer_arguments["lr"]) * self.schedule.factor(step, self.run.steps)

    def save(self, path: Path) -> None:
        """Writes the resolved recipe, which `load_recipe` (recipe_file.py) reads back."""
        OmegaConf.save(OmegaConf.create(dataclasses.asdict(self)), path)
