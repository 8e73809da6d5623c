"""Legal settings that are probably mistakes are warned about once; keys that other packages use are not."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import lr_scheduler

from adai_dist import AdaiV2, AdaiW
from adai_dist.optimizer import likely_mistakes
from adai_dist.optimizer.retirement import STEPS_BETWEEN_CHECKS
from adai_dist.optimizer.variants import OPTIMIZERS
from tests.spawn import run_ranks


@pytest.fixture(autouse=True)
def _no_warnings_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likely_mistakes, "_warned", set())
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "adai_dist"]
    return [message for message in found if not message.startswith("stepping ")]


def steps(optimizer: Any, number: int = 2) -> None:
    for _ in range(number):
        for parameter in optimizer.params():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


# -- Adam's hyperparameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS.values())
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.99), [0.95, 0.95], torch.tensor([0.9, 0.99])], ids=str)
@pytest.mark.parametrize("lr", [1e-3, 0.1, torch.tensor(1e-4)], ids=str)
def test_adams_betas_are_warned_about_once(
    lr: Any, betas: Any, optimizer_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = optimizer_class([Parameter(torch.ones(2))], lr=lr, betas=betas)
    steps(optimizer)
    copy.deepcopy(optimizer)
    (message,) = messages(caplog)
    assert "betas[0] (beta0) scales 1 - inertia and is not a momentum coefficient" in message
    assert "leave betas out, or pass betas=(0.1, 0.99)" in message
    assert ("lr=0.001 looks like Adam's, too" in message) == (lr == 1e-3 and not isinstance(lr, torch.Tensor))


def test_adams_betas_of_a_single_group_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    groups = [{"params": [Parameter(torch.ones(2))]}, {"params": [Parameter(torch.ones(2))], "betas": (0.9, 0.99)}]
    AdaiV2(groups, lr=0.1)
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize("betas", [(0.1, 0.99), (0.0, 0.9), (0.2, 0.999), (0.4, 0.95)])
def test_small_beta0_and_small_lr_are_not_warned_about(betas: Any, caplog: pytest.LogCaptureFixture) -> None:
    steps(AdaiV2([Parameter(torch.ones(2))], lr=1e-4, betas=betas))
    assert not messages(caplog)


# -- keys of parameter groups ------------------------------------------------------------------------------------------

MISSPELT = {
    "weight_decy": "weight_decay",
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    "weigth_decay": "weight_decay",
    "weight-decay": "weight_decay",
    "weightdecay": "weight_decay",
    "beta": "betas",
    "beta2": "betas",
    "LR": "lr",
    "Eps": "eps",
    "dampning": "dampening",
    "damping": "dampening",
    "decouple": "decoupled",
    "maximise": "maximize",
    "for_each": "foreach",
}
FOREIGN = (
    *("name", "param_names", "lr_mult", "lr_scale", "swa_lr", "max_lr", "min_lr", "base_lr", "initial_lr", "momentum"),
    *("base_momentum", "max_momentum", "fused", "capturable", "differentiable", "amsgrad", "moe", "nesterov", "eta"),
    *("decoupled_weight_decay", "no_weight_decay", "weight_decay_mult", "wd_mult", "decay_mult", "layer_id", "rank"),
    *(
        "original_lr",
        "lr_in_warmup",
        "peak_lr",
        "warmup_steps",
        "is_expert",
        "is_lora",
        "loraplus_lr_ratio",
        "use_muon",
    ),
    *("ds_pipe_replicated", "step", "trust_ratio", "lars", "last_epoch", "default_lr", "betas_schedule", "tag", "ids"),
)


@pytest.mark.parametrize(("key", "meant"), MISSPELT.items())
def test_a_misspelt_hyperparameter_is_warned_about_with_the_likely_name(
    key: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    groups = [{"params": [Parameter(torch.ones(2))], key: 0.1} for _ in range(3)]
    optimizer = AdaiV2(groups, lr=0.1)
    steps(optimizer)
    (message,) = messages(caplog)
    assert f"has the key {key!r}" in message
    assert f"did you mean {meant!r}?" in message
    assert optimizer.param_groups[0][key] == 0.1
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))], key: 0.1})
    assert len(messages(caplog)) == 1


def test_a_misspelt_hyperparameter_of_a_later_group_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = AdaiV2([Parameter(torch.ones(2))], lr=0.1)
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "weight_decays_": 0.1, "wieght_decay": 0.1})
    (message,) = messages(caplog)
    assert "'wieght_decay'" in message


@pytest.mark.parametrize("key", FOREIGN)
def test_keys_of_other_packages_are_not_warned_about(key: str, caplog: pytest.LogCaptureFixture) -> None:
    steps(AdaiV2([{"params": [Parameter(torch.ones(2))], key: 0.1}], lr=0.1))
    assert not messages(caplog)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=9, cycle_momentum=False),
        lambda o: lr_scheduler.CyclicLR(o, base_lr=0.1, max_lr=0.3, cycle_momentum=False),
        lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    ],
)
def test_keys_that_schedulers_add_are_not_warned_about(
    make: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = AdaiV2([("weight", Parameter(torch.ones(2)))], lr=0.1)
    scheduler = make(optimizer)
    for _ in range(3):
        steps(optimizer, 1)
        scheduler.step()
    again = AdaiV2(optimizer.param_groups, lr=0.1)  # with all their keys
    steps(again)
    assert not messages(caplog)


def test_parameter_groups_of_other_optimizers_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    for cls in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.RAdam):
        other = cls([Parameter(torch.ones(2))], lr=0.1)
        groups = [
            {key: value for key, value in group.items() if key not in ("betas", "eps", "dampening", "maximize")}
            for group in other.param_groups
        ]
        AdaiV2(groups, lr=0.1)
    assert not messages(caplog)


# -- low precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_low_precision_parameters_without_master_weights_are_warned_about_once(
    kernels: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAI_DIST_KERNELS", kernels)
    params = [Parameter(torch.ones(2, dtype=dtype)), Parameter(torch.ones(2))]
    steps(AdaiW(params, lr=0.1), 3)
    optimizer = AdaiW(params, lr=0.1, master_weights=False)
    assert not messages(caplog)
    steps(optimizer, 3)
    (message,) = messages(caplog)
    name = str(dtype).removeprefix("torch.")
    assert f"parameters are stepped in {name} without master weights, 1 of 2 on this rank" in message


def test_master_weights_that_no_parameter_needs_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    steps(AdaiW([Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1, master_weights=True))
    assert not messages(caplog)
    steps(AdaiW([Parameter(torch.ones(2))], lr=0.1, master_weights=True), 3)
    (message,) = messages(caplog)
    assert "master_weights=True has no effect" in message


def test_autocast_and_frozen_low_precision_parameters_are_not_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4).bfloat16().requires_grad_(False), nn.Linear(4, 4))
    optimizer = AdaiW(model.parameters(), lr=0.1)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert not messages(caplog)


# -- processes without a process group ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, "0", "1", "3"])
def test_processes_that_train_separately_are_warned_about_once_per_job(
    rank: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    for _ in range(2):
        steps(AdaiW([Parameter(torch.ones(2))], lr=0.1), 3)
    logged = [message for message in messages(caplog) if "WORLD_SIZE is 4" in message]
    assert len(logged) == (rank in (None, "0")) == len(messages(caplog))


@pytest.mark.parametrize("value", ["", "1", "0", "-2", "four", "2.0", " ", "²"])
def test_a_single_process_and_an_invalid_world_size_are_not_warned_about(
    value: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    steps(AdaiW([Parameter(torch.ones(2))], lr=0.1))
    assert not messages(caplog)


def warned_with_process_group() -> list[str]:
    import logging

    logged: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(listener)
    os.environ["WORLD_SIZE"] = "2"
    steps(AdaiW([Parameter(torch.ones(2, dtype=torch.bfloat16))], lr=0.1, master_weights=False))
    AdaiW([{"params": [Parameter(torch.ones(2))], "weight_decy": 0.1}], lr=0.1, betas=(0.9, 0.99))
    logging.getLogger("adai_dist").removeHandler(listener)
    return logged


@pytest.mark.distributed
def test_with_a_process_group_only_the_main_rank_warns() -> None:
    main, other = run_ranks(warned_with_process_group, 2)
    assert not other
    assert [next(word for word in ("bfloat16", "weight_decy", "beta0") if word in line) for line in main] == [
        "bfloat16",
        "weight_decy",
        "beta0",
    ]


# -- meta and inference tensors ----------------------------------------------------------------------------------------


def test_steps_on_meta_tensors_work_and_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    """torch's optimizers step meta tensors too, for planning."""
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    optimizer = AdaiV2(model.parameters(), lr=0.1, weight_decay=0.1, max_grad_norm=1.0, max_consecutive_skips=2)
    assert not messages(caplog)
    steps(optimizer, STEPS_BETWEEN_CHECKS + 1)
    (message,) = messages(caplog)
    assert "parameters are on the meta device and have no values, so nothing is trained" in message
    assert optimizer.state[model.weight]["exp_avg"].device.type == "meta"
    assert copy.deepcopy(optimizer).state_dict()["state"][0]["exp_avg"].device.type == "meta"


