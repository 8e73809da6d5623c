"""Who supplies the global mean of a step: every optimizer has one source at a time, an engine's or one of these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from adai_dist.hyper import Hyper
from adai_dist.optimizer.unsupported import check_not_held_in_parts, check_one_layout, check_params_were_given
from adai_dist.sharding.comparison import Comparison
from adai_dist.sharding.configured import Joint
from adai_dist.sharding.mean import GlobalMean, Sums, global_mean, unscaling_coefficient
from adai_dist.sharding.ownership import local_tensor
from adai_dist.sharding.plan import ModelSharding
from adai_dist.sharding.shards import OwnedShards

if TYPE_CHECKING:
    from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia


class MeanSource(ABC):
    """Supplies the global mean of an optimizer's steps. An engine that steps in a way of its own brings one of its own.

    A step of an optimizer is::

        source = optimizer.mean_source
        shards = optimizer.owned_shards()
        mean = source.mean(optimizer, shards, optimizer.max_grad_norm)
        optimizer.advance(shards, mean)
        source.after(optimizer, shards, mean)

    An engine assigns :attr:`AdaptiveInertia.mean_source` before the first step.
    """

    @abstractmethod
    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        """The mean over every element of the model, of the step that is about to be taken.

        Args:
            shards: what this rank is going to step; may be empty.
            max_norm: bound of the global gradient norm in this step; None where nothing is clipped.

        Raises:
            RuntimeError: there is no such mean; nothing has been stepped.

        Collective: the source says which; all ranks that share the mean must call alike.
        """
        ...

    def after(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """What is left to be done once the shards are stepped. Collective: none."""
        optimizer.record(mean)

    def part(self, optimizer: AdaptiveInertia) -> Hashable:
        """What tells apart the parts of the model that are stepped in turn; None where each step takes all of it."""
        del optimizer
        return None

    def sharding(self) -> ModelSharding | None:
        """Who holds what, where the tensors do not show it."""
        return None

    def check_allows(self, call: str, remedy: str) -> None:
        """Raises: RuntimeError: the engine that the source belongs to rules out this call of the optimizer."""
        del call, remedy

    def refresh(self) -> None:
        """Forget what follows from the states. Collective: none."""
        return

    def between_steps(self) -> MeanSource:
        """The source of steps to come, without what is known of a single one."""
        return self


class ShardedMean(MeanSource):
    """Observes the shards and adds up over the process groups of the plan: what an optimizer begins with.

    Collective: one all-reduce of 64 bytes per process group of :attr:`AdaptiveInertia.mean_group`.
    """

    def __init__(self, model_sharding: ModelSharding | None = None) -> None:
        self.model_sharding = model_sharding
        self._observed = ObservedMean()

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        if self.model_sharding is None:
            check_params_were_given(optimizer)
            if self._observed.is_first:
                check_not_held_in_parts(optimizer)
        return self._observed.of(optimizer, shards, max_norm)

    def sharding(self) -> ModelSharding | None:
        return self.model_sharding


class SharedMean(MeanSource):
    """One mean for several optimizers of one model: the first of them to step finds it for all.

    Collective: as :class:`ShardedMean`, by the first optimizer alone.
    """

    def __init__(self, members: tuple[AdaptiveInertia, ...], model_sharding: ModelSharding | None) -> None:
        self.members = members
        self.model_sharding = model_sharding
        self._observed = ObservedMean()
        self._joint = Joint((), model_sharding)

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        bounds = [member.max_grad_norm for member in self.members]
        if len(set(bounds)) > 1:
            raise ValueError(
                "optimizers that share one mean share one norm and must have the same max_grad_norm, "
                f"got {bounds!r}; set them alike"
            )
        others = [member for member in self.members if member is not optimizer]
        mean = self._observed.of(optimizer, shards, max_norm, others)
        for other in others:
            other.mean_source = KnownMean(other, mean, self, is_shared=True)
        return mean

    def sharding(self) -> ModelSharding | None:
        params = tuple(param for member in self.members for param in member.params())
        if not self._joint.is_of(params):
            self._joint = Joint(params, self.model_sharding)
        return self._joint

    def check_allows(self, call: str, remedy: str) -> None:
        if call in ("configure_sharding()", "share_mean()"):
            raise RuntimeError(
                f"an optimizer that shares its mean must be configured with the others, got {call} of one; pass the "
                "arguments to share_mean()"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError(
            "an optimizer that shares its mean with others must not be copied alone; copy the models and make new "
            "optimizers"
        )


class KnownMean(MeanSource):
    """A mean that was found before the step that uses it.

    Args:
        known: the mean.
        then: the source of the steps after this one.
        is_shared: another optimizer found it (:func:`adai_dist.share_mean`), and reports it.
    """

    def __init__(self, optimizer: AdaptiveInertia, known: GlobalMean, then: MeanSource, *, is_shared: bool) -> None:
        self.known = known
        self.then = then
        self.is_shared = is_shared
        self._found_from: Ingredients | None = Ingredients.of(optimizer)

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        optimizer.mean_source = self.then
        if self._found_from is not None and self._found_from.are_those_of(optimizer):
            return self.known
        if not self.is_shared:
            raise RuntimeError(
                "gradients, states and hyperparameters must stay as they are between clip_grad_norm_() and step(), but "
                "they changed; call clip_grad_norm_() after the last backward pass (and after "
                "scaler.unscale_(optimizer))"
            )
        if bool(self.known.is_live):  # only here, before an error, does the host wait
            raise RuntimeError(
                "gradients, states and hyperparameters must stay as they are from the first step() of the optimizers "
                "that share one mean to the last, but they changed; step all of them before the next backward pass"
            )
        return self.then.mean(optimizer, shards, max_norm)  # that step left nothing behind, and this one is another

    def after(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], mean: GlobalMean) -> None:
        if mean is self.known:
            optimizer.record(mean, is_logged=not self.is_shared)
        else:
            self.then.after(optimizer, shards, mean)

    def sharding(self) -> ModelSharding | None:
        return self.then.sharding()

    def check_allows(self, call: str, remedy: str) -> None:
        self.then.check_allows(call, remedy)

    def refresh(self) -> None:
        self._found_from = None
        self.then.refresh()

    def between_steps(self) -> MeanSource:
        return self.then


class Unbound(MeanSource):
    """Refuses every step: the engine has not said yet, or will not say, what the mean is."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def mean(self, optimizer: AdaptiveInertia, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        raise RuntimeError(self.reason)


