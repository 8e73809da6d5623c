"""The recipe: the typed configuration of a training run.

A recipe is a YAML file plus ``key=value`` overrides, merged by OmegaConf and validated by pydantic before anything is
built. The optimizers declare their own arguments (see optimizers.py).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adai_dist.recipes import optimizers
from adai_dist.recipes.atomic_files import write_text

_PACKAGE = Path(__file__).parents[1]
# A wheel contains the shipped files; in a checkout they are at the top of the repository.
_CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())
_HELP = "see adai-dist train --help"


class RecipeError(ValueError):
    """A recipe or command line that cannot be run. The message is one line for the person who wrote it."""


def require(condition: bool, must: str, got: object, advice: str) -> None:
    """Raise RecipeError ``"{must}; got {got!r}; {advice}"`` unless ``condition`` holds."""
    if not condition:
        raise RecipeError(f"{must}; got {got!r}; {advice}")


def require_known(prefix: str, given: Iterable[str], valid: Collection[str], where: str) -> None:
    """Raise RecipeError for the first given key, below ``prefix``, that is not among the valid ones."""
    for key in given:
        if key not in valid:
            raise RecipeError(_unknown(prefix, key, valid, where))


def _unknown(prefix: str, key: str, valid: Collection[str], where: str) -> str:
    hint, names = _did_you_mean(key, valid, prefix), ", ".join(prefix + name for name in valid)
    return f"unknown key {prefix + key!r} {where}; {hint}valid keys are {names}"


def _did_you_mean(given: str, valid: Collection[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(given, valid, 1, cutoff=0.7)
    return f"did you mean {prefix + near[0]!r}? " if near else ""


class _Section(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, coerce_numbers_to_str=True, use_attribute_docstrings=True
    )


Name = Annotated[str, Field(strict=False)]  # YAML reads some names as numbers


class Run(_Section):
    """Name, length and records of a run."""

    name: Name = ""
    """Folder of the run below `out`; the name of the recipe file if empty. Taken names get a number: NAME-2."""
    out: Name = "runs"
    """Folder that holds the runs."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the order of the data and dropout."""
    steps: int = Field(default=1000, ge=1)
    """Number of optimizer steps."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl; the host waits for the device only then and at checkpoints."""
    eval_every: int = Field(default=100, ge=1)
    """Steps between two evaluations; the last step is always evaluated."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between two checkpoints, each after a line of metrics.jsonl; 0: only when the run is asked to stop."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept."""
    resume: bool = False
    """Continue the run of this name from its newest undamaged checkpoint; start from scratch if it has none."""
    overwrite: bool = False
    """Delete an existing run of this name instead of choosing another name."""
    timeout: int = Field(default=600, ge=1)
    """Seconds that a rank waits for the others in a collective before the run ends with an error."""

    @model_validator(mode="after")
    def _check(self) -> Run:
        is_folder = self.name not in (".", "..") and "/" not in self.name and "\\" not in self.name
        advice = "use run.out for the folder around it"
        require(is_folder, "run.name must be the name of one folder", self.name, advice)
        both = self.resume and self.overwrite
        require(not both, "run.resume and run.overwrite exclude each other", "both true", "drop one of them")
        return self


class _Data(_Section):
    batch: int = Field(default=16, ge=1)
    """Sequences or images per optimizer step, over all ranks."""