def made_in_inference_mode() -> Any:
    with torch.inference_mode():
        return nn.Linear(3, 2)


def refused(optimizer: Any, message: str) -> None:
    for parameter in optimizer.params():
        parameter.grad = torch.ones(parameter.shape)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.step()


def test_parameters_made_in_inference_mode_are_refused_and_a_copy_is_not() -> None:
    model = made_in_inference_mode()
    refused(AdaiW(model.parameters(), lr=0.1), "must be made outside of torch.inference_mode(), got one from within")
    trained = copy.deepcopy(model)
    optimizer = AdaiW(trained.parameters(), lr=0.1)
    steps(optimizer)
    assert not torch.equal(trained.weight, model.weight)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "beta1_prod"])
def test_states_made_in_inference_mode_are_refused(name: str) -> None:
    optimizer = AdaiW([Parameter(torch.ones(2))], lr=0.1)
    steps(optimizer)
    state = optimizer.state[optimizer.params()[0]]
    with torch.inference_mode():
        state[name] = state[name].clone()
    refused(optimizer, f"got one from within it ({name}, of shape (2,))")


def test_a_step_in_inference_mode_is_refused_and_creates_no_states() -> None:
    optimizer = AdaiW([Parameter(torch.ones(2))], lr=0.1)
    with torch.inference_mode():
        refused(optimizer, "step() must be called outside of torch.inference_mode()")
    assert not optimizer.state
    steps(optimizer)


def test_gradients_made_in_inference_mode_are_stepped() -> None:
    parameters = [Parameter(torch.ones(2)) for _ in range(2)]
    for parameter, mode in zip(parameters, (torch.inference_mode(), torch.no_grad()), strict=True):
        optimizer = AdaiW([parameter], lr=0.1)
        for clips in (False, True, True):
            with mode:
                gradient = torch.tensor([3.0, 4.0])
            parameter.grad = gradient
            if clips:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    assert torch.equal(*parameters)
