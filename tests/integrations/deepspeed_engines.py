"""Prescribed problems on real DeepSpeed engines, whose trajectories must be the oracle's in every configuration.

The loss is the product of the parameters with prescribed gradients. Each rank (and each micro-batch) contributes
different elements, scaled by a power of two, so that the average is exact in every dtype and differs from each part.
"""

from __future__ import annotations

import functools
import gc
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from adai_dist.optimizer.adaptive_inertia import AdaptiveInertia
from tests.distributed.layouts import CollectiveCounter
from tests.integrations.deepspeed_setups import STATE_NAMES, WORLD_SIZE, Setup
from tests.naive import NaiveAdai
from tests.problems import to_numpy
from tests.spawn import run_ranks


@dataclass
class Seen:
    """Record of one rank, with full tensors."""

    wrapper: str = ""
    """Class of DeepSpeed's wrapper around the optimizer."""
    parameters: dict[str, Any] = field(default_factory=dict)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    means: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    was_skipped: list[bool] = field(default_factory=list)
    unscaled_by: list[float] = field(default_factory=list)
    """Loss scale of the gradients over DeepSpeed's divisor: 1/2 in a step in which the scale is doubled."""
    collectives: list[list[tuple[str, int]]] = field(default_factory=list)
    num_engine_skips: int = 0
    """Number of skipped steps according to the engine."""
    num_skipped_steps: int = 0
    """Number of skipped steps according to the optimizer."""


class Product(nn.Module):
    """Module with one parameter that returns its product with a gradient."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).float().sum()


class MatrixProduct(nn.Module):
    """Variant of Product that uses a linear layer, whose matrix product autocast affects."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(start.shape[1], start.shape[0], bias=False)
        self.linear.weight = nn.Parameter(start)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, gradient: Tensor) -> Tensor:
        identity = torch.eye(self.linear.in_features, dtype=self.weight.dtype)
        return (self.linear(identity).float() * gradient.T).sum()


class Prescribed(nn.Module):
    """Model whose gradients are those of the problem."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.problem = setup.rounded
        self.blocks = nn.ModuleDict()
        for spec in self.problem.specs():
            start = self.problem.initial(spec).float()
            self.blocks[spec.name.replace(".", "_")] = (MatrixProduct if start.dim() == 2 else Product)(start)

    def by_name(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their names in the problem."""
        return {spec.name: self.blocks[spec.name.replace(".", "_")].weight for spec in self.problem.specs()}

    def forward(self, step: int, part: int, num_parts: int) -> Tensor:
        """Return the loss of one of `num_parts` parts of a step's batch."""
        total = torch.zeros(())
        for spec in self.problem.specs():
            gradient = self.problem.gradient(spec, step)
            if gradient is None:
                continue
            index = torch.arange(gradient.numel()).reshape(gradient.shape)
            rank, micro_batch = divmod(part, self.setup.num_micro_batches)
            is_mine = index % num_parts == part
            if spec.name in self.setup.used_only_in:
                if self.setup.used_only_in[spec.name] != micro_batch:
                    continue
                is_mine = index % WORLD_SIZE == rank
            gradient = num_parts * gradient.float() * is_mine
            if step in self.setup.bad_steps and part == num_parts - 1:
                gradient.view(-1)[-1] = torch.inf
            total = total + self.blocks[spec.name.replace(".", "_")](gradient)
        return total


def set_environment() -> None:
    """Set the variables that DeepSpeed's launcher sets, and mend a release that cannot train on a CPU."""
    os.environ.update(launched(dist.get_rank(), dist.get_world_size(), "29500"))
    if "0.18.7" <= TorchVersion(version("deepspeed")) < "0.19":
        _let_flat_groups_be_written()


def _let_flat_groups_be_written() -> None:
    """Detach the flat groups, whose parts DeepSpeed cannot write on a CPU, with any optimizer.

    https://github.com/deepspeedai/DeepSpeed/pull/7948
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    flatten = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned
    if hasattr(flatten, "__wrapped__"):
        return

    @functools.wraps(flatten)
    def flatten_dense_tensors_aligned(*args: Any, **kwargs: Any) -> Tensor:
        return flatten(*args, **kwargs).detach()

    DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = flatten_dense_tensors_aligned


def launched(rank: int, world_size: int, port: str) -> dict[str, str]:
    """Set the environment that DeepSpeed's launcher gives to a process on the CPU."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE"), str(world_size)),
        **{"CROSS_RANK": "0", "CROSS_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",  # a torch.compile decorator in DeepSpeed would import the compiler for seconds
    }


def start(setup: Setup, model: Prescribed) -> Any:
    """Create a DeepSpeed engine. Collective: all ranks."""
    set_environment()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if setup.dtype == torch.float16:  # the CPU accelerator would refuse, although all operations are supported
        type(get_accelerator()).is_fp16_supported = lambda self: True
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1 if setup.sets_boundary else setup.num_micro_batches,
        "gradient_clipping": setup.problem.max_grad_norm or 0.0,
        **setup.config,
    }
    params = setup.problem.param_groups(model.by_name())
    client: Any = None
    if setup.optimizer == "naive":
        client = NaiveAdai(params)
    elif setup.optimizer == "torch.AdamW":
        client = torch.optim.AdamW([{"params": p["params"], "lr": p["lr"]} for p in params])
    else:
        config["optimizer"] = {"type": setup.optimizer, "params": {"lr": 1.0, **setup.arguments}}
    if client is not None:
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=client,
        model_parameters=None if client else params,
        config=config,
        dist_init_required=False,
    )
    return engine