class _Sequences(_Data):
    seq_len: int = Field(default=64, ge=2)
    """Tokens per sequence."""
    tokenizer: Name = "bytes"
    """bytes (vocabulary 256), or the name or folder of a transformers tokenizer; not used for tokens."""
    val_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the files or documents that is held out, chosen by a hash of their names; not used for tokens."""
    val_windows: int = Field(default=512, ge=1)
    """Number of held-out sequences in every evaluation, always the same ones."""


class StdlibData(_Sequences):
    """The Python sources of the standard library."""

    source: Literal["stdlib"] = "stdlib"
    """stdlib: Python's standard library. path: text files. dataset: text of the package `datasets`. tokens: `train.bin`
    and `val.bin` of 16-bit tokens, as nanoGPT writes them, memory-mapped. digits: the 1,797 scans of 8x8 pixels of
    scikit-learn. cifar10, cifar100: through `datasets`."""


class FilesData(_Sequences):
    """Text files."""

    source: Literal["path"]
    path: Name = Field(min_length=1)
    """path: a file, a folder or a glob pattern. dataset: a name on the hub, or a folder written by save_to_disk.
    tokens: the folder of the two files. cifar10, cifar100: a folder written by save_to_disk; empty: the hub."""


class DatasetData(_Sequences):
    """A text dataset of the package `datasets`."""

    source: Literal["dataset"]
    path: Name = Field(min_length=1)
    subset: Name = ""
    """Name of the dataset's configuration, if it has several; for dataset."""
    text_column: Name = "text"
    """Column of the dataset that holds the text; for dataset."""


class TokensData(_Sequences):
    """Tokenised text in two files."""

    source: Literal["tokens"]
    path: Name = Field(min_length=1)


class _Images(_Data):
    crop_padding: int = Field(default=0, ge=0)
    """Pixels of padding on each side of a training image before it is cropped at random to its original size."""
    flip: bool = False
    """Mirror training images left to right at random."""


class DigitsData(_Images):
    """Scanned digits."""

    source: Literal["digits"]


class CifarData(_Images):
    """CIFAR-10 or CIFAR-100."""

    source: Literal["cifar10", "cifar100"]
    path: Name = ""


TextData = StdlibData | FilesData | DatasetData | TokensData
ImageData = DigitsData | CifarData
_SOURCES: dict[str, type[BaseModel]] = {
    source: schema
    for schema in get_args(TextData | ImageData)
    for source in get_args(schema.model_fields["source"].annotation)
}


