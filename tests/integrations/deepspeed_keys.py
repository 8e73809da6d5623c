"""The keys that DeepSpeed reads in a configuration."""

from __future__ import annotations

import typing
from collections.abc import Iterator, KeysView
from typing import Any


class Recording(dict[str, Any]):
    """Section of a configuration that adds the keys that are read to a set, each after a prefix."""

    def __init__(self, content: dict[str, Any], asked: set[str], prefix: str = "") -> None:
        super().__init__(content)
        self.asked, self.prefix = asked, prefix

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return RecordingKeys(self)

    def _note(self, key: str) -> None:
        self.asked.add(f"{self.prefix}{key}")


class RecordingKeys(KeysView[str]):
    """Keys of a Recording, in which a membership test counts as reading."""

    def __contains__(self, key: object) -> bool:
        return key in self._mapping  # type: ignore[attr-defined]


# Sections that are read key by key; the others are pydantic models, or are passed on as they are.
SECTIONS = ("checkpoint", "data_types", "expert_parallel", "optimizer", "scheduler", "torch_autocast")


def found_keys() -> set[str]:
    """Return the dotted paths of all keys: those of pydantic models, and those read from dictionaries."""
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.config import DeepSpeedConfig, HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked = {"sequence_parallel_size", "data_parallel_size"}  # read by deepspeed.initialize

    contents: dict[str, Any] = {
        "optimizer": {"type": "Adai", "params": {"lr": 1.0}},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "expert_parallel": {"enabled": True},
    }
    sections = {name: Recording(contents.get(name, {}), asked, f"{name}.") for name in SECTIONS}
    DeepSpeedConfig(Recording({"train_micro_batch_size_per_gpu": 1, **sections}, asked))
    for name, model in {
        "bf16": DeepSpeedBF16Config,
        "compile": CompileConfig,
        "fp16": DeepSpeedFP16Config,
        "hybrid_engine": HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
        "zero_optimization": DeepSpeedZeroConfig,
    }.items():
        asked.update(f"{name}.{key}" for key in _fields(model))
    return asked


def _fields(model: Any) -> Iterator[str]:
    """Yield the keys of a pydantic model and, after a dot, those of the models in it."""
    for name, field in model.model_fields.items():
        key = field.alias or name
        yield key
        for annotation in (field.annotation, *typing.get_args(field.annotation)):
            if hasattr(annotation, "model_fields"):
                yield from (f"{key}.{inner}" for inner in _fields(annotation))
