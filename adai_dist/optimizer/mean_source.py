"""Sources of the global mean: every optimizer has one at a time, from this file or from an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from adai_dist.hyper import Hyper
from adai_dist.optimizer.unsupported import check_not_in_zero_redundancy, check_params_were_given, check_same_placements
from adai_dist.sharding.assumption_check import AssumptionCheck
from adai_dist.sharding.local_tensor import local_tensor
from adai_dist.sharding.mean import GlobalMean, Sums, global_mean, unscaling_coefficient
from adai_dist.sharding.owned_shards import OwnedShards
from adai_dist.sharding.plan import ShardingPlanner
from adai_dist.sharding.planners import JointPlanner

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


class MeanSource(ABC):
    """A source of the global mean; engines that step parts of the model one at a time implement their own.

    An optimizer steps as follows::

        source = optimizer.mean_source
        shards = optimizer.owned_shards()
        mean = source.mean(optimizer, shards, optimizer.max_grad_norm)
        optimizer.advance(shards, mean)
        source.after(optimizer, shards, mean)

    An engine assigns :attr:`AdaptiveInertia.mean_source` before the first step.
    """

    @abstractmethod
    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        """Return the mean over every element of the model for the step that follows.

        Args:
            shards: the shards that this rank is about to step; may be empty.
            max_norm: bound of the global gradient norm in this step; None for no clipping.

        Raises:
            RuntimeError: the mean cannot be computed; nothing has been stepped.

        Collective: documented by each source; all ranks that share the mean must call it in the same order.
        """
        ...

    def after(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """Finish a step whose shards have been stepped. Collective: none."""
        optimizer.record(mean)

    def part(self, optimizer: AdaptiveInertia) -> Hashable:
        """Return the key of the part of the model that is stepped now; None if each step takes the whole model."""
        del optimizer
        return None

    def sharding(self) -> ShardingPlanner | None:
        """Return the planner; None if the tensors show which rank holds which elements."""
        return None

    def check_allows(self, call: str, remedy: str) -> None:
        """Raise RuntimeError if the engine of this source does not support this call of the optimizer."""
        del call, remedy

    def refresh(self) -> None:
        """Invalidate everything derived from the states. Collective: none."""
        return

    def between_steps(self) -> MeanSource:
        """Return the source of later steps, without what is known for a single step."""
        return self


class ShardedMean(MeanSource):
    """The default source: observes the shards and reduces over the process groups of the plan.

    Collective: one all-reduce of 64 bytes per process group of :attr:`AdaptiveInertia.mean_group`.
    """

    def __init__(self, planner: ShardingPlanner | None = None) -> None:
        self.planner = planner
        self._observed = ObservedMean()

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        if self.planner is None:
            check_params_were_given(optimizer)
            if self._observed.is_first:
                check_not_in_zero_redundancy(optimizer)
        return self._observed.of(optimizer, shards, max_norm)

    def sharding(self) -> ShardingPlanner | None:
        return self.planner


class SharedMean(MeanSource):
    """One mean for several optimizers of one model, computed by the first optimizer to step.

    Collective: as :class:`ShardedMean`, by the first optimizer only.
    """

    def __init__(self, members: tuple[AdaptiveInertia, ...], planner: ShardingPlanner | None) -> None:
        self.members = members
        self.planner = planner
        self._observed = ObservedMean()
        self._joint_planner = JointPlanner((), planner)

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        bounds = [member.max_grad_norm for member in self.members]
        if len(set(bounds)) > 1:
            raise ValueError(
                "optimizers that share one mean, and so one norm, must have the same max_grad_norm, "
                f"got {bounds!r}; set the same value"
            )
        others = [member for member in self.members if member is not optimizer]
        mean = self._observed.of(optimizer, shards, max_norm, others)
        for other in others:
            other.mean_source = KnownMean(other, mean, self, is_shared=True)
        return mean

    def sharding(self) -> ShardingPlanner | None:
        params = tuple(param for member in self.members for param in member.params())
        if not self._joint_planner.is_of(params):
            self._joint_planner = JointPlanner(params, self.planner)
        return self._joint_planner

    def check_allows(self, call: str, remedy: str) -> None:
        if call in ("configure_sharding()", "share_mean()"):
            raise RuntimeError(
                f"an optimizer that shares its mean must be configured together with the others, got {call} of one; "
                "pass the arguments to share_mean()"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError(
            "an optimizer that shares its mean with others must not be copied separately; copy the models and make new "
            "optimizers"
        )


class KnownMean(MeanSource):
    """A mean that was computed before the step that uses it.

    Args:
        known: the mean.
        then: the source of later steps.
        is_shared: another optimizer has computed the mean (:func:`adai_dist.share_mean`), and logs it.
    """

    def __init__(self, optimizer: AdaptiveInertia, known: GlobalMean, then: MeanSource, *, is_shared: bool) -> None:
        self.known = known
        self.then = then
        self.is_shared = is_shared
        self._inputs: MeanInputs | None = MeanInputs.of(optimizer)

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        optimizer.mean_source = self.then
        if self._inputs is not None and self._inputs.are_those_of(optimizer):
            return self.known
        if not self.is_shared:
            raise RuntimeError(
                "gradients, states and hyperparameters must not change between clip_grad_norm_() and step(), but they "
                "did; call clip_grad_norm_() after the last backward pass (and after scaler.unscale_(optimizer))"
            )
        if bool(self.known.is_live):  # the host waits only here, before an error
            raise RuntimeError(
                "gradients, states and hyperparameters must not change from the first step() of the optimizers that "
                "share one mean to the last, but they did; step all of them before the next backward pass"
            )
        return self.then.mean(optimizer, shards, max_norm)  # the known mean was of an earlier step that did not count

    def after(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], mean: GlobalMean) -> None:
        if mean is self.known:
            optimizer.record(mean, is_logged=not self.is_shared)
        else:
            self.then.after(optimizer, shards, mean)

    def sharding(self) -> ShardingPlanner | None:
        return self.then.sharding()

    def check_allows(self, call: str, remedy: str) -> None:
        self.then.check_allows(call, remedy)

    def refresh(self) -> None:
        self._inputs = None
        self.then.refresh()

    def between_steps(self) -> MeanSource:
        return self.then


class Unbound(MeanSource):
    """A source that refuses every step, as the engine does not supply a mean, or not yet."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        raise RuntimeError(self.reason)


