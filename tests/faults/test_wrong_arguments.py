"""Five hundred wrong arguments and configurations: each raises one error with the argument and its value."""

from __future__ import annotations

import copy
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

from adai_dist import AdaiV2, share_mean
from adai_dist.cli import main
from adai_dist.optimizer.variants import OPTIMIZERS
from adai_dist.recipes.recipe import RecipeError, load_recipe
from tests.recipe_runs import write_recipe

SEED = 0
NUM_CASES = 500
CLASSES = tuple(OPTIMIZERS.values())

NAN, INF = float("nan"), float("inf")
NO_NUMBERS = (None, "0.1", "", [], {}, (1, 2), object, torch.ones(3), 1j, b"1", True)
NO_BOOLS = (None, 0, 1, "yes", 0.0, [], torch.tensor(True))
NEGATIVE = (-1, -1e-9, -INF, NAN, torch.tensor(-1.0))

# Wrong values of each argument; `None` is one of them only if it is not a valid value.
WRONG: dict[str, tuple[Any, ...]] = {
    "lr": (*NO_NUMBERS, *NEGATIVE, INF, torch.tensor([0.1, 0.2])),
    "betas": (None, 0.9, "ab", (0.1,), (0.1, 0.9, 0.9), {}, (-0.1, 0.9), (0.1, 1.0), (0.1, -0.1), (NAN, 0.9), ("a", 1)),
    "eps": (*NO_NUMBERS, *NEGATIVE, 0, 1.0, 1e-8, INF),
    "weight_decay": (*NO_NUMBERS, *NEGATIVE, INF),
    "decoupled": NO_BOOLS[1:],
    "maximize": NO_BOOLS,
    "foreach": NO_BOOLS[1:],
}
OF_V2 = {**WRONG, "dampening": (*NO_NUMBERS, *NEGATIVE, 1.1, INF)}
OF_OPTIMIZER: dict[str, tuple[Any, ...]] = {
    "max_grad_norm": (*NO_NUMBERS[1:], *NEGATIVE, 0, 0.0),
    "require_kernels": NO_BOOLS,
    "retire_beta1_prod": NO_BOOLS,
}
UNKNOWN = ("momentum", "beta1", "amsgrad", "LR", "weight_decoy")


class Wrong(NamedTuple):
    call: Callable[[], Any]
    named: tuple[str, ...]
    """Words of which one must be in the message."""
    what: str


def optimizer_of(optimizer_class: Any = AdaiV2, groups: Any = None, **arguments: Any) -> Any:
    groups = [Parameter(torch.ones(2, 3)), Parameter(torch.ones(4))] if groups is None else groups
    return optimizer_class(groups, **({"lr": 0.1} | arguments))


def constructor(chance: random.Random) -> Wrong:
    optimizer_class = chance.choice(CLASSES)
    table = {**(OF_V2 if optimizer_class is AdaiV2 else WRONG), **OF_OPTIMIZER}
    name = chance.choice([*table, "unknown"])
    if name == "unknown":
        name, value = chance.choice(UNKNOWN), 0.5
    else:
        value = chance.choice(table[name])
    return Wrong(lambda: optimizer_of(optimizer_class, **{name: value}), (name,), f"{name}={value!r}")


def param_group(chance: random.Random) -> Wrong:
    optimizer_class = chance.choice(CLASSES)
    name = chance.choice(list(OF_V2))
    value = chance.choice(OF_V2[name])
    group = {"params": [Parameter(torch.ones(2))], name: value}
    if chance.random() < 0.5:
        return Wrong(lambda: optimizer_of(optimizer_class, [group]), (name,), f"group {name}={value!r}")
    return Wrong(lambda: optimizer_of(optimizer_class).add_param_group(group), (name,), f"added {name}={value!r}")


def is_rounding(name: str, value: Any) -> bool:
    """Return whether the value is a rounding error away from the range, as at the end of a schedule."""
    return (name != "eps" and value == -1e-9) if isinstance(value, float) else value == (0.1, 1.0)


def changed_group(chance: random.Random) -> Wrong:
    """Step with a group that the user has changed: it must raise an error, and change nothing."""
    name = chance.choice(list(OF_V2))
    value = chance.choice([value for value in OF_V2[name] if not is_rounding(name, value)])

    def call() -> None:
        optimizer = optimizer_of(AdaiV2)
        params = optimizer.param_groups[0]["params"]
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.param_groups[0][name] = value
        try:
            optimizer.step()
        finally:
            assert all(bool((parameter == 1).all()) for parameter in params)

    return Wrong(call, (name,), f"changed {name}={value!r}")