class Schedule(_Section):
    """The learning rate over time, as a factor of the optimizer's lr."""

    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    shape: Literal["cosine", "constant", "multistep"] = "cosine"
    """cosine: decay from the peak to `min_ratio` of it at the last step. constant: stay at the peak.
    multistep: multiply by `gamma` at each of the `milestones`."""
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate of cosine, as a share of the peak."""
    milestones: list[int] = []
    """Steps, in ascending order, after which the learning rate falls; for multistep."""
    gamma: float = Field(default=0.1, ge=0, le=1)
    """Factor applied at each milestone; for multistep."""

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        given = self.milestones
        fits = bool(given) == (self.shape == "multistep") and given == sorted(given)
        must = "schedule.milestones must be steps in ascending order with schedule.shape=multistep, and empty otherwise"
        require(fits, must, given, "write [100, 200], for example")
        return self

    def factor(self, step: int, num_steps: int) -> float:
        """Return the factor of the learning rate in a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        if self.shape == "multistep":
            return self.gamma ** sum(step >= milestone for milestone in self.milestones)
        progress = (step - self.warmup) / max(1, num_steps - 1 - self.warmup)
        return self.min_ratio + (1.0 - self.min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


class DeepSpeed(_Section):
    """Settings of engine=deepspeed."""

    config: Name = ""
    """DeepSpeed's JSON file, or the name of a shipped one (zero2). It must not contradict the recipe."""


class Recipe(_Section):
    """The configuration of one training run."""

    run: Run = Run()
    model: dict[str, Any] = {}
    """`architecture` and its settings. For text, a model_type of transformers and settings of its config class; for
    images, cnn (channels, hidden), resnet18 or resnet34 (width)."""
    data: Annotated[TextData | ImageData, Field(discriminator="source")] = StdlibData()
    """The data; `source` decides which other keys there are."""
    engine: Literal["ddp", "fsdp2", "deepspeed"] = "fsdp2"
    """ddp, fsdp2 or deepspeed, which spreads the model over the ranks."""
    deepspeed: DeepSpeed = DeepSpeed()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu, cuda, or auto: CUDA if there is a device, else the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32, bf16, or auto: fp32, or what the file of engine=deepspeed says.
    bf16: matrix products and communicated parameters in bfloat16, master weights and optimizer in float32."""
    grad_accumulation: int = Field(default=1, ge=1)
    """Backward passes per optimizer step; the batch is split, not enlarged."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Bound of the global gradient norm; null: no clipping."""
    optimizer: Name = "adaiv2"
    """adaiv2, adai, adaiw, adam, adamw or sgd: the section of `optimizers` that is used."""
    optimizers: dict[str, dict[str, Any] | None] = {}
    """Arguments of each optimizer, so that changing `optimizer` alone is a fair comparison."""
    decay_vectors: bool = False
    """Whether weight decay also applies to biases and the weights of norms."""
    schedule: Schedule = Schedule()

    @model_validator(mode="before")
    @classmethod
    def _default_source(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(data := given.get("data"), dict):
            return {**given, "data": {"source": "stdlib", **data}}
        return given

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        has_file = self.engine != "deepspeed" or bool(self.deepspeed.config)
        advice = "set it to zero2, for example"
        require(has_file, "engine=deepspeed needs deepspeed.config", self.deepspeed.config, advice)
        architecture = self.model.get("architecture")
        must = "model.architecture must name a kind of model"
        require(isinstance(architecture, str), must, architecture, "set it to llama, for example")
        must = f"optimizer must be one of {', '.join(optimizers.OPTIMIZERS)}"
        require(self.optimizer in optimizers.OPTIMIZERS, must, self.optimizer, "set optimizer=adaiv2, for example")
        must = f"optimizers.{self.optimizer}.lr must be given"
        require("lr" in self.optimizer_arguments, must, None, "there is no default")
        require_known("optimizers.", self.optimizers, optimizers.OPTIMIZERS, "in the recipe")
        for name, arguments in self.optimizers.items():
            valid = optimizers.argument_defaults(name)
            require_known(f"optimizers.{name}.", arguments or {}, valid, "in the recipe")
            optimizers.check(name, arguments or {})
        return self

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the chosen optimizer, without the parameters and max_grad_norm."""
        return dict(self.optimizers.get(self.optimizer) or {})

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return float(self.optimizer_arguments["lr"]) * self.schedule.factor(step, self.run.steps)

    def save(self, path: Path) -> None:
        """Write the resolved recipe, which :func:`load_recipe` reads back."""
        write_text(path, yaml.safe_dump(self.model_dump(), sort_keys=False))

    def replaced(self, optimizer: str | None = None, **run: Any) -> Recipe:
        """Return a validated copy with another optimizer or other fields of the section `run`."""
        values = self.model_dump()
        return _validated({**values, "optimizer": optimizer or self.optimizer, "run": {**values["run"], **run}})


def load_recipe(given: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``key=value`` overrides.

    Args:
        given: a YAML file, or the name of a shipped recipe, such as "lm_tiny".
        overrides: such as "run.steps=100"; later ones win.

    Returns:
        The validated recipe, with `run.name` filled in.

    Raises:
        RecipeError: an unreadable file, an unknown key, or an invalid value.
    """
    for override in overrides:
        require("=" in override, "an override must read key=value", override, "write run.steps=100, for example")
    path = find_config("recipes", given, "the recipe")
    try:
        in_file: Any = OmegaConf.to_container(OmegaConf.load(path))
        in_overrides = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
        merged = _merged(in_file, in_overrides) if isinstance(in_file, dict) else in_file  # refused below
        values: Any = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OSError as error:
        message = error.strerror or error
        raise RecipeError(f"the recipe must be a readable file; got {str(given)!r}; {message}") from error
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise RecipeError(f"the recipe must be YAML; got {str(given)!r}; {' '.join(str(error).split())}") from error
    recipe = _validated(values, str(path), overrides)
    for override in overrides:
        section, _, name = override.partition("=")[0].partition(".")
        name = name.partition(".")[0]
        if section == "deepspeed" and recipe.engine != "deepspeed":
            raise RecipeError(f"{override!r} has no effect; the engine is {recipe.engine!r}; add engine=deepspeed")
        if section == "optimizers" and name != recipe.optimizer:
            advice = f"add optimizer={name} or drop it"
            raise RecipeError(f"{override!r} has no effect; the optimizer is {recipe.optimizer!r}; {advice}")
    recipe.run.name = recipe.run.name or path.stem
    return recipe


def _merged(values: Any, overrides: Any) -> Any:
    """Return nested values with overrides; a value of another type replaces the old one, and validation names it."""
    if not (isinstance(values, dict) and isinstance(overrides, dict)):
        return overrides
    return {**values, **{key: _merged(values.get(key), value) for key, value in overrides.items()}}


def find_config(folder: str, given: str | Path, key: str) -> Path:
    """Return the path of a configuration, given by its path or by the name of a shipped one; ./NAME is always a path.

    Args:
        folder: recipes or deepspeed.
        key: what the RecipeError for a missing file calls it.
    """
    shipped = {path.stem: path for path in sorted((_CONFIGS / folder).iterdir())}
    path = shipped.get(str(given), Path(given))
    advice = f"{_did_you_mean(str(given), shipped)}give the path of a file, or one of {', '.join(shipped)}"
    require(path.exists(), f"{key} must be a file, or the name of a shipped one", str(given), advice)
    return path


def describe_keys() -> str:
    """Return all keys of a recipe with their meanings and defaults, one per line, as aligned plain text."""
    rows: dict[str, str] = {}
    for key, meaning in _describe(Recipe, ""):
        rows.setdefault(key, meaning)
    width = max(map(len, rows))
    return "\n".join(f"  {key:<{width}}  {meaning}" for key, meaning in rows.items())


def _describe(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        parts = [field.annotation, *get_args(field.annotation)]
        nested = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        for schema in nested:
            yield from _describe(schema, f"{prefix}{name}.")
        if not nested:
            default = "" if field.is_required() or field.default in ("", [], {}) else f" Default: {field.default}."
            yield prefix + name, " ".join((field.description or "").split()) + default


def _validated(values: Any, origin: str = "the recipe", overrides: Sequence[str] = ()) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        raise RecipeError(_in_words(errors[0], origin, overrides)) from error


def _in_words(error: Any, origin: str, overrides: Sequence[str]) -> str:
    """Return one line for the first thing that pydantic found."""
    location = [str(part) for part in error["loc"]]
    section, source = Recipe, ""
    if len(location) > 1 and location[0] == "data":
        source = f", with data.source={location[1]}"
        section = _SOURCES[location.pop(1)]
    elif len(location) > 1:
        section: Any = Recipe.model_fields[location[0]].annotation
    key, kind, got = ".".join(location) or "a recipe", error["type"], error["input"]
    if kind == "value_error":  # from a validator above, in its final form
        return str(error.get("ctx", {}).get("error", error["msg"]))
    if kind == "extra_forbidden":
        is_override = any(f"{each.partition('=')[0]}.".startswith(f"{key}.") for each in overrides)
        where = f"in {'the command line' if is_override else origin}{source}"
        return _unknown(".".join([*location[:-1], ""]), location[-1], section.model_fields, where)
    if kind == "missing":
        return f"{key} must be given{source}; got none; {_HELP}"
    if kind == "union_tag_invalid":
        return f"data.source must be one of {', '.join(_SOURCES)}; got {got.get('source')!r}; {_HELP}"
    if got is None:  # from `key=` as well as from `key: null`
        return f"{key} must have a value; got none; give it one, or leave the key out"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key} must be a mapping of keys to values; got {got!r}; {_HELP}"
    must = error["msg"].replace("Input should", "must").replace("String should", "must")
    return f"{key} {must}; got {got!r}; {_HELP}"
