"""State dicts, copies, pickles, schedulers and hooks work as with torch's own optimizers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

from adai_dist import Adai, AdaiV2, AdaiW
from adai_dist.kernels import foreach
from tests.oracle import Oracle, OracleGroup

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adai": (Adai, {"weight_decay": 0.1}),
    "AdaiW": (AdaiW, {"weight_decay": 0.1}),
    "AdaiV2": (AdaiV2, {"weight_decay": 0.1, "dampening": 0.25}),
}
SHAPES = ((3, 4), (5,), (), (2**16 + 1,))

STATES = ("exp_avg", "exp_avg_sq", "beta1_prod")

each_class = pytest.mark.parametrize("name", CLASSES)


def gradient(step: int, index: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.array(np.random.default_rng((step, index)).standard_normal(shape) * 3.0**index))


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(gradient(10**6, k, shape).to(dtype)) for k, shape in enumerate(SHAPES)]


def make(name: str, params: Any, **changes: Any) -> Any:
    optimizer_class, arguments = CLASSES[name]
    return optimizer_class(params, **({"lr": 0.2, "max_grad_norm": 5.0} | arguments | changes))


def train(optimizer: Any, params: list[Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for k, parameter in enumerate(params):
            parameter.grad = gradient(step, k, SHAPES[k]).to(parameter.dtype)
        optimizer.step()


def assert_same_bits(a: list[Parameter], b: list[Parameter]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_saved_and_loaded_optimizer_continues_bitwise(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = make(name, params)
    train(optimizer, params, 0, 7)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, 7, 14)

    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = [Parameter(x.detach()) for x in loaded["params"]]
    other = make(name, resumed, lr=1.0, betas=(0.3, 0.5))
    other.load_state_dict(loaded["optimizer"])
    train(other, resumed, 7, 14)
    assert_same_bits(params, resumed)
    for a, b in zip(params, resumed, strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other.state[b][key])
            assert value.dtype == other.state[b][key].dtype


def test_states_of_low_precision_parameters_are_not_rounded_by_loading() -> None:
    """torch casts loaded states to the parameter's dtype, where beta1_prod = 0.999 would become 1."""
    params = parameters(torch.bfloat16)
    optimizer = make("AdaiW", params)
    train(optimizer, params, 0, 1)
    other = make("AdaiW", params)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in params:
        assert other.state[parameter]["beta1_prod"].dtype == torch.float32
        assert torch.equal(other.state[parameter]["beta1_prod"], optimizer.state[parameter]["beta1_prod"])
        assert (other.state[parameter]["beta1_prod"] < 1).all()


@each_class
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_continues_like_the_original(name: str, how: str) -> None:
    params = parameters()
    optimizer = make(name, params)
    train(optimizer, params, 0, 5)
    both = (optimizer, params)
    twin, twin_params = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert twin.max_grad_norm == 5.0
    train(optimizer, params, 5, 10)
    train(twin, twin_params, 5, 10)
    assert_same_bits(params, twin_params)
    twin.add_param_group({"params": [Parameter(torch.ones(1))]})
    assert twin.param_groups[1]["betas"] == optimizer.param_groups[0]["betas"]


def test_a_pending_clip_and_stored_sums_are_not_copied() -> None:
    params = parameters()
    optimizer = make("Adai", params)
    train(optimizer, params, 0, 3)
    optimizer.clip_grad_norm_(0.1)
    twin, twin_params = copy.deepcopy((optimizer, params))
    train(twin, twin_params, 3, 4)  # without an error about changed gradients
    assert twin.state[twin_params[0]]["step"].item() == 4


def test_writes_to_a_state_are_detected() -> None:
    """The sum of exp_avg_sq is kept between steps; a stale sum would fail this test."""
    params, others = parameters(), parameters()
    optimizer, other = make("Adai", params), make("Adai", others)
    train(optimizer, params, 0, 3)
    train(other, others, 0, 3)
    for parameter, twin in zip(params, others, strict=True):
        optimizer.state[parameter]["exp_avg_sq"].mul_(2.0)
        other.state[twin]["exp_avg_sq"] = other.state[twin]["exp_avg_sq"] * 2.0
    train(optimizer, params, 3, 4)
    expected = sum(float(optimizer.state[p]["exp_avg_sq"].double().sum()) for p in params)
    expected /= (1 - 0.99**4) * sum(p.numel() for p in params)
    assert optimizer.inertia_mean.item() == pytest.approx(expected, rel=1e-6)
    train(other, others, 3, 4)
    assert_same_bits(params, others)


def test_stepping_in_pieces_changes_only_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    params, others = parameters(torch.float64), parameters(torch.float64)
    optimizer = make("Adai", params)
    train(optimizer, params, 0, 6)
    assert foreach.Cut.of(optimizer.owned_shards()[0].tensors).num_pieces == [1, 1, 1, 1]
    monkeypatch.setitem(foreach.PIECE_ELEMENTS, "cpu", 1000)
    other = make("Adai", others)
    train(other, others, 0, 3)
    assert foreach.Cut.of(other.owned_shards()[0].tensors).num_pieces == [1, 1, 1, 66]
    other.load_state_dict(other.state_dict())  # the sums are rebuilt, piece by piece
    train(other, others, 3, 6)
    for parameter, twin in zip(params, others, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-13, atol=1e-13)


