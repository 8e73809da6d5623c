"""Steps skipped by a GradScaler do not call step(), where accelerate and the Trainer detect them."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.lr_scheduler import StepLR

from adai_dist import AdaiV2, share_mean
from tests.integrations.deepspeed_engines import set_environment
from tests.spawn import run_ranks

accelerate = pytest.importorskip("accelerate")
AcceleratedOptimizer = accelerate.optimizer.AcceleratedOptimizer
pytestmark = pytest.mark.distributed

NUM_STEPS, OVERFLOW, SCALE = 6, 2, 2.0**10
MAX_NORM = 0.5


def adaiv2(params: Any) -> AdaiV2:
    return AdaiV2(params, lr=1.0, dampening=0.5)


def adamw(params: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=1.0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def batches() -> Tensor:
    return torch.randn(NUM_STEPS, 2, 5, 6, generator=torch.Generator().manual_seed(1))


def accelerator_with_a_scaler() -> Any:
    """Create an Accelerator with a scaler for the CPU, since accelerate creates scalers only for accelerators."""
    set_environment()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return accelerator


def train(make_optimizer: Callable[[Any], Any], clips: bool) -> tuple[list[tuple[bool, float, float]], list[Tensor]]:
    """Return skipped, lr and scale after each step, and the weights; only one rank has an overflow."""
    accelerator = accelerator_with_a_scaler()
    model = net()
    inner = make_optimizer(model.parameters())
    scheduler = StepLR(inner, dist.get_world_size(), 0.5)  # accelerate steps the scheduler world_size times
    model, optimizer, scheduler = accelerator.prepare(model, inner, scheduler)
    accelerator.native_amp, accelerator.state._mixed_precision = (
        True,
        "fp16",
    )  # makes accelerate unscale before clipping
    seen: list[tuple[bool, float, float]] = []
    for step, batch in enumerate(batches()):
        is_bad = step == OVERFLOW and accelerator.process_index == dist.get_world_size() - 1
        loss = model(batch[accelerator.process_index]).square().mean()
        accelerator.backward(loss * math.inf if is_bad else loss)
        if clips:
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert accelerator.optimizer_step_was_skipped == optimizer.step_was_skipped
        seen.append((optimizer.step_was_skipped, inner.param_groups[0]["lr"], accelerator.scaler.get_scale()))
    return seen, [param.detach() for param in model.parameters()]


def without_overflow(world_size: int, clips: bool) -> list[Tensor]:
    """Train in a plain loop without the skipped step."""
    model = net()
    optimizer = adaiv2(model.parameters())
    lr = 1.0
    for step, batch in enumerate(batches()):
        if step == OVERFLOW:
            continue
        optimizer.zero_grad()
        model(batch[:world_size].flatten(0, 1)).square().mean().backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        lr /= 2
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("clips", [False, True])
def test_accelerate_sees_a_skipped_step_as_it_does_with_adamw(world_size: int, clips: bool) -> None:
    ours = run_ranks(train, world_size, adaiv2, clips)
    theirs = run_ranks(train, world_size, adamw, clips)
    for (seen, weights), (seen_of_adamw, _) in zip(ours, theirs, strict=True):
        assert seen == seen_of_adamw
        assert [is_skipped for is_skipped, _, _ in seen] == [step == OVERFLOW for step in range(NUM_STEPS)]
        assert seen[OVERFLOW][1] == seen[OVERFLOW - 1][1]
        for weight, expected in zip(weights, without_overflow(world_size, clips), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


# -- layouts that accelerate does not support on a CPU ---------------------------------------------------------------


def scaled_steps(optimizers: list[AdaiV2], backward: Callable[[int], Tensor], scaler: Any) -> list[bool]:
    """Step accelerate's optimizers with one scaler, and return which steps accelerate reports as skipped."""
    wrapped = [
        accelerate.optimizer.AcceleratedOptimizer(one, device_placement=False, scaler=scaler) for one in optimizers
    ]
    skipped: list[bool] = []
    for step in range(4):
        for one in wrapped:
            one.zero_grad()
        scaler.scale(backward(step)).backward()
        for one in wrapped:
            one.step()
        skipped.append(any(one.step_was_skipped for one in wrapped))
    return skipped


def loss_of(model: nn.Module) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        value = model(batches()[step, dist.get_rank() % 2]).square().mean()
        return value * math.inf if step == OVERFLOW and dist.get_rank() == dist.get_world_size() - 1 else value

    return loss


