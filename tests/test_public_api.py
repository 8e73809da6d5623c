"""The public API, frozen. A change here is a change for users: it belongs into CHANGELOG.md."""

from __future__ import annotations

import inspect

import pytest
import torch

import adai_dist
from adai_dist import Adai, AdaiV2, AdaiW
from adai_dist.optimizer import AdaptiveInertia

NAMES = {"Adai", "AdaiV2", "AdaiW", "__version__", "register", "share_mean"}

REQUIRED = "required"
COMMON = {"lr": REQUIRED, "betas": (0.1, 0.99), "eps": 1e-3, "weight_decay": 0.0}
KEYWORD_ONLY = {
    "maximize": False,
    "foreach": None,
    "max_grad_norm": None,
    "require_kernels": False,
    "retire_beta1_prod": True,
}

# positional parameters in their order, with their defaults
POSITIONAL = {
    Adai: {"params": REQUIRED, **COMMON, "decoupled": False},
    AdaiW: {"params": REQUIRED, **COMMON, "decoupled": True},
    AdaiV2: {"params": REQUIRED, **COMMON, "dampening": 1.0, "decoupled": True},
}

# methods: parameters in their order, with their defaults
METHODS = {
    "step": {"closure": None},
    "clip_grad_norm_": {"max_norm": REQUIRED},
    "configure_sharding": {"process_group": None, "num_replicas": None},
    "owned_shards": {},
    "observe": {"shards": REQUIRED},
    "advance": {"shards": REQUIRED, "mean": REQUIRED},
}
PROPERTIES = {"grad_norm", "inertia_mean", "mean_group", "num_skipped_steps", "sharding_plan"}

PARAM_GROUP_KEYS = {
    *("params", "lr", "betas", "eps", "weight_decay", "dampening", "decoupled", "maximize", "foreach"),
}
STATE_KEYS = {"step", "exp_avg", "exp_avg_sq", "beta1_prod"}

each_class = pytest.mark.parametrize("cls", [Adai, AdaiW, AdaiV2])


def parameters(function: object, kind: inspect._ParameterKind) -> dict[str, object]:
    assert callable(function)
    found = inspect.signature(function).parameters.values()
    return {p.name: REQUIRED if p.default is p.empty else p.default for p in found if p.kind is kind}


def test_the_package_exports_these_names_and_no_others() -> None:
    assert set(adai_dist.__all__) == NAMES
    assert len(adai_dist.__all__) == len(NAMES)


@each_class
def test_the_constructor_takes_these_arguments_in_this_order(cls: type[AdaptiveInertia]) -> None:
    kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    positional = parameters(cls, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert list(positional.items()) == list(POSITIONAL[cls].items())
    assert parameters(cls, inspect.Parameter.KEYWORD_ONLY) == KEYWORD_ONLY


@each_class
def test_the_class_has_these_public_methods_and_properties(cls: type[AdaptiveInertia]) -> None:
    own = {name for base in cls.__mro__[: cls.__mro__.index(torch.optim.Optimizer)] for name in vars(base)}
    new = {name for name in own if not name.startswith("_") and not hasattr(torch.optim.Optimizer, name)}
    assert new == PROPERTIES | METHODS.keys() - {"step"}
    for name in PROPERTIES:
        assert isinstance(inspect.getattr_static(cls, name), property), name
    for name, expected in METHODS.items():
        found = parameters(getattr(cls, name), inspect.Parameter.POSITIONAL_OR_KEYWORD)
        assert list(found.items()) == [("self", REQUIRED), *expected.items()], name


@each_class
def test_param_groups_and_states_have_these_keys(cls: type[AdaptiveInertia]) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = cls([param], lr=0.1)  # pyright: ignore[reportCallIssue]
    optimizer.step()
    assert set(optimizer.param_groups[0]) == PARAM_GROUP_KEYS
    assert set(optimizer.state[param]) == STATE_KEYS


def test_every_optimizer_is_a_torch_optimizer_and_one_class_does_the_work() -> None:
    for cls in (Adai, AdaiW, AdaiV2):
        assert issubclass(cls, AdaptiveInertia)
        assert issubclass(cls, torch.optim.Optimizer)
        assert inspect.unwrap(cls.step) is inspect.unwrap(AdaptiveInertia.step)  # torch wraps it per class
