"""The smallest engine of the recipes: a linear layer, whose state is a function of the number of steps."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adai_dist import AdaiV2
from adai_dist.recipes.engines import Engine
from adai_dist.recipes.task import Rows


class LinearEngine(Engine):
    """A linear layer and its optimizer, under FSDP2 if there are several ranks."""

    precision = "fp32"

    def __init__(self, num_inputs: int = 33, optimizer: type[torch.optim.Optimizer] = AdaiV2) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(num_inputs, 3)
        self.inputs = torch.randn(8, num_inputs)
        if dist.get_world_size() > 1:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = optimizer(self.model.parameters(), lr=0.1)

    def take_steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.backward((self.inputs,), is_last=True)
            self.step(0.1)

    def backward(self, rows: Rows, is_last: bool) -> Tensor:
        loss = self.model(*rows).square().mean()
        loss.backward()
        return loss.detach()

    def step(self, lr: float) -> Tensor | None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None

    def scores(self, rows: Rows) -> dict[str, Tensor]:
        raise NotImplementedError("the tests do not evaluate")

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def local_state(self) -> list[Tensor]:
        """Return copies of all tensors on this rank."""
        tensors = [*self.model.parameters()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return [getattr(tensor, "_local_tensor", tensor).detach().clone() for tensor in tensors]

    def is_at(self, state: list[Tensor]) -> bool:
        """Return whether all tensors equal those that `local_state` returned."""
        now = self.local_state()
        return len(now) == len(state) and all(torch.equal(a, b) for a, b in zip(now, state, strict=True))
