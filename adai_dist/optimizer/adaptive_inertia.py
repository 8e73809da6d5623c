"""The optimizer: observe, global mean, advance."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adai_dist.hyper import Hyper, max_grad_norm_in_range
from adai_dist.kernels import Backends, mode_of
from adai_dist.optimizer.closer_look import what_is_not_finite
from adai_dist.optimizer.first_look import look_at_first_step, warn_of_adams_hyperparameters
from adai_dist.optimizer.mean_source import KnownMean, MeanSource, ShardedMean
from adai_dist.optimizer.reports import ReportsSteps
from adai_dist.optimizer.shared import Shared, begin_sharing, itself
from adai_dist.optimizer.skips_in_a_row import skip_limit_in_range
from adai_dist.optimizer.stateful import StatefulOptimizer
from adai_dist.optimizer.turns import turns
from adai_dist.optimizer.unread_states import UnreadStates
from adai_dist.optimizer.unsupported import check_not_in_backward, check_not_in_inference_mode, warn_of_no_gradients
from adai_dist.optimizer.watched import is_to_be_left_out
from adai_dist.sharding.configured import NumReplicas, configured_sharding
from adai_dist.sharding.holdings import Holdings
from adai_dist.sharding.mean import MOVING, GlobalMean, Sums, unscaling_coefficient
from adai_dist.sharding.plan import ShardingPlan
from adai_dist.sharding.presence import MODULUS
from adai_dist.sharding.shards import OwnedShards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdaptiveInertia(StatefulOptimizer, ReportsSteps):
    """Adaptive Inertia on whatever part of the model this rank holds: the class behind Adai, AdaiW and AdaiV2.

    A step has three phases, and only the second one communicates::

        observe      local       inner products of gradients (and parameters), one read of the gradients
        global mean  collective  64 bytes per process group: norm, clip coefficient, mean, non-finite flag
        advance      local       one pass over parameters, gradients and states

    The second one is the business of the :class:`MeanSource`.

    Args:
        params: parameters, named parameters, or parameter groups, each with its own hyperparameters.
        lr: learning rate; that of plain SGD, or lr / (1 - momentum) of SGD with momentum. A one-element tensor may be
            changed on the device between steps.
        betas: ``(beta0, beta2)``: scale of ``1 - inertia``; decay rate of the second moment.
        eps: inertia stays at or below ``1 - eps``.
        weight_decay: decay rate.
        dampening: ``d`` of AdaiV2, between 0 and 1; 1 is Adai.
        decoupled: decay the parameters directly (True, AdaiW) or through the gradient (False, L2); None for the
            default of the class.
        maximize: ascend.
        foreach: where the equations run uncompiled, False steps one tensor at a time; same results.
        max_grad_norm: clip the global gradient norm inside every step; None for no clipping. ``param.grad`` is not
            changed.
        require_kernels: raise an error where the compiled kernels cannot be had, instead of a warning.
        retire_beta1_prod: free the state ``beta1_prod`` of a parameter once it has no effect any more (after 17,321
            steps at eps=1e-3, at the latest); not a bit of the trajectory changes.
        max_consecutive_skips: raise an error once so many steps in a row were skipped; None for no limit. On an
            accelerator the error comes up to 31 steps later, as the host does not wait for each step. A GradScaler
            that looks for its loss scale skips about 10 steps in a row.
        missing_as_zeros: take the gradient of a DTensor parameter as zeros on ranks that lack it, as those do to whose
            experts no token was sent. By default the first step in which some ranks of its mesh lack it is skipped,
            with a warning, and this becomes True.
        independent: other optimizers of the process train other models, as in a GAN, and nothing is said of means that
            they do not share.

    Attributes:
        max_grad_norm, retire_beta1_prod, max_consecutive_skips, missing_as_zeros, independent: as given; may be changed
            between steps.
        mean_source: supplies the mean of every step; an engine may assign its own.
        backends: what carries out the local phases.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Numerics: states and arithmetic are float32, or float64 for float64 parameters; sums are float64. A step makes the
    host wait for no device, unless a parameter's gradients come and go, or a state retires.
    """

    decoupled_by_default: ClassVar[bool] = True
    _kept_by_copies = (
        *StatefulOptimizer._kept_by_copies,
        "max_grad_norm",
        "retire_beta1_prod",
        "max_consecutive_skips",
        "missing_as_zeros",
        "independent",
        "mean_source",
        "backends",
    )
    max_grad_norm: Shared[float | None] = Shared()
    retire_beta1_prod: Shared[bool] = Shared()
    max_consecutive_skips: Shared[int | None] = Shared()
    missing_as_zeros: Shared[bool] = Shared()
    independent: Shared[bool] = Shared()
    mean_source: Shared[MeanSource] = Shared()
    backends: Shared[Backends] = Shared()
    grad_scale: Shared[Tensor | None] = Shared()
    found_inf: Shared[Tensor] = Shared()
    _has_stepped: Shared[bool] = Shared()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = Hyper.betas,
        eps: float = Hyper.eps,
        weight_decay: float = Hyper.weight_decay,
        *,
        dampening: float = Hyper.dampening,
        decoupled: bool | None = None,
        maximize: bool = Hyper.maximize,
        foreach: bool | None = Hyper.foreach,
        max_grad_norm: float | None = None,
        require_kernels: bool = False,
        retire_beta1_prod: bool = True,
        max_consecutive_skips: int | None = None,
        missing_as_zeros: bool = False,
        independent: bool = False,
    ) -> None:
        hyper = Hyper(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            dampening=dampening,
            decoupled=self.decoupled_by_default if decoupled is None else decoupled,
            maximize=maximize,
            foreach=foreach,
        )
        flags = {
            "retire_beta1_prod": retire_beta1_prod,
            "missing_as_zeros": missing_as_zeros,
            "independent": independent,
        }
        for name, value in flags.items():
            if not isinstance(value, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{name} must be a bool, got {value!r}")
        begin_sharing(self)
        self.backends = Backends(mode_of(require_kernels))
        self.max_grad_norm = max_grad_norm_in_range("max_grad_norm", max_grad_norm)
        self.retire_beta1_prod = retire_beta1_prod
        self.max_consecutive_skips = skip_limit_in_range(max_consecutive_skips)
        self.missing_as_zeros = missing_as_zeros
        self.independent = independent
        self.mean_source = ShardedMean()
        self._has_stepped = False
        ReportsSteps.__init__(self)
        self._holdings: dict[Hashable, Holdings] = {}
        self._unread = UnreadStates()
        super().__init__(params, hyper)
        warn_of_adams_hyperparameters(self.param_groups)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and skipping to step(), which reads the gradients once then."""
        return not is_to_be_left_out(self)

    def _begin_copy(self) -> None:
        ReportsSteps.__init__(self)
        self._holdings = {}
        self._has_stepped = False
        self._unread = UnreadStates()
        self.mean_source = self.mean_source.between_steps()

    # -- a step ----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        If a gradient on any rank is inf or NaN, all ranks leave parameters and states as they are, count the step in
        :attr:`num_skipped_steps`, and the main rank logs a warning, which says what was not finite.

        Args:
            closure: computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            TypeError: a gradient is sparse, or not held like its parameter.
            ValueError: a hyperparameter is out of range; a state is incomplete or has another shape.
            RuntimeError: there is no mean. Gradients changed since :meth:`clip_grad_norm_`; the tensors do not show
                which ranks hold what, and :meth:`configure_sharding` has not said it (FSDP1, marks of Megatron, meshes
                of some ranks); a backward pass is under way (optimizer-in-backward); a GradScaler does not see all
                DTensor gradients; DeepSpeed has not bound the optimizer. Or something was made, or the step is
                taken, in :func:`torch.inference_mode`. Or ``max_consecutive_skips`` steps in a row were skipped.

        Collective: all ranks that share the model's DTensor parameters, or all of the configured process group, also
        those that hold no element or no gradient: one all-reduce of 64 bytes per distinct mesh dimension (one for
        FSDP, two for HSDP), or one in all where :meth:`configure_sharding` names the process group. None for plain
        parameters alone (one device, DDP). A gradient that is placed unlike its parameter is redistributed first. A
        rank that raises an error leaves the others waiting until their process group's timeout.
        """
        loss = None
        if closure is not None:
            source = self.mean_source
            with torch.enable_grad():
                loss = closure()
            # Trainers pass closures that do nothing; those that add to the gradients are found out by KnownMean.
            if isinstance(source, KnownMean) and self.mean_source is not source:
                raise RuntimeError(
                    "step(closure) must not follow clip_grad_norm_(), got a closure that computes other gradients; "
                    "set max_grad_norm to clip those"
                )
        itself(self)._step()  # pyright: ignore[reportAttributeAccessIssue] torch types its decorator for functions only
        return loss

    @torch._disable_dynamo  # a collective and host code: nothing to trace
    def _step(self) -> None:
        check_not_in_backward()
        check_not_in_inference_mode()
        source = self.mean_source
        shards = self.owned_shards()
        mean = source.mean(self, shards, self.max_grad_norm)
        self.advance(shards, mean)
        source.after(self, shards, mean)
        if not self._has_stepped:
            look_at_first_step(self, [param for owned in shards for param in owned.layout.params])
            if not shards:
                warn_of_no_gradients(self.params(), self.sharding_plan.is_main_rank)
        self._has_stepped = True
        if self.retire_beta1_prod:
            states = (self.state[param] for param in self.params() if param in self.state)
            self._retirement.after_step(states, self.device)

    @torch.no_grad()
    def owned_shards(self) -> list[OwnedShards]:
        """What this rank holds of the parameters that have a gradient; creates states that do not exist yet.

        Collective: where a gradient is placed unlike its parameter, all ranks of the parameter's mesh.
        """
        self.create_states(self.params())
        return self._holdings_of_part().owned_shards(
            self.param_groups, self.state, self.mean_source.sharding(), self.missing_as_zeros
        )

    @torch.no_grad()
    def observe(self, shards: list[OwnedShards], expected: Tensor | None = None) -> Sums:
        """What this rank adds to the global mean: weighted sums, float64, on the device of the first parameter.

        Args:
            expected: what the gradients are probably going to be multiplied by, 0-dim float64; by default 1 over the
                loss scale.

        Collective: none.
        """
        if expected is None:
            expected = unscaling_coefficient(getattr(self, "grad_scale", None), self.device)
        moving = MOVING / (len(shards) * self.sharding_plan.num_terms) if shards else 0.0
        total = torch.zeros(len(Sums._fields), dtype=torch.float64, device=self.device)
        for owned in shards:
            total += owned.observe(expected.to(owned.layout.weights.device), moving).to(self.device)
            for holding in owned.written:
                self._unread.add(id(holding.param), [holding.exp_avg])
        if share := sum(owned.layout.share for owned in shards) % MODULUS:
            total[-1] += share
        sums = Sums(*total.unbind())
        unread = self._unread.look(self.device)
        if unread is not None:
            sums = sums._replace(carried=sums.carried + unread)
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # set by torch.amp.GradScaler
        if found_inf is None:
            return sums
        is_overflow = found_inf.to(self.device).reshape(()) > 0
        return sums._replace(grad_squared=torch.where(is_overflow, torch.inf, sums.grad_squared))

    @torch.no_grad()
    def advance(self, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """Step the given shards with a known mean, in place. Each shard must be stepped once per step.

        Collective: none.
        """
        for owned in shards:
            owned.advance(mean.to(owned.layout.weights.device))

    def record(self, mean: GlobalMean, *, is_logged: bool = True) -> None:
        """Keep what a step has found out for the properties that report it.

        Args:
            is_logged: the main rank logs a step that did not count.

        Raises:
            RuntimeError: ``max_consecutive_skips`` steps in a row were skipped; the same on all ranks.

        Collective: none.
        """
        turns.note(itself(self))
        self._report(mean, lambda: is_logged and self.sharding_plan.is_main_rank, self._look_closer)
        if self._uncounted.has_lacked_gradients:
            self.missing_as_zeros = True
        self._skips_in_a_row.check(mean, self.max_consecutive_skips)

    def _look_closer(self) -> str:
        seen = what_is_not_finite(self.param_groups, self.state)
        found = f"not finite on this rank: {seen}; " if seen else ""
        is_scaled = getattr(self, "found_inf", None) is not None
        return found + ("torch.amp.GradScaler lowers its loss scale; " if is_scaled else "")

    def refresh(self) -> None:
        """Read the states anew in the next step, after writing to single elements in a way that torch does not record.

        Other writes are seen without this call: torch records in-place operations, replaced and loaded states, and
        what collectives, ``.data``, NumPy and DLPack write to whole tensors shows in samples that every step compares.

        Collective: none.
        """
        self._holdings.clear()
        self._unread.clear()
        self.mean_source.refresh()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As that of torch; raises RuntimeError where an engine has taken the parameters over."""
        self.mean_source.check_allows("add_param_group()", "list all parameters before")
        super().add_param_group(param_group)

    # -- clipping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global gradient norm in the next :meth:`step`, with the coefficient of torch's ``clip_grad_norm_``.

        Works on every mixture of meshes and plain parameters. Gradients are read once and not changed; the step needs
        no collective of its own then. Replaces ``max_grad_norm`` for that step. Call it after the last backward pass,
        and with :class:`torch.amp.GradScaler` after ``scaler.unscale_(optimizer)``.

        Args:
            max_norm: bound of the norm, > 0; infinity only measures.

        Returns:
            The global norm before clipping, 0-dim float64.

        Collective: as :meth:`step`, which makes none then.
        """
        optimizer = itself(self)
        source = self.mean_source.between_steps()
        source.check_allows("clip_grad_norm_()", "set its own clipping")
        bound = max_grad_norm_in_range("max_norm", max_norm)
        if bound is None:
            raise TypeError("max_norm must be a number, got None; leave the call out to clip nothing")
        mean = source.mean(optimizer, self.owned_shards(), bound)
        self.mean_source = KnownMean(optimizer, mean, source, is_shared=False)
        return mean.grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`; a pending :meth:`clip_grad_norm_` is dropped."""
        self.mean_source = self.mean_source.between_steps()
        super().zero_grad(set_to_none)

    # -- sharding --------------------------------------------------------------------------------------------------

    def configure_sharding(
        self,
        process_group: ProcessGroup | None = None,
        num_replicas: NumReplicas = None,
        *,
        model: nn.Module | None = None,
        stages: ProcessGroup | None = None,
    ) -> None:
        """Say what the tensors cannot: which ranks share the mean, and who holds what.

        DTensor parameters and DDP need no call; FSDP1 needs ``model``, pipelines need ``stages``. Without arguments, go
        back to what the tensors say.

        Args:
            process_group: all ranks that share the mean; by default all ranks of the job.
            num_replicas: how many of these ranks hold the same local elements of a plain parameter: a number, a
                function of the parameter, or None where all of them do. A function is asked about DTensors too;
                where it returns None the placements decide, and ranks beyond the mesh are taken to hold copies.
                With ``stages``: how many of its ranks hold the parameter (a tied embedding); None stands for one.
            model: the module that FSDP1 wraps, or that contains FSDP1 modules; they are asked about their parameters.
            stages: ranks that hold different parameters, one of every pipeline stage; the sums are added up over them
                in the end. Goes with ``model`` and with DTensors.

        Raises:
            TypeError: an argument is none of these.
            ValueError: this rank is no member of a process group; ``process_group`` is given with ``model`` or
                ``stages``, or ``num_replicas`` with ``model`` alone; in the next step: ``num_replicas`` is out of
                range, ``model`` lacks an FSDP1 module of the parameters, the ranks of ``stages`` share parameters.
            RuntimeError: torch.distributed is not initialised; DeepSpeed's ZeRO drives the optimizer; the optimizer
                shares its mean (configure that in :func:`adai_dist.share_mean`).

        Collective: none here; all ranks of the process groups must step together afterwards.
        """
        self.mean_source.check_allows("configure_sharding()", "leave it out")
        self.mean_source = ShardedMean(configured_sharding(process_group, num_replicas, model, stages))

    @property
    def mean_group(self) -> tuple[ProcessGroup, ...]:
        """The process groups over which the sums are added up, in this order; none where nothing is communicated."""
        return self.sharding_plan.process_groups

    @property
    def sharding_plan(self) -> ShardingPlan:
        """Who shares the mean, and the weight of every parameter in it, as of now."""
        return self._holdings_of_part().plan(self.param_groups, self.mean_source.sharding())

    def _holdings_of_part(self) -> Holdings:
        part = self.mean_source.part(self)
        if part not in self._holdings:
            self._holdings[part] = Holdings(self.backends)
        return self._holdings[part]

    def __repr__(self) -> str:
        return f"{super().__repr__()}\nKernels: {self.backends}"
