"""States in bfloat16 under DeepSpeed: trajectories, random bits, checkpoints of every kind, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adai_dist import AdaiV2
from tests.integrations.deepspeed_engines import Family, Seen, set_environment
from tests.integrations.deepspeed_models import (
    Captured,
    gradients_of,
    oracle_of,
    walk_experts,
    walk_tensor_parallel,
)
from tests.integrations.deepspeed_oracle_check import solve
from tests.integrations.deepspeed_pipeline import walk_pipeline
from tests.integrations.deepspeed_resume import (
    NUM_STEPS,
    SAVED_AT,
    Run,
    Snapshot,
    assert_same,
    attempt_all,
    of_all_ranks,
    on_first_rank,
    resumed,
    saved,
    universal,
    weights_only,
)
from tests.integrations.deepspeed_setups import (
    BF16,
    CPU_OFFLOAD,
    FP32_GRADIENTS,
    PROBLEM,
    STATE_NAMES,
    WORLD_SIZE,
    Setup,
    has_deepspeed,
    zero,
)
from tests.oracle import Array
from tests.problems import relative_error
from tests.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed]

LOW = {"state_dtype": "bfloat16", "seed": 1}
SUB_GROUPS = {"sub_group_size": 50}
CONFIGS = {
    "stage-0": zero(0),
    "stage-0-bf16": zero(0) | BF16,
    "bf16-optimizer": zero(1) | BF16 | FP32_GRADIENTS,
    "stage-1": zero(1),
    "stage-1-offload": zero(1, **CPU_OFFLOAD),
    "stage-2-bf16": zero(2) | BF16,
    "stage-2-bf16-offload": zero(2, **CPU_OFFLOAD) | BF16,
    "stage-3": zero(3, **SUB_GROUPS),
    "stage-3-offload": zero(3, **CPU_OFFLOAD, **SUB_GROUPS),
    "stage-3-bf16": zero(3) | BF16,
}
SHORT = replace(PROBLEM, steps=NUM_STEPS)
SETUPS = {name: Setup(config, SHORT, arguments=LOW) for name, config in CONFIGS.items()}
WITH_AND_WITHOUT_OFFLOAD = [(name.removesuffix("-offload"), name) for name in SETUPS if name.endswith("-offload")]
TOLERANCE = 5e-3  # relative to the distance travelled; on one device without DeepSpeed, the error is up to 2.9e-3


def in_full(name: str) -> Setup:
    """Return the setup with states in float32."""
    return replace(SETUPS[name], arguments={})


@dataclass
class Outcome:
    """A run that saves a checkpoint halfway and goes on, and another one that resumes from the checkpoint."""

    half: Snapshot
    next_mean: float
    """Mean of the step after the checkpoint."""
    whole: Snapshot
    loaded: Snapshot
    resumed: Snapshot
    dtypes: dict[str, set[str]]
    """Dtypes of the states on this rank."""
    num_bytes: int
    """Size of the states on this rank, without step counts."""
    num_elements: int
    """Number of elements that the optimizer steps on this rank, with padding."""


def train_and_resume(setup: Setup, folder: Path) -> Outcome:
    run = Run(setup)
    run.take_steps(range(SAVED_AT))
    half = run.snapshot()
    run.save(folder)
    run.take_steps(range(SAVED_AT, SAVED_AT + 1))
    next_mean = float(run.engine.basic_optimizer.inertia_mean)
    run.take_steps(range(SAVED_AT + 1, NUM_STEPS))
    states = list(run.engine.basic_optimizer.state.values())
    tensors = [state[name] for state in states for name in STATE_NAMES]
    dtypes = {name: {str(state[name].dtype) for state in states} for name in states[0]}
    num_elements = sum(state["exp_avg"].numel() for state in states)
    whole = run.snapshot()
    run.end()
    return Outcome(
        half,
        next_mean,
        whole,
        *resumed(setup, folder),
        dtypes,
        sum(tensor.nbytes for tensor in tensors),
        num_elements,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("low")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, Any]]:
    cases = {name: (setup, folder / name) for name, setup in SETUPS.items()}
    return run_ranks(attempt_all, WORLD_SIZE, train_and_resume, cases)


def distance_of(snapshot: Snapshot, setup: Setup) -> float:
    """Return the distance of the parameters from the oracle's, relative to the distance travelled."""
    return relative_error(snapshot.parameters, solve(setup)[0], setup.rounded)


