"""Checks on the transformers Trainer, which silently replaces optimizers and betas under DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from adai_dist.integrations.deepspeed.ignored_optimizer import warn_of_ignored_optimizer
from adai_dist.integrations.deepspeed.optimizer_names import OPTIMIZERS
from adai_dist.integrations.import_hooks import after_import, wrap_once
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia

_ADAMS_BETAS, _ADAMS_EPS = (0.9, 0.999), 1e-8
"""The Trainer's defaults for adam_beta1, adam_beta2 and adam_epsilon."""


def register() -> None:
    """Make the Trainer warn of an ignored optimizer and refuse Adam's betas and eps. Collective: none."""
    after_import("transformers.integrations.deepspeed", _register_with)
    after_import("transformers.trainer", _register_with)  # may have imported the function already


def _register_with(module: ModuleType) -> None:
    if hasattr(module, "deepspeed_init"):
        wrap_once(module, "deepspeed_init", _warn_of_ignored_optimizer)
    if hasattr(module, "HfTrainerDeepSpeedConfig"):
        wrap_once(module.HfTrainerDeepSpeedConfig, "trainer_config_process", _refuse_adam_defaults)


def _warn_of_ignored_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def deepspeed_init(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        given = getattr(trainer, "optimizer", None)
        optimizer, scheduler = original(trainer, *args, **kwargs)
        if isinstance(given, AdaptiveInertia) and optimizer is not None:
            named: str | None = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.get_value("optimizer.type")
            used = type(optimizer).__name__ if named is None else f"the {named} of the configuration"
            if named in OPTIMIZERS:
                remedy = "its hyperparameters are those of the configuration; remove the ignored optimizer"
            else:
                remedy = (
                    "name it in the configuration, or remove optimizers=(...) and pass "
                    f"optimizer_cls_and_kwargs=({type(given).__name__}, {{...}}) to the Trainer with a configuration "
                    "that names no optimizer"
                )
            warn_of_ignored_optimizer(given, used, remedy, is_main_rank=trainer.is_world_process_zero())
        return optimizer, scheduler

    return deepspeed_init


def _refuse_adam_defaults(original: Callable[..., Any]) -> Callable[..., Any]:
    def trainer_config_process(config: Any, args: Any, *more: Any, **kwargs: Any) -> Any:
        if config.get_value("optimizer.type") in OPTIMIZERS:
            _check_values(config, args)
        return original(config, args, *more, **kwargs)

    return trainer_config_process


def _check_values(config: Any, args: Any) -> None:
    """Refuse "auto" for betas or eps if the Trainer would replace it with Adam's default."""
    filled = {
        "betas": ((args.adam_beta1, args.adam_beta2), _ADAMS_BETAS, "adam_beta1=0.1, adam_beta2=0.99"),
        "eps": (args.adam_epsilon, _ADAMS_EPS, "adam_epsilon=1e-3"),
    }
    for name, (value, adams, remedy) in filled.items():
        if config.is_auto(f"optimizer.params.{name}") and value == adams:
            from adai_dist.integrations.deepspeed.unsupported_settings import UnsupportedSetting

            raise UnsupportedSetting(
                f'optimizer.params.{name} must not be "auto" while TrainingArguments has Adam\'s default {name}, got '
                f"{value}, which Adai interprets differently; leave {name} out of the DeepSpeed configuration, or set "
                f"TrainingArguments({remedy})"
            )
