"""Ties an optimizer to the wrapper that DeepSpeed has put around it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from adai_dist.equations import SquaredNorms
from adai_dist.integrations.deepspeed import support, zero
from adai_dist.integrations.deepspeed.driver import CHECKPOINT_KEY, ZeroDriver
from adai_dist.integrations.deepspeed.nvme_checkpoint import wrap_nvme_checkpoints
from adai_dist.integrations.deepspeed.universal_load import wrap_universal_loading
from adai_dist.integrations.deepspeed.whole import count_skipped_steps, sharding_of_whole_parameters
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


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
        return
    support.check_version()
    support.check_config(engine)
    _allow(cls)
    engine.zero_force_ds_cpu_optimizer = lambda: False  # DeepSpeed would insist on an Adam
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
    optimizer._driver = None
    optimizer._step_within_engine = None  # pyright: ignore[reportAttributeAccessIssue] this one may be stepped
    zero_wrapper = zero.wrapper_of(engine)
    if zero_wrapper is None:
        optimizer._shard(sharding_of_whole_parameters(engine))
        count_skipped_steps(engine)
        wrap_universal_loading(engine.optimizer, optimizer)
        return
    support.check_signatures(engine.optimizer, zero_wrapper.signatures)
    driver = (_AfterClipping if isinstance(zero_wrapper, zero.BF16) else ZeroDriver)(optimizer, zero_wrapper)
    optimizer._driver = driver
    _replace_step(engine.optimizer, driver)
    _replace_checkpointing(engine.optimizer, driver)
    if isinstance(zero_wrapper, zero.Stage1And2):
        _replace_in_stage_1_and_2(engine.optimizer, driver)
    elif isinstance(zero_wrapper, zero.Stage3):
        _replace_in_stage_3(engine.optimizer, driver)
        if engine.optimizer.swap_optimizer:
            wrap_nvme_checkpoints(engine.optimizer, optimizer)
    wrap_universal_loading(engine.optimizer, optimizer)


def refresh(engine: Any) -> None:
    """Take the mean of the next step from ``exp_avg_sq`` as it is; needed after writing to it by hand.

    Collective: all ranks.
    """
    driver = engine.basic_optimizer._driver
    if driver is not None:
        driver.refresh()


# -- every wrapper of ZeRO --------------------------------------------------------------------------------------------


def _replace_step(wrapper: Any, driver: ZeroDriver) -> None:
    original = wrapper.step

    @functools.wraps(original)
    def step(closure: Any = None) -> Any:
        driver.begin()
        result = original(closure)
        driver.end(wrapper._global_grad_norm)
        return result

    wrapper.step = step


def _replace_checkpointing(wrapper: Any, driver: ZeroDriver) -> None:
    original_state_dict, original_load = wrapper.state_dict, wrapper.load_state_dict

    @functools.wraps(original_state_dict)
    def state_dict() -> dict[str, Any]:
        return {**original_state_dict(), CHECKPOINT_KEY: driver.save()}

    @functools.wraps(original_load)
    def load_state_dict(state_dict_list: Any, *args: Any, load_optimizer_states: bool = True, **kwargs: Any) -> None:
        saved = next((entry.get(CHECKPOINT_KEY) for entry in state_dict_list or [] if entry is not None), None)
        original_load(state_dict_list, *args, load_optimizer_states=load_optimizer_states, **kwargs)
        # Stages 1 and 2 load the states of a universal checkpoint whatever load_optimizer_states says.
        if load_optimizer_states or kwargs.get("checkpoint_folder"):
            driver.load(saved)

    wrapper.state_dict, wrapper.load_state_dict = state_dict, load_state_dict


def _squared(norms: list[Any]) -> Tensor:
    """Squares of norms, float64; NaN where ZeRO says with -1 that a gradient is not finite."""
    stacked = torch.stack([torch.as_tensor(norm, dtype=torch.float64).reshape(()) for norm in norms])
    return torch.where(stacked >= 0, stacked.square(), torch.nan)


def _without_products(grad_grad: Tensor) -> SquaredNorms:
    return SquaredNorms(grad_grad, torch.zeros_like(grad_grad), torch.zeros_like(grad_grad))


def _has_coupled_decay(driver: ZeroDriver) -> bool:
    return any(hyper.coupled_decay for hyper in driver.hypers())


# -- stages 1, 2 and 3 ------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What a step has shown so far."""

    norms: list[Any]
    """Norms of the scaled gradients over all ranks, one per part."""
    products: SquaredNorms | None = None
    """Of the scaled gradients, where decay is coupled."""


