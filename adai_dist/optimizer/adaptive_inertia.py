"""The optimizer: observe, global mean, advance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from adai_dist import equations
from adai_dist.hyper import Hyper, max_grad_norm_in_range
from adai_dist.kernels import Backends, mode_of
from adai_dist.optimizer.checking import check_is_mapping, check_state_dict
from adai_dist.optimizer.pending import PendingMean, versions
from adai_dist.optimizer.retirement import Retirement, with_zeros
from adai_dist.optimizer.skips import SkipCounter
from adai_dist.optimizer.state import new_state, restore_states, step_tensor
from adai_dist.optimizer.unsupported import (
    check_not_a_part,
    check_not_in_backward,
    check_one_layout,
    refuse_unregistered_deepspeed,
    warn_of_no_gradients,
)
from adai_dist.sharding.configured import NumReplicas, configured_sharding
from adai_dist.sharding.holdings import Holdings, exp_avg_sq_sums, keep_sums
from adai_dist.sharding.mean import GlobalMean, Sums, global_mean
from adai_dist.sharding.plan import ModelSharding, ShardingPlan
from adai_dist.sharding.shards import OwnedShards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_UNKNOWN = torch.tensor(torch.nan, dtype=torch.float64)


class Driver(Protocol):
    """An engine that calls step() for one part of the model after the other, and knows the mean over all of it."""

    def step_part(self) -> None:
        """Advance the parameters that ``param_groups`` lists at the moment."""
        ...


class AdaptiveInertia(torch.optim.Optimizer):
    """Adaptive Inertia on whatever part of the model this rank holds: the class behind Adai, AdaiW and AdaiV2.

    A step has three phases, and only the second one communicates::

        observe       local       inner products of gradients (and parameters), one read of the gradients
        global_mean   collective  64 bytes per process group: norm, clip coefficient, mean, non-finite flag
        advance       local       one pass over parameters, gradients and states

    Engines that step a part of the model at a time call the phases themselves, each on the parts that are at hand::

        shards = optimizer.owned_shards()
        mean = global_mean(optimizer.observe(shards), optimizer.mean_group)   # of adai_dist.sharding
        for part in shards:
            optimizer.advance([part], mean)

    Args:
        params: parameters, named parameters, or parameter groups.
        hyper: hyperparameters of the parameter groups that do not state their own.
        max_grad_norm: clip the global gradient norm inside every step; None for no clipping.
        require_kernels: raise an error where the compiled kernels cannot be had, instead of a warning.
        retire_beta1_prod: free the state ``beta1_prod`` of a parameter once it has no effect any more (after 17,321
            steps at eps=1e-3, at the latest); not a bit of the trajectory changes.

    Attributes:
        max_grad_norm: as given; may be changed between steps.

    Numerics: states and arithmetic are float32, or float64 for float64 parameters; sums are float64. A step makes the
    host wait for no device, unless a parameter's gradients come and go, or a state retires.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling and skipping to step()

    _step_within_engine: ClassVar[Callable[[AdaptiveInertia], bool] | None] = refuse_unregistered_deepspeed
    """Takes a step by an engine that has not bound the optimizer yet, or says that it did not; None once bound."""

    _driver: Driver | None = None
    _sharding: ModelSharding | None = None
    _last_mean: GlobalMean | None = None
    _pending_mean: PendingMean | None = None
    _sharers: tuple[AdaptiveInertia, ...] = ()
    """All optimizers that step with one mean, where there are several."""
    _has_stepped = False

    def __init__(
        self,
        params: ParamsT,
        hyper: Hyper,
        *,
        max_grad_norm: float | None = None,
        require_kernels: bool = False,
        retire_beta1_prod: bool = True,
    ) -> None:
        self._hyper = hyper
        self._backends = Backends(mode_of(require_kernels))
        self.max_grad_norm: float | None = max_grad_norm_in_range("max_grad_norm", max_grad_norm)
        if not isinstance(retire_beta1_prod, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"retire_beta1_prod must be a bool, got {retire_beta1_prod!r}")
        self._retirement = Retirement() if retire_beta1_prod else None
        self._skips = SkipCounter()
        self._reset_derived()
        super().__init__(params, hyper.as_defaults())
        # betas[0] is no momentum. With betas among the defaults, OneCycleLR and CyclicLR would cycle it, silently.
        del self.defaults["betas"]

    def _reset_derived(self) -> None:
        """Forget everything that is derived from parameters and states; it is found again in the next step."""
        self._holdings = Holdings(self._backends, self._sharding)
        self._pending_mean = None

    # -- the three phases ------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        If a gradient on any rank is inf or NaN, all ranks leave parameters and states as they are, count the step in
        :attr:`num_skipped_steps`, and the main rank logs a warning.

        Args:
            closure: computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            TypeError: a gradient is sparse, or not held like its parameter.
            ValueError: a hyperparameter is out of range; a loaded state does not have its parameter's shape.
            RuntimeError: gradients changed since :meth:`clip_grad_norm_`, or a closure would change them; parameters
                are sharded by FSDP1 and :meth:`configure_sharding` was not called; a backward pass is under way
                (optimizer-in-backward); a GradScaler does not see all DTensor gradients.

        Collective: all ranks that share the model's DTensor parameters, or all of the configured process group, also
        those that hold no element or no gradient: one all-reduce of 64 bytes per distinct mesh dimension (one for
        FSDP, two for HSDP), or one in all where :meth:`configure_sharding` names the process group. None for plain
        parameters alone (one device, DDP). A gradient that is placed unlike its parameter is redistributed first. A
        rank that raises an error leaves the others waiting until their process group's timeout.
        """
        loss = None
        if closure is not None:
            if self._pending_mean is not None:
                raise RuntimeError(
                    "step(closure) must not follow clip_grad_norm_(), got a closure, which computes other gradients; "
                    "set max_grad_norm to clip those"
                )
            with torch.enable_grad():
                loss = closure()
        self._step()  # pyright: ignore[reportAttributeAccessIssue] torch types its decorator for functions only
        return loss

    @torch._disable_dynamo  # a collective and host code: nothing to trace
    def _step(self) -> None:
        if self._driver is not None:
            self._driver.step_part()
            return
        if self._step_within_engine is not None and self._step_within_engine():
            return
        if not self._has_stepped and self._sharding is None:
            check_not_a_part(type(self).__name__)
        check_not_in_backward()
        shards = self.owned_shards()
        pending = self._take_pending()
        mean = self._mean(shards, self._max_grad_norm_of_all()) if pending is None else pending.mean
        self.advance(shards, mean)
        if not self._has_stepped and not shards:
            warn_of_no_gradients(self._params(), self.sharding_plan.is_main_rank)
        self._has_stepped = True
        is_reported = pending is not None and pending.is_shared
        self._record(mean, self.sharding_plan.is_main_rank and not is_reported)
        self._retire(self._params())

    def _retire(self, params: Iterable[Tensor]) -> None:
        if self._retirement is not None:
            states = (self.state[param] for param in params if param in self.state)
            self._retirement.after_step(states, self._device())

    def _record(self, mean: GlobalMean, is_main_rank: bool) -> None:
        self._skips.record(mean.is_finite, is_main_rank)
        self._last_mean = mean

    @torch.no_grad()
    def owned_shards(self) -> list[OwnedShards]:
        """What this rank holds of the parameters that have a gradient; creates states that do not exist yet.

        Collective: where a gradient is placed unlike its parameter, all ranks of the parameter's mesh.
        """
        self._create_states(self._params())
        return self._holdings.owned_shards(self.param_groups, self.state)

    def _create_states(self, params: Iterable[Tensor]) -> None:
        for param in params:
            # Also without a gradient: all ranks must have the same states, or checkpoints hang or lack keys.
            if (param.requires_grad or param.grad is not None) and not self.state[param]:
                self.state[param] = new_state(param)

    @torch.no_grad()
    def observe(self, shards: list[OwnedShards]) -> Sums:
        """What this rank adds to the global mean: weighted sums, float64, on the device of the first shard.

        Collective: none.
        """
        device = self._device()
        total = torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)
        for owned in shards:
            lr = equations.scalar_tensor(owned.hyper.lr, owned.layout.weights)
            norms = owned.backend.observe(owned.shards, owned.hyper)
            mean_terms = equations.mean_terms(norms, exp_avg_sq_sums(owned), owned.correction, owned.hyper)
            terms = (torch.stack([norms.grad_grad, *mean_terms]) * owned.layout.weights).sum(1)
            no_overflow = torch.zeros_like(lr)
            total += torch.cat([terms, torch.stack([owned.layout.num_elements, no_overflow, lr])]).to(device)
        sums = Sums(*total.unbind())
        found_inf: Tensor | None = getattr(self, "found_inf", None)  # set by torch.amp.GradScaler
        return sums if found_inf is None else sums._replace(num_overflows=found_inf.to(sums.lr).reshape(()))

    @torch.no_grad()
    def advance(self, shards: list[OwnedShards], mean: GlobalMean) -> None:
        """Step the given shards with a known mean, in place. Each shard must be stepped once per step.

        Collective: none.
        """
        for owned in shards:
            local_mean = mean.to(owned.layout.weights.device)
            scalars = local_mean.step_scalars(owned.hyper, owned.correction, owned.shards.exp_avg[0].dtype)
            keep_sums(owned, owned.advance(scalars))
            # With alpha torch takes the tensor as a tensor; without, it reads it on the host as a number.
            torch._foreach_add_(owned.steps, local_mean.is_live.to(owned.steps[0].dtype), alpha=1.0)

    def _mean(self, shards: list[OwnedShards], max_norm: float | None) -> GlobalMean:
        """The mean of this step, which the other optimizers that share it get to know."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)  # set by torch.amp.GradScaler
        if grad_scale is not None or hasattr(self, "found_inf"):
            check_one_layout(self._params())
        sums = self.observe(shards)
        others = [optimizer for optimizer in self._sharers if optimizer is not self]
        for other in others:
            sums = sums.plus(other.observe(other.owned_shards()))
        mean = global_mean(sums, self.mean_group, max_norm=max_norm, grad_scale=grad_scale)
        for other in others:
            other._pending_mean = PendingMean(mean, versions(other._params()), is_shared=True)
        return mean

    def _max_grad_norm_of_all(self) -> float | None:
        bounds = {optimizer.max_grad_norm for optimizer in self._sharers} | {self.max_grad_norm}
        if len(bounds) > 1:
            raise ValueError(
                "optimizers that share one mean share one norm and must have the same max_grad_norm, "
                f"got {[optimizer.max_grad_norm for optimizer in self._sharers]!r}; set them alike"
            )
        return self.max_grad_norm

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
        self._check_not_driven("clip_grad_norm_()", "set its own clipping")
        bound = max_grad_norm_in_range("max_norm", max_norm)
        if bound is None:
            raise TypeError("max_norm must be a number, got None; leave the call out to clip nothing")
        mean = self._mean(self.owned_shards(), bound)
        self._pending_mean = PendingMean(mean, versions(self._params()), is_shared=False)
        return mean.grad_norm

    def _take_pending(self) -> PendingMean | None:
        pending, self._pending_mean = self._pending_mean, None
        if pending is not None:
            pending.check(versions(self._params()))
        return pending

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`; a pending :meth:`clip_grad_norm_` is dropped."""
        self._pending_mean = None
        super().zero_grad(set_to_none)

    # -- what a step found out -------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradients, unscaled, before clipping; 0-dim float64, NaN before any step."""
        return _UNKNOWN.clone() if self._last_mean is None else self._last_mean.grad_norm

    @property
    def inertia_mean(self) -> Tensor:
        """Global mean of the bias-corrected second moment in the last step; 0-dim float64, NaN before any step."""
        return _UNKNOWN.clone() if self._last_mean is None else self._last_mean.inertia_mean

    @property
    def num_skipped_steps(self) -> Tensor:
        """Steps skipped because of a non-finite gradient since this object was made; 0-dim int64."""
        return self._skips.num_skipped_steps.clone()

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
            model: the module that FSDP1 wraps, or that contains FSDP1 modules; they are asked about their parameters.
            stages: ranks that hold different parameters, one of every pipeline stage; the sums are added up over them
                in the end. Goes with ``model`` and with DTensors.

        Raises:
            TypeError: an argument is none of these.
            ValueError: this rank is no member of a process group; ``process_group`` or ``num_replicas`` are given with
                ``model`` or ``stages``; in the next step: ``num_replicas`` is out of range, ``model`` lacks an FSDP1
                module of the parameters, the ranks of ``stages`` share parameters.
            RuntimeError: torch.distributed is not initialised; DeepSpeed's ZeRO drives the optimizer; the optimizer
                shares its mean (configure that in :func:`adai_dist.share_mean`).

        Collective: none here; all ranks of the process groups must step together afterwards.
        """
        self._check_not_driven("configure_sharding()", "leave it out")
        if self._sharers:
            raise RuntimeError(
                "an optimizer that shares its mean must be configured with the others, got configure_sharding() of "
                "one; pass the arguments to share_mean()"
            )
        self._shard(configured_sharding(process_group, num_replicas, model, stages))

    def _check_not_driven(self, call: str, remedy: str) -> None:
        if self._driver is not None:
            raise RuntimeError(f"an engine steps this optimizer part by part and has the norm, got {call}; {remedy}")

    def _shard(self, sharding: ModelSharding | None) -> None:
        self._sharding = sharding
        self._reset_derived()

    @property
    def mean_group(self) -> tuple[ProcessGroup, ...]:
        """The process groups over which the sums are added up, in this order; none where nothing is communicated."""
        return self.sharding_plan.process_groups

    @property
    def sharding_plan(self) -> ShardingPlan:
        """Who shares the mean, and the weight of every parameter in it, as of now."""
        return self._holdings.plan(self.param_groups)

    def _params(self) -> list[Tensor]:
        return [param for param_group in self.param_groups for param in param_group["params"]]

    def _device(self) -> torch.device:
        for param in self._params():
            return param.device
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")

    # -- torch.optim -----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own hyperparameters where given; also during training.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if isinstance(param_group, dict):  # pyright: ignore[reportUnnecessaryIsInstance] torch refuses the others
            if "params" not in param_group:
                raise ValueError(
                    f"a parameter group must have the key 'params', got {sorted(param_group)}; list parameters there"
                )
            Hyper.from_param_group({**self._hyper.as_defaults(), **param_group})
            param_group.setdefault("betas", self._hyper.betas)
        super().add_param_group(param_group)
        for optimizer in self._sharers:
            optimizer._reset_derived()

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`; zeros stand for a retired ``beta1_prod``. Collective: none."""
        state_dict = super().state_dict()
        for key, state in state_dict["state"].items():
            if isinstance(state, dict):
                state_dict["state"][key] = with_zeros(state)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of the authors' Adai and AdaiV2; states keep float32 at least.

        Raises:
            TypeError, ValueError: the checkpoint is of another optimizer, model or layout, or incomplete; parameters,
                states and hyperparameters are as before.

        Collective: none.
        """
        check_is_mapping(state_dict)
        loaded: dict[str, Any] = {}

        def check_and_keep(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            check_state_dict(final, self.param_groups)
            loaded.update(final)

        hook = self.register_load_state_dict_pre_hook(check_and_keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        restore_states(self.state, self.param_groups, loaded)
        if self._retirement is not None:
            self._retirement.look_after_next_step()

    def __repr__(self) -> str:
        return f"{super().__repr__()}\nKernels: {self._backends}"

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_hyper": self._hyper,
            "max_grad_norm": self.max_grad_norm,
            "_backends": Backends(self._backends.mode),
            "_sharding": self._sharding,
            "_retirement": None if self._retirement is None else Retirement(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_skips", SkipCounter())
        self.__dict__.setdefault("_retirement", Retirement())
        for param_group in self.param_groups:
            for name, value in self._hyper.as_defaults().items():
                param_group.setdefault(name, value)
            for param in param_group["params"]:
                if "step" in self.state.get(param, {}):
                    self.state[param]["step"] = step_tensor(self.state[param]["step"], param)
        self._reset_derived()
