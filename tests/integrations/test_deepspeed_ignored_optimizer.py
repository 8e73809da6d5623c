"""Warnings about an ignored Adai optimizer under DeepSpeed, and refusal of Adam's default betas and eps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from adai_dist import Adai, AdaiV2
from tests.integrations.deepspeed_engines import set_environment
from tests.integrations.deepspeed_setups import zero
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

ADAMW = {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True}}  # the learning rate of the Trainer


def listen() -> list[str]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    return messages


def config_with(optimizer: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    named = {} if optimizer is None else {"optimizer": optimizer}
    return {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, **named, **more}


# -- deepspeed.initialize --------------------------------------------------------------------------------------------


def engine_optimizer(config: dict[str, Any], client: Callable[[Any], Any] | None, whose: str) -> tuple[str, list[str]]:
    """Return an engine's optimizer and the warnings, after an AdaiV2 was created for a model or deleted."""
    set_environment()
    import deepspeed

    model, other = nn.Linear(6, 3), nn.Linear(6, 3)
    made = AdaiV2((other if whose == "other" else model).parameters(), lr=1.0)
    if whose == "gone":
        del made
    messages = listen()
    for _ in range(2):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=client(model.parameters()) if client else None,
            model_parameters=model.parameters(),
            config=config,
            dist_init_required=False,
        )
    return type(engine.basic_optimizer).__name__, [
        message for message in messages if "DeepSpeed trains with" in message
    ]


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1)


def adai(params: Any) -> Adai:
    return Adai(params, lr=0.1)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_engine_warns_once_if_it_ignores_an_optimizer_of_its_model(stage: int) -> None:
    (name, first), (_, second) = run_ranks(engine_optimizer, 2, config_with(ADAMW, **zero(stage)), None, "mine")
    assert name == "AdamW"
    assert len(first) == 1
    assert "AdamW and ignores the AdaiV2" in first[0]
    assert "deepspeed.initialize(optimizer=...)" in first[0]
    assert second == []


def test_it_also_warns_for_a_client_optimizer_of_another_class() -> None:
    untested = {"zero_allow_untested_optimizer": True}
    ((name, messages),) = run_ranks(engine_optimizer, 1, config_with(None, **zero(1), **untested), sgd, "mine")
    assert name == "SGD"
    assert len(messages) == 1


@pytest.mark.parametrize("whose", ["other", "gone"])
def test_it_does_not_warn_about_optimizers_of_other_models_or_deleted_ones(whose: str) -> None:
    assert run_ranks(engine_optimizer, 1, config_with(ADAMW), None, whose) == [("AdamW", [])]


def test_a_client_adai_overrides_the_optimizer_of_the_configuration() -> None:
    assert run_ranks(engine_optimizer, 1, config_with(ADAMW), adai, "other") == [("Adai", [])]


@pytest.mark.parametrize("params", [None, {}, {"dampening": 0.0}, {"learning_rate": 1.0}])
def test_a_type_without_lr_is_refused_by_name(params: dict[str, Any] | None) -> None:
    named = {"type": "AdaiV2"} | ({} if params is None else {"params": params})
    for message in run_ranks(refusal, 1, config_with(named)):
        assert message.startswith("UnsupportedSetting: optimizer.params in DeepSpeed's configuration must have lr")
        assert (", ".join(params) if params else "no params") in message
        assert '"params": {"lr":' in message


def refusal(config: dict[str, Any]) -> str:
    try:
        engine_optimizer(config, None, "gone")
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


# -- the Trainer -----------------------------------------------------------------------------------------------------


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.linear(x).square().sum()}


