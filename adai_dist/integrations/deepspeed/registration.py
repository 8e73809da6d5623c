"""Registration of the optimizers with DeepSpeed, without importing it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from adai_dist.integrations import torch_extension_lock
from adai_dist.integrations.deepspeed import transformers_trainer
from adai_dist.integrations.deepspeed.optimizer_names import OPTIMIZERS
from adai_dist.integrations.import_hooks import after_import, wrap_once
from adai_dist.kernels.build import Extension, set_compiler
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


def register() -> None:
    """Register ``Adai``, ``AdaiW`` and ``AdaiV2`` with DeepSpeed: for its configuration and as client optimizers.

    ``import adai_dist`` calls this, before or after DeepSpeed is imported, unless the environment has
    ``ADAI_DIST_REGISTER=0``. Calling it again is a no-op.

    Collective: none.
    """
    after_import("deepspeed.runtime.engine", _register_with)
    after_import("deepspeed.ops.op_builder.all_ops", _add_op_builders)
    torch_extension_lock.register()
    transformers_trainer.register()


def _register_with(engine_module: ModuleType) -> None:
    def wrap(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
        def _configure_optimizer(engine: Any, client_optimizer: Any, model_parameters: Any) -> None:
            configure = functools.partial(original, engine)
            named = OPTIMIZERS.get(engine.optimizer_name()) if client_optimizer is None else None
            try:
                from adai_dist.integrations.deepspeed.engine_binding import configure_and_bind
            except ImportError as error:
                if named is None and not isinstance(client_optimizer, AdaptiveInertia):
                    configure(client_optimizer, model_parameters)
                    return
                raise RuntimeError(
                    f"DeepSpeed must have what the binding of Adai imports, got {str(error)!r} in DeepSpeed "
                    f"{version('deepspeed')}, which this release of adai_dist does not support; use a newer adai_dist"
                ) from error
            configure_and_bind(engine, client_optimizer, named, model_parameters, configure)

        return _configure_optimizer

    if not wrap_once(engine_module.DeepSpeedEngine, "_configure_optimizer", wrap):
        return
    for name, cls in OPTIMIZERS.items():
        setattr(torch.optim, name, cls)  # DeepSpeed looks up unknown names there
    set_compiler(_compile_with_deepspeed)


def _compile_with_deepspeed(extension: Extension, folder: Path) -> None:
    from adai_dist.integrations.deepspeed._op_builder import compile_with_deepspeed

    compile_with_deepspeed(extension, folder)


def _add_op_builders(all_ops_module: ModuleType) -> None:
    from adai_dist.integrations.deepspeed._op_builder import add_to

    add_to(all_ops_module.ALL_OPS)
