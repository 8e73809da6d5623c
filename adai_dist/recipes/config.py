"""The recipe: every setting of a training run, typed, with its meaning beside it.

A recipe is a YAML file plus `key=value` overrides, read by OmegaConf. Unknown keys and impossible values are refused
before anything is built, with one line that names the key. What an optimizer takes is declared by the optimizer, not
here (see optimizers.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from adai_dist.recipes import optimizers

ENGINES = ("ddp", "fsdp2", "deepspeed")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
SOURCES = ("stdlib", "path", "dataset")
SCHEDULES = ("cosine", "constant")


class RecipeError(ValueError):
    """A recipe or command line that cannot be run. The message is one line for the person who wrote it."""


def require(condition: bool, must: str, got: object, advice: str) -> None:
    """Raises RecipeError "{must}; got {got!r}; {advice}" unless `condition` holds."""
    if not condition:
        raise RecipeError(f"{must}; got {got!r}; {advice}")


def _require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    require(
        value in choices, f"{key} must be one of {', '.join(choices)}", value, f"set {key}={choices[0]}, for example"
    )


def _require_at_least(key: str, value: float, minimum: float) -> None:
    require(value >= minimum, f"{key} must be at least {minimum}", value, "give a larger number")


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
    """Steps between two checkpoints, each after a line of metrics.jsonl; 0 writes none."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""
    resume: bool = False
    """Continue the run of this name from its newest undamaged checkpoint; start anew if it has none at all."""
    overwrite: bool = False
    """Delete a run of this name first, instead of choosing another name."""

    def __post_init__(self) -> None:
        for key, minimum in (
            ("steps", 1),
            ("log_every", 1),
            ("eval_every", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 1),
        ):
            _require_at_least(f"run.{key}", getattr(self, key), minimum)
        _require_at_least("run.seed", self.seed, 0)
        plain = self.name not in (".", "..") and "/" not in self.name and "\\" not in self.name
        require(plain, "run.name must be the name of one folder", self.name, "use run.out for the folder around it")
        both = self.resume and self.overwrite
        require(not both, "run.resume and run.overwrite exclude each other", "both true", "drop one of them")


@dataclass
class DataConfig:
    """Which text, as which tokens, in which batches."""

    source: str = "stdlib"
    """stdlib: the Python standard library's own sources. path: your files. dataset: the package `datasets`."""
    path: str = ""
    """For source=path a file, folder or glob pattern; for source=dataset its name or a folder of save_to_disk."""
    subset: str = ""
    """For source=dataset: the name of its configuration, where it has several."""
    text_column: str = "text"
    """For source=dataset: the column that holds the text."""
    tokenizer: str = "bytes"
    """bytes (vocabulary 256), or the name or folder of a transformers tokenizer."""
    seq_len: int = 64
    """Tokens per sequence."""
    batch: int = 16
    """Sequences per optimizer step, over all ranks."""
    val_fraction: float = 0.05
    """Share of the files that is held out, chosen by a hash of their names."""
    val_windows: int = 512
    """Number of held-out sequences that every evaluation reads, always the same ones."""

    def __post_init__(self) -> None:
        _require_choice("data.source", self.source, SOURCES)
        for key, minimum in (("seq_len", 2), ("batch", 1), ("val_windows", 1)):
            _require_at_least(f"data.{key}", getattr(self, key), minimum)
        share = self.val_fraction
        require(
            0 < share < 1, "data.val_fraction must be between 0 and 1", share, "0.05 holds out a twentieth of the files"
        )
        if self.source == "stdlib":
            require(
                not self.path,
                "data.path has no effect with data.source=stdlib",
                self.path,
                "set data.source=path or dataset",
            )
        else:
            require(bool(self.path), f"data.source={self.source} needs data.path", self.path, "name the text there")
        if self.source != "dataset":
            advice = "set data.source=dataset or drop it"
            require(not self.subset, f"data.subset has no effect with data.source={self.source}", self.subset, advice)


