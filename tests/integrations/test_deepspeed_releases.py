"""A DeepSpeed that the adapters do not know is refused when the optimizer is bound, by the name that differs."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

import adai_dist
from tests.integrations.deepspeed_engines import Prescribed, set_environment, start, walk
from tests.integrations.deepspeed_oracle_check import check
from tests.integrations.deepspeed_setups import BF16, CPU_OFFLOAD, FP32_GRADIENTS, Setup, zero
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

SETUPS = {
    "without-zero-bf16": Setup(zero(0) | BF16),
    "stage-1": Setup(zero(1)),
    "stage-2-offload": Setup(zero(2, **CPU_OFFLOAD)),
    "stage-3": Setup(zero(3)),
    "stage-3-offload": Setup(zero(3, **CPU_OFFLOAD)),
    "bf16-optimizer": Setup(zero(1) | BF16 | FP32_GRADIENTS),
}


@contextmanager
def without(owner: Any, name: str) -> Iterator[None]:
    """Rename an attribute of an object and of its classes, as another release might."""
    renamed = f"{name}_renamed"
    holders = [(holder, vars(holder)[name]) for holder in (owner, *type(owner).__mro__) if name in vars(holder)]
    for holder, value in holders:
        delattr(holder, name)
        setattr(holder, renamed, value)
    try:
        yield
    finally:
        for holder, value in holders:
            delattr(holder, renamed)
            setattr(holder, name, value)


def missing_names_that_are_not_refused(setup: Setup) -> tuple[int, list[str]]:
    """Bind an engine again without each name in turn, and return the number of names, and those without an error."""
    from adai_dist.integrations.deepspeed.adapters.releases import installed_release
    from adai_dist.integrations.deepspeed.adapters.wrappers import zero_wrapper_of
    from adai_dist.integrations.deepspeed.engine_binding import bind

    engine = start(setup, Prescribed(setup))
    wrapper, release = engine.optimizer, installed_release()
    zero_wrapper = zero_wrapper_of(engine, release)
    tables = ("FP16_UnfusedOptimizer",) if zero_wrapper is None else zero_wrapper.tables()
    names = [name for table in tables for name in (*release.methods[table], *release.attributes.get(table, ()))]
    accepted: list[str] = []
    for name in names:
        try:
            with without(wrapper, name):
                bind(engine)
        except RuntimeError as error:
            if f"{type(wrapper).__name__}.{name} must" in str(error) and "no such" in str(error):
                continue
        accepted.append(name)
    return len(names), accepted


@pytest.mark.parametrize("name", SETUPS)
def test_every_name_of_the_tables_is_refused_by_name_if_it_is_gone(name: str) -> None:
    for num_names, accepted in run_ranks(missing_names_that_are_not_refused, 2, SETUPS[name]):
        assert num_names > 3
        assert accepted == []


def error_of(work: Any, *args: Any) -> tuple[str, str]:
    try:
        work(*args)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def with_changed_methods() -> list[tuple[str, str]]:
    set_environment()
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    DeepSpeedZeroOptimizer.unscale_and_clip_grads = lambda self, gradients, scale: None
    BF16_Optimizer.step = lambda self, closure=None: None  # sets no norm
    setups = [SETUPS[name] for name in ("stage-1", "bf16-optimizer", "stage-3")]
    errors = [error_of(start, setup, Prescribed(setup)) for setup in setups[:2]]
    del DeepSpeedEngine.zero_partial_offload
    return [*errors, error_of(start, setups[2], Prescribed(setups[2]))]


def test_a_changed_method_is_refused_naming_method_and_version() -> None:
    for in_stage_1, in_bf16, in_engine in run_ranks(with_changed_methods, 2):
        assert in_stage_1[0] == in_bf16[0] == in_engine[0] == "RuntimeError"
        assert "DeepSpeedZeroOptimizer.unscale_and_clip_grads" in in_stage_1[1]
        assert "('gradients', 'scale')" in in_stage_1[1]
        assert version("deepspeed") in in_stage_1[1]
        assert "BF16_Optimizer.step must set _global_grad_norm" in in_bf16[1]
        assert "DeepSpeedEngine.zero_partial_offload" in in_engine[1]


def without_a_function() -> tuple[tuple[str, str], str]:
    set_environment()
    import deepspeed
    from deepspeed.moe import utils

    del utils.is_moe_param
    setup = SETUPS["stage-1"]
    other, *_ = deepspeed.initialize(
        model=torch.nn.Linear(3, 2),
        config={"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "RMSprop", "params": {"lr": 0.1}}},
        dist_init_required=False,
    )
    return error_of(start, setup, Prescribed(setup)), type(other.basic_optimizer).__name__


def test_a_missing_function_is_refused_by_name_and_does_not_affect_other_optimizers() -> None:
    for (kind, message), other in run_ranks(without_a_function, 2):
        assert kind == "RuntimeError"
        assert "is_moe_param" in message
        assert other == "RMSprop"


def logged_messages() -> list[str]:
    """Return a list to which the messages of the package's logger are appended from now on."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("adai_dist").addHandler(handler)
    return messages


