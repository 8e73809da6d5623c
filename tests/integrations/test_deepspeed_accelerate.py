"""accelerate and the transformers Trainer with DeepSpeed as backend."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from adai_dist import Adai, AdaiW
from adai_dist.optimizer import AdaptiveInertia
from tests.integrations.deepspeed_engines import set_environment
from tests.integrations.deepspeed_setups import zero
from tests.oracle import Oracle, OracleGroup
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

NUM_STEPS = 4
LR = 0.3


def accelerator_with(config: dict[str, Any]) -> Any:
    set_environment()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import Accelerator, DeepSpeedPlugin

    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(
            hf_ds_config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, **config}
        )
    )


def batches() -> torch.Tensor:
    return torch.randn(NUM_STEPS, 2, 6, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 3, bias=False)


def train(config: dict[str, Any], make_optimizer: Any) -> tuple[str, np.ndarray]:
    """Return the class of the innermost optimizer and the weights after a few steps on one row of each batch."""
    accelerator = accelerator_with(config)
    net = model()
    net, optimizer = accelerator.prepare(net, make_optimizer(net.parameters()))
    for batch in batches():
        loss = net(batch[dist.get_rank()]).square().sum()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    from deepspeed.utils import safe_get_full_fp32_param

    weight = safe_get_full_fp32_param(net.module.weight)
    return type(net.basic_optimizer).__name__, weight.numpy()


def expected() -> np.ndarray:
    start = model().weight.detach().double().numpy()
    oracle = Oracle({"weight": start}, [OracleGroup(("weight",), lr=LR)])
    for batch in batches().double().numpy():
        outputs = batch @ oracle.parameters["weight"].T
        oracle.step({"weight": np.mean([2 * np.outer(y, x) for y, x in zip(outputs, batch, strict=True)], axis=0)})
    return oracle.parameters["weight"]


def check(ranks: list[tuple[str, np.ndarray]], name: str) -> None:
    travelled = np.linalg.norm(expected() - model().weight.detach().double().numpy())
    for found, weight in ranks:
        assert found == name
        assert np.linalg.norm(weight - expected()) / travelled < 1e-6


def with_dummy(params: Any) -> Any:
    from accelerate.utils import DummyOptim

    return DummyOptim(params)


def in_json(config: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    named = {"optimizer": {"type": "Adai", "params": {"lr": LR}}}
    return run_ranks(train, 2, config | named, with_dummy)


def client(params: Any) -> Adai:
    return Adai(params, lr=LR)


def test_an_optimizer_named_in_the_json_is_exact_also_under_offload() -> None:
    check(in_json(zero(2, offload_optimizer={"device": "cpu"})), "Adai")


def test_a_client_optimizer_is_exact() -> None:
    check(run_ranks(train, 2, zero(3), client), "Adai")


def test_a_client_optimizer_is_exact_under_offload_if_accelerate_may_not_replace_it() -> None:
    config = zero(2, offload_optimizer={"device": "cpu"}) | {"zero_force_ds_cpu_optimizer": False}
    check(run_ranks(train, 2, config, client), "Adai")


def replaced() -> str:
    try:
        train(zero(2, offload_optimizer={"device": "cpu"}), client)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.deepspeed("CPUAdam")
def test_a_client_optimizer_that_accelerate_replaces_under_offload_is_refused() -> None:
    for message in run_ranks(replaced, 2):
        assert "replaced by DeepSpeedCPUAdam" in message
        assert '"zero_force_ds_cpu_optimizer": false' in message
        assert "DummyOptim" in message


# -- transformers.Trainer ----------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((6,), float(index % 3) - 1.0)}


class Squares(nn.Module):
    """Model that returns its loss, as transformers models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = model()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.linear(x).square().sum()}


def trainer_run(folder: str, params: dict[str, Any], arguments: dict[str, Any]) -> tuple[str, dict[str, Any], int]:
    """Return the class, hyperparameters and number of steps of the optimizer that the Trainer used."""
    set_environment()
    from transformers import Trainer, TrainingArguments

    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": False},  # otherwise the Trainer of transformers 4 casts the batch to fp16
        "optimizer": {"type": "AdaiW", "params": {"lr": "auto", "weight_decay": "auto", **params}},
        **zero(2),
    }
    trainer = Trainer(
        model=Squares(),
        args=TrainingArguments(
            output_dir=folder,
            deepspeed=config,
            max_steps=3,
            per_device_train_batch_size=1,
            learning_rate=0.2,
            weight_decay=0.01,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=Rows(),
    )
    trainer.train()
    optimizer: AdaptiveInertia = trainer.model_wrapped.basic_optimizer
    hyper = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    (state, *_) = optimizer.state.values()
    return type(optimizer).__name__, hyper, int(state["step"])


ADAM_FIELDS = {"adam_beta1": 0.1, "adam_beta2": 0.99, "adam_epsilon": 1e-3}


@pytest.mark.parametrize(
    ("params", "arguments"),
    [
        pytest.param({}, {}, id="left out of the JSON"),
        pytest.param({"betas": "auto", "eps": "auto"}, ADAM_FIELDS, id="auto, from the arguments"),
        pytest.param({"betas": [0.1, 0.99], "eps": 1e-3}, ADAM_FIELDS, id="the same in both"),
    ],
)
def test_the_trainer_accepts_betas_and_eps_of_adai(
    params: dict[str, Any], arguments: dict[str, Any], tmp_path: Any
) -> None:
    for name, hyper, num_steps in run_ranks(trainer_run, 2, str(tmp_path), params, arguments):
        assert name == AdaiW.__name__
        assert tuple(hyper["betas"]) == (0.1, 0.99)
        assert hyper["eps"] == 1e-3
        assert (hyper["lr"], hyper["weight_decay"], hyper["decoupled"]) == (0.2, 0.01, True)
        assert num_steps == 3


def test_the_trainer_refuses_betas_that_its_arguments_contradict(tmp_path: Any) -> None:
    with pytest.raises(AssertionError, match=r"optimizer\.params\.betas"):
        run_ranks(trainer_run, 2, str(tmp_path), {"betas": [0.1, 0.99]}, {})