def params(chance: random.Random) -> Wrong:
    shared = Parameter(torch.ones(1))
    value: Any = chance.choice(
        [
            [],
            torch.ones(2),
            5,
            [1.0],
            [shared, "x"],
            [{"lr": 0.1}],
            [{"params": [shared]}, {"params": [shared]}],
            [shared * 2],
            [{"params": {shared}}],
            None,
        ]
    )
    words = ("param", "Param", "iter", "optimizer got an empty", "leaf")
    return Wrong(lambda: optimizer_of(AdaiV2, [] if value is None else value), words, f"params={value!r}")


def clip(chance: random.Random) -> Wrong:
    value = chance.choice((*NO_NUMBERS, *NEGATIVE, 0))
    return Wrong(lambda: optimizer_of().clip_grad_norm_(value), ("max_norm",), f"clip_grad_norm_({value!r})")


def sharding(chance: random.Random) -> Wrong:
    name = chance.choice(["process_group", "num_replicas", "model", "stages"])
    values: tuple[Any, ...] = ("world", 3.5, [], object(), torch.ones(1), True)
    value = chance.choice(values)
    if chance.random() < 0.3:
        return Wrong(lambda: share_mean([optimizer_of()], **{name: value}), (name,), f"share_mean {name}={value!r}")
    return Wrong(lambda: optimizer_of().configure_sharding(**{name: value}), (name,), f"{name}={value!r}")


def sharers(chance: random.Random) -> Wrong:
    one = optimizer_of()
    value: Any = chance.choice([[], [one, one], [one, None], ["x"], [torch.optim.SGD([Parameter(torch.ones(1))])]])
    return Wrong(lambda: share_mean(value), ("optimizers",), f"share_mean({value!r})")


def loaded(chance: random.Random) -> Wrong:
    """Return a state_dict with one invalid entry."""
    optimizer, other = optimizer_of(), optimizer_of()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    paths: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = [
        ((), (None, 3, [], "x", {}, {"state": {}})),
        (("state",), (None, 3, [])),
        (("param_groups",), (None, 3, {}, [], [{}], [None], [{"params": 3}], [{"params": [0]}], [{"params": [0, 0]}])),
        (("state", 0), (None, 3, [1], torch.ones(2), {"step": 1}, {"momentum_buffer": torch.ones(2, 3)})),
        (("state", 1, "step"), (None, -1, 0.5, NAN, INF, "1", True, torch.ones(2), torch.tensor(-3.0), [], 1j)),
        *(
            (("state", chance.choice([0, 1]), name), (None, 1.0, [], torch.ones(7), torch.zeros(0), "x"))
            for name in ("exp_avg", "exp_avg_sq", "beta1_prod")
        ),
        *((("param_groups", 0, name), tuple(v for v in OF_V2[name] if not is_rounding(name, v))) for name in OF_V2),
    ]
    path, values = chance.choice(paths)
    value = chance.choice(values)
    if not path:
        saved = value
    else:
        place = saved
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    named = tuple(str(key) for key in path) or ("state_dict",)
    return Wrong(lambda: other.load_state_dict(saved), (*named, "state_dict"), f"loaded {path} = {value!r}")


OVERRIDES: dict[str, tuple[str, ...]] = {
    "run.steps": ("0", "-3", "many", "1.5", "[]", "null", "{a: 1}"),
    "run.seed": ("-1", "x", "null", "[1]"),
    "run.log_every": ("0", "x", "null"),
    "run.eval_every": ("0", "-1", "null"),
    "run.checkpoint_every": ("-1", "x"),
    "run.keep_checkpoints": ("0", "-2"),
    "run.name": ("a/b", "..", "."),
    "run.resume": ("maybe", "3.5", "[]"),
    "run.overwrite": ("perhaps", "{}"),
    "data.source": ("web", "null", "[]"),
    "data.path": ("''", "null"),
    "data.seq_len": ("1", "0", "x", "null"),
    "data.batch": ("0", "-8", "x"),
    "data.val_fraction": ("0", "1", "-0.5", "x", "null", "nan"),
    "data.val_windows": ("0", "x"),
    "data.subset": ("en",),
    "engine": ("horovod", "null", "[]", "DDP"),
    "device": ("tpu", "null"),
    "precision": ("fp8", "null"),
    "grad_accumulation": ("0", "-1", "x", "null"),
    "max_grad_norm": ("0", "-1", "x", "[]", "nan"),
    "optimizer": ("adam", "null", "Adai"),
    "schedule.shape": ("linear", "null"),
    "schedule.warmup": ("-1", "x"),
    "schedule.min_ratio": ("-0.1", "1.5", "nan", "x"),
    "optimizers.adaiv2.lr": ("-1", "nan", "inf", "null", "[]", "'0.1x'"),
    "optimizers.adaiv2.betas": ("0.9", "[0.1]", "[0.1,1.0]", "[-1,0.9]", "x", "null"),
    "optimizers.adaiv2.eps": ("0", "1", "1e-8", "x", "null"),
    "optimizers.adaiv2.dampening": ("-0.1", "2", "x", "null"),
    "optimizers.adaiv2.weight_decay": ("-0.1", "inf", "x"),
    "optimizers.adaiv2.decoupled": ("3", "x"),
    "optimizers.adaiv2.momentum": ("0.9",),
    "optimizers.adai": ("3", "[]", "{lr: -1}"),
    "model": ("3", "null", "[]"),
    "model.architecture": ("null", "3", "[]"),
    "deepspeed.config": ("zero2.json",),
    "run": ("5", "null", "[]"),
    "optimizers": ("5", "null", "[]"),
    "run.stesp": ("3",),
    "engin": ("ddp",),
    "schedule": ("x", "null"),
}