def fsdp2() -> tuple[list[bool], int]:
    accelerator_with_a_scaler()
    model = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = adaiv2(model.parameters())
    skipped = scaled_steps([optimizer], loss_of(model), torch.amp.GradScaler("cpu", init_scale=SCALE))
    return skipped, int(optimizer.num_skipped_steps)


def fsdp1() -> tuple[list[bool], int]:
    accelerator_with_a_scaler()
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = adaiv2(model.parameters())
    optimizer.configure_sharding(model=model)
    skipped = scaled_steps([optimizer], loss_of(model), ShardedGradScaler("cpu", init_scale=SCALE))
    return skipped, int(optimizer.num_skipped_steps)


@pytest.mark.parametrize("layout", [fsdp2, fsdp1], ids=lambda layout: layout.__name__)
def test_sharded_ranks_skip_a_step_together(layout: Callable[[], tuple[list[bool], int]]) -> None:
    for skipped, num_skipped in run_ranks(layout, 2):
        assert skipped == [step == OVERFLOW for step in range(4)]
        assert num_skipped == 0  # the scaler skipped the step


def stages() -> tuple[list[bool], int]:
    """Train ranks with different parameters, as in pipelines, where only one scaler sees the overflow."""
    accelerator_with_a_scaler()
    model = net()
    optimizer = adaiv2(model.parameters())
    optimizer.configure_sharding(stages=dist.group.WORLD)
    skipped = scaled_steps([optimizer], loss_of(model), torch.amp.GradScaler("cpu", init_scale=SCALE))
    return skipped, int(optimizer.num_skipped_steps)


def experts() -> tuple[list[bool], int]:
    accelerator_with_a_scaler()
    model = net()
    optimizer = adaiv2(model.parameters())
    optimizer.configure_sharding(num_replicas=1)
    skipped = scaled_steps([optimizer], loss_of(model), torch.amp.GradScaler("cpu", init_scale=SCALE))
    return skipped, int(optimizer.num_skipped_steps)


def parts_with_one_mean() -> tuple[list[bool], int]:
    """Train two optimizers with one mean, in which a scaler must not unscale gradients after the mean was computed."""
    accelerator_with_a_scaler()
    model = net()
    optimizers = [adaiv2(layer.parameters()) for layer in (model[0], model[2])]  # type: ignore[index]
    share_mean(optimizers)
    expected = net()
    whole = adaiv2(expected.parameters())

    def loss(step: int) -> Tensor:
        value = model(batches()[step, 0]).square().mean()
        return value * math.inf if step == OVERFLOW else value

    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    wrapped = [
        accelerate.optimizer.AcceleratedOptimizer(one, device_placement=False, scaler=scaler) for one in optimizers
    ]
    for step in range(4):
        for one in (*wrapped, whole):
            one.zero_grad()
        scaler.scale(loss(step)).backward()
        for one in wrapped:  # without accelerate's own update of the scaler after each optimizer
            one.optimizer.step = one._optimizer_patched_step_method
            scaler.step(one.optimizer)
        scaler.update()
        if step != OVERFLOW:
            expected(batches()[step, 0]).square().mean().backward()
            whole.step()
    for param, twin in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)
    return [False] * 4, int(optimizers[0].num_skipped_steps)


@pytest.mark.parametrize("layout", [stages, experts, parts_with_one_mean], ids=lambda layout: layout.__name__)
def test_no_rank_and_no_part_skips_a_step_alone(layout: Callable[[], tuple[list[bool], int]]) -> None:
    for skipped, num_skipped in run_ranks(layout, 2):
        assert skipped == [False] * 4
        assert num_skipped == 1


def two_layouts() -> str:
    accelerator_with_a_scaler()
    meshes = [init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["a", "b"]]
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)] * mesh.ndim)) for mesh in meshes]
    optimizer = adaiv2(params)

    def loss(_: int) -> Tensor:
        total = [param.sum() for param in params]
        whole = [part.full_tensor() for part in total if isinstance(part, DTensor)]
        return whole[0] + whole[1]

    try:
        scaled_steps([optimizer], loss, torch.amp.GradScaler("cpu", init_scale=SCALE))
    except RuntimeError as error:
        return str(error)
    return "not refused"


def test_several_layouts_are_refused_as_without_accelerate() -> None:
    for message in run_ranks(two_layouts, 2):
        assert message.startswith("with torch.amp.GradScaler, all DTensor parameters must have the same mesh")


# -- replacements of step() -----------------------------------------------------------------------------------------


