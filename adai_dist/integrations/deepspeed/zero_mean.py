"""The global mean of a step that ZeRO takes part by part."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adai_dist import equations
from adai_dist.equations import LocalTensors, SquaredNorms
from adai_dist.hyper import Hyper
from adai_dist.integrations.deepspeed.support import check_coupled_decay_in_memory, check_no_clipping_of_its_own
from adai_dist.integrations.deepspeed.unchanged import TrainedModel
from adai_dist.integrations.deepspeed.zero import Fragment, ZeroWrapper
from adai_dist.kernels import nothing_kept
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.first_moment_check import FirstMomentCheck
from adai_dist.optimizer.mean_source import LastClip, MeanSource, Unbound
from adai_dist.optimizer.state import step_tensor
from adai_dist.sharding.mean import LR_SIGNAL, GlobalMean, Sums, evaluate
from adai_dist.sharding.owned_shards import OwnedShards
from adai_dist.sharding.param_shard import ParamShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_AGREEMENT = 1e-12
"""What rounding may make of two equal sums, relative."""


class ZeroMean(MeanSource):
    """The mean over the whole model, for an optimizer to which ZeRO hands the parameters part by part.

    It is made of the norms of the gradients, which ZeRO has all-reduced anyway, and of the sums of exp_avg_sq, which
    the ranks add up::

        begin    before ZeRO's step              states exist; leftovers are cleared
        observe  once the norms are known        what this rank holds is summed, and added up over the ranks
        settle   with the scale that ZeRO uses   sums and scale give the mean
        mean     once per part                   the optimizer steps what its parameter groups list at the moment
        end      after ZeRO's step               the step is counted, or counted as skipped

    Collective: construction: all ranks, one object gathered per process group; :meth:`observe`: all ranks, one
    all-reduce of 64 bytes per process group; nothing else.

    Args:
        model: what DeepSpeed trains.
    """

    def __init__(self, optimizer: AdaptiveInertia, zero_wrapper: ZeroWrapper, model: nn.Module) -> None:
        self.optimizer = optimizer
        self.zero_wrapper = zero_wrapper
        self.flats: list[Tensor] = zero_wrapper.flats()
        self.device: torch.device = self.flats[0].device
        self.process_groups: tuple[ProcessGroup, ...] = zero_wrapper.process_groups()
        self._part_of = {id(flat): part for part, flat in enumerate(self.flats)}
        self._num_ranks = math.prod(map(dist.get_world_size, self.process_groups))
        self._group_of_part = zero_wrapper.group_indices()
        fragments = map(zero_wrapper.fragments, range(len(self.flats)))
        self._counted = [[f for f in of_part if f.is_counted and f.num_elements] for of_part in fragments]
        self._num_elements = [sum(f.num_elements for f in of_part) for of_part in self._counted]
        pairs = zip(self._counted, self.flats, strict=True)
        self._not_counted = [_runs_outside(of_part, flat.numel()) for of_part, flat in pairs]
        self._trained = TrainedModel(model, optimizer)
        self._check_param_groups()
        self.check_coupled_decay()
        self._clear_padding()
        self._last_clip = LastClip()
        self._unscaling = self._expected = torch.ones((), dtype=torch.float64, device=self.device)
        self._sums: Sums | None = None
        self._mean: GlobalMean | None = None
        self._stepped: dict[int, ParamShard] = {}
        """What knows the last step of a part, by the id of its parameter."""
        self._first_moment_check = FirstMomentCheck()
        self._sums_on_disk: dict[int, Tensor] = {}
        """Of exp_avg_sq of the parts that are swapped: to read one before its step would lose its gradients."""

    def hypers(self) -> list[Hyper]:
        """The hyperparameters of every parameter group."""
        return Hyper.from_param_groups(self.optimizer.param_groups)

    def _check_param_groups(self) -> None:
        """ZeRO adds up the norms of parameter groups by their index, also across pipeline stages."""
        local = [(hyper.beta2, hyper.coupled_decay) for hyper in self.hypers()]
        for process_group in self.process_groups:
            found: list[Any] = [None] * dist.get_world_size(process_group)
            dist.all_gather_object(found, local, group=process_group)
            if any(other != found[0] for other in found):
                raise ValueError(
                    "all ranks must have the same parameter groups in the same order, with the same beta2 and coupled "
                    f"weight decay, got {found!r} as (beta2, decay) per group and rank; give every pipeline stage all "
                    "groups, in one order, or one beta2 and decay to all"
                )

    def check_coupled_decay(self) -> None:
        """Raises: UnsupportedSetting: decay is coupled, and parameters are on disk."""
        if any(self.zero_wrapper.is_swapped(part) for part in range(len(self.flats))):
            check_coupled_decay_in_memory(self.optimizer)

    def _clear_padding(self) -> None:
        """Zero the elements of the flats that are no part of the model: coupled decay would make gradients of them."""
        for part, flat in enumerate(self.flats):
            if not self.zero_wrapper.is_swapped(part):
                for run in _runs_outside(self.zero_wrapper.fragments(part), flat.numel()):
                    flat.detach().view(-1)[run].zero_()

    # -- a step ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before ZeRO looks at the gradients."""
        check_no_clipping_of_its_own(self.optimizer)
        self._trained.check()
        self._sums = self._mean = None
        self.zero_wrapper.collect_late_gradients()
        for part, flat in enumerate(self.flats):
            if not self.zero_wrapper.is_swapped(part):
                self.optimizer.create_states([flat])
                self.zero_wrapper.clear_stale_gradients(part)

    def observe(self, unscaling: Tensor, squared_norms: Tensor | None) -> None:
        """Add up over the ranks what they hold of the model.

        Args:
            unscaling: coefficient of the gradients if they are not clipped; 0-dim.
            squared_norms: of the gradients as they are handed over, over all ranks; one per part, float64, NaN where a
                gradient is not finite. None to find them here.

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
            dtype = self.flats[part].dtype
            v_sum = self._exp_avg_sq_sum(part).to(self.device)
            terms = equations.mean_terms(norms, v_sum, correction, hypers[group], self._expected, dtype)
            signal = equations.scalar_tensor((hypers[group].lr != 0) * lr_signal, correction)
            total += torch.stack([norms.grad_grad, *terms, torch.full_like(signal, self._num_elements[part]), signal])
        sums = Sums(*total.unbind())
        unread = self._first_moment_check.check(self.device)
        if unread is not None:
            sums = sums._replace(carried=sums.carried + unread)
        if squared_norms is None:
            self._sums = sums.added_up(self.process_groups)
            return
        # All ranks know the norms. The place of theirs tells whether the ranks agree on the step counts of the parts.
        sums = sums._replace(grad_squared=self._num_ranks * sums.quadratic.square()).added_up(self.process_groups)
        is_agreed = (sums.grad_squared - sums.quadratic.square()).abs() <= _AGREEMENT * sums.grad_squared
        carried = torch.where(is_agreed | ~squared_norms.sum().isfinite(), sums.carried, torch.nan)
        self._sums = sums._replace(grad_squared=squared_norms.sum(), carried=carried)

    def _inner_products(self, part: int, hyper: Hyper, squared_norms: Tensor | None) -> SquaredNorms:
        """Of the elements of a part that this rank counts; its share of the norms where they are known."""
        products = torch.zeros(len(SquaredNorms._fields), dtype=torch.float64, device=self.device)
        if squared_norms is None or hyper.coupled_decay:
            flat = self.flats[part].detach()
            nothing = nothing_kept([]).to(flat.device)
            c = (hyper.sign * self._expected).to(flat.device, flat.dtype)
            for fragment, gradient in self.zero_wrapper.gradients(part):
                if fragment.num_elements:
                    shards = LocalTensors([fragment.of(flat)], [gradient], [], [], [])
                    backend = self.optimizer.backends.of((shards.param[0], gradient))
                    products += torch.cat(backend.observe(shards, hyper, c, nothing)[0]).to(self.device)
        norms = SquaredNorms(*products.unbind())
        return norms if squared_norms is None else norms._replace(grad_grad=squared_norms[part] / self._num_ranks)

    def _exp_avg_sq_sum(self, part: int) -> Tensor:
        """Of the elements of a part that this rank counts, as they stand; 0-dim float64."""
        flat = self.flats[part]
        state = self.optimizer.state.get(flat)
        if not state:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        if self.zero_wrapper.is_swapped(part):
            return self._sums_on_disk[part]
        shard = self._stepped.get(id(flat))
        row = shard.kept_row() if shard is not None and shard.is_of(flat, state) else None
        if row is None:
            self._first_moment_check.add(part, [fragment.of(state["exp_avg"]) for fragment in self._counted[part]])
        v = state["exp_avg_sq"]
        backend = self.optimizer.backends.of([v])
        kept = nothing_kept([v]) if row is None else row[0][row[1]].unsqueeze(0)
        total = backend.sums([v], kept).sum()
        not_counted = [v.view(-1)[run] for run in self._not_counted[part]]
        return total - backend.sums(not_counted, nothing_kept(not_counted)).sum() if not_counted else total

    def _note_sum_on_disk(self, part: int) -> None:
        """While a swapped part is in memory. It is read: its padding comes from disk, and may be anything."""
        v = self.optimizer.state[self.flats[part]]["exp_avg_sq"]
        counted = [fragment.of(v) for fragment in self._counted[part]]
        backend = self.optimizer.backends.of([v])
        self._sums_on_disk[part] = backend.sums(counted, nothing_kept(counted)).sum().to(self.device)

    def _correction(self, part: int, hyper: Hyper) -> Tensor:
        state = self.optimizer.state.get(self.flats[part])
        step = state["step"].to(self.device) if state else torch.zeros((), device=self.device)
        return equations.bias_correction(hyper.beta2, step + 1.0)

    def settle(self, coefficient: Tensor, grad_norm: Any) -> None:
        """Find the mean of this step.

        Args:
            coefficient: what the gradients are still to be multiplied by; 0-dim.
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
    def is_settled(self) -> bool:
        return self._mean is not None

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        """What :meth:`settle` has found. Collective: none."""
        if self._mean is None:
            raise RuntimeError(
                "DeepSpeed must find the norm of all gradients before it steps a part of the model, got a step without "
                "one; step with engine.step()"
            )
        return self._mean

    def after(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """A part is stepped, and the step goes on with the next one."""
        self._stepped.update((id(shard.param), shard) for owned in shards for shard in owned.param_shards)
        for param in optimizer.params():
            part = self._part_of[id(param)]
            if self.zero_wrapper.is_swapped(part):
                self._note_sum_on_disk(part)

    def end(self, grad_norm: Any) -> None:
        """After ZeRO's step. Where ZeRO has found the gradients not to be finite, nothing was stepped."""
        mean, self._mean = self._mean, None
        self.zero_wrapper.clear_accumulated_gradients()
        self.optimizer.record(skipped(grad_norm) if mean is None else mean)

    # -- what the optimizer asks -----------------------------------------------------------------------------------

    def part(self, optimizer: AdaptiveInertia) -> Hashable:
        return next((id(param) for param in optimizer.params()), None)

    def check_allows(self, call: str, remedy: str) -> None:
        raise RuntimeError(f"an engine steps this optimizer part by part and has the norm, got {call}; {remedy}")

    def refresh(self) -> None:
        self._stepped.clear()
        self._first_moment_check.clear()

    def after_loading(self) -> None:
        """The states are others, and no gradients are there. Collective: none."""
        for flat in self.flats:
            state = self.optimizer.state.get(flat, {})
            if "step" in state:  # loaders share one tensor among the parts
                state["step"] = step_tensor(state["step"], flat)
        self.refresh()
        self._clear_padding()
        for part, flat in enumerate(self.flats):
            if self.zero_wrapper.is_swapped(part) and self.optimizer.state.get(flat):
                with self.zero_wrapper.in_memory(part):
                    self._note_sum_on_disk(part)

    def __reduce__(self) -> tuple[type[Unbound], tuple[str]]:
        """A copy of the optimizer is bound to no engine."""
        return Unbound, (
            "DeepSpeed must bind an optimizer before it is stepped, got a step of a copy of one that it has bound; "
            "pass the copy to deepspeed.initialize()",
        )


def _runs_outside(fragments: list[Fragment], size: int) -> list[slice]:
    """The runs of a flat partition of so many elements that none of the fragments covers."""
    runs: list[slice] = []
    start = 0
    for fragment in sorted(fragments, key=lambda fragment: fragment.start):
        if fragment.num_elements:
            runs.append(slice(start, fragment.start))
            start = fragment.start + fragment.num_elements
    return [run for run in (*runs, slice(start, size)) if run.start < run.stop]


def skipped(grad_norm: Any) -> GlobalMean:
    """What is known of a step that an engine skips because of a non-finite gradient."""
    nan, no = torch.full((), torch.nan, dtype=torch.float64), torch.zeros((), dtype=torch.bool)
    norm = torch.as_tensor(grad_norm, dtype=torch.float64)
    faults = torch.tensor([True, False, False, False, False])
    return GlobalMean(nan, norm, nan, is_finite=no, is_live=no, is_undefined=no, faults=faults)
