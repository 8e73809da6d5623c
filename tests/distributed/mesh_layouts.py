"""Layouts on 2, 4 and 8 ranks, in which the mean is exact, refused or warned about.

A layout makes parameters of this rank by name. Parameters with the same name are pieces or copies of one parameter,
and pieces are identified by their place in the mesh. Gradients are random, the same for copies.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from adai_dist import AdaiV2
from tests.distributed.recorded import names_of

Configure = Callable[[AdaiV2], None]


class Model(nn.Module):
    """A model with parameters by name, of 24 elements each, with values derived from the name."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(value_of(name)))


def value_of(name: str) -> Tensor:
    return torch.randn(8, 3, generator=seeded(name), dtype=torch.float64)


def seeded(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def scale_of(name: str) -> float:
    """Return the magnitude of a parameter's gradient; they differ, so that a wrong weight shows."""
    return 0.2 + zlib.crc32(name.split("@")[0].encode()) % 7


def on_mesh(name: str, mesh: DeviceMesh, *placements: Placement) -> nn.Module:
    """Return one parameter as a DTensor."""
    model = Model(name)
    model.register_parameter(name, nn.Parameter(distribute_tensor(value_of(name), mesh, placements)))
    return model


def mesh_of(*shape: int, names: str = "") -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(names.split()) or None)


def subgroup(*all_ranks: list[int]) -> Any:
    """Make these process groups and return the one with this rank. Collective: all ranks."""
    groups = [dist.new_group(ranks) for ranks in all_ranks]
    return next(g for g, ranks in zip(groups, all_ranks, strict=True) if dist.get_rank() in ranks)


@dataclass(frozen=True)
class Made:
    modules: list[nn.Module]
    configure: Configure = lambda optimizer: None
    is_reversed: bool = False
    """Whether the optimizer gets the parameters in reverse order."""

    def names(self) -> dict[Tensor, str]:
        names: dict[Tensor, str] = {}
        for module in self.modules:
            held = [p for p in module.parameters() if not isinstance(p, DTensor) or p.device_mesh.get_coordinate()]
            names |= names_of(module) if held else dict.fromkeys(module.parameters(), "on other ranks")
        return dict(reversed(names.items())) if self.is_reversed else names


@dataclass(frozen=True)
class Layout:
    world_size: int
    make: Callable[[], Made]
    outcome: str = "exact"
    """Text of the error message or of the warning; empty if the mean is exact."""

    @property
    def is_refused(self) -> bool:
        return self.outcome.startswith(REFUSED)


REFUSED = "the mean over all parameters requires knowing"
OTHERS = "hold different parameters, and each take the mean over their own"
COPIES = "are assumed to hold copies of the parameters that are not sharded over them"
TIED = "are assumed to hold different parameters, but 1 of them are the same on several"
UNLIKE = "reduce their means over different ones"


def rank() -> int:
    return dist.get_rank()


# -- plain tensors -----------------------------------------------------------------------------------------------------


def copies() -> Made:
    return Made([Model("a", "b")])


def unconfigured_stages() -> Made:
    return Made([Model(f"stage{rank()}")])


def configured_stages() -> Made:
    return Made([Model(f"stage{rank()}")], lambda optimizer: optimizer.configure_sharding(stages=dist.group.WORLD))


def tied_stages(num_replicas: Any) -> Callable[[], Made]:
    def make() -> Made:
        model = Model(f"stage{rank()}", "tied") if rank() in (0, dist.get_world_size() - 1) else Model(f"stage{rank()}")
        tied = getattr(model, "tied", None)

        def of_param(param: Tensor) -> int | None:
            return num_replicas if param is tied else None

        def configure(optimizer: AdaiV2) -> None:
            replicas = {"num_replicas": of_param} if num_replicas else {}
            optimizer.configure_sharding(stages=dist.group.WORLD, **replicas)

        return Made([model], configure)

    return make


def unmarked_tensor_parallel() -> Made:
    return Made([Model(f"part{rank()}", "norm")])


def marked(name: str, value: bool) -> Callable[[], Made]:
    def make() -> Made:
        model = Model(f"part{rank()}", "norm")
        setattr(getattr(model, f"part{rank()}"), name, value)
        return Made([model])

    return make


def marked_and_configured() -> Made:
    model = Model(f"part{rank()}", "norm")
    part = getattr(model, f"part{rank()}")
    part.tensor_model_parallel = True

    def configure(optimizer: AdaiV2) -> None:
        optimizer.configure_sharding(num_replicas=lambda param: 1 if param is part else None)

    return Made([model], configure)


def models_of_their_own() -> Made:
    """Make a separate model on every rank, configured as such."""
    own = subgroup(*([r] for r in range(dist.get_world_size())))
    return Made([Model("shared")], lambda optimizer: optimizer.configure_sharding(own))