class MeanInputs:
    """The tensors and hyperparameters that a mean depends on, with the number of writes that torch has recorded.

    Torch does not record writes by collectives or through ``.data``, NumPy or DLPack.
    """

    def __init__(self, tensors: list[Tensor], hypers: list[tuple[float, ...]]) -> None:
        self._tensors = tensors
        self._versions = [(_version(tensor), _version(local_tensor(tensor))) for tensor in tensors]
        self._hypers = hypers

    @classmethod
    def of(cls, optimizer: AdaptiveInertia) -> MeanInputs:
        """Collect the inputs of the next step's mean."""
        tensors: list[Tensor] = []
        hypers = Hyper.from_param_groups(optimizer.param_groups)
        for hyper, param_group in zip(hypers, optimizer.param_groups, strict=True):
            for param in param_group["params"]:
                if param.grad is not None:
                    state = optimizer.state.get(param, {})
                    tensors += [param.grad, *(state[name] for name in ("exp_avg_sq", "step") if name in state)]
                    tensors += [param] if hyper.coupled_decay else []
        return cls(tensors, [(hyper.beta2, hyper.coupled_decay, hyper.sign) for hyper in hypers])

    def are_those_of(self, optimizer: AdaptiveInertia) -> bool:
        """Return whether the optimizer has the same inputs, unchanged."""
        now = MeanInputs.of(optimizer)
        if (now._versions, now._hypers) != (self._versions, self._hypers):
            return False
        return all(a is b for a, b in zip(now._tensors, self._tensors, strict=True))


def _version(tensor: Tensor) -> int:
    """Return the number of recorded writes; 0 for gradients made in inference mode, where torch records none."""
    return 0 if tensor.is_inference() else tensor._version


class LastClip:
    """The clip coefficient of the last step, as an estimate of the next one.

    It matters only near convergence under coupled decay, see :func:`adai_dist.equations.mean_sum`.
    """

    def __init__(self) -> None:
        self._clip: Tensor | float = 1.0

    def expected(self, unscaling: Tensor) -> Tensor:
        """Return the expected coefficient of gradients that are multiplied by ``unscaling``; 0-dim float64."""
        return unscaling * self._clip

    def note(self, mean: GlobalMean, unscaling: Tensor) -> None:
        """Store the clip coefficient of a step."""
        self._clip = torch.where(mean.is_finite, mean.coefficient / unscaling, self._clip)


class ObservedMean:
    """The computation of a mean from shards, with what it keeps from one step to the next."""

    def __init__(self) -> None:
        self.is_first: bool = True
        self._last_clip = LastClip()
        self._assumption_check = AssumptionCheck()

    def of(
        self,
        optimizer: AdaptiveInertia,
        shards: list[OwnedShards],
        max_norm: float | None,
        others: Sequence[AdaptiveInertia] = (),
    ) -> GlobalMean:
        """Return the mean over the shards of an optimizer, and of ``others`` that share it.

        Raises:
            RuntimeError: the sharding plan of this rank (in the first step, of any rank) refuses the layout.

        Collective: one all-reduce of 64 bytes per process group of the plan, even if the plan refuses the layout.
        """
        grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)  # set by torch.amp.GradScaler
        if grad_scale is not None or hasattr(optimizer, "found_inf"):
            check_same_placements(optimizer.params())
        plan = optimizer.sharding_plan
        self._assumption_check.before_step(plan)
        unscaling = unscaling_coefficient(grad_scale, optimizer.device)
        expected = self._last_clip.expected(unscaling)
        if plan.refusal:
            sums = Sums.of_refusal(optimizer.device)
        else:
            sums = optimizer.observe(shards, expected)
            for other in others:
                sums = sums.plus(other.observe(other.owned_shards(), expected))
        sums = sums.added_up(plan.process_groups)
        if plan.refusal:
            raise RuntimeError(plan.refusal)
        if self.is_first and plan.process_groups:
            _check_not_refused(sums)
        self.is_first = False
        mean = global_mean(sums, (), max_norm=max_norm, grad_scale=grad_scale, expected=expected)
        self._last_clip.note(mean, unscaling)
        return mean


def _check_not_refused(sums: Sums) -> None:
    if sums.are_refused():
        raise RuntimeError(
            "all ranks that share the mean must know which ranks hold what, but another rank does not; see the error "
            "message of that rank, which applies to all of them"
        )