def trainer_run(
    folder: str, optimizer: dict[str, Any] | None, how: str, arguments: dict[str, Any]
) -> tuple[str, list[str]]:
    """Return the optimizer that the Trainer uses, and the warnings, for one way of passing an optimizer."""
    set_environment()
    from transformers import Trainer, TrainingArguments

    messages = listen()
    model = Squares()
    kept = AdaiV2(model.parameters(), lr=1.0) if how == "kept" else None
    given: dict[str, Any] = {}
    if how in ("kept", "inline"):
        given["optimizers"] = (kept or AdaiV2(model.parameters(), lr=1.0), None)
    elif how == "class":
        given["optimizer_cls_and_kwargs"] = (AdaiV2, {"lr": 1.0})
    del kept
    float32 = {"fp16": {"enabled": False}}  # otherwise the Trainer of transformers 4 casts the batch to fp16
    try:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                deepspeed=config_with(optimizer, **zero(2), **float32),
                max_steps=2,
                per_device_train_batch_size=1,
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=True,
                **arguments,
            ),
            train_dataset=[{"x": torch.ones(6)}] * 4,  # type: ignore[arg-type]
            **given,
        )
        trainer.train()
    except ValueError as error:
        return f"{type(error).__name__}: {error}", messages
    return type(trainer.model_wrapped.basic_optimizer).__name__, messages


@pytest.mark.parametrize("how", ["kept", "inline"])
@pytest.mark.parametrize("named", [None, ADAMW], ids=["names none", "names another"])
def test_the_trainer_warns_that_it_ignores_an_optimizer(how: str, named: dict[str, Any] | None, tmp_path: Any) -> None:
    for rank, (name, messages) in enumerate(run_ranks(trainer_run, 1, str(tmp_path), named, how, {})):
        assert name == "AdamW"
        assert len(messages) == (rank == 0)
        assert "AdamW" in messages[0]
        assert "ignores the AdaiV2 that was created for the same parameters" in messages[0]
        assert "optimizer_cls_and_kwargs=(AdaiV2, {...})" in messages[0]


def test_the_suggested_remedy_trains_the_optimizer(tmp_path: Any) -> None:
    assert run_ranks(trainer_run, 1, str(tmp_path), None, "class", {}) == [("AdaiV2", [])]


def test_the_trainer_warns_that_the_hyperparameters_are_those_of_the_configuration(tmp_path: Any) -> None:
    named = {"type": "Adai", "params": {"lr": "auto"}}
    ((name, messages),) = run_ranks(trainer_run, 1, str(tmp_path), named, "inline", {})
    assert name == "Adai"
    assert len(messages) == 1
    assert "hyperparameters are those of the configuration" in messages[0]


# Params of the JSON, arguments of the Trainer, and the param that is refused.
AUTO: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({"betas": "auto"}, {}, "betas"),
    ({"eps": "auto"}, {}, "eps"),
    ({"betas": "auto", "eps": "auto"}, {"adam_epsilon": 1e-3}, "betas"),
    ({"betas": "auto", "eps": "auto"}, {"adam_beta1": 0.1, "adam_beta2": 0.99}, "eps"),
    ({"weight_decay": "auto"}, {}, None),
    ({"betas": "auto"}, {"adam_beta1": 0.2}, None),
    ({"eps": "auto"}, {"adam_epsilon": 1e-2}, None),
    ({}, {}, None),
]


def processed(folder: str, name: str) -> list[str]:
    """Return for each configuration the error, or the params that DeepSpeed would receive."""
    set_environment()
    from transformers import TrainingArguments

    found: list[str] = []
    for params, arguments, _ in AUTO:
        config = config_with({"type": name, "params": {"lr": "auto", **params}}, **zero(2))
        try:
            done = TrainingArguments(
                output_dir=folder, deepspeed=config, per_device_train_batch_size=1, use_cpu=True, **arguments
            )
            found.append(str(done.hf_deepspeed_config.config["optimizer"]["params"]))
        except ValueError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("name", ["AdaiV2", "adai", "AdamW"])
def test_auto_is_never_replaced_with_a_default_of_adam(name: str, tmp_path: Any) -> None:
    (found,) = run_ranks(processed, 1, str(tmp_path), name)
    for (params, _, refused), result in zip(AUTO, found, strict=True):
        if refused is None or name == "AdamW":
            assert "auto" not in result
            assert all(f"'{key}'" in result for key in ("lr", *params))
        else:
            assert result.startswith(f'UnsupportedSetting: optimizer.params.{refused} must not be "auto"')
            assert f"leave {refused} out" in result
