"""The global mean under ZeRO, which steps the model part by part."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adai_dist import equations
from adai_dist.equations import LocalTensors, SquaredNorms
from adai_dist.hyper import Hyper
from adai_dist.integrations.deepspeed.adapters.zero_wrapper import Fragment, ZeroWrapper
from adai_dist.integrations.deepspeed.model_snapshot import ModelSnapshot
from adai_dist.integrations.deepspeed.unsupported_settings import (
    check_no_coupled_decay,
    check_no_max_grad_norm,
)
from adai_dist.kernels import nothing_kept
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.first_moment_check import FirstMomentCheck
from adai_dist.optimizer.mean_source import LastClip, MeanSource, Unbound
from adai_dist.optimizer.state import step_tensor
from adai_dist.sharding.mean import LR_SIGNAL, GlobalMean, Sums, evaluate
from adai_dist.sharding.owned_shards import OwnedShards
from adai_dist.sharding.param_shard import ParamShard
from adai_dist.sharding.plan import ShardingPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_AGREEMENT = 1e-12
"""Relative rounding error allowed between two sums that must be equal."""


@dataclass(frozen=True)
class FlatPartitionPlanner:
    """Plans for flat partitions, with the global indices from which their random bits are derived.

    Each data-parallel rank holds a partition of every part of the model, of the same size on all of them. The index
    counts through the partitions in the order of all data-parallel ranks, also for the experts of several ranks.
    """

    ordinals: dict[Tensor, int]
    """Index of the part of the model, by its flat partition."""
    rank: int
    """Index of this rank among the data-parallel ranks."""

    def start(self, flat: Tensor) -> int:
        """Return the global index of the first element of this rank's partition."""
        return self.rank * flat.numel()

    def plan(self, params: tuple[Tensor, ...]) -> ShardingPlan:
        starts = {param: self.start(param) for param in params}
        return ShardingPlan(params, (), dict.fromkeys(params, 1.0), starts=starts, ordinals=self.ordinals)


