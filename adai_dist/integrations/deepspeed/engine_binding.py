"""Binding of an optimizer to the wrapper that DeepSpeed puts around it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from adai_dist.integrations.deepspeed import unsupported_settings
from adai_dist.integrations.deepspeed.adapters.bf16 import BF16
from adai_dist.integrations.deepspeed.adapters.checkpoint_loading import wrap_checkpoint_loading
from adai_dist.integrations.deepspeed.adapters.engine import clips_without_being_asked
from adai_dist.integrations.deepspeed.adapters.names import check_names
from adai_dist.integrations.deepspeed.adapters.nvme_checkpoint import wrap_nvme_checkpoints
from adai_dist.integrations.deepspeed.adapters.releases import installed_release
from adai_dist.integrations.deepspeed.adapters.stage_3 import Stage3
from adai_dist.integrations.deepspeed.adapters.without_zero import (
    places_without_zero,
    sharding_without_zero,
    wrap_master_weight_step,
)
from adai_dist.integrations.deepspeed.adapters.wrappers import zero_wrapper_of
from adai_dist.integrations.deepspeed.ignored_optimizer import warn_of_ignored_optimizer
from adai_dist.integrations.deepspeed.zero_mean_source import ZeroMeanSource, mean_of_skipped_step
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.mean_source import MeanSource, ShardedMean
from adai_dist.optimizer.proxies import live_optimizers_of
from adai_dist.rounding import LOW_DTYPES
from adai_dist.sharding.mean import GlobalMean
from adai_dist.sharding.owned_shards import OwnedShards

logger: logging.Logger = logging.getLogger("adai_dist")


def configure_and_bind(
    engine: Any,
    client_optimizer: Any,
    named: type[AdaptiveInertia] | None,
    model_parameters: Any,
    configure: Callable[[Any, Any], None],
) -> None:
    """Run DeepSpeed's ``_configure_optimizer``, check the settings before it, and bind the optimizer after it.

    Args:
        engine: a ``DeepSpeedEngine``.
        client_optimizer: an optimizer, a function that creates one, or None if the configuration names it.
        named: the class that the configuration names, if it is one of this package.
        model_parameters: argument of a function ``client_optimizer``.
        configure: the original method; takes the client optimizer and the parameters.

    Raises:
        UnsupportedSetting: the algorithm cannot be exact under the configuration.

    Collective: all ranks, if the optimizer is one of this package.
    """
    if client_optimizer is not None:
        if not isinstance(client_optimizer, torch.optim.Optimizer):
            client_optimizer = client_optimizer(model_parameters)
        unsupported_settings.check_not_replaced(client_optimizer)
    cls = type(client_optimizer) if isinstance(client_optimizer, AdaptiveInertia) else named
    if cls is None:
        configure(client_optimizer, model_parameters)
        for ignored in live_optimizers_of(engine.module.parameters()):
            warn_of_ignored_optimizer(
                ignored,
                type(engine.basic_optimizer).__name__,
                'name it in the configuration as "optimizer", or pass it to deepspeed.initialize(optimizer=...)',
                is_main_rank=engine.global_rank == 0,
            )
        return
    if client_optimizer is None:
        unsupported_settings.check_has_lr(engine)
    check_names(engine, installed_release(), "DeepSpeedEngine")
    unsupported_settings.check_config(engine)
    if clips_without_being_asked(engine) and engine.global_rank == 0:
        logger.warning(
            'DeepSpeed clips gradients at 1.0 because the configuration does not set "gradient_clipping"; the update '
            'of %s is proportional to the gradient, so that clipping slows it down: set "gradient_clipping" to the '
            "bound that you want, or to 0.0 for none",
            cls.__name__,
        )
    _allow(cls)
    engine.zero_force_ds_cpu_optimizer = lambda: False  # DeepSpeed would require its CPU Adam under offload
    if client_optimizer is None:
        engine._configure_basic_optimizer = _initialized(engine, engine._configure_basic_optimizer)
    elif isinstance(client_optimizer, AdaptiveInertia):
        _begin_initialization(engine, client_optimizer)
    configure(client_optimizer, model_parameters)
    unsupported_settings.check_not_replaced(engine.basic_optimizer, cls)
    bind(engine)


def _allow(cls: type[AdaptiveInertia]) -> None:
    from deepspeed.runtime.zero import utils

    supported: list[Any] = utils.ZERO_SUPPORTED_OPTIMIZERS
    if cls not in supported:  # compared by identity, so subclasses must be listed as well
        supported.append(cls)


def bind(engine: Any) -> None:
    """Make ``engine.basic_optimizer`` exact under ``engine.optimizer`` by setting attributes of these two objects.

    Raises:
        UnsupportedSetting: see :mod:`adai_dist.integrations.deepspeed.unsupported_settings`.
        RuntimeError: this release does not support the class of DeepSpeed's wrapper, or a method or attribute of it.

    Collective: all ranks.
    """
    release = installed_release()
    check_names(engine, release, "DeepSpeedEngine after configuration")
    optimizer: AdaptiveInertia = engine.basic_optimizer
    unsupported_settings.check_no_max_grad_norm(optimizer)
    zero_wrapper = zero_wrapper_of(engine, release)
    if zero_wrapper is None:
        optimizer.mean_source = ShardedMean(sharding_without_zero(engine))
        unsupported_settings.check_same_places(engine, places_without_zero(engine))
        wrap_master_weight_step(engine)
    else:
        kind = _BF16MeanSource if isinstance(zero_wrapper, BF16) else ZeroMeanSource
        source = optimizer.mean_source = kind(optimizer, zero_wrapper, engine.module)
        unsupported_settings.check_same_places(engine, source.places())
        optimizer.retire_beta1_prod = False  # would free no memory: ZeRO holds references to the states
        zero_wrapper.attach(source)
        if isinstance(zero_wrapper, Stage3) and engine.optimizer.swap_optimizer:
            wrap_nvme_checkpoints(engine.optimizer, optimizer, source)
    wrap_checkpoint_loading(engine, zero_wrapper)
    _warn_of_kept_master_weights(engine)


def _warn_of_kept_master_weights(engine: Any) -> None:
    """Warn that DeepSpeed keeps float32 parameters which the optimizer was told to do without."""
    has_copies = engine.optimizer is not engine.basic_optimizer
    is_low = any(param.dtype in LOW_DTYPES for param in engine.module.parameters())
    if engine.basic_optimizer.precision.master_weights is False and has_copies and is_low and engine.global_rank == 0:
        logger.warning(
            "master_weights=False has no effect under DeepSpeed, which keeps a float32 copy of the parameters in 16 "
            "bits and gives that to the optimizer; leave it out"
        )


class InitializationOnly(MeanSource):
    """The source of the mean during ``deepspeed.initialize``, where a step only creates states."""

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        if any(param.grad is not None and bool(param.grad.any()) for param in optimizer.params()):
            raise RuntimeError(
                f"DeepSpeed must bind {type(optimizer).__name__} before it steps it, or the mean is taken over a part "
                "of the model; got a step with gradients before deepspeed.initialize() has returned; step with "
                "engine.step()"
            )
        return mean_of_skipped_step(0.0)

    def after(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """Record nothing, since no parameter was stepped."""


def _begin_initialization(engine: Any, optimizer: AdaptiveInertia) -> None:
    """Check an optimizer and set its source, before DeepSpeed creates states or opens files."""
    unsupported_settings.check_state_dtype(engine, optimizer)
    optimizer.mean_source = InitializationOnly()


def _initialized(engine: Any, create: Callable[[Any], AdaptiveInertia]) -> Callable[[Any], AdaptiveInertia]:
    @functools.wraps(create)
    def _configure_basic_optimizer(model_parameters: Any) -> AdaptiveInertia:
        optimizer = create(model_parameters)
        _begin_initialization(engine, optimizer)
        return optimizer

    return _configure_basic_optimizer


class _BF16MeanSource(ZeroMeanSource):
    """The mean under BF16_Optimizer, which calls the optimizer once, with gradients clipped by their total norm."""

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        one = torch.ones((), dtype=torch.float64, device=self.device)
        self.observe(one, None)
        self.compute_mean(one, self.zero_wrapper.global_grad_norm())
        return super().mean(optimizer, shards, max_norm)