# -- one mesh ----------------------------------------------------------------------------------------------------------


def fsdp2() -> Made:
    return Made([fully_shard(Model("a", "b"), mesh=mesh_of(dist.get_world_size()))])


def fsdp2_beside_plain_experts() -> Made:
    return Made([fully_shard(Model("a"), mesh=mesh_of(dist.get_world_size())), Model(f"expert{rank()}")])


def one_rank_mesh_beside_fsdp2() -> Made:
    """Make a parameter on a mesh of rank 0 only."""
    whole = mesh_of(dist.get_world_size())
    mine = DeviceMesh("cpu", [0])
    modules: list[nn.Module] = [fully_shard(Model("a"), mesh=whole)]
    if rank() == 0:
        modules.append(on_mesh("b", mine, Shard(0)))
    return Made(modules)


def some_ranks_only() -> Made:
    """Make a separate model on the last rank."""
    num_ranks = dist.get_world_size() - 1
    mesh = DeviceMesh("cpu", list(range(num_ranks)))
    if rank() < num_ranks:
        return Made([fully_shard(Model("a", "b"), mesh=mesh)])
    return Made([])


def with_empty_shards() -> Made:
    """Make parameters with fewer rows than ranks, so that some ranks hold no elements."""
    model = Model("a")
    model.register_parameter("b", nn.Parameter(value_of("b")[:1].clone()))
    return Made([fully_shard(model, mesh=mesh_of(dist.get_world_size()))])


# -- two meshes --------------------------------------------------------------------------------------------------------


def experts_in_modules(is_configured: bool) -> Callable[[], Made]:
    """Make experts as ordinary modules of each rank, sharded over "efsdp", and the rest sharded over all ranks."""

    def make() -> Made:
        mesh = mesh_of(2, 2, names="ep efsdp")
        expert = fully_shard(Model(f"expert{mesh['ep'].get_local_rank()}"), mesh=mesh["efsdp"])
        rest = fully_shard(Model("a"), mesh=mesh_of(4))
        experts = set(expert.parameters())

        def configure(optimizer: AdaiV2) -> None:
            if is_configured:
                optimizer.configure_sharding(num_replicas=lambda param: 1 if param in experts else None)

        return Made([rest, expert], configure)

    return make


def flattened_experts_in_modules() -> Made:
    """Make the same, with both meshes flattened from one."""
    mesh = mesh_of(2, 2, names="ep efsdp")
    expert = fully_shard(Model(f"expert{mesh['ep'].get_local_rank()}"), mesh=mesh["efsdp"])
    return Made([fully_shard(Model("a"), mesh=mesh["ep", "efsdp"]._flatten("fsdp")), expert])


def experts_within_hsdp() -> Made:
    """Make experts as ordinary modules, sharded over one dimension of the mesh of the rest, which uses HSDP."""
    mesh = mesh_of(2, 2, names="ep fsdp")
    expert = fully_shard(Model(f"expert{mesh['ep'].get_local_rank()}"), mesh=mesh["fsdp"])
    return Made([fully_shard(Model("a"), mesh=mesh), expert])


def dtensor_experts() -> Made:
    """Make experts as DTensors over all dimensions of their mesh, and the rest sharded over all ranks."""
    mesh = mesh_of(2, 2, names="efsdp ep")
    expert = fully_shard(on_mesh("experts", mesh["ep"], Shard(0)), mesh=mesh["efsdp"])
    return Made([fully_shard(Model("a"), mesh=mesh_of(4)), expert])


def a_part_of_the_ranks() -> Made:
    """Shard one parameter over all ranks, and another one over the first two, which the others do not have."""
    whole, part = mesh_of(4), DeviceMesh("cpu", [0, 1])
    modules: list[nn.Module] = [fully_shard(Model("a"), mesh=whole)]
    if rank() < 2:
        modules.append(on_mesh("b", part, Shard(0)))
    return Made(modules)


def a_part_of_the_ranks_named_by_all() -> Made:
    whole, part = mesh_of(4), DeviceMesh("cpu", [0, 1])
    return Made([fully_shard(Model("a"), mesh=whole), on_mesh("b", part, Shard(0))])


def a_part_of_the_ranks_copied() -> Made:
    """Replicate instead of shard, which makes no difference: the other ranks may hold anything."""
    whole, part = mesh_of(4), DeviceMesh("cpu", [0, 1])
    modules: list[nn.Module] = [fully_shard(Model("a"), mesh=whole)]
    if rank() < 2:
        modules.append(on_mesh("b", part, Replicate()))
    return Made(modules)


