"""Train a small Llama with the script of configs/README.md in the environment of `accelerate launch`.

Without a GPU accelerate never enables FSDP. `on_the_cpu` makes it detect GPUs and keeps the tensors on the CPU;
everything else, from the plugin to the engine, is as accelerate creates it from the file.

Run under a launcher, `training.py FOLDER` writes its results to FOLDER, one file per rank.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from adai_dist import AdaiV2
from tests.recipe_runs import ROOT

NUM_STEPS = 3
ROWS_PER_RANK = 8  # per step, as in the DeepSpeed files
NUM_TOKENS = 32
OPTIMIZER: dict[str, Any] = {"lr": 4.0, "dampening": 0.0, "max_grad_norm": 1.0}
NUM_LOOKS, SECONDS_BETWEEN_LOOKS = 10, 0.02
FIXED_BUFFER_BYTES = 10**8  # larger tensors are DeepSpeed's buckets, whose size is independent of the model


class Model(nn.Module):
    """Small Llama with almost all parameters in matrices of more than 100,000 elements, which ZeRO 3 shards."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": 384,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        }
        self.llama = LlamaForCausalLM(LlamaConfig(vocab_size=NUM_TOKENS, **sizes))

    def forward(self, batch: Tensor) -> Any:
        return self.llama(input_ids=batch, labels=batch)


@dataclass
class Found:
    """Results of one rank."""

    engine: str
    """Distributed type according to accelerate."""
    plugin: dict[str, str]
    """Settings as interpreted by accelerate."""
    losses: list[float]
    error: float
    """Distance from the reference parameters, relative to the distance travelled."""
    bytes_before_step: float
    """Bytes per parameter of all live tensors after a backward pass."""
    bytes_in_step: float
    """Bytes per parameter of all live tensors in the last step of the optimizer."""


def rows(num_ranks: int) -> Tensor:
    """Return sequences of consecutive numbers."""
    numbers = torch.Generator().manual_seed(1)
    first = torch.randint(0, NUM_TOKENS, (NUM_STEPS * num_ranks * ROWS_PER_RANK, 1), generator=numbers)
    return (first + torch.arange(8)) % NUM_TOKENS


def script() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "configs/README.md").read_text(), re.MULTILINE | re.DOTALL)
    return block


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def whole(model: nn.Module) -> Tensor:
    """Return all parameters of a model under any engine, concatenated."""
    if hasattr(model, "optimizer"):  # DeepSpeed's
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = [safe_get_full_fp32_param(parameter) for parameter in model.parameters()]
    elif hasattr(model, "summon_full_params"):  # FSDP1
        with type(model).summon_full_params(model):
            return flat(model)
    else:
        parameters = [x.full_tensor() if isinstance(x, DTensor) else x for x in model.parameters()]
    return torch.cat([parameter.detach().double().flatten() for parameter in parameters])


def reference(num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return the parameters before and after the same steps in one process, in float64."""
    model = Model().double()
    start = flat(model)
    optimizer = AdaiV2(model.parameters(), **OPTIMIZER)
    for batch in rows(num_ranks).split(num_ranks * ROWS_PER_RANK):
        model(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return start, flat(model)


def live_bytes() -> int:
    """Return the bytes of all storages of tensors created since `gc.freeze()` that persist.

    A thread of gloo holds a reduced tensor until it is scheduled again, so the tensors are counted several times, and
    the smallest count is returned.
    """
    gc.collect()
    counts = [_bytes_of_tensors()]
    for _ in range(NUM_LOOKS - 1):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        counts.append(_bytes_of_tensors())
    return min(counts)


def _bytes_of_tensors() -> int:
    storages: dict[int, int] = {}
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    for tensor in (*tensors, *(tensor.grad for tensor in tensors if tensor.is_leaf)):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local is not None and local.layout == torch.strided and local.device.type == "cpu":
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in storages.values() if size < FIXED_BUFFER_BYTES)


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set accelerate's variables and reset its singletons."""
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    before = dict(os.environ)
    os.environ.update(variables)
    forget()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        forget()


def on_the_cpu() -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import CPUOffloadPolicy

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        PartialState(backend="gloo")
        return
    PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 refuses cpu:0
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin()
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pinned memory needs a GPU
            Accelerator(fsdp_plugin=plugin)  # sets the state shared by later instances


def settings(accelerator: Any, model: nn.Module) -> dict[str, str]:
    if str(accelerator.distributed_type) == "DistributedType.DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        return {"stage": str(config["zero_optimization"]["stage"]), "clipping": str(config["gradient_clipping"])}
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return {"class": type(model).__name__}
    mesh = accelerator.torch_device_mesh
    return {
        "version": str(plugin.fsdp_version),
        "wrapped": ",".join(plugin.transformer_cls_names_to_wrap),
        "offload": type(plugin.cpu_offload).__name__,
        "mesh": "" if mesh is None else str(tuple(mesh.shape)),
    }


def train(variables: dict[str, str], goal: tuple[Tensor, Tensor]) -> Found:
    start, end = goal
    gc.collect()
    gc.freeze()
    with environment(variables):
        on_the_cpu()
        losses: list[float] = []
        in_step: list[int] = []
        data: Any = DataLoader(rows(dist.get_world_size()), batch_size=ROWS_PER_RANK)  # pyright: ignore[reportArgumentType]
        names: dict[str, Any] = {"model": Model(), "data": data}
        names["model"].register_forward_hook(lambda _, __, output: losses.append(output.loss.item()))
        hook = register_optimizer_step_pre_hook(
            lambda *_: in_step.append(live_bytes()) if len(losses) == NUM_STEPS else None
        )
        try:
            exec(compile(script(), "configs/README.md", "exec"), names)
        finally:
            hook.remove()
        engine = names["model"]
        error = (whole(engine) - end).norm() / (end - start).norm()
        loss = engine(next(iter(names["data"]))).loss
        if hasattr(engine, "optimizer"):
            engine.backward(loss)
        else:
            loss.backward()
        found = Found(
            engine=str(names["accelerator"].distributed_type).rpartition(".")[2],
            plugin=settings(names["accelerator"], engine),
            losses=losses[:NUM_STEPS],
            error=error.item(),
            bytes_before_step=live_bytes() / start.numel(),
            bytes_in_step=in_step[-1] / start.numel(),
        )
        if hasattr(engine, "destroy"):
            engine.destroy()
    return found


def main(folder: Path) -> None:
    """Run under `accelerate launch`, which sets the environment."""
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    found = train({}, reference(dist.get_world_size()))
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(asdict(found)))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort in their destructors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
