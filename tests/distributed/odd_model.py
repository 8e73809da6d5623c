"""A small language model with the features that are hard for layouts, trained in all of torch's ways."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from adai_dist import AdaiV2
from tests.distributed.recorded import Recorder, Recording, fsdp1_names_of, names_of

VOCABULARY, WIDTH, BATCH, LENGTH = 13, 10, 4, 6
MIXED: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


class Frozen(nn.Linear):
    """A separate class, so that FSDP1 can wrap it separately: a flat parameter is trained completely or not at all."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.gain = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(torch.tanh(self.up(x)))


class OddModel(nn.Module):
    """A model with tied, frozen and unused weights, and a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = Frozen(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Linear(3, 1)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.frozen(x))


def ddp(model: OddModel) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp2(**options: Any) -> Callable[[OddModel], nn.Module]:
    def wrap(model: OddModel) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)

    return wrap


def hsdp(model: OddModel) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(use_orig_params: bool, **options: Any) -> Callable[[OddModel], nn.Module]:
    def wrap(model: OddModel) -> nn.Module:
        policy = ModuleWrapPolicy({Block, Frozen})
        cpu = torch.device("cpu")
        return FSDP(model, auto_wrap_policy=policy, device_id=cpu, use_orig_params=use_orig_params, **options)

    return wrap


def tp(model: OddModel) -> nn.Module:
    """Apply tensor parallelism to the matrices of the blocks; the rest are plain copies; all ranks see one batch."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


@dataclass(frozen=True)
class Way:
    """One way to train: layout, dtype of the parameters, and gradient accumulation."""

    wrap: Callable[[OddModel], nn.Module]
    dtype: torch.dtype = torch.float64
    num_micro_batches: int = 1
    bfloat16_gradients: bool = False
    world_size: int = 2


float32 = torch.float32
WAYS: dict[str, Way] = {
    "ddp": Way(ddp),
    "ddp no_sync": Way(ddp, num_micro_batches=3),
    "ddp, gradients in bfloat16": Way(ddp, float32, bfloat16_gradients=True),
    "fsdp2": Way(fsdp2()),
    "fsdp2 accumulating": Way(fsdp2(), num_micro_batches=3),
    "fsdp2 mixed precision": Way(fsdp2(mp_policy=MixedPrecisionPolicy(**MIXED)), float32),
    "fsdp2 all in bfloat16": Way(
        fsdp2(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)), float32, num_micro_batches=2
    ),
    "fsdp2, gradients in bfloat16": Way(fsdp2(), float32, bfloat16_gradients=True),
    "fsdp2 CPU offload": Way(fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "fsdp1 original": Way(fsdp1(True)),
    "fsdp1 flat": Way(fsdp1(False)),
    "fsdp1 original no_sync": Way(fsdp1(True), num_micro_batches=3),
    "fsdp1 flat no_sync": Way(fsdp1(False), num_micro_batches=3),
    "fsdp1 original mixed precision": Way(fsdp1(True, mixed_precision=MixedPrecision(**MIXED)), float32),
    "fsdp1 flat mixed precision": Way(fsdp1(False, mixed_precision=MixedPrecision(**MIXED)), float32),
    "tensor parallel": Way(tp),
    "hsdp": Way(hsdp, world_size=4),
}


def accumulating(wrapped: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Reduce gradients with the last micro-batch only, as each engine spells it."""
    if isinstance(wrapped, (DistributedDataParallel, FSDP)):
        return nullcontext() if is_last else wrapped.no_sync()
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(is_last)
    return nullcontext()


def train(way: Way, num_steps: int = 8) -> Recording:
    """Train on random tokens and record every step. Collective: all ranks."""
    torch.manual_seed(0)
    model = OddModel().to(way.dtype)
    wrapped = way.wrap(model)
    optimizer = AdaiV2(
        [
            {"params": [p for p in wrapped.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in wrapped.parameters() if p.ndim <= 1], "lr": 1.0, "dampening": 1.0},
        ],
        lr=1.0,
        dampening=0.5,
        max_grad_norm=1.0,
    )
    is_fsdp1 = isinstance(wrapped, FSDP)
    if is_fsdp1:
        optimizer.configure_sharding(model=wrapped)
    if way.bfloat16_gradients:
        optimizer.register_step_pre_hook(lambda *_: round_gradients(model))
    recorder = Recorder([optimizer], fsdp1_names_of(wrapped) if is_fsdp1 else names_of(model))
    data_rank = 0 if way.wrap is tp else dist.get_rank()
    generator = torch.Generator().manual_seed(data_rank)
    for _ in range(num_steps):
        optimizer.zero_grad()
        for index in range(way.num_micro_batches):
            tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
            with accumulating(wrapped, index == way.num_micro_batches - 1):
                logits = wrapped(tokens)
                nn.functional.cross_entropy(logits.flatten(0, 1).to(way.dtype), tokens.flatten()).backward()
        optimizer.step()
    return recorder.finish()


def round_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad_dtype = None  # type: ignore[attr-defined]  # torch then takes gradients of any dtype
            parameter.grad = parameter.grad.bfloat16()