@pytest.mark.parametrize("name", SETUPS)
def test_every_stage_follows_the_oracle(name: str, outcomes: list[dict[str, Any]]) -> None:
    for outcome in of_all_ranks(outcomes, name):
        error = distance_of(outcome.whole, SETUPS[name])
        print(f"{name}: {error:.1e}")
        assert 1e-4 < error < TOLERANCE


@pytest.mark.parametrize("name", SETUPS)
def test_states_take_six_bytes_per_parameter(name: str, outcomes: list[dict[str, Any]]) -> None:
    for outcome in of_all_ranks(outcomes, name):
        assert outcome.dtypes == {"step": {"torch.float32"}} | {key: {"torch.bfloat16"} for key in STATE_NAMES}
        assert outcome.num_bytes == 6 * outcome.num_elements


def mean_of(states: dict[str, dict[str, Array]], setup: Setup, step: int) -> float:
    """Return the mean of a step from exp_avg_sq as it is stored before the step."""
    problem = setup.rounded
    gradients = problem.oracle_gradients(step)
    total, count = 0.0, 0
    for index, (_, specs) in enumerate(problem.groups):
        beta2 = problem.hyperparameters(index)["betas"][1]
        for spec in specs:
            gradient = gradients[spec.name]
            assert gradient is not None
            v = beta2 * states[spec.name]["exp_avg_sq"] + (1 - beta2) * gradient**2
            total += float(np.sum(v)) / (1 - beta2 ** (step + 1))
            count += v.size
    return total / count


@pytest.mark.parametrize("name", SETUPS)
def test_the_mean_is_that_of_the_stored_states(name: str, outcomes: list[dict[str, Any]]) -> None:
    for outcome in of_all_ranks(outcomes, name):
        expected = mean_of(outcome.half.states, SETUPS[name], SAVED_AT)
        assert abs(outcome.next_mean / expected - 1) < 1e-6


@pytest.mark.parametrize("name", SETUPS)
def test_a_resumed_run_has_the_bits_of_one_that_went_on(name: str, outcomes: list[dict[str, Any]]) -> None:
    for outcome in of_all_ranks(outcomes, name):
        assert_same(outcome.loaded, outcome.half)
        assert_same(outcome.resumed, outcome.whole)


@pytest.mark.parametrize(("name", "offloaded"), WITH_AND_WITHOUT_OFFLOAD)
def test_offload_does_not_change_the_bits(name: str, offloaded: str, outcomes: list[dict[str, Any]]) -> None:
    for one, other in zip(of_all_ranks(outcomes, name), of_all_ranks(outcomes, offloaded), strict=True):
        if name == "stage-3":  # whose norms are in float32 under offload, so that the means differ by 1e-8
            pairs = zip(one.whole.parts, other.whole.parts, strict=True)
            same = [np.mean(ours[key] == theirs[key]) for ours, theirs in pairs for key in STATE_NAMES]
            assert np.mean(same) > 0.99
        else:
            assert_same(one.whole, other.whole)


# -- random bits -------------------------------------------------------------------------------------------------------


class Twins(nn.Module):
    """Two parameters of two equal rows, with equal gradients, of which each rank holds a row under ZeRO."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.linspace(-1.0, 1.0, 64)
        self.first, self.second = (nn.Parameter(row.repeat(2, 1)) for _ in range(2))

    def forward(self, step: int) -> Tensor:
        gradient = torch.randn(64, generator=torch.Generator().manual_seed(step))
        return sum(((param * gradient).sum() for param in self.parameters()), torch.zeros(()))


def rows(config: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Return the four equal rows of each state, of a client optimizer."""
    set_environment()
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state

    model = Twins()
    groups = [{"params": [param]} for param in model.parameters()]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=AdaiV2(groups, lr=0.1, state_dtype="bfloat16", seed=3),
        config={"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, **config},
        dist_init_required=False,
    )
    for step in range(4):
        engine.backward(engine(step))
        engine.step()
    found = {
        name: [row for param in model.parameters() for row in safe_get_full_optimizer_state(param, name)]
        for name in STATE_NAMES
    }
    engine.destroy()
    return found


def rows_of_all() -> dict[str, dict[str, list[Tensor]]]:
    names = ("bf16-optimizer", "stage-1", "stage-2-bf16-offload", "stage-3")
    return {name: rows(CONFIGS[name]) for name in names}