def backward(engine: Any, setup: Setup, step: int) -> None:
    """Run forward and backward of all micro-batches of a step. Collective: all ranks."""
    num_parts = WORLD_SIZE * setup.num_micro_batches
    for micro_batch in range(setup.num_micro_batches):
        is_last = micro_batch == setup.num_micro_batches - 1
        if setup.sets_boundary:
            engine.set_gradient_accumulation_boundary(is_last)
        loss = engine(step, dist.get_rank() * setup.num_micro_batches + micro_batch, num_parts)
        engine.backward(loss / setup.num_micro_batches if setup.sets_boundary else loss)
        if not is_last and not setup.sets_boundary:
            engine.step()


def walk(setup: Setup) -> Seen:
    """Take all steps of a problem. Collective: all ranks."""
    model = Prescribed(setup)
    engine = start(setup, model)
    seen = Seen(wrapper=type(engine.optimizer).__name__)
    for step in range(setup.problem.steps):
        backward(engine, setup, step)
        loss_scale = engine.optimizer.loss_scale if setup.dtype == torch.float16 else 1.0
        with CollectiveCounter() as counter:
            engine.step()
        seen.collectives.append(counter.calls)
        seen.unscaled_by.append(loss_scale / engine.optimizer.loss_scale if setup.dtype == torch.float16 else 1.0)
        note_step(engine, seen)
    gather(engine, model.by_name(), seen, setup.has_linked_masters)
    engine.destroy()
    return seen


def note_step(engine: Any, seen: Seen) -> None:
    """Record what the optimizer reports about the last step."""
    basic = engine.basic_optimizer
    skips = (engine.skipped_steps, int(getattr(basic, "num_skipped_steps", 0)))
    seen.was_skipped.append(skips != (seen.num_engine_skips, seen.num_skipped_steps))
    seen.num_engine_skips, seen.num_skipped_steps = skips
    seen.means.append(float(getattr(basic, "inertia_mean", torch.nan)))
    seen.grad_norms.append(float(getattr(basic, "grad_norm", torch.nan)))


def gather(engine: Any, parameters: Mapping[str, nn.Parameter], seen: Seen, has_linked_masters: bool = True) -> None:
    """Record full master weights and states. Collective: all ranks, as DeepSpeed's safe_get functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    masters = unpartitioned(engine)
    # DeepSpeed links only the states of the first group, with any optimizer.
    state_names = STATE_NAMES if isinstance(engine.basic_optimizer, AdaptiveInertia) else ()
    for name, parameter in parameters.items():
        if not has_linked_masters:
            value, states = parameter, {}
        elif masters is None:
            value = safe_get_full_fp32_param(parameter)
            states = {key: safe_get_full_optimizer_state(parameter, key) for key in state_names}
        else:
            value = masters[parameter]
            states = {key: engine.basic_optimizer.state[value][key] for key in state_names}
        seen.parameters[name] = to_numpy(value)
        seen.states[name] = {key: to_numpy(state) for key, state in states.items()}


def unpartitioned(engine: Any) -> dict[nn.Parameter, Tensor] | None:
    """Return the full master weight of each parameter, or None under ZeRO."""
    if engine.optimizer is engine.basic_optimizer:
        return {parameter: parameter for parameter in engine.module.parameters()}
    if hasattr(engine.optimizer, "fp32_groups"):
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
    return None


# -- several setups per start of the processes -------------------------------------------------------------------------


def walk_all(setups: dict[str, Setup], walk_one: Callable[[Setup], Any]) -> dict[str, Any]:
    """Walk through the setups in order, with a traceback in place of each result that failed."""
    set_environment()
    import deepspeed  # noqa: F401

    gc.freeze()  # DeepSpeed collects garbage for every engine, in half the time without the imported objects
    return {name: _walk_or_traceback(setup, walk_one) for name, setup in setups.items()}


def _walk_or_traceback(setup: Setup, walk_one: Callable[[Setup], Any]) -> Any:
    try:
        return walk_one(setup)
    except Exception:
        return traceback.format_exc()
    finally:
        gc.collect()


class Family:
    """Setups that share processes, which run when the first result is requested."""

    def __init__(
        self, setups: dict[str, Setup], walk_one: Callable[[Setup], Any] = walk, world_size: int = WORLD_SIZE
    ) -> None:
        self.setups = setups
        self._work = (walk_all, world_size, setups, walk_one)

    @functools.cached_property
    def _outcomes(self) -> list[dict[str, Any]] | AssertionError:
        try:
            return run_ranks(*self._work)
        except AssertionError as error:
            return error  # hold the failure of the start, so that it is not repeated by each test

    def ranks(self, name: str) -> list[Any]:
        """Return the record of each rank for one setup.

        Raises:
            AssertionError: a rank failed.
        """
        __tracebackhide__ = True
        if isinstance(self._outcomes, AssertionError):
            raise self._outcomes
        ranks = [outcomes[name] for outcomes in self._outcomes]
        failures = [f"--- rank {rank}: {seen}" for rank, seen in enumerate(ranks) if isinstance(seen, str)]
        if failures:
            raise AssertionError("\n".join(failures))
        return ranks
