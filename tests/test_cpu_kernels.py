"""The compiled CPU kernels against the equations, and their bitwise guarantees."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from adai_dist.equations import LocalTensors
from adai_dist.hyper import KERNEL_SCALARS, Hyper
from adai_dist.kernels import build
from adai_dist.kernels.ops import kernel_scalars, operator_order
from adai_dist.rounding import LOW_DTYPES, Origin, join
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
    make_scalars,
    make_shards,
    turned,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def operators() -> Operators:
    build.load(build.CPU)
    return kernel_cases.torch_operators("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_stepped_and_observed(operators: Operators, name: str) -> None:
    kernel_cases.check_advance(operators, make_shards(SIZES[name], CPU), Hyper(lr=1.0))
    kernel_cases.check_observe(operators, make_shards(SIZES[name], CPU))
    kernel_cases.check_sums(operators, make_shards(SIZES[name], CPU))


@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [MIXED, [2048, 2049, 5000], [3] * 260, [2**16 + 1]], ids=str)
def test_a_write_to_a_state_is_detected(operators: Operators, sizes: list[int], state: torch.dtype) -> None:
    kernel_cases.check_detection_of_writes(operators, make_shards(sizes, operators.device, state=state))


@pytest.mark.parametrize("state", STATE_DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sums_of_states_in_low_precision_agree(operators: Operators, name: str, state: torch.dtype) -> None:
    kernel_cases.check_sums(operators, make_shards(SIZES[name], CPU, state=state))


@pytest.mark.parametrize("retired", [False, True], ids=["with products", "retired"])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_variant_in_every_mode_follows_the_equations(
    operators: Operators, name: str, mode: Mode, retired: bool
) -> None:
    shards = make_shards(MIXED, CPU, **mode._asdict(), retired=retired)
    kernel_cases.check_advance(operators, shards, Hyper(lr=1.0, **OPTIONS[name]))
    kernel_cases.check_observe(operators, shards)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_alignment_changes_no_bit(operators: Operators, mode: Mode) -> None:
    kernel_cases.check_alignment(operators, Hyper(lr=1.0, **OPTIONS["dampening 0.4, l2"]), mode)


@pytest.mark.parametrize("is_finite", [True, False], ids=["finite", "non-finite"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_step_that_does_not_count_leaves_the_states(operators: Operators, mode: Mode, is_finite: bool) -> None:
    kernel_cases.check_step_that_does_not_count(operators, mode, is_finite=is_finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_non_finite_gradient_shows_in_its_sum(operators: Operators, value: float, dtype: torch.dtype) -> None:
    kernel_cases.check_non_finite(operators, value, dtype)


# -- the same bits -----------------------------------------------------------------------------------------------------


def made_by_numpy(sizes: list[int], mode: Mode) -> LocalTensors:
    """Make parameters, gradients and states with NumPy: random numbers of torch depend on its instruction set."""
    random = np.random.default_rng(0)
    shards: list[list[Tensor]] = []
    for size in (kernel_cases.whole(size, mode.state) for size in sizes):
        normal = torch.from_numpy(
            random.standard_normal((3, size), dtype=np.float32) * 2.0 ** random.integers(-9, 9, size)
        ).float()
        uniform = torch.from_numpy(random.random((2, size), dtype=np.float32))
        stored = kernel_cases.stored_in([*normal, *uniform], **mode._asdict())
        shards.append([x.clone() for x in stored])
    return kernel_cases.listed(shards)


def all_bits(operators: Operators) -> str:
    """Return a digest of everything that the operators write and return, over all options, modes and origins."""
    digest = hashlib.sha256()
    all_options = list(OPTIONS.values())
    for index, mode in enumerate(MODES):
        shards = made_by_numpy([7, 0, 2**17 + 11, 1], mode)
        digest.update(bytes_of(kernel_cases.observe(operators, shards.grad, shards.param, remainders=shards.remainder)))
        for number in range(2):
            options = all_options[(index + index // 6 + 3 * number) % 6]
            scalars = make_scalars(shards, origins=turned(index + number))
            digest.update(bytes_of(kernel_cases.step(operators, shards, Hyper(lr=1.0, **options), scalars)))
        for tensors in shards:
            for tensor in tensors:
                digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_the_number_of_threads_and_a_repetition_change_no_bit(operators: Operators, threads: None) -> None:
    found: set[str] = set()
    for num_threads in (1, 2, 4, 4):
        torch.set_num_threads(num_threads)
        found.add(all_bits(operators))
    assert len(found) == 1


def test_every_instruction_set_gives_the_same_bits(operators: Operators) -> None:
    """Every instruction set needs a process, because torch reads its limit once."""
    program = (
        "import torch\n"
        "from tests import test_cpu_kernels as t, kernel_cases\n"
        "t.build.load(t.build.CPU)\n"
        "print(torch.backends.cpu.get_cpu_capability(), t.all_bits(kernel_cases.torch_operators('cpu')))"
    )
    found: dict[str, str] = {}
    # Limited to what this CPU has: torch trusts the environment and would crash with an illegal instruction.
    num_usable = {"AVX2": 2, "AVX512": 3}.get(torch.backends.cpu.get_cpu_capability(), 1)
    for capability in ("default", "avx2", "avx512")[:num_usable]:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used, digest = done.stdout.rsplit(maxsplit=1)
        found[used] = digest
    assert set(found.values()) == {all_bits(operators)}
    assert len(found) == num_usable


@pytest.mark.parametrize("mode", LOW_MODES, ids=str)
def test_the_bits_of_an_element_depend_on_its_global_index_only(operators: Operators, mode: Mode) -> None:
    """A parameter that is divided among shards is stepped as a whole one; blocks and chunks begin elsewhere."""
    cuts = [kernel_cases.whole(cut, mode.state) for cut in (0, 1, 300, 17_000, 50_000)]
    whole = make_shards(cuts[-1:], CPU, **mode._asdict())

    def part(x: Tensor, i: int, j: int) -> Tensor:
        return x[i * len(x) // cuts[-1] : j * len(x) // cuts[-1]].clone()  # of records there are fewer

    parts = LocalTensors(*([part(x[0], i, j) for i, j in itertools.pairwise(cuts) if x] for x in whole))
    start = 2**32 - 20_000
    scalars = make_scalars(whole, origins=[Origin(start)])
    of_parts = scalars.of_shards([0] * 4)
    assert of_parts.rounding is not None
    origins = torch.tensor([Origin(start + cut) for cut in cuts[:-1]])
    of_parts = of_parts._replace(rounding=of_parts.rounding._replace(origins=origins))
    hyper = Hyper(lr=1.0, **OPTIONS["adaiw"])
    kernel_cases.step(operators, whole, hyper, scalars)
    kernel_cases.step(operators, parts, hyper, of_parts)
    kernel_cases.assert_same_bits(LocalTensors(*([torch.cat(x)] if x else [] for x in parts)), whole)


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retired", [False, True], ids=["with products", "retired"])
@pytest.mark.parametrize("mode", LOW_MODES, ids=str)
def test_numbers_are_rounded_as_specified(operators: Operators, mode: Mode, retired: bool) -> None:
    for number, options in enumerate(OPTIONS.values()):
        kernel_cases.check_rounding(operators, mode, Hyper(lr=1.0, **options), turned(number), retired=retired)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.has_remainder], ids=str)
def test_master_weights_are_stepped_as_parameters_in_float32(operators: Operators, mode: Mode) -> None:
    for options in OPTIONS.values():
        kernel_cases.check_master_weights(operators, mode, Hyper(lr=1.0, **options))


# -- arithmetic --------------------------------------------------------------------------------------------------------


def first_step(
    operators: Operators,
    v: Tensor,
    gradient: Tensor,
    hyper: Hyper,
    param: Tensor | None = None,
    m: Tensor | None = None,
) -> LocalTensors:
    """Take a step of one tensor from P = 1, with all device scalars and lr equal to 1; 16 bits have a remainder."""
    zeros = torch.zeros_like(v)
    param = zeros.clone() if param is None else param
    shards = LocalTensors([param], [gradient], [zeros.clone() if m is None else m], [v.clone()], [torch.ones_like(v)])
    if param.dtype in LOW_DTYPES:
        shards = shards._replace(remainder=[torch.zeros_like(param, dtype=torch.int16)])
    one, true = torch.ones(()), torch.tensor(True)
    operators.advance(*shards, torch.ones(1), one, one, true, true, [], kernel_scalars(hyper))
    return shards


@pytest.mark.parametrize("a", [1 / 3, 0.4, 0.5, 0.75, 0.99])
def test_the_fractional_power_is_accurate_to_two_units_in_the_last_place(operators: Operators, a: float) -> None:
    """After a step, P is 1 - beta0 * x^a, which is exact if beta0 is a power of 2 that brings x^a into [1/2, 1)."""
    random = np.random.default_rng(0)
    worst = 0.0
    for j in range(-30, 31):
        x = np.exp2(random.uniform((-1 - j) / a, -j / a, 20_000)).astype(np.float32)
        x = x[(x > 2e-38) & (x < 1e38)]
        if not len(x):
            continue
        hyper = Hyper(lr=1.0, betas=(2.0**j, 0.5), eps=2**-24, dampening=(3 - 1 / a) / 2)
        shards = first_step(operators, torch.from_numpy(2 * x), torch.zeros(len(x)), hyper)
        found = (1 - shards.beta1_prod[0].double().numpy()) / 2.0**j
        exact = x.astype(np.float64) ** a
        worst = max(worst, np.max(np.abs(found - exact) / np.spacing(exact.astype(np.float32))))
    assert 0.5 < worst < 2.0  # measured: 1.7


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39])
def test_the_power_of_zero_and_of_subnormal_numbers_is_zero(operators: Operators, value: float) -> None:
    hyper = Hyper(lr=1.0, betas=(1.0, 0.0), eps=2**-24, dampening=0.5)
    shards = first_step(operators, torch.full((5,), value), torch.zeros(5), hyper)
    assert torch.equal(shards.beta1_prod[0], torch.full((5,), 1 - 2**-24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_low_precision_is_widened_exactly(operators: Operators, dtype: torch.dtype) -> None:
    """The new m is the gradient, with dampening 0, beta0 = 1 and m = 0."""
    gradient = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    shards = first_step(operators, torch.zeros(2**16), gradient, Hyper(lr=1.0, betas=(1.0, 0.5), dampening=0.0))
    assert torch.equal(shards.exp_avg[0].nan_to_num(nan=7.0), gradient.float().nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
def test_master_weights_are_rounded_to_the_nearest_number(operators: Operators, dtype: torch.dtype) -> None:
    """Ties of bfloat16 are rounded away from 0, those of float16 to even, as torch does."""
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32))
    exact = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    finite = exact[exact.isfinite()].numpy()
    ties = torch.from_numpy(finite + np.spacing(finite) * 2.0 ** np.arange(24)[:, None]).flatten()
    halves = torch.linspace(-70_000, 70_000, 2**17)
    subnormal = torch.linspace(-1e-4, 1e-4, 2**17)
    m = torch.cat([bits, exact, ties.float(), halves, subnormal])
    m = m[~m.isnan()]
    hyper = Hyper(lr=1.0, betas=(1.0, 0.5), eps=0.5, dampening=0.0)  # beta1 is 1/2, 1 - P is 1/2
    in_float32, in_dtype = (
        first_step(operators, torch.zeros_like(m), torch.zeros_like(m), hyper, torch.zeros_like(m, dtype=x), m.clone())
        for x in (torch.float32, dtype)
    )
    exact, rounded, remainder = in_float32.param[0], in_dtype.param[0], in_dtype.remainder[0]
    assert torch.equal(exact[m.abs() > 1e-37], -m[m.abs() > 1e-37])
    nearest = exact.to(dtype)
    is_tie = (exact.view(torch.int32) & 0xFFFF == 0x8000) & (dtype == torch.bfloat16)
    assert is_tie.any() == (dtype == torch.bfloat16)
    assert torch.equal(rounded[~is_tie], nearest[~is_tie])
    away = (exact[is_tie].view(torch.int32) + 0x8000).view(torch.float32)
    assert torch.equal(rounded[is_tie].float(), away)
    is_exact = torch.ones_like(is_tie)
    if dtype == torch.float16:
        is_exact = (exact.abs() >= 2.0**-16) & (exact.abs() < 65_520)
    assert torch.equal(join(rounded, remainder)[is_exact], exact[is_exact])


# -- torch integration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retired", [False, True], ids=["with products", "retired"])
@pytest.mark.parametrize("mode", [Mode(), MODES[-1]], ids=str)
def test_schemas_and_fake_implementations_pass_the_checks_of_torch(
    operators: Operators, mode: Mode, retired: bool
) -> None:
    del operators
    shards = make_shards([5, 7], CPU, **mode._asdict(), retired=retired)
    scalars = make_scalars(shards)
    ops = torch.ops.adai_dist
    kept = torch.zeros(2, 2, dtype=torch.float64)
    observed = (shards.grad, shards.param, shards.remainder, shards.exp_avg_sq, kept, scalars.coefficient, 0.1)
    torch.library.opcheck(ops.observe.default, observed)
    torch.library.opcheck(ops.sums.default, (shards.exp_avg_sq, kept))
    torch.library.opcheck(ops.advance.default, (*shards, *operator_order(scalars), kernel_scalars(Hyper(lr=1.0))))


def test_a_compiled_function_may_contain_the_operators(operators: Operators) -> None:
    hyper = Hyper(lr=1.0)

    def phases(shards: LocalTensors) -> tuple[Tensor, Tensor]:
        observed = kernel_cases.observe(operators, shards.grad, [])
        return observed, kernel_cases.step(operators, shards, hyper, make_scalars(shards))

    compiled, eager = make_shards(MIXED, CPU), make_shards(MIXED, CPU)
    found = torch.compile(phases, backend="aot_eager", fullgraph=True)(compiled)
    assert all(torch.equal(a, b) for a, b in zip(found, phases(eager), strict=True))
    kernel_cases.assert_same_bits(compiled, eager)


def test_written_tensors_have_a_new_version(operators: Operators) -> None:
    shards = make_shards([5], CPU, **MODES[-1]._asdict())
    before = [x[0]._version for x in shards]
    kernel_cases.step(operators, shards, Hyper(lr=1.0), make_scalars(shards))
    assert [x[0]._version - then for x, then in zip(shards, before, strict=True)] == [1, 0, 1, 1, 1, 1]


def test_the_kernels_declare_their_scalars_in_the_order_in_which_they_are_passed() -> None:
    text = (build.CSRC / "adai_math.h").read_text()
    assert tuple(re.findall(r"^  X\(\w+, (\w+)\)", text, re.MULTILINE)) == KERNEL_SCALARS


FLOAT32, LOW, MIXED8 = Mode(), Mode(state=torch.bfloat16), Mode(state=torch.uint8)
WITH_REMAINDER = Mode((torch.float16, torch.float16), torch.bfloat16, has_remainder=True)

BAD_TENSORS = {
    "float64": (FLOAT32, lambda s: {"param": [s.param[0].double()]}, "params must be float32, bfloat16 or float16"),
    "shape": (FLOAT32, lambda s: {"exp_avg": [s.exp_avg[0][:3]]}, "exp_avgs must have sizes and strides of params"),
    "number": (FLOAT32, lambda s: {"grad": s.grad * 2}, "grads must have as many tensors as params, 1, got 2"),
    "float16 state": (
        FLOAT32,
        lambda s: {"exp_avg_sq": [s.exp_avg_sq[0].half()]},
        "exp_avg_sqs must be float32 or bfloat16, got Half",
    ),
    "overlap": (FLOAT32, lambda s: {"param": [torch.zeros(1).expand(5)]}, "params must be dense without overlaps"),
    "mixed moments": (
        FLOAT32,
        lambda s: {"exp_avg_sq": [s.exp_avg_sq[0].bfloat16()]},
        "exp_avgs, exp_avg_sqs and beta1_prods must have one dtype, or be .*, got Float and BFloat16",
    ),
    "mixed products": (
        LOW,
        lambda s: {"beta1_prod": [s.beta1_prod[0].float()]},
        "exp_avgs, exp_avg_sqs and beta1_prods must have one dtype, or be .*, got BFloat16 and Float",
    ),
    "records without bfloat16": (
        MIXED8,
        lambda s: {"exp_avg": [s.exp_avg[0].float()]},
        "must have one dtype, or be bfloat16, uint8 and uint8, got Float and Byte",
    ),
    "products beside records": (
        MIXED8,
        lambda s: {"beta1_prod": [s.beta1_prod[0].bfloat16()]},
        "got BFloat16 and BFloat16",
    ),
    "number of records": (
        MIXED8,
        lambda s: {"exp_avg_sq": [s.exp_avg_sq[0][:0]]},
        "exp_avg_sqs of uint8 must be contiguous, with 34 bytes for 32 elements of params",
    ),
    "remainder of float32": (
        FLOAT32,
        lambda s: {"remainder": [torch.zeros(5, dtype=torch.int16)]},
        "remainders must be int16, of bfloat16 or float16 params, got Short of Float",
    ),
    "dtype of a remainder": (
        WITH_REMAINDER,
        lambda s: {"remainder": [s.remainder[0].int()]},
        "remainders must be int16, of bfloat16 or float16 params, got Int of Half",
    ),
    "shape of a remainder": (
        WITH_REMAINDER,
        lambda s: {"remainder": [s.remainder[0][:3]]},
        "remainders must have sizes and strides of params",
    ),
    "number of remainders": (
        WITH_REMAINDER,
        lambda s: {"remainder": s.remainder * 2},
        "remainders must have as many tensors as params, 1, or none, got 2",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_invalid_tensors_are_refused_before_anything_is_written(operators: Operators, name: str) -> None:
    mode, change, message = BAD_TENSORS[name]
    shards = make_shards([5], CPU, **mode._asdict())
    before = kernel_cases.copied(shards)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        kernel_cases.step(operators, shards._replace(**change(shards)), Hyper(lr=1.0), make_scalars(shards))
    kernel_cases.assert_same_bits(shards, before)


def test_remainders_of_float32_parameters_are_refused_by_observe(operators: Operators) -> None:
    shards = make_shards([5], CPU)
    with pytest.raises(TypeError, match="remainders must be int16, of bfloat16 or float16 params"):
        kernel_cases.observe(operators, shards.grad, shards.param, remainders=[torch.zeros(5, dtype=torch.int16)])
    with pytest.raises(ValueError, match="remainders must have as many tensors as params, 0, or none, got 1"):
        kernel_cases.observe(operators, shards.grad, [], remainders=[torch.zeros(5, dtype=torch.int16)])


BAD_ROUNDINGS = {
    "missing": (lambda r: None, "rounding must have 3 tensors for bfloat16 states, and for params in low precision"),
    "streams": (lambda r: r._replace(streams=r.streams.long()), "streams must be Int, got Long"),
    "origins": (lambda r: r._replace(origins=r.origins[:, :2]), "origins must be contiguous with 3 elements"),
    "settled": (lambda r: r._replace(settled=r.settled.double()), "settled must be Float, got Double"),
}


@pytest.mark.parametrize("mode", [LOW, Mode((torch.bfloat16, torch.float32))], ids=str)
@pytest.mark.parametrize("name", BAD_ROUNDINGS)
def test_invalid_inputs_of_the_rounding_are_refused(operators: Operators, name: str, mode: Mode) -> None:
    change, message = BAD_ROUNDINGS[name]
    shards = make_shards([5], CPU, **mode._asdict())
    before, scalars = kernel_cases.copied(shards), make_scalars(shards)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        kernel_cases.step(operators, shards, Hyper(lr=1.0), scalars._replace(rounding=change(scalars.rounding)))
    kernel_cases.assert_same_bits(shards, before)


@pytest.mark.parametrize("mode", [FLOAT32, Mode((torch.float16, torch.float32), has_remainder=True)], ids=str)
def test_a_step_that_rounds_nothing_stochastically_needs_no_inputs_for_it(operators: Operators, mode: Mode) -> None:
    shards = make_shards(MIXED, CPU, **mode._asdict())
    found, scalars = kernel_cases.copied(shards), make_scalars(shards)
    kernel_cases.step(operators, shards, Hyper(lr=1.0), scalars)
    kernel_cases.step(operators, found, Hyper(lr=1.0), scalars._replace(rounding=None))
    kernel_cases.assert_same_bits(found, shards)


# -- beyond 2^31 elements ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tensor_of_more_than_2_to_the_31_elements_is_read_to_its_end(operators: Operators) -> None:
    num_elements = 2**31 + 3
    gigabytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if gigabytes < 10:
        pytest.skip(f"needs 10 GB of free memory, got {gigabytes:.1f}")
    gradient = torch.zeros(num_elements, dtype=torch.bfloat16)
    gradient[0], gradient[2**31 - 1], gradient[-1] = 1.0, 2.0, 4.0
    assert kernel_cases.observe(operators, [gradient], [])[0, 0].item() == 21.0
    del gradient
    v = torch.zeros(num_elements)
    v[2**31], v[-1] = 0.25, 0.5
    assert kernel_cases.sums(operators, [v]).item() == 0.75