def test_every_rank_and_every_part_rounds_with_other_random_bits() -> None:
    for of_rank in run_ranks(rows_of_all, WORLD_SIZE):
        for found in of_rank.values():
            for of_state in found.values():
                assert all(torch.allclose(row, of_state[0], rtol=0.03, atol=0.03) for row in of_state)
                for index, row in enumerate(of_state):
                    assert not any(torch.equal(row, other) for other in of_state[:index])


def product_after_many_steps(setup: Setup) -> list[Tensor]:
    run = Run(setup)
    run.take_steps(range(setup.problem.steps))
    products = [state["beta1_prod"] for state in run.engine.basic_optimizer.state.values()]
    run.end()
    return products


def test_the_product_settles_after_the_steps_that_eps_determines() -> None:
    """At eps=0.5 it may be taken as 0 after 9 steps; ZeRO keeps references to the states, so that none is freed."""
    setups = {
        name: replace(SETUPS[name], problem=replace(SHORT.with_all(eps=0.5), steps=9))
        for name in ("stage-2-bf16", "stage-3")
    }
    ranks = run_ranks(attempt_all, WORLD_SIZE, product_after_many_steps, {k: (s,) for k, s in setups.items()})
    for name in setups:
        for products in of_all_ranks(ranks, name):
            assert all(bool((q == 1).all()) for q in products)