def scale_and_step(optimizer: Any, param: nn.Parameter, scaler: Any, *, is_bad: bool = False) -> None:
    scaler.scale(torch.zeros(()))
    param.grad = torch.full_like(param, math.inf if is_bad else scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()


@pytest.fixture
def unscalings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the optimizers whose gradients a scaler unscaled in a separate pass."""
    seen: list[Any] = []
    original = torch.amp.GradScaler.unscale_

    def unscale_(scaler: Any, optimizer: Any) -> None:
        seen.append(optimizer)
        original(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale_)
    return seen


def test_gradients_are_read_once_if_step_is_not_observed(unscalings: list[Any]) -> None:
    """Include the replacements of step() by torch's schedulers and by accelerate, which do not observe it."""
    param = nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = adaiv2([param])
    scale_and_step(optimizer, param, scaler)
    StepLR(optimizer, 1)
    StepLR(optimizer, 2)
    scale_and_step(optimizer, param, scaler)
    optimizer.step = optimizer.step  # type: ignore[method-assign]
    scale_and_step(optimizer, param, scaler, is_bad=True)
    assert unscalings == []
    assert optimizer.num_skipped_steps == 1


def counting(optimizer: Any, calls: list[int]) -> Any:
    step = optimizer.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return step(*args, **kwargs)

    return counted


@pytest.mark.parametrize("with_scheduler", [False, True])
def test_a_function_that_replaces_step_is_called_only_for_steps_that_are_taken(
    with_scheduler: bool, unscalings: list[Any]
) -> None:
    param = nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = adaiv2([param])
    if with_scheduler:
        StepLR(optimizer, 1)
    original = optimizer.step
    calls: list[int] = []
    optimizer.step = counting(optimizer, calls)  # type: ignore[method-assign]
    for is_bad in (False, True, False):
        scale_and_step(optimizer, param, scaler, is_bad=is_bad)
    assert len(calls) == 2
    optimizer.step = original  # type: ignore[method-assign]
    scale_and_step(optimizer, param, scaler, is_bad=True)
    assert (len(calls), len(unscalings)) == (2, 3)
    assert optimizer.num_skipped_steps == 1


class Proxy:
    def __init__(self, optimizer: AdaiV2) -> None:
        self.inner = optimizer
        self.__class__ = type("Proxy", (Proxy, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("place", ["method", "method below a scheduler", "proxy"])
def test_replacements_by_bound_methods_and_on_proxies_are_detected(place: str) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = adaiv2([param])
    calls: list[int] = []
    counted = counting(optimizer, calls)
    stepped: Any = Proxy(optimizer) if place == "proxy" else optimizer
    stepped.step = types.MethodType(lambda _, *args: counted(*args), stepped) if place != "proxy" else counted
    if "scheduler" in place:
        StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for is_bad in (False, True):
        scale_and_step(stepped, param, scaler, is_bad=is_bad)
    assert len(calls) == 1


# -- the Trainer -----------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = (self.net(x).sum(-1) - labels).square().mean()
        return {"loss": loss * math.inf if labels.max() > 1e3 else loss}


def train_with_the_trainer(make_optimizer: Callable[[Any], Any] | None, folder: Path) -> list[float]:
    """Return the learning rate after each step; without an optimizer, the Trainer creates one."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    set_environment()
    rows = [{"x": x, "labels": torch.tensor(0.5)} for x in batches()[:, 0, 0]]
    rows[OVERFLOW]["labels"] = torch.tensor(1e4)
    model = Regression()
    optimizer = make_optimizer(model.parameters()) if make_optimizer else None
    lrs: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
            lrs.append(optimizer.param_groups[0]["lr"])
            assert isinstance(optimizer.optimizer, torch.optim.AdamW if make_optimizer is adamw else AdaiV2)

    class InOrder(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

        def _get_train_sampler(self, *_: Any) -> Any:
            return None

    settings: dict[str, Any] = {"lr_scheduler_type": "linear", "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, max_steps=NUM_STEPS, use_cpu=True,
        logging_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": (AdaiV2, {"lr": 1.0})}
    if optimizer is not None:
        given = {"optimizers": (optimizer, None)}
    InOrder(model, arguments, train_dataset=rows, callbacks=[Watch()], **given).train()  # type: ignore[arg-type]
    return lrs


def test_the_schedule_of_the_trainer_skips_steps_as_with_adamw(tmp_path: Path) -> None:
    (ours,), (theirs,), (made,) = (
        run_ranks(train_with_the_trainer, 1, make, tmp_path) for make in (adaiv2, adamw, None)
    )
    assert ours == theirs == made
    assert ours[OVERFLOW] == ours[OVERFLOW - 1]
    assert len(set(ours)) == NUM_STEPS - 1