def with_version(pretended: str) -> tuple[tuple[str, str], list[str], Any]:
    """Pretend that DeepSpeed has another version, and return an error, or what was logged and the trajectory."""
    set_environment()
    from adai_dist.integrations.deepspeed.adapters import releases

    messages = logged_messages()
    releases.installed_release.cache_clear()
    releases.version = lambda distribution: pretended
    setup = SETUPS["stage-1"]
    error = error_of(start, setup, Prescribed(setup))
    return error, messages, None if error[0] else walk(setup)


@pytest.mark.parametrize("unsupported", ["0.15.4", "0.17.6", "0.18.5"])
def test_a_release_that_is_not_supported_is_refused_naming_its_version(unsupported: str) -> None:
    from adai_dist.integrations.deepspeed.adapters.releases import TESTED

    tested = " or ".join(f"{first} to {last}" for first, last in TESTED)
    for error, _, _ in run_ranks(with_version, 2, unsupported):
        assert error[0] == "RuntimeError"
        assert error[1].startswith(f"Adai needs DeepSpeed {tested}, got {unsupported};")


def test_a_newer_release_with_the_same_names_trains_after_one_warning() -> None:
    from adai_dist.integrations.deepspeed.adapters.releases import RELEASES, installed_release

    if installed_release() is not RELEASES[-1]:
        pytest.skip("the names are those of an older range")
    for error, messages, seen in run_ranks(with_version, 2, "99.0.1"):
        assert error == ("", "")
        newer = [message for message in messages if "99.0.1" in message]
        assert len(newer) == 1
        assert "newer than" in newer[0]
        check(seen, SETUPS["stage-1"])


def test_the_installed_release_is_within_the_tested_ones() -> None:
    from adai_dist.integrations.deepspeed.adapters.releases import RELEASES, TESTED

    installed = TorchVersion(version("deepspeed"))
    assert any(first <= installed <= last for first, last in TESTED)
    starts = [TorchVersion(release.since) for release in RELEASES]
    assert starts == sorted(starts)
    assert str(starts[0]) == TESTED[0][0]
    assert {first for first, _ in TESTED} <= {str(start) for start in starts}


def test_the_tables_hold_exactly_the_names_that_the_package_uses() -> None:
    from adai_dist.integrations.deepspeed.adapters.releases import RELEASES

    in_tables: set[str] = set()
    for release in RELEASES:
        for table in (*release.methods.values(), *release.attributes.values(), *release.set_by_step.values()):
            in_tables.update(table)
    used: set[str] = set()
    text: set[str] = set()
    assert adai_dist.__file__ is not None
    for path in Path(adai_dist.__file__).parent.joinpath("integrations/deepspeed").rglob("*.py"):
        if path.name == "releases.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                text.add(node.attr)
                if ast.unparse(node.value).split(".")[-1] in ("wrapper", "engine"):
                    used.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text.add(node.value)
    assert used - in_tables == {"param_groups"}  # of the optimizer itself, which is its own wrapper without ZeRO
    assert in_tables - text == set()


