"""Ties an optimizer to the wrapper that DeepSpeed has put around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adai_dist.integrations.deepspeed import support, zero
from adai_dist.integrations.deepspeed.dropped import warn_of_dropped
from adai_dist.integrations.deepspeed.nvme_checkpoint import wrap_nvme_checkpoints
from adai_dist.integrations.deepspeed.universal_load import wrap_universal_loading
from adai_dist.integrations.deepspeed.whole import sharding_of_whole_parameters, wrap_step_of_masters
from adai_dist.integrations.deepspeed.zero_mean import ZeroMean, skipped
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
    """DeepSpeed's ``_configure_optimizer``, with what these optimizers need before and after it.

    Args:
        client_optimizer: an optimizer, a function that makes one, or None where the configuration names it.
        named: what it names, if that is one of ours.
        configure: the original method; takes the client optimizer and the parameters.

    Raises:
        UnsupportedSetting: the configuration asks for what cannot be exact.

    Collective: all ranks, where the optimizer is one of ours.
    """
    if client_optimizer is not None:
        if not isinstance(client_optimizer, torch.optim.Optimizer):
            client_optimizer = client_optimizer(model_parameters)
        support.check_not_replaced(client_optimizer)
    cls = type(client_optimizer) if isinstance(client_optimizer, AdaptiveInertia) else named
    if cls is None:
        configure(client_optimizer, model_parameters)
        for dropped in live_optimizers_of(engine.module.parameters()):
            warn_of_dropped(
                dropped,
                type(engine.basic_optimizer).__name__,
                'name it in the configuration as "optimizer", or hand it to deepspeed.initialize(optimizer=...)',
                is_main_rank=engine.global_rank == 0,
            )
        return
    if client_optimizer is None:
        support.check_has_lr(engine)
    support.check_version()
    support.check_config(engine)
    _allow(cls)
    engine.zero_force_ds_cpu_optimizer = lambda: False  # DeepSpeed would insist on an Adam
    if client_optimizer is None:
        engine._configure_basic_optimizer = _being_wrapped(engine._configure_basic_optimizer)
    elif isinstance(client_optimizer, AdaptiveInertia):
        client_optimizer.mean_source = BeingWrapped()
    configure(client_optimizer, model_parameters)
    support.check_not_replaced(engine.basic_optimizer, cls)
    bind(engine)


def _allow(cls: type[AdaptiveInertia]) -> None:
    from deepspeed.runtime.zero import utils

    supported: list[Any] = utils.ZERO_SUPPORTED_OPTIMIZERS
    if cls not in supported:  # compared by identity there, so that subclasses have to be listed, too
        supported.append(cls)


def bind(engine: Any) -> None:
    """Make ``engine.basic_optimizer`` exact under ``engine.optimizer``, by attributes of these two objects alone.

    Raises:
        UnsupportedSetting: see :mod:`adai_dist.integrations.deepspeed.support`.
        RuntimeError: DeepSpeed's wrapper is of a class, or has methods, that this release does not know.

    Collective: all ranks.
    """
    optimizer: AdaptiveInertia = engine.basic_optimizer
    support.check_no_clipping_of_its_own(optimizer)
    zero_wrapper = zero.wrapper_of(engine)
    if zero_wrapper is None:
        optimizer.mean_source = ShardedMean(sharding_of_whole_parameters(engine))
        wrap_step_of_masters(engine)
        wrap_universal_loading(engine.optimizer, optimizer)
        return
    support.check_signatures(engine.optimizer, zero_wrapper.signatures)
    source = (_AfterClipping if isinstance(zero_wrapper, zero.BF16) else ZeroMean)(
        optimizer, zero_wrapper, engine.module
    )
    optimizer.mean_source = source
    optimizer.retire_beta1_prod = False  # ZeRO's links to the states would keep their memory
    _replace_step(engine.optimizer, source)
    _replace_loading(engine.optimizer, source)
    if isinstance(zero_wrapper, zero.Stage1And2):
        _replace_in_stage_1_and_2(engine.optimizer, source)
    elif isinstance(zero_wrapper, zero.Stage3):
        _replace_in_stage_3(engine.optimizer, source)
        if engine.optimizer.swap_optimizer:
            wrap_nvme_checkpoints(engine.optimizer, optimizer, source)
    wrap_universal_loading(engine.optimizer, optimizer)


class BeingWrapped(MeanSource):
    """While DeepSpeed puts its wrapper around an optimizer: a step is there to create states, and does nothing else."""

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        if any(param.grad is not None and bool(param.grad.any()) for param in optimizer.params()):
            raise RuntimeError(
                f"DeepSpeed must bind {type(optimizer).__name__} before it steps it, or the mean is taken over a part "
                "of the model; got a step with gradients before deepspeed.initialize() has returned; step with "
                "engine.step()"
            )
        return skipped(0.0)

    def after(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """Nothing was stepped."""


def _being_wrapped(make: Callable[[Any], AdaptiveInertia]) -> Callable[[Any], AdaptiveInertia]:
    @functools.wraps(make)
    def _configure_basic_optimizer(model_parameters: Any) -> AdaptiveInertia:
        optimizer = make(model_parameters)
        optimizer.mean_source = BeingWrapped()
        return optimizer

    return _configure_basic_optimizer


# -- every wrapper of ZeRO --------------------------------------------------------------------------------------------


def _replace_step(wrapper: Any, source: ZeroMean) -> None:
    original = wrapper.step

    @functools.wraps(original)
    def step(closure: Any = None) -> Any:
        source.begin()
        result = original(closure)
        source.end(wrapper._global_grad_norm)
        return result

    wrapper.step = step


def _replace_loading(wrapper: Any, source: ZeroMean) -> None:
    original = wrapper.load_state_dict

    @functools.wraps(original)
    def load_state_dict(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        source.after_loading()

    wrapper.load_state_dict = load_state_dict


def _squared(norms: list[Any]) -> Tensor:
    """Squares of norms, float64; NaN where ZeRO says with -1 that a gradient is not finite."""
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float64).reshape(()) for norm in norms])
    return torch.where(stacked >= 0, stacked.square(), torch.nan)


# -- stages 1, 2 and 3 ------------------------------------------------------------------------------------------------


def _observe(wrapper: Any, source: ZeroMean, norms: list[Any]) -> None:
    """Hand over the norms of the scaled gradients over all ranks, one per part. Collective: as ZeroMean.observe."""
    if len(norms) != len(source.flats):
        raise RuntimeError(
            f"ZeRO must find one norm per part of the model ({len(source.flats)}) in every step, got {len(norms)}; "
            "this DeepSpeed is not the one that adai_dist was written for"
        )
    unscaling = 1.0 / torch.as_tensor(wrapper.loss_scale, dtype=torch.float64, device=source.device)
    source.observe(unscaling, _squared(norms).to(source.device))


def _replace_in_stage_1_and_2(wrapper: Any, source: ZeroMean) -> None:
    norms: list[Any] = []
    wrapper.compute_grad_norm = True  # the mean is made of the norms; "compute_grad_norm": false would leave them out

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
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
        # The optimizer multiplies as it reads; what it has to multiply by shows in what becomes of a 1.
        if not source.is_settled:
            one = torch.ones(1, dtype=torch.float64, device=source.device)
            original_unscale([one], total_norm)
            source.settle(one, wrapper._global_grad_norm)

    wrapper.get_grad_norm_direct = noting(wrapper.get_grad_norm_direct)
    wrapper.complete_grad_norm_calculation_for_cpu_offload = noting(
        wrapper.complete_grad_norm_calculation_for_cpu_offload
    )
    wrapper.scaled_global_norm = scaled_global_norm
    wrapper.unscale_and_clip_grads = unscale_and_clip_grads


class _OneElement:
    """A stage-3 wrapper whose sub-groups have one element each, the gradient of which is 1."""

    def __init__(self, wrapper: Any, sub_group_id: int, one: Tensor) -> None:
        self._wrapper = wrapper
        self.fp32_partitioned_groups_flat = {sub_group_id: SimpleNamespace(grad=one)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


def _replace_in_stage_3(wrapper: Any, source: ZeroMean) -> None:
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
            source.zero_wrapper.clear_stale_gradients(sub_group_id)  # only now in memory
        if not source.is_settled:
            one = torch.ones(1, dtype=torch.float64, device=source.device)
            original_unscale(_OneElement(wrapper, sub_group_id, one), sub_group_id, total_norm)
            source.settle(one, wrapper._global_grad_norm)

    wrapper._get_norm_groups = _get_norm_groups
    wrapper.unscale_and_clip_grads = unscale_and_clip_grads


# -- BF16_Optimizer ---------------------------------------------------------------------------------------------------


class _AfterClipping(ZeroMean):
    """BF16_Optimizer calls the optimizer once, with gradients that it has clipped by their total norm."""

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        one = torch.ones((), dtype=torch.float64, device=self.device)
        self.observe(one, None)
        self.settle(one, self.zero_wrapper.wrapper._global_grad_norm)
        return super().mean(optimizer, shards, max_norm)