@dataclass
class ScheduleConfig:
    """The learning rate over time, as a factor of the optimizer's lr."""

    warmup: int = 0
    """Steps of linear warm-up."""
    shape: str = "cosine"
    """cosine: from the peak to `min_ratio` of it at the last step. constant: stays at the peak."""
    min_ratio: float = 0.1
    """Where cosine ends, as a share of the peak."""

    def __post_init__(self) -> None:
        _require_choice("schedule.shape", self.shape, SCHEDULES)
        _require_at_least("schedule.warmup", self.warmup, 0)
        ratio = self.min_ratio
        require(0 <= ratio <= 1, "schedule.min_ratio must be between 0 and 1", ratio, "0.1 ends at a tenth of the peak")

    def factor(self, step: int, num_steps: int) -> float:
        """The factor of the learning rate in a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, num_steps - 1 - self.warmup)
        return self.min_ratio + (1.0 - self.min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


@dataclass
class DeepSpeedSettings:
    """What engine=deepspeed needs; other engines do not look at it."""

    config: str = ""
    """Its configuration, a JSON file such as configs/deepspeed/zero2.json. It must not contradict the recipe."""


@dataclass
class Recipe:
    """One training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: dict[str, Any] = field(default_factory=lambda: {})
    """`architecture` (a model_type of transformers) and the settings of that architecture's config."""
    data: DataConfig = field(default_factory=DataConfig)
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
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _require_choice("engine", self.engine, ENGINES)
        _require_choice("device", self.device, DEVICES)
        _require_choice("precision", self.precision, PRECISIONS)
        has_file = self.engine != "deepspeed" or bool(self.deepspeed.config)
        advice = "configs/deepspeed/zero2.json, for example"
        require(has_file, "engine=deepspeed needs deepspeed.config", self.deepspeed.config, advice)
        _require_choice("optimizer", self.optimizer, tuple(optimizers.OPTIMIZERS))
        _require_at_least("grad_accumulation", self.grad_accumulation, 1)
        norm = self.max_grad_norm
        require(norm is None or norm > 0, "max_grad_norm must be positive", norm, "set it to null for no clipping")
        architecture = self.model.get("architecture")
        advice = "set model.architecture=llama, for example"
        require(
            isinstance(architecture, str),
            "model.architecture must name a model_type of transformers",
            architecture,
            advice,
        )
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
        """Writes the resolved recipe, which `load_recipe` reads back."""
        OmegaConf.save(OmegaConf.create(dataclasses.asdict(self)), path)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `key=value` overrides.

    Args:
        path: a YAML file.
        overrides: such as "run.steps=100"; later ones win.

    Returns:
        The validated recipe; `run.name` is filled in.

    Raises:
        RecipeError: for a file that cannot be read, an unknown key, or a value that cannot be.
    """
    path = Path(path)
    for override in overrides:
        require("=" in override, "an override must read key=value", override, "write run.steps=100, for example")
    try:
        from_file = OmegaConf.load(path)
        from_overrides = OmegaConf.from_dotlist(list(overrides))
        for given, origin in ((from_file, str(path)), (from_overrides, "the command line")):
            _refuse_unknown_keys(cast("Any", OmegaConf.to_container(given)), Recipe, "", origin)
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), from_file, from_overrides)
        recipe = cast(Recipe, OmegaConf.to_object(merged))
    except OSError as error:
        raise RecipeError(f"the recipe must be a readable file; got {str(path)!r}; {error.strerror}") from error
    except YAMLError as error:
        raise RecipeError(f"the recipe must be YAML; got {str(path)!r}; {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        key, what = error.full_key or "recipe", str(error).splitlines()[0]
        raise RecipeError(f"{key} must have the type of its default; {what}; change the value") from error
    _refuse_idle_overrides(recipe, overrides)
    recipe.run.name = recipe.run.name or path.stem
    return recipe


def _refuse_unknown_keys(given: Any, schema: type, prefix: str, origin: str) -> None:
    """The merge would refuse them too, but without saying what the valid keys are."""
    _require_mapping(prefix.rstrip(".") or "a recipe", given, origin)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key, value in cast("dict[Any, Any]", given).items():
        if key not in fields:
            raise RecipeError(
                f"unknown key {f'{prefix}{key}'!r} in {origin}; valid keys are {', '.join(prefix + f for f in fields)}"
            )
        section = fields[key].default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            _refuse_unknown_keys(value, section, f"{prefix}{key}.", origin)
        elif section is not dataclasses.MISSING:  # free keys, for models and optimizers
            _require_mapping(f"{prefix}{key}", value, origin)
            if key == "optimizers":
                for name, arguments in value.items():
                    _require_mapping(f"{prefix}{key}.{name}", {} if arguments is None else arguments, origin)


def _require_mapping(key: str, given: Any, origin: str) -> None:
    require(isinstance(given, dict), f"{key} must be a mapping of keys to values", given, f"see {origin}")


def _refuse_idle_overrides(recipe: Recipe, overrides: Sequence[str]) -> None:
    for override in overrides:
        section, _, rest = override.partition("=")[0].partition(".")
        name = rest.partition(".")[0]
        if section == "deepspeed" and recipe.engine != "deepspeed":
            raise RecipeError(f"{override!r} has no effect; the engine is {recipe.engine!r}; add engine=deepspeed")
        if section == "optimizers" and name != recipe.optimizer:
            raise RecipeError(
                f"{override!r} has no effect; the optimizer is {recipe.optimizer!r}; add optimizer={name} or drop it"
            )
