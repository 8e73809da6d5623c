"""The files for `accelerate launch` contain no unknown or ineffective keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.configs.accelerate_launch import FILES, environment_of
from tests.recipe_runs import ROOT

pytest.importorskip("accelerate")

STAGES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme")
NAMES = {"ddp", "fsdp1", "fsdp2", "fsdp2_offload", "hsdp", "multi_node", *(f"deepspeed_{stage}" for stage in STAGES)}
SECTIONS = ("fsdp_config", "parallelism_config", "deepspeed_config")
files = pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name, marks=pytest.mark.deepspeed if "zero" in name else ())
        for name, path in FILES.items()
    ],
)


def another(value: Any) -> Any:
    """Return a different value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else f"not-{value}"


def keys_without_effect(content: dict[str, Any], folder: Path) -> list[str]:
    """Return the nested keys whose values do not change the environment of the ranks."""
    path = folder / "config.yaml"

    def variables_with(changed: dict[str, Any]) -> dict[str, str]:
        path.write_text(yaml.safe_dump(changed))
        return environment_of(path)

    unchanged = variables_with(content)
    return [
        key
        for section in SECTIONS
        for key, value in content.get(section, {}).items()
        if variables_with(content | {section: content[section] | {key: another(value)}}) == unchanged
    ]


def test_there_is_a_file_for_every_engine() -> None:
    assert FILES.keys() == NAMES


@files
def test_accelerate_reads_each_file_and_refuses_an_unknown_key(path: Path, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    content = yaml.safe_load(path.read_text())
    read = load_config_from_file(str(path))
    for key, value in content.items():
        assert getattr(read, key) == value, key
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(content | {"num_process": 2}))
    with pytest.raises(ValueError, match=r"unknown keys \(\['num_process'\]\)"):
        load_config_from_file(str(changed))


@files
def test_every_nested_key_changes_the_environment_of_the_ranks(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert keys_without_effect(content, tmp_path) == []


@pytest.mark.parametrize("section", SECTIONS[:2])
def test_a_misspelt_nested_key_is_detected(section: str, tmp_path: Path) -> None:
    content = yaml.safe_load(FILES["hsdp" if section == "parallelism_config" else "fsdp2"].read_text())
    content[section]["fsdp_reshard_after_foward"] = True
    assert keys_without_effect(content, tmp_path) == ["fsdp_reshard_after_foward"]


@pytest.mark.deepspeed
def test_a_misspelt_key_for_deepspeed_is_detected(tmp_path: Path) -> None:
    content = yaml.safe_load(FILES["deepspeed_zero3"].read_text())
    content["deepspeed_config"]["zero3_init"] = True
    assert keys_without_effect(content, tmp_path) == ["zero3_init"]


class Recording(dict[str, str]):
    """Environment that records the variables that are read."""

    def __init__(self, variables: dict[str, str]) -> None:
        super().__init__(variables)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("name", [name for name in FILES if "fsdp_config" in FILES[name].read_text()])
def test_every_variable_of_fsdp_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    variables = environment_of(FILES[name])
    content = yaml.safe_load(FILES[name].read_text())
    of_keys: set[str] = set()
    for section in SECTIONS[:2]:
        for key, value in content.get(section, {}).items():
            changed = tmp_path / "changed.yaml"
            changed.write_text(yaml.safe_dump(content | {section: content[section] | {key: another(value)}}))
            of_keys |= {variable for variable, _ in environment_of(changed).items() ^ variables.items()}
    with monkeypatch.context() as patched:
        # Weights can be broadcast from rank 0 only on a GPU.
        environment = Recording(dict(os.environ) | variables | {"FSDP_SYNC_MODULE_STATES": "false"})
        patched.setattr(os, "environ", environment)
        FullyShardedDataParallelPlugin()
        if "parallelism_config" in content:
            from accelerate import ParallelismConfig

            ParallelismConfig()
    assert len(of_keys) >= len(content["fsdp_config"])
    assert of_keys - environment.asked == set()


@files
def test_two_lines_are_marked_to_edit_and_the_header_lists_the_settings_of_the_script(path: Path) -> None:
    text = path.read_text()
    assert text.count("# edit: ") == 2
    head = text.partition("\n\n")[0]
    assert f"accelerate launch --config_file {path.relative_to(ROOT)}" in head
    for word in ("max_grad_norm", "batch_size", "gradient_accumulation_steps") * (
        not path.stem.startswith("deepspeed")
    ):
        assert word in head


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_for_deepspeed_refers_to_the_json_of_the_same_name(stage: str) -> None:
    content = yaml.safe_load(FILES[f"deepspeed_{stage}"].read_text())
    config = content["deepspeed_config"]
    assert config["deepspeed_config_file"] == f"configs/deepspeed/{stage}.json"
    assert config["zero3_init_flag"] is ("zero3" in stage)
    assert "mixed_precision" not in content, "accelerate refuses it together with a JSON"