COMMANDS: tuple[tuple[str, ...], ...] = (
    (),
    ("trani",),
    ("train",),
    ("train", "--config"),
    ("train", "--config", "nowhere.yaml"),
    ("train", "--config", "."),
    ("train", "--config", "RECIPE", "--resumee"),
    ("train", "--config", "RECIPE", "nonsense"),
    ("train", "--config", "RECIPE", "=3"),
    ("run",),
    ("run", "nowhere.py"),
    ("run", "-m"),
    ("run", "-m", "no.such.module"),
    ("compare",),
    ("compare", "nowhere"),
    ("bench", "--numel", "many"),
    ("bench", "--numel", "0"),
    ("bench", "--numel", "-5"),
    ("bench", "--shapes", "resnet"),
    ("bench", "--dtype", "float7"),
    ("bench", "--device", "tpu"),
    ("bench", "--repetitions", "0"),
    ("bench", "--threads", "0"),
    ("bench", "--numel", "3", "--shapes", "tiny-148"),
    ("build", "--device", "tpu"),
    ("to-universal",),
    ("to-universal", "nowhere"),
    ("to-universal", "nowhere", "there"),
    ("to-universal", "nowhere", "there", "--num-workers", "x"),
)


def recipe(chance: random.Random, path: Path) -> Wrong:
    key = chance.choice(list(OVERRIDES))
    value = chance.choice(OVERRIDES[key])
    override = f"{key}={value}"
    last = key.rpartition(".")[2]
    return Wrong(lambda: load_recipe(path, [override]), (key, last), override)


MAKERS: tuple[tuple[Callable[[random.Random], Wrong], int], ...] = (
    (constructor, 110),
    (param_group, 70),
    (changed_group, 50),
    (params, 20),
    (clip, 20),
    (sharding, 30),
    (sharers, 10),
    (loaded, 90),
)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def cases(recipe_path: Path) -> list[Wrong]:
    chance = random.Random(SEED)
    made = [maker(chance) for maker, count in MAKERS for _ in range(count)]
    return made + [recipe(chance, recipe_path) for _ in range(NUM_CASES - len(made))]


def fault_of(wrong: Wrong) -> str | None:
    """Return the fault in how a wrong call ended, or None."""
    try:
        wrong.call()
    except (TypeError, ValueError) as error:
        message = str(error)
        if type(error) not in (TypeError, ValueError, RecipeError):
            return f"{type(error).__name__}: {message}"
        if not any(word in message for word in wrong.named):
            return f"does not name {wrong.named}: {message}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.fixture
def _world_of_one() -> Iterator[None]:
    """Initialise torch.distributed, so that process groups are checked."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_world_of_one")
def test_every_wrong_argument_ends_in_an_error_that_names_it(cases: list[Wrong]) -> None:
    assert len(cases) == NUM_CASES
    faults = Counter(f"{wrong.what}: {fault}" for wrong in cases if (fault := fault_of(wrong)) is not None)
    assert not faults, "\n".join(sorted(faults))


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_wrong_command_line_ends_with_a_usage_error(
    words: tuple[str, ...], recipe_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe_path.parent)
    with pytest.raises(SystemExit) as end:
        main([str(recipe_path) if word == "RECIPE" else word for word in words])
    _, stderr = capfd.readouterr()
    assert end.value.code == 2
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("adai-dist"), stderr