def test_groups_of_an_older_version_get_the_missing_keys() -> None:
    params = parameters()
    optimizer = make("AdaiV2", params)
    train(optimizer, params, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("dampening", "decoupled", "maximize", "foreach"):
        del saved["param_groups"][0][key]
    other = make("AdaiV2", params)
    other.load_state_dict(saved)
    assert other.param_groups[0]["dampening"] == 0.25
    train(other, params, 2, 3)
    assert other.state[params[0]]["step"].item() == 3


def test_lr_as_a_tensor_is_the_same_number() -> None:
    params, others = parameters(), parameters()
    lr = torch.tensor(0.2)
    optimizer, other = make("AdaiW", params, lr=lr), make("AdaiW", others, lr=float(lr))
    train(optimizer, params, 0, 3)
    train(other, others, 0, 3)
    lr.fill_(0.05)
    other.param_groups[0]["lr"] = float(lr)
    train(optimizer, params, 3, 6)
    train(other, others, 3, 6)
    assert_same_bits(params, others)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10, cycle_momentum=False),
        lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=4, cycle_momentum=False),
    ],
    ids=["lambda", "cosine", "one cycle", "cyclic"],
)
def test_schedulers_of_torch_change_only_lr(schedule: Any) -> None:
    params = parameters(torch.float64)
    optimizer = make("AdaiW", params, max_grad_norm=None)
    scheduler = schedule(optimizer)
    starts = {str(k): p.detach().numpy().copy() for k, p in enumerate(params)}
    group = OracleGroup(tuple(starts), lr=0.2, weight_decay=0.1, decoupled=True)
    oracle = Oracle(starts, [group], None)
    for step in range(8):
        group.lr = optimizer.param_groups[0]["lr"]
        oracle.step({str(k): gradient(step, k, shape).numpy() for k, shape in enumerate(SHAPES)})
        train(optimizer, params, step, step + 1)
        scheduler.step()
    for k, parameter in enumerate(params):
        np.testing.assert_allclose(parameter.detach(), oracle.parameters[str(k)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheduler", [lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR])
def test_a_scheduler_that_would_cycle_beta0_as_a_momentum_is_refused(scheduler: Any) -> None:
    optimizer = make("Adai", parameters())
    arguments = {"total_steps": 10} if scheduler is lr_scheduler.OneCycleLR else {"base_lr": 0.01}
    with pytest.raises(ValueError, match="momentum"):
        scheduler(optimizer, max_lr=0.2, cycle_momentum=True, **arguments)


def test_named_parameters_keep_their_names_through_a_checkpoint() -> None:
    params = parameters()
    optimizer = make("Adai", [(f"p{k}", p) for k, p in enumerate(params)])
    train(optimizer, params, 0, 2)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["p0", "p1", "p2", "p3"]
    other = make("Adai", [(f"q{k}", p) for k, p in enumerate(params)])
    other.load_state_dict(optimizer.state_dict())
    train(other, params, 2, 3)
    assert other.state[params[0]]["step"].item() == 3


def test_parameters_added_during_training_start_their_own_count() -> None:
    params = parameters(torch.float64)
    optimizer = make("Adai", params[:2], max_grad_norm=None)
    starts = {str(k): p.detach().numpy().copy() for k, p in enumerate(params)}
    groups = [
        OracleGroup(("0", "1"), lr=0.2, weight_decay=0.1),
        OracleGroup(("2", "3"), lr=0.4, betas=(0.2, 0.9), weight_decay=0.1),
    ]
    oracle = Oracle(starts, groups, None)
    for step in range(12):
        if step == 4:
            optimizer.add_param_group({"params": params[2:], "lr": 0.4, "betas": (0.2, 0.9)})
        present = range(4) if step >= 4 else range(2)
        oracle.step({str(k): gradient(step, k, SHAPES[k]).numpy() if k in present else None for k in range(4)})
        for k in present:
            params[k].grad = gradient(step, k, SHAPES[k])
        optimizer.step()
    for k, parameter in enumerate(params):
        np.testing.assert_allclose(parameter.detach(), oracle.parameters[str(k)], rtol=1e-12, atol=1e-12)
    assert [optimizer.state[p]["step"].item() for p in params] == [12, 12, 8, 8]


def test_hooks_and_closure_are_called_as_torch_calls_them() -> None:
    params = parameters()
    optimizer = make("Adai", params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append("closure")
        for k, parameter in enumerate(params):
            parameter.grad = gradient(0, k, SHAPES[k]).float()
        return 1.5

    assert optimizer.step(closure) == 1.5
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "closure", "after", "saved", "loading", "loaded"]
    assert optimizer.state[params[0]]["step"].item() == 1


def test_a_load_hook_may_replace_what_is_loaded() -> None:
    params = parameters(torch.bfloat16)
    optimizer = make("Adai", params)
    train(optimizer, params, 0, 2)
    saved = optimizer.state_dict()
    other = make("Adai", params)
    other.register_load_state_dict_pre_hook(lambda *_: copy.deepcopy(saved))
    other.load_state_dict({"state": {}, "param_groups": []})
    assert torch.equal(other.state[params[0]]["beta1_prod"], optimizer.state[params[0]]["beta1_prod"])


def test_foreign_entries_in_the_state_are_kept() -> None:
    params = parameters()
    optimizer = make("Adai", params)
    optimizer.state["note"] = "not a parameter"
    train(optimizer, params, 0, 2)
    assert optimizer.state["note"] == "not a parameter"


def test_sparse_gradients_are_refused_with_the_remedy() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = Adai(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"gradients must be dense.*use sparse=False"):
        optimizer.step()


def test_a_step_under_torch_compile_is_the_same() -> None:
    params, others = parameters(), parameters()
    optimizer, other = make("Adai", params), make("Adai", others)
    train(optimizer, params, 0, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own tracing
        other.step = torch.compile(other.step)
        train(other, others, 0, 3)
    assert_same_bits(params, others)
