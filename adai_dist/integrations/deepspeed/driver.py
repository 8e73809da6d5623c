"""The global mean of a step that ZeRO takes part by part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from adai_dist import equations
from adai_dist.equations import MeanTerms, Shards, SquaredNorms
from adai_dist.hyper import Hyper
from adai_dist.integrations.deepspeed.support import check_coupled_decay_in_memory, check_no_clipping_of_its_own
from adai_dist.integrations.deepspeed.zero import ZeroWrapper
from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from adai_dist.optimizer.state import step_tensor
from adai_dist.sharding.holdings import Holdings
from adai_dist.sharding.mean import GlobalMean, Sums, all_reduce, evaluate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHECKPOINT_KEY = "adai_dist"
"""Where ZeRO's own state_dict keeps what :meth:`ZeroDriver.save` returns."""


class ZeroDriver:
    """Steps an optimizer whose parameters ZeRO hands over part by part, all with the mean over the whole model.

    The sum of exp_avg_sq over all ranks is kept per parameter group and follows the recursion of
    :mod:`adai_dist.equations` from the norms that ZeRO has all-reduced, so that a step needs no collective of its own::

        begin     before ZeRO's step      states exist; leftovers are cleared
        settle    once per step           norms and the scale that ZeRO applies give the mean
        step_part once per part           advance
        end       after ZeRO's step       the step is counted, or counted as skipped

    Collective: construction, :meth:`load` and :meth:`refresh`: all ranks, a few all-reduces; a step: none, but one of
    24 bytes per parameter group where decay is coupled, and under BF16_Optimizer where these differ in beta2.
    """

    def __init__(self, optimizer: AdaptiveInertia, zero_wrapper: ZeroWrapper) -> None:
        self.optimizer = optimizer
        self.zero_wrapper = zero_wrapper
        self.flats: list[Tensor] = zero_wrapper.flats()
        self.device: torch.device = self.flats[0].device
        self._group_of_part = torch.tensor(zero_wrapper.group_indices(), device=self.device)
        self.process_groups: tuple[ProcessGroup, ...] = zero_wrapper.process_groups()
        self._check_param_groups()
        self.check_coupled_decay()
        self.num_elements: Tensor = self._count()
        self.exp_avg_sq_sums: Tensor | None = None
        """Over all ranks, of every parameter group; float64. None where it has to be found from the states."""
        self._mean: GlobalMean | None = None
        self._holdings: dict[int, Holdings] = {}
        self._knows_groups = True

    def _count(self) -> Tensor:
        fragments = [fragment for part in range(len(self.flats)) for fragment in self.zero_wrapper.fragments(part)]
        num_elements = sum(fragment.num_elements for fragment in fragments if fragment.is_counted)
        return self._total(torch.tensor(num_elements, dtype=torch.float64, device=self.device))

    def per_group(self, of_parts: Tensor) -> Tensor:
        """Sums over the parts of each parameter group; the first dimension changes its meaning. Float64."""
        values = of_parts.to(self.device, torch.float64)
        sums = values.new_zeros(len(self.optimizer.param_groups), *values.shape[1:])
        return sums.index_add_(0, self._group_of_part, values)

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

    def _total(self, local: Tensor) -> Tensor:
        """What the ranks add up to. Collective: all ranks."""
        return all_reduce(local, self.process_groups)

    # -- a step ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before ZeRO looks at the gradients."""
        check_no_clipping_of_its_own(self.optimizer)
        self._mean = None
        if self.exp_avg_sq_sums is None and not any(self.optimizer.state.get(flat) for flat in self.flats):
            self.exp_avg_sq_sums = self.num_elements.new_zeros(len(self.optimizer.param_groups))
        self.zero_wrapper.collect_late_gradients()
        for part, flat in enumerate(self.flats):
            if not self.zero_wrapper.is_swapped(part):
                self.optimizer._create_states([flat])
                self.zero_wrapper.clear_stale_gradients(part)
        if self.exp_avg_sq_sums is None:
            self.refresh()

    def hypers(self) -> list[Hyper]:
        """The hyperparameters of every parameter group."""
        return [Hyper.from_param_group(param_group) for param_group in self.optimizer.param_groups]

    def inner_products(self) -> SquaredNorms:
        """Of gradients and parameters as they are, over all ranks; float64, one per parameter group.

        Collective: all ranks.
        """
        hypers = self.hypers()
        of_parts: list[Tensor] = []
        for part, (flat, index) in enumerate(zip(self.flats, self.zero_wrapper.group_indices(), strict=True)):
            products = torch.zeros(len(SquaredNorms._fields), dtype=torch.float64, device=self.device)
            for fragment, gradient in self.zero_wrapper.gradients(part):
                if fragment.num_elements:
                    products += self._inner_products(fragment.of(flat.detach()), gradient, hypers[index])
            of_parts.append(products)
        return SquaredNorms(*self._total(self.per_group(torch.stack(of_parts))).unbind(1))

    def _inner_products(self, param: Tensor, gradient: Tensor, hyper: Hyper) -> Tensor:
        backend = self.optimizer._backends.of((param, gradient))
        return torch.cat(backend.observe(Shards([param], [gradient], [], [], []), hyper))

    def settle(self, norms: SquaredNorms, coefficient: Tensor, grad_norm: Any, *, knows_groups: bool = True) -> None:
        """Find the mean of this step and advance the sums of exp_avg_sq.

        Args:
            norms: squared norm of the gradients as they are handed over, and inner products with the parameters; over
                all ranks, float64, one per parameter group; NaN where a gradient is not finite.
            coefficient: what the gradients are still to be multiplied by; 0-dim.
            grad_norm: the norm to report.
            knows_groups: False where ``norms`` has the total in its first entry.

        Collective: none; all ranks where groups are told apart again after steps in which they were not.
        """
        assert self.exp_avg_sq_sums is not None
        if knows_groups and not self._knows_groups:
            self.refresh()
        elif not knows_groups:
            self._knows_groups = False
            self.exp_avg_sq_sums = _in_first_entry(self.exp_avg_sq_sums)
        norms = SquaredNorms(*(x.to(self.device, torch.float64) for x in norms))
        c = coefficient.to(self.device, torch.float64).reshape(())
        grad_norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=self.device).reshape(())
        hypers, step = self.hypers(), self._step() + 1.0
        terms: list[MeanTerms] = []
        next_sums: list[Tensor] = []
        for hyper, old, *of_group in zip(hypers, self.exp_avg_sq_sums, *norms, strict=True):
            correction = equations.bias_correction(hyper.beta2, step)
            of_mean = equations.mean_terms(SquaredNorms(*of_group), old, correction, hyper)
            terms.append(of_mean)
            total = of_mean.carried + c * c * of_mean.quadratic + c * of_mean.linear + of_mean.constant
            next_sums.append(total * correction)
        grad_squared = norms.grad_grad.sum()
        sums = Sums(
            grad_squared,
            *(torch.stack(column).sum() for column in zip(*terms, strict=True)),
            num_elements=self.num_elements,
            num_overflows=torch.zeros_like(grad_squared),
            lr=torch.stack([equations.scalar_tensor(hyper.lr, grad_squared) for hyper in hypers]).sum(),
        )
        self._mean = evaluate(sums, torch.where(grad_squared.isfinite(), grad_norm, torch.inf), c)
        self.exp_avg_sq_sums = torch.where(self._mean.is_live, torch.stack(next_sums), self.exp_avg_sq_sums)

    def _step(self) -> Tensor:
        """Steps that have counted so far; 0-dim. All parts step together."""
        for flat in self.flats:
            if self.optimizer.state.get(flat):
                return self.optimizer.state[flat]["step"].to(self.device)
        return torch.zeros((), device=self.device)

    def step_part(self) -> None:
        """Advance what the optimizer's parameter groups list at the moment. Collective: none."""
        if self._mean is None:
            raise RuntimeError(
                "DeepSpeed must find the norm of all gradients before it steps a part of the model, got a step without "
                "one; step with engine.step()"
            )
        params = self.optimizer._params()
        self.optimizer._create_states(params)
        # One record per part, so that what is derived from a part is found once and not in every step.
        holdings = self._holdings.setdefault(id(params[0]), Holdings(self.optimizer._backends))
        self.optimizer.advance(holdings.owned_shards(self.optimizer.param_groups, self.optimizer.state), self._mean)

    @property
    def is_settled(self) -> bool:
        return self._mean is not None

    def end(self, grad_norm: Any) -> None:
        """After ZeRO's step. Where ZeRO has found the gradients not to be finite, nothing was stepped."""
        mean, self._mean = self._mean, None
        self.optimizer._record(skipped(grad_norm) if mean is None else mean, dist.get_rank() == 0)
        self.zero_wrapper.clear_accumulated_gradients()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Find the sums of exp_avg_sq from the states; needed after they were written to by hand.

        Collective: all ranks.
        """
        of_parts: list[Tensor] = []
        for part, flat in enumerate(self.flats):
            of_parts.append(torch.zeros((), dtype=torch.float64, device=self.device))
            state = self.optimizer.state.get(flat)
            if not state:
                continue
            with self.zero_wrapper.in_memory(part):
                counted = [
                    fragment.of(state["exp_avg_sq"])
                    for fragment in self.zero_wrapper.fragments(part)
                    if fragment.is_counted and fragment.num_elements
                ]
                if counted:
                    of_parts[part] += self.optimizer._backends.of(counted).sums(counted).sum()
        self.exp_avg_sq_sums = self._total(self.per_group(torch.stack(of_parts)))
        self._knows_groups = True

    def save(self) -> dict[str, Any] | None:
        """What a checkpoint needs beside the states, so that the next step is the same to the bit."""
        if self.exp_avg_sq_sums is None:
            return None
        return {"exp_avg_sq_sums": self.exp_avg_sq_sums.cpu(), "knows_groups": self._knows_groups}

    def load(self, saved: dict[str, Any] | None) -> None:
        """Go on from loaded states. Collective: all ranks, where ``saved`` is None."""
        for flat in self.flats:
            state = self.optimizer.state.get(flat, {})
            if "step" in state:  # loaders share one tensor among the parts
                state["step"] = step_tensor(state["step"], flat)
        self._holdings.clear()
        if saved is not None:
            self._knows_groups = saved["knows_groups"]
            self.exp_avg_sq_sums = saved["exp_avg_sq_sums"].to(self.device)
        else:
            self.refresh()


def skipped(grad_norm: Any) -> GlobalMean:
    """What is known of a step that an engine skips because of a non-finite gradient."""
    nan, no = torch.full((), torch.nan, dtype=torch.float64), torch.zeros((), dtype=torch.bool)
    return GlobalMean(nan, torch.as_tensor(grad_norm, dtype=torch.float64), nan, is_finite=no, is_live=no)


def _in_first_entry(x: Tensor) -> Tensor:
    return torch.cat([x.sum().reshape(1), torch.zeros_like(x[1:])])
