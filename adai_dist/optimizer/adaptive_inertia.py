"""The optimizer: a step observes, computes the global mean, and advances."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adai_dist.hyper import Hyper, max_grad_norm_in_range
from adai_dist.kernels import Backends, mode_of
from adai_dist.optimizer.first_moment_check import FirstMomentCheck
from adai_dist.optimizer.grad_scaler import scaler_skips_step
from adai_dist.optimizer.interleaved_steps import interleaved_steps
from adai_dist.optimizer.likely_mistakes import (
    warn_at_first_step,
    warn_of_adams_hyperparameters,
    warn_of_no_gradients,
)
from adai_dist.optimizer.mean_source import KnownMean, MeanSource, ShardedMean
from adai_dist.optimizer.nonfinite_diagnosis import describe_nonfinite
from adai_dist.optimizer.proxies import SharedAttribute, init_shared_attributes, unproxied
from adai_dist.optimizer.skipped_steps import skip_limit_in_range
from adai_dist.optimizer.stateful import StatefulOptimizer
from adai_dist.optimizer.step_report import StepReport
from adai_dist.optimizer.unsupported import check_not_in_backward, check_not_in_inference_mode
from adai_dist.precision import MasterWeights, Precision, StateDtype
from adai_dist.sharding.mean import LR_SIGNAL, GlobalMean, Sums, unscaling_coefficient
from adai_dist.sharding.missing_gradients import CHECKSUM_MODULUS
from adai_dist.sharding.owned_shards import OwnedShards
from adai_dist.sharding.plan import ShardingPlan
from adai_dist.sharding.planners import NumReplicas, make_planner
from adai_dist.sharding.shard_cache import ShardCache

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdaptiveInertia(StatefulOptimizer, StepReport):
    """The common class of Adai, AdaiW and AdaiV2: Adaptive Inertia on the part of the model that this rank holds.

    A step has three phases, and only the second one communicates::

        observe      local       inner products of gradients (and parameters), one read of the gradients
        global mean  collective  64 bytes per process group: norm, clip coefficient, mean, non-finite flag
        advance      local       one pass over parameters, gradients and states

    The :class:`MeanSource` carries out the second phase. :meth:`observe` and :meth:`advance` take
    :class:`adai_dist.sharding.owned_shards.OwnedShards`, which group the local tensors of the parameters.

    Args:
        params: parameters, named parameters, or parameter groups, each with its own hyperparameters.
        lr: learning rate; the same as for plain SGD, or lr / (1 - momentum) for SGD with momentum. A one-element tensor
            may be changed on the device between steps.
        betas: ``(beta0, beta2)``: scale of ``1 - inertia``; decay rate of the second moment.
        eps: inertia is at most ``1 - eps``.
        weight_decay: decay rate.
        dampening: ``d`` of AdaiV2, between 0 and 1; 1 is Adai.
        decoupled: decay the parameters directly (True, AdaiW) or through the gradient (False, L2); None for the
            default of the class.
        maximize: maximize the objective instead of minimizing it.
        foreach: if the equations run uncompiled, False steps one tensor at a time; same results.
        max_grad_norm: clip the global gradient norm inside every step; None for no clipping. ``param.grad`` is not
            changed.
        require_kernels: raise an error instead of a warning if the compiled kernels are not available.
        retire_beta1_prod: free the state ``beta1_prod`` of a parameter once it has no effect (at eps=1e-3, after at
            most 17,321 steps); the trajectory stays bitwise the same.
        max_consecutive_skips: raise an error once this many consecutive steps were skipped; None for no limit. On an
            accelerator the error is raised up to 31 steps later, as the host does not wait for each step. A GradScaler
            that searches for its loss scale skips about 10 steps in a row.
        missing_as_zeros: take the gradient of a DTensor parameter as zeros on ranks that lack it, as experts do to
            which no token was routed. By default, the first step in which a gradient is missing on some ranks of the
            mesh only is skipped with a warning, and this becomes True.
        independent: other optimizers of the process train other models, as in a GAN; disables the warning about
            optimizers that do not share a mean.
        state_dtype: "float32" (12 bytes of state per parameter, 8 once beta1_prod has retired); "bfloat16" (6 and 4) or
            "mixed8" (4.06 and 3.06 for matrices whose rows are multiples of 32, the others as bfloat16), both rounded
            stochastically. mixed8 requires eps >= 0.00069, and FSDP1 and DeepSpeed do not support it.
        master_weights: keep the float32 values of bfloat16 and float16 parameters, as remainders of 2 bytes per
            parameter: "auto" and True do, and True warns if no parameter is in 16 bits; False rounds parameters
            stochastically, and warns.
        seed: of the stochastic rounding; the same on all ranks. The random bits depend on the seed, the parameter, its
            step count and the element alone, so that a resumed run has the same ones.

    Attributes:
        max_grad_norm, retire_beta1_prod, max_consecutive_skips, missing_as_zeros, independent: as given; may be changed
            between steps.
        mean_source: supplies the mean of every step; an engine may assign its own.
        backends: implementations of the local phases.
        precision: the last three arguments.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Numerics: arithmetic is float32, or float64 for float64 parameters; sums are float64, of the second moments as they
    are stored. In a step the host does not wait for a device, except when the set of parameters with a gradient changes
    or a state retires.
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
    max_grad_norm: SharedAttribute[float | None] = SharedAttribute()
    retire_beta1_prod: SharedAttribute[bool] = SharedAttribute()
    max_consecutive_skips: SharedAttribute[int | None] = SharedAttribute()
    missing_as_zeros: SharedAttribute[bool] = SharedAttribute()
    independent: SharedAttribute[bool] = SharedAttribute()
    mean_source: SharedAttribute[MeanSource] = SharedAttribute()
    backends: SharedAttribute[Backends] = SharedAttribute()
    grad_scale: SharedAttribute[Tensor | None] = SharedAttribute()
    found_inf: SharedAttribute[Tensor] = SharedAttribute()
    _has_stepped: SharedAttribute[bool] = SharedAttribute()

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
        state_dtype: StateDtype = Precision.state_dtype,
        master_weights: MasterWeights = Precision.master_weights,
        seed: int = Precision.seed,
    ) -> None:
        precision = Precision(state_dtype=state_dtype, master_weights=master_weights, seed=seed)
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
        init_shared_attributes(self)
        self.backends = Backends(mode_of(require_kernels))
        self.max_grad_norm = max_grad_norm_in_range("max_grad_norm", max_grad_norm)
        self.retire_beta1_prod = retire_beta1_prod
        self.max_consecutive_skips = skip_limit_in_range(max_consecutive_skips)
        self.missing_as_zeros = missing_as_zeros
        self.independent = independent
        self.mean_source = ShardedMean()
        self._has_stepped = False
        StepReport.__init__(self)
        self._shard_caches: dict[Hashable, ShardCache] = {}
        self._first_moment_check = FirstMomentCheck()
        super().__init__(params, hyper, precision)
        warn_of_adams_hyperparameters(self.param_groups)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and skipping to step(), to save a read of the gradients."""
        return not scaler_skips_step(self)

    def _begin_copy(self) -> None:
        StepReport.__init__(self)
        self._shard_caches = {}
        self._has_stepped = False
        self._first_moment_check = FirstMomentCheck()
        self.mean_source = self.mean_source.between_steps()

    # -- a step ----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient.

        If a gradient on any rank is inf or NaN, all ranks leave parameters and states unchanged, count the step in
        :attr:`num_skipped_steps`, and the main rank logs a warning that names what was not finite.

        Args:
            closure: recomputes the gradients and returns the loss.

        Returns:
            The result of ``closure``.

        Raises:
            TypeError: a gradient is sparse, or only one of parameter and gradient is a DTensor.
            ValueError: a hyperparameter is out of range; a state is incomplete or has another shape.
            RuntimeError: the mean cannot be computed: gradients changed since :meth:`clip_grad_norm_`; neither the
                tensors nor :meth:`configure_sharding` define which ranks hold what (FSDP1, marks of Megatron, meshes of
                some ranks); a backward pass is in progress (optimizer-in-backward); a GradScaler does not see all
                DTensor gradients; or DeepSpeed has not bound the optimizer. Tensors were made, or the step is taken, in
                :func:`torch.inference_mode`. ``max_consecutive_skips`` consecutive steps were skipped.

        Collective: all ranks that share the model's DTensor parameters, or all ranks of the configured process group,
        including ranks without elements or gradients: one all-reduce of 64 bytes per distinct mesh dimension (one for
        FSDP, two for HSDP), or a single one if :meth:`configure_sharding` names the process group. None if all
        parameters are plain (one device, DDP). Gradients whose placements differ from their parameter's are
        redistributed first. If a rank raises an error, the others wait until the timeout of their process group.
        """
        loss = None
        if closure is not None:
            source = self.mean_source
            with torch.enable_grad():
                loss = closure()
            # Trainers pass closures that do nothing; KnownMean detects those that add to the gradients.
            if isinstance(source, KnownMean) and self.mean_source is not source:
                raise RuntimeError(
                    "step(closure) must not follow clip_grad_norm_(), got a closure that computes other gradients; "
                    "set max_grad_norm to clip them"
                )
        unproxied(self)._step()  # pyright: ignore[reportAttributeAccessIssue] torch types its decorator for functions only
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
            warn_at_first_step(self, [param for owned in shards for param in owned.constants.params])
            if not shards:
                warn_of_no_gradients(self.params(), self.sharding_plan.is_main_rank)
        self._has_stepped = True
        if self.retire_beta1_prod:
            states = (self.state[param] for param in self.params() if param in self.state)
            self._retirement.after_step(states, self.device)

    @torch.no_grad()
    def owned_shards(self) -> list[OwnedShards]:
        """Return this rank's elements of the parameters that have a gradient; creates missing states.

        Collective: if a gradient's placements differ from its parameter's, all ranks of the parameter's mesh.
        """
        self.create_states(self.params())
        return self._shard_cache().owned_shards(
            self.param_groups, self.state, self.mean_source.sharding(), self.missing_as_zeros
        )

    @torch.no_grad()
    def observe(self, shards: list[OwnedShards], expected: Tensor | None = None) -> Sums:
        """Return this rank's contribution to the global mean: weighted sums, on the device of the first parameter.

        Args:
            expected: the expected coefficient of the gradients; 0-dim float64, by default 1 over the loss scale.

        Collective: none.
        """
        if expected is None:
            expected = unscaling_coefficient(getattr(self, "grad_scale", None), self.device)
        lr_signal = LR_SIGNAL / (len(shards) * self.sharding_plan.num_terms) if shards else 0.0
        total = torch.zeros(len(Sums._fields), dtype=torch.float64, device=self.device)
        for owned in shards:
            total += owned.observe(expected.to(owned.constants.weights.device), lr_signal).to(self.device)
            for shard in owned.written:
                self._first_moment_check.add(id(shard.param), [shard.exp_avg])
        if checksum := sum(owned.constants.checksum for owned in shards) % CHECKSUM_MODULUS:
            total[-1] += checksum
        sums = Sums(*total.unbind())
        zero_or_nan = self._first_moment_check.check(self.device)
        if zero_or_nan is not None:
            sums = sums._replace(carried=sums.carried + zero_or_nan)
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # set by torch.amp.GradScaler
        if found_inf is None:
            return sums
        is_overflow = found_inf.to(self.device).reshape(()) > 0
        return sums._replace(grad_squared=torch.where(is_overflow, torch.inf, sums.grad_squared))

    @torch.no_grad()
    def advance(self, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """Update the given shards in place with a known mean. Each shard must be updated once per step.

        Collective: none.
        """
        for owned in shards:
            owned.advance(mean.to(owned.constants.weights.device))

    def record(self, mean: GlobalMean, *, is_logged: bool = True) -> None:
        """Record the mean of a step for the properties that report it.

        Args:
            is_logged: the main rank logs a step that did not count.

        Raises:
            RuntimeError: ``max_consecutive_skips`` consecutive steps were skipped; the same on all ranks.

        Collective: none.
        """
        interleaved_steps.record(unproxied(self))
        self._report(mean, lambda: is_logged and self.sharding_plan.is_main_rank, self._diagnose)
        if self._uncounted.has_lacked_gradients:
            self.missing_as_zeros = True
        self._consecutive_skips.check(mean, self.max_consecutive_skips)

    def _diagnose(self) -> str:
        nonfinite = describe_nonfinite(self.param_groups, self.state)
        found = f"not finite on this rank: {nonfinite}; " if nonfinite else ""
        is_scaled = getattr(self, "found_inf", None) is not None
        return found + ("torch.amp.GradScaler lowers its loss scale; " if is_scaled else "")

    def refresh(self) -> None:
        """Make the next step read the states again, after writes to single elements that torch does not record.

        Other writes are detected: torch records in-place operations and replaced or loaded states, and every step
        compares samples that show writes to whole tensors by collectives, ``.data``, NumPy or DLPack.

        Collective: none.
        """
        self._shard_caches.clear()
        self._first_moment_check.clear()
        self.mean_source.refresh()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group as in torch; raises RuntimeError if an engine has taken over the parameters."""
        self.mean_source.check_allows("add_param_group()", "list all parameters before")
        super().add_param_group(param_group)

    # -- clipping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global gradient norm in the next :meth:`step`, with the coefficient of torch's ``clip_grad_norm_``.

        Supports any combination of meshes and plain parameters. Gradients are read once and not changed; the step then
        needs no collective. Overrides ``max_grad_norm`` for that step. Call it after the last backward pass, and with
        :class:`torch.amp.GradScaler` after ``scaler.unscale_(optimizer)``.

        Args:
            max_norm: bound of the norm, > 0; infinity only measures.

        Returns:
            The global norm before clipping, 0-dim float64.

        Collective: as :meth:`step`, which then has none.
        """
        optimizer = unproxied(self)
        source = self.mean_source.between_steps()
        source.check_allows("clip_grad_norm_()", "set its own clipping")
        bound = max_grad_norm_in_range("max_norm", max_norm)
        if bound is None:
            raise TypeError("max_norm must be a number, got None; omit the call for no clipping")
        mean = source.mean(optimizer, self.owned_shards(), bound)
        self.mean_source = KnownMean(optimizer, mean, source, is_shared=False)
        return mean.grad_norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as :meth:`torch.optim.Optimizer.zero_grad`; drops a pending :meth:`clip_grad_norm_`."""
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
        """Define which ranks share the mean and which elements they hold, if the tensors do not show it.

        DTensor parameters and DDP need no call; FSDP1 needs ``model``, pipelines need ``stages``. A call without
        arguments restores the default, to read the sharding from the tensors.

        Args:
            process_group: all ranks that share the mean; by default all ranks of the job.
            num_replicas: how many of these ranks hold the same local elements of a plain parameter: a number, a
                function of the parameter, or None if all of them do. A function is called for DTensors too; if it
                returns None, the placements decide, and ranks outside the mesh are assumed to hold copies. With
                ``stages``: how many of its ranks hold the parameter (a tied embedding); None is the same as 1.
            model: the module that FSDP1 wraps, or that contains FSDP1 modules, from which placements are read.
            stages: ranks that hold different parameters, one of every pipeline stage; the sums are reduced over them
                last. Can be combined with ``model`` and with DTensors.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: this rank is not a member of a process group; ``process_group`` is given with ``model`` or
                ``stages``, or ``num_replicas`` with ``model`` alone; in the next step: ``num_replicas`` is out of
                range, ``model`` lacks an FSDP1 module of the parameters, the ranks of ``stages`` share parameters.
            RuntimeError: torch.distributed is not initialised; DeepSpeed's ZeRO drives the optimizer; the optimizer
                shares its mean (configure that in :func:`adai_dist.share_mean`).

        Collective: none here; all ranks of the process groups must step together afterwards.
        """
        self.mean_source.check_allows("configure_sharding()", "leave it out")
        self.mean_source = ShardedMean(make_planner(process_group, num_replicas, model, stages))

    @property
    def mean_group(self) -> tuple[ProcessGroup, ...]:
        """Process groups over which the sums are all-reduced, in order; empty if nothing is communicated."""
        return self.sharding_plan.process_groups

    @property
    def sharding_plan(self) -> ShardingPlan:
        """Process groups of the mean and weights of the current parameters."""
        return self._shard_cache().plan(self.param_groups, self.mean_source.sharding())

    def _shard_cache(self) -> ShardCache:
        """Return the cache of the part of the model that is stepped now."""
        part = self.mean_source.part(self)
        if part not in self._shard_caches:
            self._shard_caches[part] = ShardCache(self.backends, self.precision)
        return self._shard_caches[part]

    def __repr__(self) -> str:
        return f"{super().__repr__()}\nKernels: {self.backends}"