def moved_away_and_back(setup: Setup) -> tuple[Snapshot, dict[str, list[float]]]:
    """Return a run with offloaded states halfway, and a parameter's states as DeepSpeed's accessor writes them."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    run = Run(setup)
    run.take_steps(range(SAVED_AT))
    run.engine.offload_states()
    run.engine.reload_states()
    run.take_steps(range(SAVED_AT, NUM_STEPS))
    snapshot = run.snapshot()
    param, written = run.model.by_name()["third.two"], {}
    for name in STATE_NAMES:
        safe_set_full_optimizer_state(param, torch.tensor([0.5, 0.25]), name)
        written[name] = safe_get_full_optimizer_state(param, name).tolist()
    run.end()
    return snapshot, written


def test_deepspeeds_own_functions_move_read_and_write_the_states(outcomes: list[dict[str, Any]]) -> None:
    names = ("stage-1", "stage-2-bf16")
    ranks = run_ranks(attempt_all, WORLD_SIZE, moved_away_and_back, {name: (SETUPS[name],) for name in names})
    for name in names:
        results = zip(of_all_ranks(ranks, name), of_all_ranks(outcomes, name), strict=True)
        for (snapshot, written), outcome in results:
            assert_same(snapshot, outcome.whole)
            assert written == {key: [0.5, 0.25] for key in STATE_NAMES}


# -- checkpoints in another mode, and universal ones -------------------------------------------------------------------


@dataclass
class Loaded:
    """A run that loads a checkpoint of another one."""

    loaded: Snapshot
    resumed: Snapshot
    logged: list[str]


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect the messages of the package's logger."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("adai_dist").addHandler(handler)
    try:
        yield logged
    finally:
        logging.getLogger("adai_dist").removeHandler(handler)


def load(setup: Setup, folder: Path) -> Loaded:
    with listening() as logged:
        return Loaded(*resumed(setup, folder), logged)


def check_loaded(result: Loaded, half: Snapshot, setup: Setup, *, were_low: bool) -> None:
    """Assert that parameters and states are the saved ones, whatever is stored, and that the run goes on."""
    is_low = bool(setup.arguments)
    assert result.loaded.hyper == half.hyper
    for name, expected in half.parameters.items():
        np.testing.assert_array_equal(result.loaded.parameters[name], expected, err_msg=name)
        for key in STATE_NAMES:
            ours, theirs = result.loaded.states[name][key], half.states[name][key]
            if key == "beta1_prod" and is_low != were_low:
                theirs = 1.0 - theirs
            if is_low and not were_low:
                theirs = torch.from_numpy(theirs).bfloat16().double().numpy()
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{key} of {name}")
    assert {float(part["step"]) for part in result.loaded.parts} == {SAVED_AT}
    assert distance_of(result.resumed, setup) < TOLERANCE


IN_OTHER_MODES = ("stage-0", "bf16-optimizer", "stage-1", "stage-3")


@pytest.fixture(scope="module")
def of_float32(folder: Path) -> list[dict[str, Any]]:
    cases = {name: (in_full(name), folder / f"{name}-float32") for name in IN_OTHER_MODES}
    return run_ranks(attempt_all, WORLD_SIZE, saved, cases)


def test_every_mode_loads_the_checkpoints_of_the_other_one(
    folder: Path, outcomes: list[dict[str, Any]], of_float32: list[dict[str, Any]]
) -> None:
    cases = {f"{name} to bfloat16": (SETUPS[name], folder / f"{name}-float32") for name in IN_OTHER_MODES}
    cases |= {f"{name} to float32": (in_full(name), folder / name) for name in IN_OTHER_MODES}
    ranks = run_ranks(attempt_all, WORLD_SIZE, load, cases)
    for name in IN_OTHER_MODES:
        for rank, result in enumerate(of_all_ranks(ranks, f"{name} to bfloat16")):
            check_loaded(result, of_all_ranks(of_float32, name)[rank], SETUPS[name], were_low=False)
            assert any("state_dtype='float32' instead of 'bfloat16'" in line for line in result.logged) == (rank == 0)
        for rank, result in enumerate(of_all_ranks(ranks, f"{name} to float32")):
            check_loaded(result, of_all_ranks(outcomes, name)[rank].half, in_full(name), were_low=True)


# Source and target: a target in float32 or in bfloat16, on 1, 2 or 4 ranks.
TARGETS: dict[int, tuple[tuple[str, str, bool], ...]] = {
    1: (("stage-1", "stage-3", True), ("bf16-optimizer", "bf16-optimizer", True)),
    2: (("stage-3", "stage-1", True), ("stage-3", "stage-1", False), ("stage-2-bf16", "bf16-optimizer", True)),
    4: (("stage-1", "stage-1-offload", True), ("stage-3", "stage-3-offload", True)),
}
SOURCES = sorted({source for targets in TARGETS.values() for source, _, _ in targets})
FLOAT32_SOURCES = ("stage-1", "stage-3")


def convert(folder: Path) -> None:
    from adai_dist.integrations.deepspeed.universal import to_universal

    on_first_rank(lambda: to_universal(folder / f"global_step{SAVED_AT}", folder / "universal"))


@pytest.fixture(scope="module")
def converted(folder: Path, outcomes: list[dict[str, Any]], of_float32: list[dict[str, Any]]) -> None:
    names = (*SOURCES, *(f"{name}-float32" for name in FLOAT32_SOURCES))
    ranks = run_ranks(attempt_all, 1, convert, {name: (folder / name,) for name in names})
    for name in names:
        of_all_ranks(ranks, name)


@pytest.mark.usefixtures("converted")
def test_universal_checkpoints_contain_the_product_in_float32(folder: Path, outcomes: list[dict[str, Any]]) -> None:
    for source in SOURCES:
        half = of_all_ranks(outcomes, source)[0].half
        products = sorted((folder / source / "universal" / "zero").rglob("beta1_prod.pt"))
        assert len(products) == len(half.states)
        saved_products = [torch.load(path)["param"] for path in products]
        assert all(product.dtype == torch.float32 for product in saved_products)
        assert all(torch.load(path.with_name("exp_avg.pt"))["param"].dtype == torch.bfloat16 for path in products)
        found = torch.cat([product.view(-1) for product in saved_products]).double().sort().values
        expected = np.sort(np.concatenate([1.0 - state["beta1_prod"].ravel() for state in half.states.values()]))
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("num_ranks", TARGETS)
def test_universal_checkpoints_load_into_other_stages_ranks_and_modes(
    num_ranks: int, folder: Path, outcomes: list[dict[str, Any]], of_float32: list[dict[str, Any]]
) -> None:
    cases: dict[str, tuple[Setup, Path]] = {}
    halves: dict[str, tuple[Snapshot, bool]] = {}
    for source, target, is_low in TARGETS[num_ranks]:
        name = f"{source} {target} {is_low}"
        cases[name] = (universal(SETUPS[target] if is_low else in_full(target)), folder / source)
        halves[name] = (of_all_ranks(outcomes, source)[0].half, True)
    if num_ranks == WORLD_SIZE:
        for source, target in zip(FLOAT32_SOURCES, reversed(FLOAT32_SOURCES), strict=True):
            name = f"{source}-float32 {target}"
            cases[name] = (universal(SETUPS[target]), folder / f"{source}-float32")
            halves[name] = (of_all_ranks(of_float32, source)[0], False)
    ranks = run_ranks(attempt_all, num_ranks, load, cases)
    for name, (half, were_low) in halves.items():
        for rank, result in enumerate(of_all_ranks(ranks, name)):
            check_loaded(result, half, cases[name][0], were_low=were_low)
            is_other_mode = bool(cases[name][0].arguments) != were_low
            assert any("state_dtype=" in line for line in result.logged) == (rank == 0 and is_other_mode)


@pytest.mark.usefixtures("converted")
def test_loading_the_weights_only_keeps_the_states(folder: Path, outcomes: list[dict[str, Any]]) -> None:
    cases = {name: (SETUPS[name], folder / name) for name in ("stage-1", "bf16-optimizer")}
    ranks = run_ranks(attempt_all, WORLD_SIZE, weights_only, cases)
    for name in cases:
        half = of_all_ranks(outcomes, name)[0].half
        for before, loaded in of_all_ranks(ranks, name):
            assert_same(loaded, replace(before, parameters=half.parameters, model=half.model))


# -- settings ----------------------------------------------------------------------------------------------------------


def messages_of_master_weights() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in ("stage-0", "stage-0-bf16", "stage-2-bf16"):
        for value in (False, True):
            with listening() as logged:
                run = Run(replace(SETUPS[name], arguments={"master_weights": value}))
                run.take_steps(range(1))
                run.end()
            found[f"{name} {value}"] = [line for line in logged if "master_weights" in line]
    return found


def test_master_weights_without_effect_are_warned_about() -> None:
    main, other = run_ranks(messages_of_master_weights, WORLD_SIZE)
    assert not any(other.values())
    assert main["stage-0 False"] == []  # float32 parameters are never rounded
    for name in ("stage-0-bf16", "stage-2-bf16"):
        (message,) = main[f"{name} False"]
        assert "master_weights=False has no effect under DeepSpeed, which keeps a float32 copy" in message
    assert all(len(main[f"{name} True"]) == 1 for name in ("stage-0", "stage-0-bf16", "stage-2-bf16"))


def refusals_of_8_bits() -> dict[str, str]:
    from adai_dist.integrations.deepspeed.unsupported_settings import UnsupportedSetting

    found: dict[str, str] = {}
    for name in ("stage-0", "bf16-optimizer", "stage-1", "stage-2-bf16-offload", "stage-3"):
        with pytest.raises(UnsupportedSetting) as error:
            Run(replace(SETUPS[name], arguments={"state_dtype": "mixed8"}))
        found[name] = str(error.value)
    return found


def test_states_in_8_bits_are_refused_on_all_ranks() -> None:
    one, other = run_ranks(refusals_of_8_bits, WORLD_SIZE)
    assert one == other
    for message in one.values():
        assert "got state_dtype = 'mixed8', which" in message
        assert message.endswith('; use "bfloat16" or "float32"')


def resumed_in_16_bits(folder: Path) -> list[dict[str, Tensor]]:
    """Train a model in bfloat16 without ZeRO and without the section that makes DeepSpeed keep float32 copies."""
    set_environment()
    import deepspeed

    def take_steps(folder_to_load: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        engine, *_ = deepspeed.initialize(
            model=(model := Twins().bfloat16()),
            model_parameters=model.parameters(),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "AdaiV2", "params": {"lr": 0.1, **LOW}},
            },
            dist_init_required=False,
        )
        for step in range(6):
            if step == 3 and folder_to_load is None:
                engine.save_checkpoint(str(folder))
            if step == 3 and folder_to_load is not None:
                engine.load_checkpoint(str(folder_to_load))
            engine.backward(engine(step if step >= 3 or folder_to_load is None else step + 10))
            engine.step()
        param = engine.module.first
        return {"param": param.detach().clone(), **engine.basic_optimizer.state[param]}

    return [take_steps(None), take_steps(folder)]


def test_a_model_in_16_bits_without_zero_keeps_its_remainders(tmp_path: Path) -> None:
    for whole, resumed_run in run_ranks(resumed_in_16_bits, WORLD_SIZE, tmp_path):
        assert whole["master_param"].dtype == torch.int16
        assert whole["master_param"].any()
        assert whole.keys() == resumed_run.keys()
        for name, value in whole.items():
            assert torch.equal(resumed_run[name], value), name


# -- model parallelism -------------------------------------------------------------------------------------------------

AUTOTP = {"tensor_parallel": {"autotp_size": 2}}
SLOW = replace(PROBLEM, groups=tuple((hyper | {"lr": 0.1 * hyper["lr"]}, specs) for hyper, specs in PROBLEM.groups))
EXPERTS = {name: Setup(CONFIGS[name], SLOW, arguments=LOW) for name in ("stage-0", "stage-1", "bf16-optimizer")}
TENSOR_PARALLEL = {name: replace(setup, config={**setup.config, **AUTOTP}) for name, setup in EXPERTS.items()}
TENSOR_PARALLEL["stage-3"] = Setup(zero(3) | AUTOTP, SLOW, arguments=LOW)
PIPELINES = {name: SETUPS[name] for name in ("stage-0", "stage-0-bf16", "stage-1", "bf16-optimizer")}
FIRST, *OTHER_GROUPS = SHORT.groups
MOVED = replace(SHORT, groups=((FIRST[0], FIRST[1][::-1]), *OTHER_GROUPS))
"""The tied layer follows a parameter that one of its two stages lacks."""


def assert_copies_are_equal(ranks: list[Seen]) -> None:
    first, second = ranks
    names = first.parameters.keys() & second.parameters.keys()
    assert names
    for name in names:
        np.testing.assert_array_equal(first.parameters[name], second.parameters[name], err_msg=name)
        for key in STATE_NAMES:
            np.testing.assert_array_equal(first.states[name][key], second.states[name][key], err_msg=f"{name} {key}")


def check_follows_the_oracle(ranks: list[Captured], setup: Setup) -> None:
    oracle, starts = oracle_of(ranks, setup)
    for step in range(setup.problem.steps):
        oracle.step(gradients_of(ranks, step))
    found = {name: value for rank in ranks for name, value in rank.seen.parameters.items()}
    squares = np.array(
        [
            [np.sum((found[name] - oracle.parameters[name]) ** 2), np.sum((oracle.parameters[name] - start) ** 2)]
            for name, start in starts.items()
        ]
    )
    error, travelled = np.sqrt(squares.sum(0))
    print(f"{error / travelled:.1e}")
    assert error / travelled < TOLERANCE


EXPERT_STARTS: list[int] = []


def note_starts(engine: Any) -> None:
    EXPERT_STARTS[:] = getattr(engine.basic_optimizer.sharding_plan, "starts", {}).values()


def walk_experts_of_each_rank(setup: Setup) -> tuple[Captured, list[int]]:
    captured = walk_experts(setup, 2, note_starts)
    return captured, list(EXPERT_STARTS)


def test_experts_follow_the_oracle_with_random_bits_of_their_own() -> None:
    family = Family(EXPERTS, walk_experts_of_each_rank)
    for name, setup in EXPERTS.items():
        ranks = [captured for captured, _ in family.ranks(name)]
        assert_copies_are_equal([captured.seen for captured in ranks])
        check_follows_the_oracle(ranks, setup)
    (_, first), (_, second) = family.ranks("stage-0")
    assert first == [0] * len(second)
    assert sorted(second) == [8, 64]  # the sizes of bias and matrix


@pytest.mark.skipif(not has_deepspeed("0.19.8"), reason="AutoTP with ZeRO 3 is refused")
def test_copies_on_tensor_parallel_ranks_stay_equal() -> None:
    family = Family(TENSOR_PARALLEL, walk_tensor_parallel)
    for name, setup in TENSOR_PARALLEL.items():
        assert_copies_are_equal([captured.seen for captured in family.ranks(name)])
        check_follows_the_oracle(family.ranks(name), setup)


def test_copies_of_a_layer_in_two_stages_stay_equal_or_are_refused() -> None:
    moved = {f"{name} moved": replace(setup, problem=MOVED) for name, setup in PIPELINES.items()}
    family = Family(PIPELINES | moved, walk_or_error)
    for name in PIPELINES:
        assert_copies_are_equal(family.ranks(name))
        first, second = family.ranks(f"{name} moved")
        assert first == second
        (message,) = first
        assert "with 'tied_modules.tied.weight' at different offsets on model-parallel ranks" in message
        assert message.endswith("; leave both out")


def walk_or_error(setup: Setup) -> Seen | tuple[str]:
    try:
        return walk_pipeline(setup)
    except ValueError as error:
        return (str(error),)