def crossing_meshes() -> Made:
    """Make two meshes that share rank 0; ranks 1 and 2 are in one of them."""
    first, second = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 2])
    modules: list[nn.Module] = []
    if rank() in (0, 1):
        modules.append(on_mesh("a", first, Shard(0)))
    if rank() in (0, 2):
        modules.append(on_mesh("b", second, Shard(0)))
    return Made(modules)


def fsdp2_stages(is_configured: bool) -> Callable[[], Made]:
    def make() -> Made:
        mesh = mesh_of(2, 2, names="pp dp")
        stage = fully_shard(Model(f"stage{mesh['pp'].get_local_rank()}"), mesh=mesh["dp"])

        def configure(optimizer: AdaiV2) -> None:
            if is_configured:
                optimizer.configure_sharding(stages=mesh["pp"].get_group())

        return Made([stage], configure)

    return make


def tied_fsdp2_stages() -> Made:
    mesh = mesh_of(2, 2, names="pp dp")
    stage = fully_shard(Model(f"stage{mesh['pp'].get_local_rank()}", "tied"), mesh=mesh["dp"])
    tied = stage.tied

    def configure(optimizer: AdaiV2) -> None:
        optimizer.configure_sharding(
            stages=mesh["pp"].get_group(), num_replicas=lambda param: 2 if param is tied else None
        )

    return Made([stage], configure)


def unequal_stages() -> Made:
    """Shard the first stage and replicate the last one."""
    stages, part = subgroup([0, 2], [1, 3]), DeviceMesh("cpu", [0, 1])
    stage = on_mesh("stage0", part, Shard(0)) if rank() < 2 else Model("stage1")
    return Made([stage], lambda optimizer: optimizer.configure_sharding(stages=stages))


def replicas_by_hand() -> Made:
    """Use FSDP2 within halves that are copies of each other, kept equal by the test."""
    mesh = mesh_of(2, 2, names="replica fsdp")
    return Made([fully_shard(Model("a", "b"), mesh=mesh["fsdp"])])


