"""A checkpoint that does not fit is refused with one clear error, and nothing changes."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from adai_dist import Adai, AdaiV2
from adai_dist.optimizer.state_dict_validation import check_state_dict
from adai_dist.sharding.param_shard import STATE_NAMES
from tests.spawn import run_ranks

ROOT = Path(__file__).parent.parent


def parameters() -> list[Parameter]:
    torch.manual_seed(0)
    return [
        Parameter(torch.randn(3, 4)),
        Parameter(torch.randn(2, dtype=torch.complex64)),
        Parameter(torch.randn(5).bfloat16()),
    ]


def optimizer_of(params: list[Parameter], optimizer_class: Any = AdaiV2, **options: Any) -> Any:
    return optimizer_class([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.1, **options)


def step(optimizer: torch.optim.Optimizer) -> None:
    for k, param_group in enumerate(optimizer.param_groups):
        for parameter in param_group["params"]:
            parameter.grad = torch.full_like(parameter, 0.5 + k)
    optimizer.step()


def checkpoint() -> dict[str, Any]:
    optimizer = optimizer_of(parameters())
    step(optimizer)
    return copy.deepcopy(optimizer.state_dict())


def bits(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Copy everything that loading could change."""
    seen: list[Any] = []
    for param_group in optimizer.param_groups:
        seen.append({k: v for k, v in param_group.items() if k != "params"})
        for parameter in param_group["params"]:
            state = optimizer.state[parameter]
            seen.append((parameter.detach().clone(), {k: v.clone() for k, v in state.items()}, list(map(id, state))))
    return seen


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


Change = Callable[[dict[str, Any]], Any]
"""Function that corrupts a checkpoint in place, or returns another one."""


