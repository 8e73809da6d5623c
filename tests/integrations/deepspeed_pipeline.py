"""Two-stage pipeline of prescribed products, with a layer tied between the first and the last stage."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.integrations.deepspeed_engines import Seen, gather, note_step, set_environment
from tests.integrations.deepspeed_setups import Setup
from tests.problems import Problem, Spec

NUM_STAGES = 2
TIED = "first.matrix"
# Both stages have parameters of every group, because DeepSpeed adds up the norms of all stages by group.
LAYERS = (
    "second.matrix",
    "third.matrix",
    "second.one",
    "first.vector",
    "second.three",
    "third.cube",
    "third.two",
)


class PipedProduct(nn.Module):
    """Layer that adds the product of its parameter and a gradient to the loss.

    The pipeline passes a tensor of three elements: the loss so far, the step, and the part of the batch.
    """

    def __init__(self, problem: Problem, spec: Spec, num_parts: int) -> None:
        super().__init__()
        self.problem, self.spec, self.num_parts = problem, spec, num_parts
        self.weight = nn.Parameter(problem.initial(spec).float())

    def forward(self, inputs: Tensor, use: int = 0, num_uses: int = 1) -> Tensor:
        _, step, part = (int(x) for x in inputs.detach().float().nan_to_num().view(-1))
        gradient = self.problem.gradient(self.spec, step)
        assert gradient is not None
        index = torch.arange(gradient.numel()).reshape(gradient.shape) % (self.num_parts * num_uses)
        gradient = self.num_parts * gradient.float() * (index == part * num_uses + use)
        product = (self.weight * gradient).float().sum().to(inputs.dtype)
        return inputs + torch.stack([product, torch.zeros_like(product), torch.zeros_like(product)])


def first_use(module: PipedProduct, inputs: Tensor) -> Tensor:
    return module(inputs, use=0, num_uses=2)


def second_use(module: PipedProduct, inputs: Tensor) -> Tensor:
    return module(inputs, use=1, num_uses=2)


def loss_of(num_added: int, outputs: Tensor, label: Tensor) -> Tensor:
    """Return the loss of a micro-batch, divided by the number of micro-batches if DeepSpeed adds up their gradients."""
    return outputs.float()[..., 0].sum() / num_added


def walk_pipeline(setup: Setup, layers_between: tuple[str, ...] = LAYERS, module: str = "PipelineModule") -> Seen:
    """Take all steps, and return a record with the parameters of this rank's stages. Collective: all ranks."""
    set_environment()
    import deepspeed
    from deepspeed import pipe

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    num_parts = dist.get_world_size() // NUM_STAGES * setup.num_micro_batches
    from adai_dist.integrations.deepspeed.adapters.releases import installed_release

    problem = setup.rounded
    num_added = 1 if installed_release().averages_micro_batches_of_pipelines else setup.num_micro_batches
    specs = {spec.name: spec for spec in problem.specs()}
    tied = (problem, specs[TIED], num_parts)
    layers: list[Any] = [
        pipe.TiedLayerSpec("tied", PipedProduct, *tied, forward_fn=first_use, tied_weight_attr="weight"),
        *(pipe.LayerSpec(PipedProduct, problem, specs[name], num_parts) for name in layers_between),
        pipe.TiedLayerSpec("tied", PipedProduct, *tied, forward_fn=second_use, tied_weight_attr="weight"),
    ]
    model = getattr(pipe, module)(
        layers, num_stages=NUM_STAGES, loss_fn=functools.partial(loss_of, num_added), partition_method="uniform"
    )
    parameters = {m.spec.name: m.weight for m in model.modules() if isinstance(m, PipedProduct)}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=local_groups(setup.problem, parameters),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": setup.num_micro_batches,
            "steps_per_print": 1000,  # a pipeline without it fails before DeepSpeed 0.16.4
            "gradient_clipping": setup.problem.max_grad_norm or 0.0,
            "optimizer": {"type": setup.optimizer, "params": {"lr": 1.0, **setup.arguments}},
            **setup.config,
        },
        dist_init_required=False,
    )
    seen = Seen(wrapper=type(engine.optimizer).__name__)
    for step in range(problem.steps):
        engine.train_batch(batches(step, engine.grid.get_data_parallel_rank(), setup))
        note_step(engine, seen)
        seen.unscaled_by.append(1.0)
    gather(engine, parameters, seen)
    return seen


def batches(step: int, data_parallel_rank: int, setup: Setup) -> Iterator[tuple[Tensor, Tensor]]:
    for micro_batch in range(setup.num_micro_batches):
        part = data_parallel_rank * setup.num_micro_batches + micro_batch
        yield torch.tensor([0.0, step, part]).to(setup.dtype), torch.zeros(())


def local_groups(problem: Problem, parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return the parameter groups, each with its parameters in this stage."""
    groups = []
    for index, (_, specs) in enumerate(problem.groups):
        params = [parameters[spec.name] for spec in specs if spec.name in parameters]
        groups.append(problem.hyperparameters(index) | {"params": params})
    return [group for group in groups if group["params"]]
