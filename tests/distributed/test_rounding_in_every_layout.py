"""Parameters and states in 16 or 8 bits have the same bits in every layout, given the same gradients."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from adai_dist import AdaiV2
from adai_dist.rounding import global_indices
from adai_dist.sharding.global_index import origin_of
from adai_dist.sharding.records import records_shape
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

NUM_STEPS = 6
# Sizes that 2 and 4 ranks cannot divide evenly, and one that leaves ranks without elements.
# The last two have records of 8 bits in every layout.
SIZES = {
    "first": (7, 5),
    "second": (13, 6),
    "vector": (11,),
    "tiny": (1, 3),
    "stacked": (3, 5, 6),
    "wide": (7, 192),
    "stack_of_wide": (3, 5, 64),
}
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32, bfloat16 states": (torch.float32, {"state_dtype": "bfloat16"}),
    "master weights": (torch.bfloat16, {"state_dtype": "bfloat16"}),
    "rounded": (torch.bfloat16, {"state_dtype": "bfloat16", "master_weights": False}),
    "mixed8": (torch.bfloat16, {"state_dtype": "mixed8"}),
}
FSDP1_MODES = [mode for mode in MODES if mode != "mixed8"]
Bits = dict[str, Tensor]


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name in SIZES:
            self.register_parameter(name, nn.Parameter(random_tensor(name, -1).to(dtype)))

    def forward(self) -> Tensor:
        return torch.stack([param.square().mean() for param in self.parameters()]).sum()


def random_tensor(name: str, t: int) -> Tensor:
    random = torch.Generator().manual_seed(list(SIZES).index(name) * 1000 + t + 1)
    return torch.randn(SIZES[name], generator=random)


def gradient_of(name: str, t: int, param: Tensor) -> Tensor:
    gradient = (random_tensor(name, t) * (1 + len(name))).to(param.dtype)
    return distribute_tensor(gradient, param.device_mesh, param.placements) if isinstance(param, DTensor) else gradient


# -- layouts -----------------------------------------------------------------------------------------------------------


def ddp(model: Model) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: Model, *shape: int) -> nn.Module:
    names = ("replicas", "shards")[-len(shape) :]
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model


def tensor_parallel(model: Model, *, is_sharded: bool = False) -> nn.Module:
    """Shard matrices over the last dimension, stacks of them over the middle one, and all further by FSDP2."""
    shape = (2, dist.get_world_size() // 2) if is_sharded else (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("shards", "tensor")[-len(shape) :])
    tensor_mesh: DeviceMesh = mesh["tensor"] if is_sharded else mesh
    for name, param in list(model.named_parameters()):
        placement = Replicate() if param.dim() == 1 else Shard(1)
        model.register_parameter(name, nn.Parameter(distribute_tensor(param.detach(), tensor_mesh, [placement])))
    if is_sharded:
        fully_shard(model, mesh=mesh["shards"])
    return model


LAYOUTS: dict[str, tuple[int, Callable[[Model], nn.Module]]] = {
    "DDP on 1": (1, ddp),
    "DDP on 2": (2, ddp),
    "DDP on 4": (4, ddp),
    "FSDP2 on 2": (2, lambda model: fsdp2(model, 2)),
    "FSDP2 on 3": (3, lambda model: fsdp2(model, 3)),
    "FSDP2 on 4": (4, lambda model: fsdp2(model, 4)),
    "HSDP on 2 x 2": (4, lambda model: fsdp2(model, 2, 2)),
    "tensor parallelism on 2": (2, tensor_parallel),
    "tensor parallelism on 3": (3, tensor_parallel),
    "FSDP2 and tensor parallelism on 2 x 2": (4, partial(tensor_parallel, is_sharded=True)),
}


def optimizer_of(model: nn.Module, mode: str) -> AdaiV2:
    return AdaiV2(model.parameters(), lr=0.3, dampening=0.5, weight_decay=0.1, max_grad_norm=20.0, **MODES[mode][1])


def train(model: nn.Module, optimizer: AdaiV2, start: int, end: int) -> None:
    for t in range(start, end):
        for name, param in model.named_parameters():
            param.grad = gradient_of(name.removeprefix("module."), t, param)
        optimizer.step()


def bits_of(model: nn.Module, optimizer: AdaiV2) -> Bits:
    """Return whole parameters and states, as they are saved. Collective: all ranks."""
    saved = optimizer.state_dict()["state"]
    bits: Bits = {}
    for index, (name, param) in enumerate(model.named_parameters()):
        tensors = {"param": param.detach(), **saved[index]}
        for key, value in tensors.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            bits[f"{name.removeprefix('module.')}.{key}"] = whole.clone()
    return bits


def run(make: Callable[[Model], nn.Module]) -> dict[str, Bits]:
    """Train in every mode, on this rank."""
    found: dict[str, Bits] = {}
    for mode, (dtype, _) in MODES.items():
        model = make(Model(dtype))
        optimizer = optimizer_of(model, mode)
        train(model, optimizer, 0, NUM_STEPS)
        found[mode] = bits_of(model, optimizer)
    return found


def run_layout(name: str) -> dict[str, Bits]:
    return run(LAYOUTS[name][1])


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, Bits]:
    return run(lambda model: model)


def assert_same_bits(found: Bits, expected: Bits) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_bits_of_one_device(name: str, on_one_device: dict[str, Bits]) -> None:
    for of_rank in run_ranks(run_layout, LAYOUTS[name][0], name):
        for mode, expected in on_one_device.items():
            assert_same_bits(of_rank[mode], expected)


def step_tied_stages(mode: str) -> list[Tensor]:
    """Return a parameter that the first and the last stage share, at different places in their optimizers."""
    own, tied = (nn.Parameter(random_tensor(name, -1).to(MODES[mode][0])) for name in ("first", "wide"))
    params = [own, tied] if dist.get_rank() == 0 else [tied]
    optimizer = AdaiV2(params, lr=0.3, max_grad_norm=20.0, **MODES[mode][1])
    optimizer.configure_sharding(stages=dist.group.WORLD, num_replicas=lambda param: 2 if param is tied else None)
    for t in range(NUM_STEPS):
        own.grad, tied.grad = gradient_of("first", t, own), gradient_of("wide", t, tied)
        optimizer.step()
    return [tied.detach(), *(value for name, value in optimizer.state[tied].items() if name != "step")]


@pytest.mark.parametrize("mode", MODES)
def test_stages_round_a_parameter_that_they_share_alike(mode: str) -> None:
    one, other = run_ranks(step_tied_stages, 2, mode)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def wrongly_indexed(world_size: int) -> list[str]:
    """Return the parameters whose elements have other global indices than their values are."""
    wrong: list[str] = []
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("shards", "tensor"))
    placements = {"rows": (Shard(0),), "columns": (Shard(1),), "middle": (Shard(1),), "last of three": (Shard(2),)}
    for shape, cuts in (
        ((7, 5), ("rows", "columns")),
        ((5, 6, 9), ("rows", "middle", "last of three")),
        ((11,), ("rows",)),
    ):
        for cut in cuts:
            for is_sharded in (False, True):
                whole = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
                module = nn.Module()
                param = nn.Parameter(distribute_tensor(whole, mesh["tensor"], placements[cut]))
                module.register_parameter("param", param)
                if is_sharded:
                    fully_shard(module, mesh=mesh["shards"])
                local: Any = next(module.parameters()).to_local()
                origin = torch.tensor(list(origin_of(next(module.parameters()), {})))
                if not torch.equal(global_indices(origin, 0, local), local.detach().long()):
                    wrong.append(f"{shape} by {cut}, {is_sharded=}")
    return wrong


def test_elements_have_their_global_indices() -> None:
    for of_rank in run_ranks(wrongly_indexed, 4, 4):
        assert not of_rank


# -- FSDP1 -------------------------------------------------------------------------------------------------------------


def run_fsdp1(strategy: ShardingStrategy, use_orig_params: bool) -> dict[str, Bits]:
    """Train with gradients from a backward pass, the same in every layout; return the saved states by name."""
    found: dict[str, Bits] = {}
    for mode in FSDP1_MODES:
        module = FullyShardedDataParallel(
            Model(MODES[mode][0]),
            sharding_strategy=strategy,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )
        optimizer = optimizer_of(module, mode)
        optimizer.configure_sharding(model=module)
        for _ in range(NUM_STEPS):
            module().backward()
            optimizer.step()
            optimizer.zero_grad()
        states: Any = FullyShardedDataParallel.optim_state_dict(module, optimizer)["state"]
        found[mode] = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    return found


@pytest.mark.parametrize("use_orig_params", [True, False], ids=["original parameters", "flat parameters"])
def test_fsdp1_has_the_same_bits_on_2_and_4_ranks(use_orig_params: bool) -> None:
    """With flat parameters, random bits belong to the elements of these, so they differ from those of DDP."""
    two, four = (
        run_ranks(run_fsdp1, world_size, ShardingStrategy.FULL_SHARD, use_orig_params)[0] for world_size in (2, 4)
    )
    for mode, bits in two.items():
        assert {key.split(".")[1] for key in bits} >= {"exp_avg", "exp_avg_sq", "beta1_prod", "step"}
        assert any(key.endswith("master_param") for key in bits) == (mode == "master weights")
        assert_same_bits(four[mode], bits)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save(folder: str, mode: str, name: str) -> Bits:
    model = LAYOUTS[name][1](Model(MODES[mode][0]))
    optimizer = optimizer_of(model, mode)
    train(model, optimizer, 0, NUM_STEPS)
    dcp.save({"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    return bits_of(model, optimizer)


def load(folder: str, mode: str, name: str) -> tuple[Bits, Bits]:
    """Return the bits after loading, and after further steps."""
    model = LAYOUTS[name][1](Model(MODES[mode][0]))
    optimizer = optimizer_of(model, mode)
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=folder, planner=planner)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optim"])
    loaded = bits_of(model, optimizer)
    train(model, optimizer, NUM_STEPS, 2 * NUM_STEPS)
    return loaded, bits_of(model, optimizer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("before", "after"), [("FSDP2 on 2", "FSDP2 on 4"), ("FSDP2 on 4", "FSDP2 on 3")])
def test_a_run_resumed_on_other_ranks_has_the_bits_of_one_that_went_on(before: str, after: str, mode: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (saved, *_) = run_ranks(save, LAYOUTS[before][0], folder, mode, before)
        (of_rank, *_) = run_ranks(load, LAYOUTS[after][0], folder, mode, after)
    assert_same_bits(of_rank[0], saved)
    model = Model(MODES[mode][0])
    optimizer = optimizer_of(model, mode)
    train(model, optimizer, 0, 2 * NUM_STEPS)
    assert_same_bits(of_rank[1], bits_of(model, optimizer))


def refused_by_fsdp1(use_orig_params: bool) -> str:
    module = FullyShardedDataParallel(
        Model(torch.float32), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = optimizer_of(module, "mixed8")
    optimizer.configure_sharding(model=module)
    module().backward()
    with pytest.raises(ValueError, match="state_dtype must be") as error:
        optimizer.step()
    return str(error.value)


@pytest.mark.parametrize("use_orig_params", [True, False], ids=["original parameters", "flat parameters"])
def test_fsdp1_refuses_records_on_all_ranks(use_orig_params: bool) -> None:
    one, other = run_ranks(refused_by_fsdp1, 2, use_orig_params)
    assert one == other
    assert "parameters of FSDP1, which cuts them within the records of 32 elements" in one


def cut_within_records() -> list[tuple[int, ...] | None]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {"on the grid": (5, 192), "off the grid": (5, 96), "not divisible": (5, 160), "inner": (4, 6, 96)}
    found: list[tuple[int, ...] | None] = []
    for shape in whole.values():
        param = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(1)]))
        param.grad = torch.ones_like(param)
        optimizer = AdaiV2([param], lr=0.1, state_dtype="mixed8", independent=True)
        optimizer.step()
        found.append(records_shape(param, optimizer.precision))
        v = optimizer.state[param]["exp_avg_sq"]
        assert isinstance(v, DTensor)
        assert tuple(v.shape) == (found[-1] or shape)
        assert v.dtype == (torch.uint8 if found[-1] else torch.bfloat16)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_cut_within_records_leaves_states_in_bfloat16_on_all_ranks(world_size: int) -> None:
    expected = {
        2: [(5, 6, 34), None, None, (4, 6, 3, 34)],
        3: [(5, 6, 34), (5, 3, 34), None, (4, 6, 3, 34)],
    }
    assert run_ranks(cut_within_records, world_size) == [expected[world_size]] * world_size


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("rounded", "master weights"), ("master weights", "rounded")],
)
def test_a_distributed_checkpoint_is_loaded_into_another_mode(theirs: str, ours: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (saved, *_) = run_ranks(save, 2, folder, theirs, "FSDP2 on 2")
        (of_rank, *_) = run_ranks(load, 4, folder, ours, "FSDP2 on 4")
    loaded, further = of_rank
    assert_same_bits(
        {name: value for name, value in loaded.items() if "master" not in name}, saved_without_masters(saved)
    )
    for name in SIZES:
        if ours == "master weights":
            assert torch.equal(loaded[f"{name}.master_param"], saved[f"{name}.param"].float())
        assert further[f"{name}.param"].isfinite().all()


@pytest.mark.parametrize(("theirs", "ours"), [("mixed8", "master weights"), ("master weights", "mixed8")])
def test_a_distributed_checkpoint_is_loaded_with_more_or_fewer_bits(theirs: str, ours: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (saved, *_) = run_ranks(save, 2, folder, theirs, "FSDP2 on 2")
        (of_rank, *_) = run_ranks(load, 4, folder, ours, "FSDP2 on 4")
    loaded, further = of_rank
    assert loaded.keys() == saved.keys()
    for name, before in saved.items():
        # Products in 8 bits are on a grid of 1/48; the fourth root of a second moment on one of 1/255 of the largest.
        tolerance = 1 / 96 if name.endswith("beta1_prod") else 2 / 255 * float(before.abs().max())
        is_coded = name.split(".")[1] in ("exp_avg_sq", "beta1_prod")
        torch.testing.assert_close(
            loaded[name].float(), before.float(), rtol=2.0**-8 if is_coded else 0.0, atol=tolerance if is_coded else 0.0
        )
        assert further[name].isfinite().all()


def saved_without_masters(saved: Bits) -> Bits:
    return {name: value for name, value in saved.items() if "master" not in name}


def whole_state_dict(mode: str) -> tuple[dict[str, Any], Bits]:
    model = fsdp2(Model(MODES[mode][0]), 2)
    optimizer = optimizer_of(model, mode)
    train(model, optimizer, 0, NUM_STEPS)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    return whole, bits_of(model, optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_gloo_gathers_a_full_state_dict(mode: str) -> None:
    (whole, bits), _ = run_ranks(whole_state_dict, 2, mode)
    gathered = {f"{name}.{key}": value for name, state in whole["state"].items() for key, value in state.items()}
    assert_same_bits(gathered, {name: value for name, value in bits.items() if not name.endswith(".param")})