def context_parallel() -> Made:
    """Shard parameters over data- and context-parallel ranks together."""
    mesh = mesh_of(2, dist.get_world_size() // 2, names="dp cp")
    return Made([fully_shard(Model("a", "b"), mesh=mesh["dp", "cp"]._flatten("dp_cp"))])


def hsdp() -> Made:
    return Made([fully_shard(Model("a", "b"), mesh=mesh_of(2, dist.get_world_size() // 2, names="replicate shard"))])


def tensor_parallel_and_fsdp2(is_reversed: bool) -> Callable[[], Made]:
    """Distribute norms over the data-parallel dimension only, as without sequence parallelism."""

    def make() -> Made:
        mesh = mesh_of(dist.get_world_size() // 2, 2, names="dp tp")
        linear = fully_shard(on_mesh("linear", mesh["tp"], Shard(0)), mesh=mesh["dp"])
        norm = fully_shard(Model("norm"), mesh=mesh["dp"])
        only_tp = on_mesh("head", mesh["tp"], Shard(0))
        return Made([linear, norm, only_tp], is_reversed=is_reversed and rank() in (0, 3))

    return make


# -- three dimensions --------------------------------------------------------------------------------------------------


def three_dimensions() -> Made:
    """Make stages of tensor-parallel, sharded parameters."""
    mesh = mesh_of(2, 2, 2, names="pp dp tp")
    stage = mesh["pp"].get_local_rank()
    linear = fully_shard(on_mesh(f"linear{stage}", mesh["tp"], Shard(0)), mesh=mesh["dp"])
    norm = fully_shard(Model(f"norm{stage}"), mesh=mesh["dp"])
    return Made([linear, norm], lambda optimizer: optimizer.configure_sharding(stages=mesh["pp"].get_group()))


def three_dimensions_unconfigured() -> Made:
    return Made(three_dimensions().modules)


def hsdp_and_tensor_parallel() -> Made:
    mesh = mesh_of(2, 2, 2, names="replicate shard tp")
    both = mesh["replicate", "shard"]
    return Made(
        [fully_shard(on_mesh("linear", mesh["tp"], Shard(0)), mesh=both), fully_shard(Model("norm"), mesh=both)]
    )


def experts_within_replicas() -> Made:
    """Make two replicas of DTensor experts and a sharded rest; the mesh of the experts lacks the replicas."""
    mesh = mesh_of(2, 2, 2, names="replicate efsdp ep")
    expert = fully_shard(on_mesh("experts", mesh["ep"], Shard(0)), mesh=mesh["efsdp"])
    return Made([fully_shard(Model("a"), mesh=mesh_of(2, 4, names="replicate shard")), expert])


def three_dimensional_shards() -> Made:
    mesh = mesh_of(2, 2, 2, names="x y z")
    return Made([on_mesh("a", mesh, Shard(0), Shard(0), Replicate()), on_mesh("b", mesh["y"], Shard(0)), Model("c")])


LAYOUTS = {
    "copies, 2": Layout(2, copies),
    "fsdp2, 2": Layout(2, fsdp2),
    "fsdp2 beside plain experts, 2": Layout(2, fsdp2_beside_plain_experts, COPIES),
    "stages, configured, 2": Layout(2, configured_stages),
    "stages, unconfigured, 2": Layout(2, unconfigured_stages, OTHERS),
    "a tied embedding, configured, 2": Layout(2, tied_stages(2)),
    "a tied embedding, unconfigured, 2": Layout(2, tied_stages(None), TIED),
    "plain tensor parallelism, 2": Layout(2, unmarked_tensor_parallel, OTHERS),
    "marked by Megatron, 2": Layout(2, marked("tensor_model_parallel", True), REFUSED),
    "marked by DeepSpeed, 2": Layout(2, marked("model_parallel", True), REFUSED),
    "experts marked by Megatron, 2": Layout(2, marked("allreduce", False), REFUSED),
    "marked for no reason, 2": Layout(2, marked("tensor_model_parallel", False), OTHERS),
    "marked and configured, 2": Layout(2, marked_and_configured),
    "models of their own, configured, 2": Layout(2, models_of_their_own),
    "a mesh of one rank, 2": Layout(2, one_rank_mesh_beside_fsdp2, COPIES),
    "copies, 4": Layout(4, copies),
    "stages, configured, 4": Layout(4, configured_stages),
    "stages, unconfigured, 4": Layout(4, unconfigured_stages, OTHERS),
    "a tied embedding, configured, 4": Layout(4, tied_stages(2)),
    "a tied embedding, unconfigured, 4": Layout(4, tied_stages(None), TIED),
    "experts in modules, 4": Layout(4, experts_in_modules(is_configured=False), REFUSED),
    "experts in modules, configured, 4": Layout(4, experts_in_modules(is_configured=True)),
    "experts in modules, one mesh, 4": Layout(4, flattened_experts_in_modules, REFUSED),
    "experts in modules within HSDP, 4": Layout(4, experts_within_hsdp, COPIES),
    "experts as DTensors, 4": Layout(4, dtensor_experts),
    "a part of the ranks, 4": Layout(4, a_part_of_the_ranks, REFUSED),
    "a part of the ranks, named by all, 4": Layout(4, a_part_of_the_ranks_named_by_all, REFUSED),
    "copies on a part of the ranks, 4": Layout(4, a_part_of_the_ranks_copied, REFUSED),
    "fsdp2 stages, unconfigured, 4": Layout(4, fsdp2_stages(is_configured=False), OTHERS),
    "fsdp2 stages, configured, 4": Layout(4, fsdp2_stages(is_configured=True)),
    "tied fsdp2 stages, 4": Layout(4, tied_fsdp2_stages),
    "unequal stages, 4": Layout(4, unequal_stages),
    "replicas by hand, 4": Layout(4, replicas_by_hand),
    "context parallel, 4": Layout(4, context_parallel),
    "hsdp, 4": Layout(4, hsdp),
    "tensor parallel and fsdp2, 4": Layout(4, tensor_parallel_and_fsdp2(is_reversed=False)),
    "in another order, 4": Layout(4, tensor_parallel_and_fsdp2(is_reversed=True)),
    "empty shards, 4": Layout(4, with_empty_shards),
    # Last, as ranks number their means, and rank 3 has none here.
    "crossing meshes, 4": Layout(4, crossing_meshes, UNLIKE),
    "three of the ranks, 4": Layout(4, some_ranks_only),
    "context parallel, 8": Layout(8, context_parallel),
    "tensor parallel and fsdp2, 8": Layout(8, tensor_parallel_and_fsdp2(is_reversed=True)),
    "three dimensions, 8": Layout(8, three_dimensions),
    "three dimensions, unconfigured, 8": Layout(8, three_dimensions_unconfigured, OTHERS),
    "hsdp and tensor parallel, 8": Layout(8, hsdp_and_tensor_parallel),
    "experts within replicas, 8": Layout(8, experts_within_replicas),
    "three-dimensional shards, 8": Layout(8, three_dimensional_shards),
}


def gradient_of(param: Tensor, name: str, step: int) -> Tensor:
    local = param.to_local() if isinstance(param, DTensor) else param
    gradient = scale_of(name) * torch.randn(local.shape, generator=seeded(f"{name} {step}"), dtype=local.dtype)
    if not isinstance(param, DTensor):
        return gradient
    return DTensor.from_local(
        gradient, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
