"""Frozen public API. A change here affects users: record it in CHANGELOG.md."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import adai_dist
import adai_dist.sharding
from adai_dist import Adai, AdaiV2, AdaiW, AdaptiveInertia

NAMES = {
    *("Adai", "AdaiV2", "AdaiW", "AdaptiveInertia", "GlobalMean", "MeanSource"),
    *("__version__", "global_mean", "register", "share_mean"),
}

REQUIRED = "required"
# Arguments with their defaults, in order: positional ones, and keyword-only ones.
POSITIONAL = {"params": REQUIRED, "lr": REQUIRED, "betas": (0.1, 0.99), "eps": 1e-3, "weight_decay": 0.0}
KEYWORD_ONLY = {
    "dampening": 1.0,
    "decoupled": None,
    "maximize": False,
    "foreach": None,
    "max_grad_norm": None,
    "require_kernels": False,
    "retire_beta1_prod": True,
    "max_consecutive_skips": None,
    "missing_as_zeros": False,
    "independent": False,
    "state_dtype": "float32",
    "master_weights": "auto",
    "seed": 0,
}

DECOUPLED_BY_DEFAULT = {Adai: False, AdaiW: True, AdaiV2: True}

# Signatures: parameters in order with their defaults, keyword-only after *; and the return annotation.
STAR = ("*", None)
SHARDING = [("process_group", None), ("num_replicas", None), STAR, ("model", None), ("stages", None)]
Signature = tuple[list[tuple[str, object]], str]
METHODS: dict[str, Signature] = {
    "step": ([("closure", None)], "float | None"),
    "clip_grad_norm_": ([("max_norm", REQUIRED)], "Tensor"),
    "configure_sharding": (SHARDING, "None"),
    "params": ([], "list[Tensor]"),
    "create_states": ([("params", REQUIRED)], "None"),
    "owned_shards": ([], "list[OwnedShards]"),
    "observe": ([("shards", REQUIRED), ("expected", None)], "Sums"),
    "advance": ([("shards", REQUIRED), ("mean", REQUIRED)], "None"),
    "record": ([("mean", REQUIRED), STAR, ("is_logged", True)], "None"),
    "refresh": ([], "None"),
    "add_param_group": ([("param_group", REQUIRED)], "None"),
    "state_dict": ([], "dict[str, Any]"),
    "load_state_dict": ([("state_dict", REQUIRED)], "None"),
    "zero_grad": ([("set_to_none", True)], "None"),
}
FUNCTIONS: dict[str, Signature] = {
    "register": ([], "None"),
    "share_mean": ([("optimizers", REQUIRED), *SHARDING], "None"),
    "sharding.mean.global_mean": (
        [
            *(("local_sums", REQUIRED), ("process_groups", REQUIRED), STAR),
            *(("max_norm", None), ("grad_scale", None), ("expected", None)),
        ],
        "GlobalMean",
    ),
    "sharding.mean.evaluate": (
        [("sums", REQUIRED), ("grad_norm", REQUIRED), ("c", REQUIRED), ("expected", REQUIRED)],
        "GlobalMean",
    ),
    "sharding.mean.unscaling_coefficient": ([("grad_scale", REQUIRED), ("device", REQUIRED)], "Tensor"),
    "sharding.mean.all_reduce": ([("packed", REQUIRED), ("process_groups", REQUIRED)], "Tensor"),
    "sharding.plan.in_words": ([("ranks", REQUIRED)], "str"),
    "sharding.plan.plan_by_placements": (
        [("params", REQUIRED), ("placements_of", REQUIRED), ("stages", None), ("num_stages_with", None)],
        "ShardingPlan",
    ),
    "sharding.plan.plan_sharding": ([("params", REQUIRED), ("sharding", REQUIRED)], "ShardingPlan"),
    "sharding.plan.placements_of_tensor": ([("param", REQUIRED)], "Sequence[GroupPlacement]"),
}

# Fields of records, in order.
FIELDS: dict[str, list[str]] = {
    "sharding.mean.GlobalMean": [
        "coefficient",
        "grad_norm",
        "inertia_mean",
        "is_finite",
        "is_live",
        "is_undefined",
        "faults",
    ],
    "sharding.mean.Sums": [
        *("grad_squared", "carried", "quadratic", "linear", "constant", "expected", "num_elements", "signals"),
    ],
    "sharding.plan.Assumptions": ["copied", "stages", "of_one_stage"],
    "sharding.plan.ShardingPlan": [
        "params",
        "process_groups",
        "weights",
        "refusal",
        "assumptions",
        "starts",
        "ordinals",
    ],
    "sharding.plan.GroupPlacement": ["process_group", "is_sharded"],
}
# Methods of MeanSource, which an engine may implement.
SOURCE: dict[str, Signature] = {
    "mean": ([("optimizer", REQUIRED), ("shards", REQUIRED), ("max_norm", REQUIRED)], "GlobalMean"),
    "after": ([("optimizer", REQUIRED), ("shards", REQUIRED), ("mean", REQUIRED)], "None"),
    "part": ([("optimizer", REQUIRED)], "Hashable"),
    "sharding": ([], "ShardingPlanner | None"),
    "check_allows": ([("call", REQUIRED), ("remedy", REQUIRED)], "None"),
    "refresh": ([], "None"),
    "between_steps": ([], "MeanSource"),
}
PROPERTIES = {
    "device": "torch.device",
    "grad_norm": "Tensor",
    "inertia_mean": "Tensor",
    "mean_group": "tuple[ProcessGroup, ...]",
    "num_skipped_steps": "Tensor",
    "num_undefined_steps": "Tensor",
    "replaced_params": "list[Tensor]",
    "sharding_plan": "ShardingPlan",
}

# Attributes that may be assigned: settings, attributes of torch, and those that torch.amp.GradScaler sets in a step.
ATTRIBUTES = {
    *("max_grad_norm", "retire_beta1_prod", "max_consecutive_skips", "missing_as_zeros", "independent"),
    *("mean_source", "backends"),
    *("param_groups", "state", "grad_scale", "found_inf"),
}

PARAM_GROUP_KEYS = {
    *("params", "lr", "betas", "eps", "weight_decay", "dampening", "decoupled", "maximize", "foreach"),
}
STATE_KEYS = {"step", "exp_avg", "exp_avg_sq", "beta1_prod"}

each_class = pytest.mark.parametrize("cls", DECOUPLED_BY_DEFAULT)


def parameters(function: object, kind: inspect._ParameterKind) -> dict[str, object]:
    assert callable(function)
    found = inspect.signature(function).parameters.values()
    return {p.name: REQUIRED if p.default is p.empty else p.default for p in found if p.kind is kind}


def signature_of(function: Callable[..., object]) -> Signature:
    """Return a signature in the form of the tables; *args and **kwargs keep their stars."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found: list[tuple[str, object]] = []
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and STAR not in found:
            found.append(STAR)
        default = REQUIRED if parameter.default is parameter.empty else parameter.default
        found.append((stars.get(parameter.kind, "") + parameter.name, default))
    return found, signature.return_annotation


