"""Makes the optimizers known to DeepSpeed, without importing it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from adai_dist.integrations.after_import import after_import, wrap_once
from adai_dist.kernels.build import Extension, set_compiler
from adai_dist.optimizer import Adai, AdaiV2, AdaiW
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.unsupported import modules_of_callers

OPTIMIZERS: dict[str, type[AdaptiveInertia]] = {
    spelling: cls for cls in (Adai, AdaiW, AdaiV2) for spelling in (cls.__name__, cls.__name__.lower())
}
"""Optimizers by what may stand as their type in a DeepSpeed configuration."""


def register() -> None:
    """Make ``Adai``, ``AdaiW`` and ``AdaiV2`` known to DeepSpeed: in its JSON, and as client optimizers.

    ``import adai_dist`` has done it already, before or after DeepSpeed is imported, unless the environment has
    ``ADAI_DIST_REGISTER=0``. It may be called again.

    Collective: none.
    """
    after_import("deepspeed.runtime.engine", _register_with)
    after_import("deepspeed.ops.op_builder.all_ops", _add_op_builders)


def _register_with(engine_module: ModuleType) -> None:
    def wrap(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
        def _configure_optimizer(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
            from adai_dist.integrations.deepspeed.binding import configure_and_bind

            named = OPTIMIZERS.get(engine.optimizer_name()) if client_optimizer is None else None
            configure_and_bind(engine, client_optimizer, named, model_parameters, functools.partial(original, engine))

        return _configure_optimizer

    if not wrap_once(engine_module.DeepSpeedEngine, "_configure_optimizer", wrap):
        return
    for name, cls in OPTIMIZERS.items():
        setattr(torch.optim, name, cls)  # where DeepSpeed looks up names that it does not know
    AdaptiveInertia._step_within_engine = _step_within_deepspeed
    set_compiler(_compile_with_deepspeed)


def _compile_with_deepspeed(extension: Extension, folder: Path) -> None:
    from adai_dist.integrations.deepspeed._op_builder import compile_with_deepspeed

    compile_with_deepspeed(extension, folder)


def _add_op_builders(all_ops_module: ModuleType) -> None:
    from adai_dist.integrations.deepspeed._op_builder import add_to

    add_to(all_ops_module.ALL_OPS)


def _step_within_deepspeed(optimizer: AdaptiveInertia) -> bool:
    """Keep DeepSpeed from stepping an optimizer that is not bound: it would take the mean over a part of the model."""
    *_, caller = modules_of_callers()
    if not caller.startswith("deepspeed.runtime."):
        return False
    params = optimizer._params()
    if not optimizer.state and not any(param.grad is not None and bool(param.grad.any()) for param in params):
        optimizer._create_states(params)  # the constructor of a wrapper; the optimizer is bound after it
        return True
    raise RuntimeError(
        f"DeepSpeed must bind {type(optimizer).__name__} before it steps it, or the mean is taken over a part of the "
        f"model; got a step from {caller} without a binding; pass the optimizer to deepspeed.initialize(), or name it "
        "in the DeepSpeed configuration"
    )