def put(value: Any, *path: Any) -> Change:
    def change(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value

    return change


def corrupt(value: complex, *path: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that writes a number to the last element of a state."""

    def change(saved: dict[str, Any]) -> None:
        place: Any = saved
        for key in path:
            place = place[key]
        place.view(-1)[-1] = value

    return change


def drop(*path: Any) -> Change:
    def change(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return change


def of_another_optimizer(optimizer_class: Any, **options: Any) -> Change:
    def change(_: Any) -> Any:
        other = optimizer_of(parameters(), optimizer_class, **options)
        step(other)
        return other.state_dict()

    return change


GROUPS = "param_groups"
WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "a list": (lambda _: [1, 2], TypeError, r"state_dict must be a dict, got \[1, 2\]; load the state_dict\(\)"),
    "None": (lambda _: None, TypeError, "state_dict must be a dict, got None"),
    "the model's": (
        lambda _: {"weight": torch.ones(3)},
        ValueError,
        "state_dict must have the keys 'state' and 'param_groups', got 'weight'",
    ),
    "empty": (lambda _: {}, ValueError, "must have the keys 'state' and 'param_groups', got no keys"),
    "no groups": (drop(GROUPS), ValueError, "must have the keys 'state' and 'param_groups', got 'precision', 'state'"),
    "state is a list": (put([], "state"), TypeError, r"state_dict\['state'\] must be a dict, got \[\]"),
    "groups are a dict": (put({}, GROUPS), TypeError, r"state_dict\['param_groups'\] must be a list, got \{\}"),
    "a group is a number": (
        put(3, GROUPS, 1),
        TypeError,
        r"\['param_groups'\]\[1\] must be a dict with a list 'params'",
    ),
    "params are a number": (put(2, GROUPS, 0, "params"), TypeError, "must be a dict with a list 'params'"),
    "fewer groups": (drop(GROUPS, 1), ValueError, "must have 2 parameter groups, as this optimizer has, got .* 1;"),
    "fewer parameters": (
        put([0], GROUPS, 0, "params"),
        ValueError,
        r"must have \[2, 1\] parameters, as in this optimizer, got \[1, 1\]",
    ),
    "ids twice": (put([0, 0], GROUPS, 0, "params"), ValueError, "must differ, got 0 twice"),
    "ids are tensors": (put([torch.ones(1)] * 2, GROUPS, 0, "params"), TypeError, "must list numbers or names, got"),
    "ids of no state": (
        put([7, 8], GROUPS, 0, "params"),
        ValueError,
        "must have states of the parameters in 'param_groups', got one of 0, which is not in any parameter group",
    ),
    "Adam": (
        of_another_optimizer(torch.optim.Adam),
        ValueError,
        r"\['state'\]\[0\] must have step, exp_avg, exp_avg_sq, beta1_prod, got 'exp_avg', 'exp_avg_sq', 'step' "
        "without beta1_prod: another optimizer's, or incomplete",
    ),
    "AdamW with amsgrad": (
        of_another_optimizer(torch.optim.AdamW, amsgrad=True),
        ValueError,
        "got 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'step' without beta1_prod",
    ),
    "SGD": (
        of_another_optimizer(torch.optim.SGD, momentum=0.9),
        ValueError,
        r"must have step, .*, got 'momentum_buffer' without step, exp_avg, exp_avg_sq, beta1_prod: another optimizer's",
    ),
    "SGD before its first step": (
        lambda _: optimizer_of(parameters(), torch.optim.SGD).state_dict(),
        ValueError,
        r"\['param_groups'\]\[0\] must have lr, betas, eps, weight_decay, got 'dampening'",
    ),
    "AdamW before its first step": (
        lambda _: optimizer_of(parameters(), torch.optim.AdamW).state_dict(),
        ValueError,
        r"\['param_groups'\]\[0\]: eps must be in .*, got 1e-08; load the state_dict\(\) of an Adai",
    ),
    "Adagrad": (of_another_optimizer(torch.optim.Adagrad), ValueError, "got 'step', 'sum' without exp_avg, "),
    "a state is a tensor": (
        put(torch.ones(2), "state", 0),
        TypeError,
        r"\['state'\]\[0\] must be a dict, got a tensor",
    ),
    "a state is None": (put(None, "state", 0), TypeError, r"\['state'\]\[0\] must be a dict, got None"),
    "a moment is a number": (
        put(0.5, "state", 0, "exp_avg"),
        TypeError,
        r"\['state'\]\[0\]\['exp_avg'\] must be a tensor, got 0.5",
    ),
    "another shape": (
        put(torch.ones(4, 3), "state", 0, "exp_avg_sq"),
        ValueError,
        r"\['exp_avg_sq'\] must have the shape of its parameter, \(3, 4\), got \(4, 3\); load into the model, ",
    ),
    "flattened": (put(torch.ones(12), "state", 0, "beta1_prod"), ValueError, r"\(3, 4\), got \(12,\)"),
    "integers": (
        put(torch.ones(3, 4, dtype=torch.uint8), "state", 0, "exp_avg"),
        TypeError,
        "must be floating-point, as its parameter is torch.float32, got torch.uint8",
    ),
    "complex for real": (
        put(torch.ones(5, dtype=torch.complex64), "state", 2, "exp_avg"),
        TypeError,
        "must be floating-point, as its parameter is torch.bfloat16, got torch.complex64",
    ),
    "real for complex": (
        put(torch.ones(2), "state", 1, "exp_avg"),
        TypeError,
        "must be complex, as its parameter is torch.complex64, got torch.float32",
    ),
    "on meta": (
        put(torch.ones(3, 4, device="meta"), "state", 0, "exp_avg"),
        ValueError,
        "must be a dense tensor with values, got one on meta",
    ),
    "sparse": (put(torch.ones(3, 4).to_sparse(), "state", 0, "exp_avg"), ValueError, "must be a dense tensor"),
    "step < 0": (put(-1, "state", 0, "step"), ValueError, r"\['step'\] must be a whole number >= 0.*got -1.0"),
    "step = 1.5": (put(torch.tensor(1.5), "state", 0, "step"), ValueError, "must be a whole number.*got 1.5"),
    "step is inf": (put(torch.tensor(torch.inf), "state", 0, "step"), ValueError, "whole number.*got inf; .* damaged"),
    "step is NaN": (put(float("nan"), "state", 2, "step"), ValueError, r"\['state'\]\[2\]\['step'\] must.*got nan"),
    "step of many": (put(torch.ones(2), "state", 0, "step"), TypeError, r"got a tensor of shape \(2,\)"),
    "step is a word": (put("7", "state", 0, "step"), TypeError, "whole number.*got '7'"),
    "step is a bool": (put(True, "state", 0, "step"), TypeError, "whole number.*got True"),
    "step is None": (put(None, "state", 0, "step"), TypeError, "whole number.*got None"),
    **{
        f"{number} in {name}": (
            corrupt(number, "state", index, name),
            ValueError,
            rf"states must be finite, .* got inf or NaN in state_dict\['state'\]\[{index}\]\['{name}'\]; .* damaged",
        )
        for number, index, name in (
            (float("nan"), 0, "exp_avg"),
            (float("inf"), 0, "exp_avg_sq"),
            (-float("inf"), 0, "exp_avg_sq"),
            (float("nan"), 2, "beta1_prod"),
            (-float("inf"), 2, "exp_avg"),
            (complex(0.0, float("nan")), 1, "exp_avg"),
            (complex(0.0, float("inf")), 1, "exp_avg_sq"),
        )
    },
    "a second moment < 0": (
        corrupt(-0.5, "state", 2, "exp_avg_sq"),
        ValueError,
        r"second moments >= 0, got -0.5 in state_dict\['state'\]\[2\]\['exp_avg_sq'\]; the checkpoint is damaged",
    ),
    "all states are NaN": (
        lambda saved: (
            [corrupt(float("nan"), "state", k, name)(saved) for k in range(3) for name in STATE_NAMES] and None
        ),
        ValueError,
        r"\[0\]\['exp_avg'\], .*\[0\]\['exp_avg_sq'\], .*\[0\]\['beta1_prod'\] and 6 more; the checkpoint is damaged",
    ),
    **{
        f"no {name}": (drop("state", 0, name), ValueError, f"without {name}: another optimizer's, or incomplete")
        for name in ("step", "exp_avg", "exp_avg_sq", "beta1_prod")
    },
    **{
        f"{name} = {value!r}": (put(value, GROUPS, 1, name), error, rf"\['param_groups'\]\[1\]: {name}.* must .*, got ")
        for name, value, error in (
            ("lr", -1.0, ValueError),
            ("lr", "0.1", TypeError),
            ("lr", torch.ones(2), ValueError),
            ("betas", (0.1, 1.5), ValueError),
            ("betas", 0.9, TypeError),
            ("eps", 1e-8, ValueError),
            ("weight_decay", float("inf"), ValueError),
            ("dampening", 2.0, ValueError),
            ("decoupled", "yes", TypeError),
            ("maximize", None, TypeError),
        )
        if name != "lr" or not isinstance(value, Tensor)
    },
    "lr of many": (put(torch.ones(2), GROUPS, 0, "lr"), ValueError, r"\[0\]: Tensor lr must be 1-element, got"),
    "no eps": (drop(GROUPS, 0, "eps"), ValueError, "must have lr, betas, eps, weight_decay, got 'betas'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint_is_refused_and_nothing_changes(wrong: str) -> None:
    change, error, message = WRONG[wrong]
    params = parameters()
    optimizer = optimizer_of(params)
    step(optimizer)
    before = bits(optimizer)
    saved = checkpoint()
    returned = change(saved)
    with pytest.raises(error, match=message) as raised:
        optimizer.load_state_dict(saved if returned is None and wrong != "None" else returned)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)
    assert_equal(bits(optimizer), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    twin = optimizer_of(other_params := parameters())  # loads nothing
    for _ in range(2):
        step(twin)
    step(optimizer)
    assert_equal([p.detach() for p in params], [p.detach() for p in other_params])


FITTING: dict[str, Change] = {
    "as saved": lambda _: None,
    "before the first step": put({}, "state"),
    "one parameter without a state": drop("state", 2),
    "one parameter with an empty state": put({}, "state", 1),
    "a user's own entry": put("mine", "state", "note"),
    "a user's own dict": put({"loss": 1.0}, "state", "note"),
    "a user's own key of a group": put("encoder", GROUPS, 0, "name"),
    "a state more": put(torch.ones(3, 4), "state", 0, "mine"),
    "steps as Python numbers": put(1, "state", 0, "step"),
    "steps with one entry": put(torch.ones(1), "state", 0, "step"),
    "steps as integers": put(torch.tensor(1), "state", 0, "step"),
    "moments in double": put(torch.ones(3, 4, dtype=torch.float64), "state", 0, "exp_avg"),
    "lr as a tensor": put(torch.tensor(0.3), GROUPS, 0, "lr"),
    "betas as a list": put([0.2, 0.9], GROUPS, 0, "betas"),
    "names for numbers": lambda saved: {
        "state": {f"p{k}": state for k, state in saved["state"].items()},
        GROUPS: [{**group, "params": [f"p{k}" for k in group["params"]]} for group in saved[GROUPS]],
    },
}


@pytest.mark.parametrize("fitting", FITTING)
def test_a_checkpoint_that_fits_is_loaded(fitting: str) -> None:
    saved = checkpoint()
    loaded = FITTING[fitting](saved) or saved
    optimizer = optimizer_of(parameters())
    optimizer.load_state_dict(loaded)
    assert_equal(optimizer.param_groups[1]["lr"], loaded[GROUPS][1]["lr"])
    for parameter, state in zip(optimizer.params(), loaded["state"].values(), strict=False):
        if isinstance(state, dict) and "beta1_prod" in state:
            assert optimizer.state[parameter]["step"].item() == 1
    step(optimizer)


def test_the_host_waits_twice_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of a device tensor waits for the device; a read of each state would fail this test."""
    saved = checkpoint()
    optimizer = optimizer_of(parameters())
    reads: list[int] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, original: Any = original) -> Any:
            reads.append(self.numel())
            return original(self)

        monkeypatch.setattr(Tensor, name, counted)
    check_state_dict(saved, optimizer.param_groups)
    assert reads == [3, 20], "all three steps in one go, and the ends of nine states and a master weight in another one"


# -- DTensors ----------------------------------------------------------------------------------------------------------


def refused_loads() -> dict[str, str]:
    """Return the error message of each wrong layout. Collective: all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    grid = init_device_mesh("cpu", (dist.get_world_size(), 1))
    whole = torch.arange(12.0).reshape(4, 3)

    def optimizer_with(parameter: Tensor) -> Any:
        optimizer = Adai([Parameter(parameter)], lr=0.1)
        optimizer.params()[0].grad = torch.ones_like(optimizer.params()[0])
        optimizer.step()
        return optimizer

    tensors = {
        "sharded": distribute_tensor(whole, mesh, [Shard(0)]),
        "by columns": distribute_tensor(whole, mesh, [Shard(1)]),
        "copied": distribute_tensor(whole, mesh, [Replicate()]),
        "on another mesh": distribute_tensor(whole, grid, [Shard(0), Replicate()]),
        "longer": distribute_tensor(torch.ones(6, 3), mesh, [Shard(0)]),
        "plain": whole,
    }
    optimizers = {name: optimizer_with(tensor) for name, tensor in tensors.items()}
    messages: dict[str, str] = {}
    for target in ("sharded", "plain"):
        for name, optimizer in optimizers.items():
            before = bits(optimizers[target])
            try:
                optimizers[target].load_state_dict(optimizer.state_dict())
            except ValueError as error:
                messages[f"{name} into {target}"] = str(error)
                for a, b in zip(bits(optimizers[target])[1:], before[1:], strict=True):
                    assert_equal(*([x.to_local() if target == "sharded" else x for x in (y[0],)] for y in (a, b)))
    # Only one rank finds an error: the others load, and do not wait.
    damaged = copy.deepcopy(optimizers["sharded"].state_dict())
    if dist.get_rank() == 1:
        damaged["state"][0]["step"] = torch.tensor(-1.0)
    try:
        optimizers["sharded"].load_state_dict(damaged)
        messages["one rank"] = "loaded"
    except ValueError:
        messages["one rank"] = "refused"
    dist.barrier()
    return messages


@pytest.mark.distributed
def test_states_of_another_layout_are_refused_with_the_way_to_convert_them() -> None:
    first, second = run_ranks(refused_loads, 2)
    assert (first.pop("one rank"), second.pop("one rank")) == ("loaded", "refused")
    assert first.keys() == second.keys()
    assert first.keys() == {
        f"{name} into sharded" for name in ("by columns", "copied", "on another mesh", "longer")
    } | {"plain into sharded"} | {
        f"{name} into plain" for name in ("sharded", "by columns", "copied", "on another mesh", "longer")
    }
    for message in first.values():
        assert message.endswith(
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict converts between layouts"
        )
    assert "must be a DTensor like its parameter, got a plain tensor of shape (4, 3)" in first["plain into sharded"]
    assert "must be a plain tensor like its parameter, got a DTensor of shape" in first["sharded into plain"]
    assert re.search(
        r"must be sharded like its parameter, \(Shard\(dim=0\),\) over .*, got \(Shard\(dim=1\),\)",
        first["by columns into sharded"],
    )
    assert re.search(
        r"\(4, 3\), \(2, 3\) on this rank, got \(6, 3\), \(3, 3\) on this rank", first["longer into sharded"]
    )


# -- nothing untrusted is unpickled ------------------------------------------------------------------------------------

UNPICKLERS = {
    f"{module}.{name}" for module in ("pickle", "dill", "cloudpickle") for name in ("load", "loads", "Unpickler")
}


def unpickling_calls(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if (name := ast.unparse(call.func)) in UNPICKLERS
        or (name == "torch.load" and not any(ast.unparse(k) == "weights_only=True" for k in call.keywords))
    ]


def test_the_package_unpickles_nothing() -> None:
    assert unpickling_calls("x = torch.load(path)\ny = pickle.loads(b'')") == ["torch.load(path)", "pickle.loads(b'')"]
    for path in sorted((ROOT / "adai_dist").rglob("*.py")):
        source = path.read_text()
        assert unpickling_calls(source) == [], path
        assert "from pickle import" not in source, path