def refused_by_release(since: str, config: dict[str, Any], num_stages: int) -> tuple[str, str]:
    """Return the error of a configuration if the rules of another range of releases apply."""
    set_environment()
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from adai_dist.integrations.deepspeed import unsupported_settings
    from adai_dist.integrations.deepspeed.adapters.releases import RELEASES

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    release = next(release for release in RELEASES if release.since == since)
    unsupported_settings.installed_release = lambda: release
    model: torch.nn.Module = torch.nn.Linear(3, 2)
    if num_stages:
        model = PipelineModule([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)], num_stages=num_stages)
    return error_of(
        lambda: deepspeed.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "steps_per_print": 1000,
                "optimizer": {"type": "AdaiV2", "params": {"lr": 0.1}},
                **config,
            },
            model_parameters=model.parameters(),
            dist_init_required=False,
        )
    )


NVME = {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
# The range, a configuration, its number of stages in a pipeline, and what the message says.
REFUSED_BY_RELEASE: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "nvme": ("0.16.0", zero(3, **NVME), 0, 'offload_optimizer.device = "nvme" in DeepSpeed'),
    "pipeline": (
        "0.18.6",
        {"gradient_accumulation_steps": 2},
        2,
        "a pipeline with 2 micro-batches per step in DeepSpeed",
    ),
    "scattered-gradients": ("0.19.7", zero(2, contiguous_gradients=False), 0, "contiguous_gradients = False on a CPU"),
}
ACCEPTED_BY_RELEASE: dict[str, tuple[str, dict[str, Any], int]] = {
    "pipeline-one-micro-batch": ("0.18.6", {}, 2),
    "pipeline-one-stage": ("0.18.6", {"gradient_accumulation_steps": 2}, 1),
    "pipeline-before": ("0.16.0", {"gradient_accumulation_steps": 2}, 2),
    "pipeline-after": ("0.19.3", {"gradient_accumulation_steps": 2}, 2),
}


@pytest.mark.parametrize("name", REFUSED_BY_RELEASE)
def test_a_setting_that_a_release_gets_wrong_is_refused_with_it(name: str) -> None:
    since, config, num_stages, expected = REFUSED_BY_RELEASE[name]
    first, second = run_ranks(refused_by_release, 2, since, config, num_stages)
    assert first == second
    assert first[0] == "UnsupportedSetting", first
    assert expected in first[1]


@pytest.mark.parametrize("name", ACCEPTED_BY_RELEASE)
def test_a_setting_that_a_release_gets_right_is_accepted(name: str) -> None:
    assert run_ranks(refused_by_release, 2, *ACCEPTED_BY_RELEASE[name]) == [("", ""), ("", "")]


def clipped_by_default(config: dict[str, Any]) -> list[str]:
    set_environment()
    import deepspeed

    messages = logged_messages()
    deepspeed.initialize(
        model=torch.nn.Linear(3, 2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdaiV2", "params": {"lr": 0.1}},
            **zero(1),
            **config,
        },
        dist_init_required=False,
    )
    return [message for message in messages if "gradient_clipping" in message]


def test_clipping_that_the_configuration_does_not_ask_for_is_reported_once() -> None:
    from adai_dist.integrations.deepspeed.adapters.releases import installed_release

    expected = 1 if installed_release().clips_by_default else 0
    assert [len(messages) for messages in run_ranks(clipped_by_default, 2, {})] == [expected, 0]
    for bound in (0.0, 1.0):
        assert run_ranks(clipped_by_default, 2, {"gradient_clipping": bound}) == [[], []]
