"""Binding of an optimizer to the wrapper that DeepSpeed puts around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adai_dist.integrations.deepspeed import unsupported_settings, zero_wrappers
from adai_dist.integrations.deepspeed.checkpoint_loading import wrap_checkpoint_loading
from adai_dist.integrations.deepspeed.ignored_optimizer import warn_of_ignored_optimizer
from adai_dist.integrations.deepspeed.nvme_checkpoint import wrap_nvme_checkpoints
from adai_dist.integrations.deepspeed.without_zero import sharding_without_zero, wrap_master_weight_step
from adai_dist.integrations.deepspeed.zero_mean_source import ZeroMeanSource, mean_of_skipped_step
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.mean_source import MeanSource, ShardedMean
from adai_dist.optimizer.proxies import live_optimizers_of
from adai_dist.sharding.mean import GlobalMean
from adai_dist.sharding.owned_shards import OwnedShards


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
    unsupported_settings.check_version()
    unsupported_settings.check_config(engine)
    _allow(cls)
    engine.zero_force_ds_cpu_optimizer = lambda: False  # DeepSpeed would require its CPU Adam under offload
    if client_optimizer is None:
        engine._configure_basic_optimizer = _set_initial_mean_source(engine._configure_basic_optimizer)
    elif isinstance(client_optimizer, AdaptiveInertia):
        client_optimizer.mean_source = InitializationOnly()
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
        RuntimeError: this release does not support the class of DeepSpeed's wrapper, or the signature of a method.

    Collective: all ranks.
    """
    optimizer: AdaptiveInertia = engine.basic_optimizer
    unsupported_settings.check_no_max_grad_norm(optimizer)
    zero_wrapper = zero_wrappers.wrapper_of(engine)
    if zero_wrapper is None:
        optimizer.mean_source = ShardedMean(sharding_without_zero(engine))
        wrap_master_weight_step(engine)
        wrap_checkpoint_loading(engine.optimizer, optimizer)
        return
    unsupported_settings.check_signatures(engine.optimizer, zero_wrapper.signatures)
    source = (_BF16MeanSource if isinstance(zero_wrapper, zero_wrappers.BF16) else ZeroMeanSource)(
        optimizer, zero_wrapper, engine.module
    )
    optimizer.mean_source = source
    optimizer.retire_beta1_prod = False  # would free no memory: ZeRO holds references to the states
    _replace_step(engine.optimizer, source)
    _replace_loading(engine.optimizer, source)
    if isinstance(zero_wrapper, zero_wrappers.Stage1And2):
        _replace_in_stage_1_and_2(engine.optimizer, source)
    elif isinstance(zero_wrapper, zero_wrappers.Stage3):
        _replace_in_stage_3(engine.optimizer, source)
        if engine.optimizer.swap_optimizer:
            wrap_nvme_checkpoints(engine.optimizer, optimizer, source)
    wrap_checkpoint_loading(engine.optimizer, optimizer)


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


def _set_initial_mean_source(create: Callable[[Any], AdaptiveInertia]) -> Callable[[Any], AdaptiveInertia]:
    @functools.wraps(create)
    def _configure_basic_optimizer(model_parameters: Any) -> AdaptiveInertia:
        optimizer = create(model_parameters)
        optimizer.mean_source = InitializationOnly()
        return optimizer

    return _configure_basic_optimizer


# -- all ZeRO wrappers ------------------------------------------------------------------------------------------------


def _replace_step(wrapper: Any, source: ZeroMeanSource) -> None:
    original = wrapper.step

    @functools.wraps(original)
    def step(closure: Any = None) -> Any:
        source.begin()
        result = original(closure)
        source.end(wrapper._global_grad_norm)
        return result

    wrapper.step = step


def _replace_loading(wrapper: Any, source: ZeroMeanSource) -> None:
    original = wrapper.load_state_dict

    @functools.wraps(original)
    def load_state_dict(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        source.after_loading()

    wrapper.load_state_dict = load_state_dict


def _squared(norms: list[Any]) -> Tensor:
    """Return the squared norms in float64, with NaN for -1, ZeRO's value for non-finite gradients."""
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float64).reshape(()) for norm in norms])
    return torch.where(stacked >= 0, stacked.square(), torch.nan)


# -- stages 1, 2 and 3 ------------------------------------------------------------------------------------------------


