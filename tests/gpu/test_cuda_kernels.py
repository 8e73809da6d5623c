"""The CUDA kernels as operators: exact, deterministic, and without synchronisation with the host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adai_dist.equations import LocalTensors, StepScalars
from adai_dist.hyper import Hyper
from adai_dist.kernels import build
from adai_dist.kernels.ops import kernel_scalars, operator_order
from adai_dist.rounding import Origin
from tests import kernel_cases
from tests.kernel_cases import (
    DTYPES,
    LOW_MODES,
    MIXED,
    MODES,
    OPTIONS,
    SIZES,
    STATE_DTYPES,
    Mode,
    Operators,
    assert_same_bits,
    copied,
    make_scalars,
    make_shards,
    step,
    turned,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # the first test compiles
]

L2 = Hyper(lr=1.0, **OPTIONS["l2"])
FRACTIONAL_POWERS = Hyper(lr=1.0, **OPTIONS["dampening 0.4, l2"])


@pytest.fixture(scope="module")
def operators() -> Operators:
    build.load(build.CUDA)
    return kernel_cases.torch_operators("cuda")


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_stepped_and_observed(operators: Operators, name: str) -> None:
    kernel_cases.check_advance(operators, make_shards(SIZES[name], operators.device), Hyper(lr=1.0))
    kernel_cases.check_observe(operators, make_shards(SIZES[name], operators.device))
    kernel_cases.check_sums(operators, make_shards(SIZES[name], operators.device))


@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [MIXED, [2048, 2049, 5000], [3] * 260, [2**16 + 1]], ids=str)
def test_a_write_to_a_state_is_detected(operators: Operators, sizes: list[int], state: torch.dtype) -> None:
    kernel_cases.check_detection_of_writes(operators, make_shards(sizes, operators.device, state=state))


@pytest.mark.parametrize("state", STATE_DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sums_of_states_in_low_precision_agree(operators: Operators, name: str, state: torch.dtype) -> None:
    kernel_cases.check_sums(operators, make_shards(SIZES[name], operators.device, state=state))


@pytest.mark.parametrize("retired", [False, True], ids=["with products", "retired"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_variant_follows_the_equations(operators: Operators, name: str, retired: bool) -> None:
    shards = make_shards(MIXED, operators.device, retired=retired)
    kernel_cases.check_advance(operators, shards, Hyper(lr=1.0, **OPTIONS[name]))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_follows_the_equations(operators: Operators, mode: Mode) -> None:
    shards = make_shards(MIXED, operators.device, **mode._asdict())
    kernel_cases.check_advance(operators, shards, L2)
    kernel_cases.check_observe(operators, shards)


@pytest.mark.parametrize("retired", [False, True], ids=["with products", "retired"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_elements_have_the_bits_of_the_cpu_kernels(operators: Operators, mode: Mode, retired: bool) -> None:
    build.load(build.CPU)
    for number, options in enumerate(OPTIONS.values()):
        hyper = Hyper(lr=1.0, **options)
        shards = make_shards(MIXED, operators.device, **mode._asdict(), retired=retired)
        kernel_cases.check_same_as_cpu(operators, shards, hyper, turned(number))


@pytest.mark.parametrize("mode", LOW_MODES, ids=str)
def test_numbers_are_rounded_as_specified(operators: Operators, mode: Mode) -> None:
    for number, options in enumerate(OPTIONS.values()):
        kernel_cases.check_rounding(operators, mode, Hyper(lr=1.0, **options), turned(number))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.has_remainder], ids=str)
def test_master_weights_are_stepped_as_parameters_in_float32(operators: Operators, mode: Mode) -> None:
    for options in OPTIONS.values():
        kernel_cases.check_master_weights(operators, mode, Hyper(lr=1.0, **options))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_alignment_changes_no_bit(operators: Operators, mode: Mode) -> None:
    kernel_cases.check_alignment(operators, FRACTIONAL_POWERS, mode)


@pytest.mark.parametrize("is_finite", [True, False], ids=["finite", "non-finite"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_step_that_does_not_count_leaves_the_states(operators: Operators, mode: Mode, is_finite: bool) -> None:
    kernel_cases.check_step_that_does_not_count(operators, mode, is_finite=is_finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_non_finite_gradient_shows_in_its_sum(operators: Operators, value: float, dtype: torch.dtype) -> None:
    kernel_cases.check_non_finite(operators, value, dtype)


# -- determinism -------------------------------------------------------------------------------------------------------


def test_results_have_the_same_bits_from_run_to_run(operators: Operators) -> None:
    shards = make_shards([*MIXED, 10_000_019], operators.device)
    scalars = make_scalars(shards)
    first = copied(shards)
    norms, sums = (
        kernel_cases.observe(operators, shards.grad, shards.param),
        step(operators, first, FRACTIONAL_POWERS, scalars),
    )
    for _ in range(5):
        again = copied(shards)
        assert torch.equal(norms, kernel_cases.observe(operators, again.grad, again.param))
        assert torch.equal(sums, step(operators, again, FRACTIONAL_POWERS, scalars))
        assert_same_bits(again, first)


def test_work_follows_the_current_stream(operators: Operators) -> None:
    shards = make_shards([2**20], operators.device)
    expected, found = copied(shards), copied(shards)
    scalars = make_scalars(shards)
    sums = step(operators, expected, L2, scalars)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found.grad[0].mul_(2.0)
        found.grad[0].mul_(0.5)
        sums_of_stream = step(operators, found, L2, scalars)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(sums, sums_of_stream)
    assert_same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_work_follows_the_device_of_the_tensors(operators: Operators) -> None:
    of_devices = [make_shards(MIXED, torch.device("cuda", index)) for index in range(2)]
    sums = [step(operators, shards, L2, make_scalars(shards)).cpu() for shards in of_devices]
    assert torch.equal(*sums)
    assert_same_bits(*of_devices)


# -- no synchronisation ------------------------------------------------------------------------------------------------


def test_the_host_does_not_wait_for_the_device(operators: Operators) -> None:
    shards = make_shards(MIXED, operators.device)
    scalars = make_scalars(shards)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms = kernel_cases.observe(operators, shards.grad, shards.param)
        returned = step(operators, shards, L2, scalars)
        kept = kernel_cases.observe(operators, shards.grad, [], shards.exp_avg_sq, returned)[:, 1]
        sums = kernel_cases.sums(operators, shards.exp_avg_sq)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(returned[:, 0], sums)
    assert torch.equal(returned[:, 0], kept)
    assert norms.isfinite().all()


def test_a_captured_graph_replays_what_it_recorded(operators: Operators) -> None:
    shards = make_shards([*MIXED, *SIZES["more than a launch takes"]], operators.device)
    expected, found = copied(shards), copied(shards)
    scalars = make_scalars(shards)

    def run(on: LocalTensors) -> tuple[Tensor, Tensor, Tensor]:
        norms = kernel_cases.observe(operators, on.grad, on.param)
        return norms, step(operators, on, FRACTIONAL_POWERS, scalars), kernel_cases.sums(operators, on.exp_avg_sq)

    run(copied(shards))  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(found)
    assert_same_bits(found, shards)  # nothing has run yet
    for _ in range(3):
        eager = run(expected)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    assert_same_bits(found, expected)
    scalars.is_live.fill_(False)  # read on the device in every replay
    graph.replay()
    assert_same_bits(found, expected)


def test_compiled_functions_call_the_operators(operators: Operators) -> None:
    shards = make_shards(MIXED, operators.device)
    expected, found = copied(shards), copied(shards)
    scalars = make_scalars(shards)

    def run(on: LocalTensors, given: StepScalars) -> tuple[Tensor, Tensor]:
        scale = kernel_cases.observe(operators, on.grad, on.param).sum().rsqrt().float()
        return scale, step(operators, on, L2, given._replace(coefficient=given.coefficient * scale))

    eager = run(expected, scalars)
    compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(found, scalars), eager, strict=True):
        assert torch.equal(a, b)
    assert_same_bits(found, expected)


def test_schemas_and_fake_implementations_match_the_kernels(operators: Operators) -> None:
    shards = make_shards(MIXED, operators.device)
    scalars = make_scalars(shards)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.adai_dist
    kept = torch.zeros(len(shards.param), 2, dtype=torch.float64, device=operators.device)
    observed = (shards.grad, shards.param, shards.remainder, shards.exp_avg_sq, kept, scalars.coefficient, 0.1)
    torch.library.opcheck(ops.observe.default, observed, test_utils=checks)
    torch.library.opcheck(
        ops.advance.default, (*shards, *operator_order(scalars), kernel_scalars(L2)), test_utils=checks
    )
    torch.library.opcheck(ops.sums.default, (shards.exp_avg_sq, kept), test_utils=checks)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_step_needs_less_than_a_mebibyte(operators: Operators) -> None:
    shards = make_shards([2**26, 7], operators.device)
    scalars = make_scalars(shards)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernel_cases.observe(operators, shards.grad, shards.param)
    step(operators, shards, L2, scalars)
    kernel_cases.sums(operators, shards.exp_avg_sq)
    assert torch.cuda.max_memory_allocated() - before <= 2**20


NUM_BEYOND = 2**31 + 3
BYTES_BEYOND = NUM_BEYOND * (2 + 2 + 2 + 4 + 4)
VALUES_BEYOND = (1.0, 0.5, 0.25, 0.125)
"""Of parameters, gradients and moments; the last two elements have half of them."""

needs_memory_beyond = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < BYTES_BEYOND * 1.3, reason="needs 39 GB of memory"
)


def filled(size: int, device: torch.device, state: torch.dtype, remainders: int) -> LocalTensors:
    dtypes = (torch.bfloat16, torch.bfloat16, state, state)
    lists = [
        [torch.full((size,), value, device=device, dtype=dtype)]
        for value, dtype in zip(VALUES_BEYOND, dtypes, strict=True)
    ]
    for tensors in lists:
        tensors[0][-2:].mul_(0.5)
    remainder = [torch.zeros(size, dtype=torch.int16, device=device) for _ in range(remainders)]
    return LocalTensors(*lists, [], remainder)


@needs_memory_beyond
def test_more_than_2_to_the_31_elements_are_stepped(operators: Operators) -> None:
    device, hyper = operators.device, Hyper(lr=1.0)
    large, small = (filled(size, device, torch.float32, 1) for size in (NUM_BEYOND, 5))
    norms = kernel_cases.observe(operators, large.grad, large.param, remainders=large.remainder)
    assert norms[:, [0, 2, 3]].tolist() == [[0.25 * (NUM_BEYOND - 1.5), 0.5 * (NUM_BEYOND - 1.5), NUM_BEYOND - 1.5]]
    sums = step(operators, large, hyper, make_scalars(large))
    step(operators, small, hyper, make_scalars(small))
    for of_large, of_small in zip(large, small, strict=True):
        if not of_large:
            continue
        assert torch.equal(of_large[0][-5:], of_small[0])
        start = 2**31 - 2**25
        assert (of_large[0][:start].view(-1, 2**25) == of_small[0][0]).all()
        assert (of_large[0][start:-2] == of_small[0][0]).all()
    v = small.exp_avg_sq[0].double()
    assert math.isclose(sums[0, 0].item(), (v[0] * (NUM_BEYOND - 2) + v[-2:].sum()).item(), rel_tol=1e-12)


@needs_memory_beyond
def test_the_random_bits_of_more_than_2_to_the_31_elements_depend_on_their_indices(operators: Operators) -> None:
    device, hyper, start = operators.device, Hyper(lr=1.0), 2**31 - 1000
    large = filled(NUM_BEYOND, device, torch.bfloat16, 0)
    small = LocalTensors(*([x[0][start:].clone()] if x else [] for x in large))
    step(operators, large, hyper, make_scalars(large))
    step(operators, small, hyper, make_scalars(small, origins=[Origin(start)]))
    assert_same_bits(LocalTensors(*([x[0][start:]] if x else [] for x in large)), small)