class Ingredients:
    """What the mean of a step depends on, and what torch has recorded of writes to it.

    Not recorded are writes by collectives, through ``.data``, NumPy or DLPack.
    """

    def __init__(self, tensors: list[Tensor], hypers: list[tuple[float, ...]]) -> None:
        self._tensors = tensors
        self._versions = [(_version(tensor), _version(local_tensor(tensor))) for tensor in tensors]
        self._hypers = hypers

    @classmethod
    def of(cls, optimizer: AdaptiveInertia) -> Ingredients:
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
        now = Ingredients.of(optimizer)
        if (now._versions, now._hypers) != (self._versions, self._hypers):
            return False
        return all(a is b for a, b in zip(now._tensors, self._tensors, strict=True))


def _version(tensor: Tensor) -> int:
    """Gradients may have been made in inference mode, where torch records no writes."""
    return 0 if tensor.is_inference() else tensor._version


class LastClip:
    """The clip coefficient of the last step, which that of the next one is expected to be near.

    It matters near convergence under coupled decay alone, see :func:`adai_dist.equations.mean_sum`.
    """

    def __init__(self) -> None:
        self._clip: Tensor | float = 1.0

    def expected(self, unscaling: Tensor) -> Tensor:
        """The coefficient to expect of gradients that ``unscaling`` unscales; 0-dim float64."""
        return unscaling * self._clip

    def note(self, mean: GlobalMean, unscaling: Tensor) -> None:
        self._clip = torch.where(mean.is_finite, mean.coefficient / unscaling, self._clip)


class ObservedMean:
    """Observes shards and adds up over the process groups of the plan; keeps what one mean has to do with the next."""

    def __init__(self) -> None:
        self.is_first: bool = True
        self._last_clip = LastClip()
        self._comparison = Comparison()

    def of(
        self,
        optimizer: AdaptiveInertia,
        shards: list[OwnedShards],
        max_norm: float | None,
        others: Sequence[AdaptiveInertia] = (),
    ) -> GlobalMean:
        """The mean over the shards of an optimizer, and of ``others`` that share it.

        Raises:
            RuntimeError: the sharding plan of this rank, or in the first step of any rank, refuses the layout.

        Collective: one all-reduce of 64 bytes per process group of the plan, also where it is refused.
        """
        grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)  # set by torch.amp.GradScaler
        if grad_scale is not None or hasattr(optimizer, "found_inf"):
            check_one_layout(optimizer.params())
        plan = optimizer.sharding_plan
        self._comparison.before_step(plan)
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
            "all ranks that share the mean must be able to tell which ranks hold what, but another one cannot; what it "
            "says in its own error message applies to all of them"
        )