def public(name: str) -> Any:
    """Return an attribute of the package by its path."""
    *modules, attribute = name.split(".")
    return getattr(importlib.import_module(".".join(["adai_dist", *modules])), attribute)


def test_the_package_exports_these_names_and_no_others() -> None:
    assert set(adai_dist.__all__) == NAMES
    assert len(adai_dist.__all__) == len(NAMES)


@each_class
def test_the_constructor_takes_these_arguments_in_this_order(cls: type[AdaptiveInertia]) -> None:
    kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    positional = parameters(cls, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert list(positional.items()) == list(POSITIONAL.items())
    assert parameters(cls, inspect.Parameter.KEYWORD_ONLY) == KEYWORD_ONLY


@each_class
def test_the_classes_differ_in_one_default(cls: type[AdaptiveInertia]) -> None:
    for decoupled, expected in ((None, DECOUPLED_BY_DEFAULT[cls]), (True, True), (False, False)):
        optimizer = cls([torch.nn.Parameter(torch.ones(1))], lr=0.1, decoupled=decoupled)
        assert optimizer.param_groups[0]["decoupled"] is expected


@each_class
def test_the_class_has_these_public_methods_and_properties(cls: type[AdaptiveInertia]) -> None:
    own = {name for base in cls.__mro__ if base.__module__.startswith("adai_dist.") for name in vars(base)}
    expected = {*PROPERTIES, *METHODS, *ATTRIBUTES, "decoupled_by_default"}
    assert {name for name in own if not name.startswith("_")} == expected
    for name, returned in PROPERTIES.items():
        found = inspect.getattr_static(cls, name)
        assert isinstance(found, property), name
        assert inspect.signature(found.fget).return_annotation == returned, name


@each_class
@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_and_returns_this(cls: type[AdaptiveInertia], name: str) -> None:
    parameters, returned = METHODS[name]
    assert signature_of(getattr(cls, name)) == ([("self", REQUIRED), *parameters], returned)


def test_a_source_of_the_mean_has_these_methods() -> None:
    assert {name for name in vars(adai_dist.MeanSource) if not name.startswith("_")} == set(SOURCE)
    assert adai_dist.MeanSource.__abstractmethods__ == {"mean"}


@pytest.mark.parametrize("name", SOURCE)
def test_a_method_of_a_source_takes_and_returns_this(name: str) -> None:
    parameters, returned = SOURCE[name]
    assert signature_of(getattr(adai_dist.MeanSource, name)) == ([("self", REQUIRED), *parameters], returned)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_and_returns_this(name: str) -> None:
    assert signature_of(public(name)) == FUNCTIONS[name]


@pytest.mark.parametrize("name", FIELDS)
def test_a_record_has_these_fields(name: str) -> None:
    assert list(inspect.signature(public(name)).parameters) == FIELDS[name]


@pytest.mark.parametrize("module", ["sharding.mean", "sharding.plan"])
def test_every_documented_function_and_record_of_sharding_is_frozen(module: str) -> None:
    loaded = importlib.import_module(f"adai_dist.{module}")
    own = {name: value for name, value in vars(loaded).items() if getattr(value, "__module__", "") == loaded.__name__}
    documented = {f"{module}.{name}" for name, value in own.items() if not name.startswith("_") and value.__doc__}
    protocols = {"sharding.plan.ShardingPlanner"}  # no fields, no signature
    assert documented - protocols == {name for name in (*FUNCTIONS, *FIELDS) if name.startswith(module)}


def test_sharding_exports_these_names() -> None:
    assert set(adai_dist.sharding.__all__) == {"GlobalMean", "global_mean"}


@each_class
def test_param_groups_and_states_have_these_keys(cls: type[AdaptiveInertia]) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = cls([param], lr=0.1)  # pyright: ignore[reportCallIssue]
    optimizer.step()
    assert set(optimizer.param_groups[0]) == PARAM_GROUP_KEYS
    assert set(optimizer.state[param]) == STATE_KEYS


def test_every_optimizer_is_a_torch_optimizer_and_one_class_does_the_work() -> None:
    for cls in DECOUPLED_BY_DEFAULT:
        assert issubclass(cls, AdaptiveInertia)
        assert issubclass(cls, torch.optim.Optimizer)
        assert inspect.unwrap(cls.step) is inspect.unwrap(AdaptiveInertia.step)  # torch wraps it per class