def _settle(wrapper: Any, driver: ZeroDriver, seen: _Seen, scale: Tensor) -> None:
    if len(seen.norms) != len(driver.flats):
        raise RuntimeError(
            f"ZeRO must find one norm per part of the model ({len(driver.flats)}) in every step, got "
            f"{len(seen.norms)}; this DeepSpeed is not the one that adai_dist was written for"
        )
    grad_grad = driver.per_group(_squared(seen.norms))
    norms = _without_products(grad_grad) if seen.products is None else seen.products._replace(grad_grad=grad_grad)
    driver.settle(norms, scale, wrapper._global_grad_norm)


def _replace_in_stage_1_and_2(wrapper: Any, driver: ZeroDriver) -> None:
    seen = _Seen([])
    wrapper.compute_grad_norm = True  # the mean is made of the norms; "compute_grad_norm": false would leave them out

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def norm_of_group(*args: Any, **kwargs: Any) -> Any:
            norm = original(*args, **kwargs)
            seen.norms.append(norm)
            return norm

        return norm_of_group

    original_global_norm, original_unscale = wrapper.scaled_global_norm, wrapper.unscale_and_clip_grads

    @functools.wraps(original_global_norm)
    def scaled_global_norm(norm_type: int = 2) -> Any:
        seen.norms.clear()
        seen.products = driver.inner_products() if _has_coupled_decay(driver) else None
        return original_global_norm(norm_type)

    @functools.wraps(original_unscale)
    def unscale_and_clip_grads(grad_groups_flat: Any, total_norm: Any) -> None:
        # The optimizer multiplies as it reads; what it has to multiply by shows in what becomes of a 1.
        if not driver.is_settled:
            one = torch.ones(1, dtype=torch.float64, device=driver.device)
            original_unscale([one], total_norm)
            _settle(wrapper, driver, seen, one)

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


def _replace_in_stage_3(wrapper: Any, driver: ZeroDriver) -> None:
    seen = _Seen([])
    original_norm_groups, original_unscale = wrapper._get_norm_groups, type(wrapper).unscale_and_clip_grads

    @functools.wraps(original_norm_groups)
    def _get_norm_groups() -> list[Any]:
        seen.products = None
        if _has_coupled_decay(driver):
            driver.check_coupled_decay()
            seen.products = driver.inner_products()
        seen.norms[:] = original_norm_groups()
        return list(seen.norms)

    @functools.wraps(original_unscale)
    def unscale_and_clip_grads(sub_group_id: int, total_norm: Any) -> None:
        if driver.zero_wrapper.is_swapped(sub_group_id):
            driver.zero_wrapper.clear_stale_gradients(sub_group_id)  # only now in memory
        if not driver.is_settled:
            one = torch.ones(1, dtype=torch.float64, device=driver.device)
            original_unscale(_OneElement(wrapper, sub_group_id, one), sub_group_id, total_norm)
            _settle(wrapper, driver, seen, one)

    wrapper._get_norm_groups = _get_norm_groups
    wrapper.unscale_and_clip_grads = unscale_and_clip_grads


# -- BF16_Optimizer ---------------------------------------------------------------------------------------------------


class _AfterClipping(ZeroDriver):
    """BF16_Optimizer calls the optimizer once, with gradients that it has clipped by their total norm."""

    def step_part(self) -> None:
        wrapper = self.zero_wrapper.wrapper
        one = torch.ones(1, dtype=torch.float64, device=self.device)
        total_norm = torch.as_tensor(wrapper._global_grad_norm, dtype=torch.float64, device=self.device)
        if _has_coupled_decay(self) or len({hyper.beta2 for hyper in self.hypers()}) > 1:
            self.settle(self.inner_products(), one, total_norm)
        else:
            clip = wrapper.clip_grad / (total_norm + 1e-6) if wrapper.clip_grad > 0 else math.inf
            clipped_norm = total_norm * torch.as_tensor(clip, device=self.device).clamp(max=1.0)
            total = torch.cat([clipped_norm.square().reshape(1), one.new_zeros(len(self.optimizer.param_groups) - 1)])
            self.settle(_without_products(total), one, total_norm, knows_groups=False)
        super().step_part()