def _observe(wrapper: Any, source: ZeroMeanSource, norms: list[Any]) -> None:
    """Pass ZeRO's global norms of the scaled gradients, one per part, to the source.

    Collective: as ZeroMeanSource.observe.
    """
    if len(norms) != len(source.flat_partitions):
        raise RuntimeError(
            f"ZeRO must compute one norm per part of the model ({len(source.flat_partitions)}) in every step, got "
            f"{len(norms)}; use a version of DeepSpeed that this release of adai_dist supports"
        )
    unscaling = 1.0 / torch.as_tensor(wrapper.loss_scale, dtype=torch.float64, device=source.device)
    source.observe(unscaling, _squared(norms).to(source.device))


def _replace_in_stage_1_and_2(wrapper: Any, source: ZeroMeanSource) -> None:
    norms: list[Any] = []
    wrapper.compute_grad_norm = True  # the mean needs the norms, also under "compute_grad_norm": false

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def norm_of_group(*args: Any, **kwargs: Any) -> Any:
            norm = original(*args, **kwargs)
            norms.append(norm)
            return norm

        return norm_of_group

    original_global_norm, original_unscale = wrapper.scaled_global_norm, wrapper.unscale_and_clip_grads

    @functools.wraps(original_global_norm)
    def scaled_global_norm(norm_type: int = 2) -> Any:
        norms.clear()
        global_norm = original_global_norm(norm_type)
        _observe(wrapper, source, norms)
        return global_norm

    @functools.wraps(original_unscale)
    def unscale_and_clip_grads(grad_groups_flat: Any, total_norm: Any) -> None:
        # The optimizer scales gradients as it reads them. Applied to a 1, the original method yields the coefficient.
        if not source.has_mean:
            one = torch.ones(1, dtype=torch.float64, device=source.device)
            original_unscale([one], total_norm)
            source.compute_mean(one, wrapper._global_grad_norm)

    wrapper.get_grad_norm_direct = recording(wrapper.get_grad_norm_direct)
    wrapper.complete_grad_norm_calculation_for_cpu_offload = recording(
        wrapper.complete_grad_norm_calculation_for_cpu_offload
    )
    wrapper.scaled_global_norm = scaled_global_norm
    wrapper.unscale_and_clip_grads = unscale_and_clip_grads


class _UnitGradientWrapper:
    """Proxy of a stage-3 wrapper in which the gradient of a sub-group is a single 1."""

    def __init__(self, wrapper: Any, sub_group_id: int, one: Tensor) -> None:
        self._wrapper = wrapper
        self.fp32_partitioned_groups_flat = {sub_group_id: SimpleNamespace(grad=one)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


def _replace_in_stage_3(wrapper: Any, source: ZeroMeanSource) -> None:
    original_norm_groups, original_unscale = wrapper._get_norm_groups, type(wrapper).unscale_and_clip_grads

    @functools.wraps(original_norm_groups)
    def _get_norm_groups() -> list[Any]:
        source.check_coupled_decay()
        norms = original_norm_groups()
        _observe(wrapper, source, norms)
        return norms

    @functools.wraps(original_unscale)
    def unscale_and_clip_grads(sub_group_id: int, total_norm: Any) -> None:
        if source.zero_wrapper.is_swapped(sub_group_id):
            source.zero_wrapper.clear_stale_gradients(sub_group_id)  # not in memory before this point
        if not source.has_mean:
            one = torch.ones(1, dtype=torch.float64, device=source.device)
            original_unscale(_UnitGradientWrapper(wrapper, sub_group_id, one), sub_group_id, total_norm)
            source.compute_mean(one, wrapper._global_grad_norm)

    wrapper._get_norm_groups = _get_norm_groups
    wrapper.unscale_and_clip_grads = unscale_and_clip_grads


# -- BF16_Optimizer ---------------------------------------------------------------------------------------------------


class _BF16MeanSource(ZeroMeanSource):
    """The mean under BF16_Optimizer, which calls the optimizer once, with gradients clipped by their total norm."""

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        one = torch.ones((), dtype=torch.float64, device=self.device)
        self.observe(one, None)
        self.compute_mean(one, self.zero_wrapper.wrapper._global_grad_norm)
        return super().mean(optimizer, shards, max_norm)