class ZeroMeanSource(MeanSource):
    """The mean over the whole model, for an optimizer to which ZeRO passes the parameters part by part.

    It combines the gradient norms that ZeRO all-reduces with an all-reduced sum of exp_avg_sq::

        begin         before ZeRO's step              create states, clear stale gradients
        observe       when ZeRO has the norms         sum over the elements of this rank, all-reduce the sums
        compute_mean  when ZeRO has the loss scale    compute the mean from sums and scale
        mean          once per part                   return it for the parameters now in the parameter groups
        end           after ZeRO's step               record the step, or a skipped step

    Collective: construction: all ranks, one object gathered per process group; :meth:`observe`: all ranks, one
    all-reduce of 64 bytes per process group; nothing else.

    Args:
        optimizer: the optimizer that DeepSpeed steps.
        zero_wrapper: interface to ZeRO's wrapper around it.
        model: the model that DeepSpeed trains.
    """

    def __init__(self, optimizer: AdaptiveInertia, zero_wrapper: ZeroWrapper, model: nn.Module) -> None:
        self.optimizer = optimizer
        self.zero_wrapper = zero_wrapper
        self.flat_partitions: list[Tensor] = zero_wrapper.flat_partitions()
        self.device: torch.device = self.flat_partitions[0].device
        self.process_groups: tuple[ProcessGroup, ...] = zero_wrapper.process_groups()
        self._part_of = {id(flat): part for part, flat in enumerate(self.flat_partitions)}
        self._num_ranks = math.prod(map(dist.get_world_size, self.process_groups))
        self._group_of_part = zero_wrapper.group_indices()
        fragments = map(zero_wrapper.fragments, range(len(self.flat_partitions)))
        self._counted = [[f for f in of_part if f.is_counted and f.num_elements] for of_part in fragments]
        self._num_elements = [sum(f.num_elements for f in of_part) for of_part in self._counted]
        pairs = zip(self._counted, self.flat_partitions, strict=True)
        self._uncounted = [_gaps(of_part, flat.numel()) for of_part, flat in pairs]
        self._planner = FlatPartitionPlanner(
            ordinals={flat: part for part, flat in enumerate(self.flat_partitions)},
            rank=dist.get_rank(self.process_groups[0]),
        )
        self._snapshot = ModelSnapshot(model, optimizer)
        self._check_param_groups()
        self.check_coupled_decay()
        self._clear_padding()
        self._last_clip = LastClip()
        self._unscaling = self._expected = torch.ones((), dtype=torch.float64, device=self.device)
        self._sums: Sums | None = None
        self._mean: GlobalMean | None = None
        self._stepped: dict[int, ParamShard] = {}
        """The most recently stepped shard of each part, by the id of its parameter."""
        self._first_moment_check = FirstMomentCheck()
        self._swapped_sums: dict[int, Tensor] = {}
        """Sum of exp_avg_sq of each swapped part; reading the part before its step would discard its gradients."""

    def hypers(self) -> list[Hyper]:
        """Return the hyperparameters of every parameter group."""
        return Hyper.from_param_groups(self.optimizer.param_groups)

    def _check_param_groups(self) -> None:
        """Check that parameter groups match across ranks: ZeRO adds up their norms by index, across pipeline stages."""
        local = [(hyper.beta2, hyper.coupled_decay) for hyper in self.hypers()]
        for process_group in self.process_groups:
            found: list[Any] = [None] * dist.get_world_size(process_group)
            dist.all_gather_object(found, local, group=process_group)
            if any(other != found[0] for other in found):
                raise ValueError(
                    "all ranks must have the same parameter groups in the same order, with the same beta2 and coupled "
                    f"weight decay, got {found!r} as (beta2, decay) per group and rank; create all groups in the same "
                    "order on every pipeline stage, or use one beta2 and weight decay"
                )

    def check_coupled_decay(self) -> None:
        """Refuse coupled decay while parameters are on disk."""
        if any(self.zero_wrapper.is_swapped(part) for part in range(len(self.flat_partitions))):
            check_no_coupled_decay(self.optimizer)

    def _clear_padding(self) -> None:
        """Zero the padding of the flat partitions, from which coupled decay would make gradients."""
        for part, flat in enumerate(self.flat_partitions):
            if not self.zero_wrapper.is_swapped(part):
                for run in _gaps(self.zero_wrapper.fragments(part), flat.numel()):
                    flat.detach().view(-1)[run].zero_()

    # -- a step ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare states and gradient buffers, before ZeRO reads the gradients."""
        check_no_max_grad_norm(self.optimizer)
        self._snapshot.check()
        self._sums = self._mean = None
        self.zero_wrapper.collect_late_gradients()
        for part, flat in enumerate(self.flat_partitions):
            if not self.zero_wrapper.is_swapped(part):
                self.optimizer.create_states([flat])
                self.zero_wrapper.clear_stale_gradients(part)

    def observe(self, unscaling: Tensor, squared_norms: Tensor | None) -> None:
        """Sum over the elements of this rank and all-reduce the sums.

        Args:
            unscaling: coefficient that unscales the gradients, without clipping; 0-dim.
            squared_norms: squared global norm of the scaled gradients of each part, float64, NaN if non-finite. None
                to compute them here.

        Collective: all ranks, one all-reduce of 64 bytes per process group.
        """
        self._unscaling = unscaling.to(self.device, torch.float64).reshape(())
        self._expected = self._last_clip.expected(self._unscaling)
        total = torch.zeros(len(Sums._fields), dtype=torch.float64, device=self.device)
        hypers = self.hypers()
        lr_signal = LR_SIGNAL / (max(1, len(self._group_of_part)) * self._num_ranks)
        for part, group in enumerate(self._group_of_part):
            norms = self._inner_products(part, hypers[group], squared_norms)
            correction = self._correction(part, hypers[group])
            dtype = self.flat_partitions[part].dtype
            v_sum = self._exp_avg_sq_sum(part).to(self.device)
            terms = equations.mean_terms(norms, v_sum, correction, hypers[group], self._expected, dtype)
            signal = equations.scalar_tensor((hypers[group].lr != 0) * lr_signal, correction)
            total += torch.stack([norms.grad_grad, *terms, torch.full_like(signal, self._num_elements[part]), signal])
        if checksum := self.zero_wrapper.checksum_of_reduced():
            total[-1] += checksum
        sums = Sums(*total.unbind())
        unread = self._first_moment_check.check(self.device)
        if unread is not None:
            sums = sums._replace(carried=sums.carried + unread)
        if squared_norms is None:
            self._sums = sums.added_up(self.process_groups)
            return
        # All ranks have the norms already, so their slot in the sums checks that the ranks agree on the step counts.
        sums = sums._replace(grad_squared=self._num_ranks * sums.quadratic.square()).added_up(self.process_groups)
        is_agreed = (sums.grad_squared - sums.quadratic.square()).abs() <= _AGREEMENT * sums.grad_squared
        carried = torch.where(is_agreed | ~squared_norms.sum().isfinite(), sums.carried, torch.nan)
        self._sums = sums._replace(grad_squared=squared_norms.sum(), carried=carried)

    def _inner_products(self, part: int, hyper: Hyper, squared_norms: Tensor | None) -> SquaredNorms:
        """Return the inner products over the counted elements of a part; a share of the norms if they are given."""
        products = torch.zeros(len(SquaredNorms._fields), dtype=torch.float64, device=self.device)
        if squared_norms is None or hyper.coupled_decay:
            flat = self.flat_partitions[part].detach()
            nothing = nothing_kept([]).to(flat.device)
            c = (hyper.sign * self._expected).to(flat.device, flat.dtype)
            for fragment, gradient in self.zero_wrapper.gradients(part):
                if fragment.num_elements:
                    shards = LocalTensors([fragment.view_of(flat)], [gradient], [], [], [])
                    backend = self.optimizer.backends.of((shards.param[0], gradient))
                    products += torch.cat(backend.observe(shards, hyper, c, nothing)[0]).to(self.device)
        norms = SquaredNorms(*products.unbind())
        return norms if squared_norms is None else norms._replace(grad_grad=squared_norms[part] / self._num_ranks)

    def _exp_avg_sq_sum(self, part: int) -> Tensor:
        """Return the sum of exp_avg_sq over the counted elements of a part, 0-dim float64."""
        flat = self.flat_partitions[part]
        state = self.optimizer.state.get(flat)
        if not state:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        if self.zero_wrapper.is_swapped(part):
            return self._swapped_sums[part]
        shard = self._stepped.get(id(flat))
        row = shard.kept_row() if shard is not None and shard.is_of(flat, state) else None
        if row is None:
            self._first_moment_check.add(part, [fragment.view_of(state["exp_avg"]) for fragment in self._counted[part]])
        v = state["exp_avg_sq"]
        backend = self.optimizer.backends.of([v])
        kept = nothing_kept([v]) if row is None else row[0][row[1]].unsqueeze(0)
        total = backend.sums([v], kept).sum()
        not_counted = [v.view(-1)[run] for run in self._uncounted[part]]
        return total - backend.sums(not_counted, nothing_kept(not_counted)).sum() if not_counted else total

    def _store_swapped_sum(self, part: int) -> None:
        """Store the sum of exp_avg_sq of a swapped part that is in memory, without its padding, arbitrary on disk."""
        v = self.optimizer.state[self.flat_partitions[part]]["exp_avg_sq"]
        counted = [fragment.view_of(v) for fragment in self._counted[part]]
        backend = self.optimizer.backends.of([v])
        self._swapped_sums[part] = backend.sums(counted, nothing_kept(counted)).sum().to(self.device)

    def _correction(self, part: int, hyper: Hyper) -> Tensor:
        state = self.optimizer.state.get(self.flat_partitions[part])
        step = state["step"].to(self.device) if state else torch.zeros((), device=self.device)
        return equations.bias_correction(hyper.beta2, step + 1.0)

    def compute_mean(self, coefficient: Tensor, grad_norm: Any) -> None:
        """Compute the mean of this step.

        Args:
            coefficient: factor that the optimizer must apply to the gradients; 0-dim.
            grad_norm: the norm to report.

        Collective: none.
        """
        assert self._sums is not None
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=self.device).reshape(())
        norm = torch.where(self._sums.grad_squared.isfinite(), norm, torch.inf)
        c = coefficient.to(self.device, torch.float64).reshape(())
        self._mean = evaluate(self._sums, norm, c, self._expected)
        self._last_clip.note(self._mean, self._unscaling)

    @property
    def has_mean(self) -> bool:
        return self._mean is not None

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        """Return the result of :meth:`compute_mean`. Collective: none."""
        if self._mean is None:
            raise RuntimeError(
                "DeepSpeed must compute the norm of all gradients before it steps a part of the model, got a step "
                "without one; step with engine.step()"
            )
        return self._mean

    def after(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """Remember the stepped shards of a part; :meth:`end` records the step."""
        self._stepped.update((id(shard.param), shard) for owned in shards for shard in owned.param_shards)
        for param in optimizer.params():
            part = self._part_of[id(param)]
            if self.zero_wrapper.is_swapped(part):
                self._store_swapped_sum(part)

    def end(self, grad_norm: Any) -> None:
        """Record the step, as skipped if ZeRO found non-finite gradients and stepped nothing."""
        mean, self._mean = self._mean, None
        self.zero_wrapper.clear_accumulated_gradients()
        self.optimizer.record(mean_of_skipped_step(grad_norm) if mean is None else mean)

    # -- called by the optimizer -----------------------------------------------------------------------------------

    def part(self, optimizer: AdaptiveInertia) -> Hashable:
        return next((id(param) for param in optimizer.params()), None)

    def sharding(self) -> FlatPartitionPlanner:
        return self._planner

    def places(self) -> dict[Tensor, tuple[int, int]]:
        """Return part and global index of the first element of each parameter of the model on this rank.

        It is empty if no other rank holds a copy, as ZeRO 3 may partition parameters over the model-parallel ranks too.
        """
        if len(self.process_groups) == 1:
            return {}
        return {
            fragment.param: (part, self._planner.start(flat) + fragment.start)
            for part, flat in enumerate(self.flat_partitions)
            for fragment in self.zero_wrapper.fragments(part)
            if fragment.num_elements
        }

    def check_allows(self, call: str, remedy: str) -> None:
        raise RuntimeError(
            f"DeepSpeed must clip and configure an optimizer that it steps part by part, got {call}; {remedy}"
        )

    def refresh(self) -> None:
        self._stepped.clear()
        self._first_moment_check.clear()

    def after_loading(self) -> None:
        """Update the source after states were loaded and before gradients exist. Collective: none."""
        for flat in self.flat_partitions:
            state = self.optimizer.state.get(flat, {})
            if "step" in state:  # loaders share one tensor between the parts
                state["step"] = step_tensor(state["step"], flat)
        self.refresh()
        self._clear_padding()
        for part, flat in enumerate(self.flat_partitions):
            if self.zero_wrapper.is_swapped(part) and self.optimizer.state.get(flat):
                with self.zero_wrapper.in_memory(part):
                    self._store_swapped_sum(part)

    def __reduce__(self) -> tuple[type[Unbound], tuple[str]]:
        """Replace the source of a copied optimizer, which is not bound to an engine."""
        return Unbound, (
            "DeepSpeed must bind an optimizer before it is stepped, got a step of a copy of a bound optimizer; "
            "pass the copy to deepspeed.initialize()",
        )


def _gaps(fragments: list[Fragment], size: int) -> list[slice]:
    """Return the ranges of a flat partition of ``size`` elements that no fragment covers."""
    runs: list[slice] = []
    start = 0
    for fragment in sorted(fragments, key=lambda fragment: fragment.start):
        if fragment.num_elements:
            runs.append(slice(start, fragment.start))
            start = fragment.start + fragment.num_elements
    return [run for run in (*runs, slice(start, size)) if run.start < run.stop]


def mean_of_skipped_step(grad_norm: Any) -> GlobalMean:
    """Return the GlobalMean of a step that DeepSpeed skipped because of a non-finite gradient."""
    nan, no = torch.full((), torch.nan, dtype=torch.float64), torch.zeros((), dtype=torch.bool)
    norm = torch.as_tensor(grad_norm, dtype=torch.float64)
    faults = torch.tensor([True, False, False, False, False])
    return GlobalMean(nan, norm, nan, is_finite=no, is_live=no, is_undefined=no, faults=faults)
