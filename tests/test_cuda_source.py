"""The CUDA sources without a GPU: they compile for all architectures and give exact results when run on the CPU."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adai_dist.equations import LocalTensors
from adai_dist.hyper import Hyper
from adai_dist.kernels import build
from tests import emulated_cuda, kernel_cases
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
    make_shards,
    turned,
)

pytestmark = pytest.mark.exhaustive

CSRC = build.CSRC
NVCC = shutil.which("nvcc")

# -- compilation -------------------------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@dataclass
class Target:
    architecture: str
    code: str


TARGETS = [
    pytest.param(Target("compute_80", "sm_80"), id="sm_80", marks=pytest.mark.slow),
    pytest.param(Target("compute_90", "sm_90"), id="sm_90"),
    pytest.param(Target("compute_100", "sm_100"), id="sm_100", marks=pytest.mark.slow),
    pytest.param(Target("compute_90", "compute_90"), id="PTX", marks=pytest.mark.slow),
]


@needs_nvcc
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_compile_without_warnings_and_spill_no_registers(target: Target, tmp_path: Path) -> None:
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout
    if target.architecture not in known:
        pytest.skip(f"this nvcc does not know {target.architecture}")
    command = [str(NVCC), "-std=c++17", *build.CUDA.nvcc_flags, "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += ["-Xcompiler", "-Wall,-Wextra,-Werror", f"-gencode=arch={target.architecture},code={target.code}"]
    command += ["-c", str(CSRC / "adai_cuda.cu"), "-o", str(tmp_path / "adai_cuda.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if target.code.startswith("sm_"):
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert len(spills) > 100
        assert set(spills) == {("0", "0", "0")}


# -- the same sources on the CPU ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if emulated_cuda.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return emulated_cuda.build(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(params=["ascending", "descending"])
def operators(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[Operators]:
    """Run the threads of a block in ascending and in descending order, so that a race shows as a different result."""
    library.set_descending(ctypes.c_bool(request.param == "descending"))
    yield emulated_cuda.operators(library)
    library.set_descending(ctypes.c_bool(False))


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
    kernel_cases.check_advance(operators, shards, Hyper(lr=1.0, **OPTIONS["l2"]))
    kernel_cases.check_observe(operators, shards)


@pytest.mark.parametrize("mode", MODES[::2], ids=str)
def test_alignment_changes_no_bit(operators: Operators, mode: Mode) -> None:
    kernel_cases.check_alignment(operators, Hyper(lr=1.0, **OPTIONS["dampening 0.4, l2"]), mode)


@pytest.mark.parametrize("is_finite", [True, False], ids=["finite", "non-finite"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_step_that_does_not_count_leaves_the_states(operators: Operators, mode: Mode, is_finite: bool) -> None:
    kernel_cases.check_step_that_does_not_count(operators, mode, is_finite=is_finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_non_finite_gradient_shows_in_its_sum(operators: Operators, value: float, dtype: torch.dtype) -> None:
    kernel_cases.check_non_finite(operators, value, dtype)


@pytest.mark.parametrize("retired", [False, True], ids=["with products", "retired"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_elements_have_the_bits_of_the_cpu_kernels(library: ctypes.CDLL, mode: Mode, retired: bool) -> None:
    build.load(build.CPU)
    for number, options in enumerate(OPTIONS.values()):
        hyper = Hyper(lr=1.0, **options)
        shards = make_shards(MIXED, torch.device("cpu"), **mode._asdict(), retired=retired)
        kernel_cases.check_same_as_cpu(emulated_cuda.operators(library), shards, hyper, turned(number))


@pytest.mark.parametrize("mode", LOW_MODES, ids=str)
def test_numbers_are_rounded_as_specified(operators: Operators, mode: Mode) -> None:
    for number, options in enumerate(OPTIONS.values()):
        kernel_cases.check_rounding(operators, mode, Hyper(lr=1.0, **options), turned(number))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.has_remainder], ids=str)
def test_master_weights_are_stepped_as_parameters_in_float32(operators: Operators, mode: Mode) -> None:
    for options in OPTIONS.values():
        kernel_cases.check_master_weights(operators, mode, Hyper(lr=1.0, **options))


# -- the torch binding on the CPU --------------------------------------------------------------------------------------


def run_binding(folder: Path) -> None:
    emulated_cuda.build_binding(folder)
    operators = kernel_cases.torch_operators("cpu")
    for mode in MODES:
        shards = make_shards(MIXED, operators.device, **mode._asdict())
        kernel_cases.check_observe(operators, shards)
        kernel_cases.check_advance(operators, shards, Hyper(lr=1.0, **OPTIONS["l2"]))
        kernel_cases.check_step_that_does_not_count(operators, mode, is_finite=True)
    for retired in (False, True):
        sizes = SIZES["with nothing between"]
        shards = make_shards(sizes, operators.device, **MODES[-1]._asdict(), retired=retired)
        kernel_cases.check_sums(operators, shards)
        before = versions(shards)
        kernel_cases.step(operators, shards, Hyper(lr=1.0), kernel_cases.make_scalars(shards))
        for name, then, now in zip(LocalTensors._fields, before, versions(shards), strict=True):
            assert now == [version + (name != "grad") for version in then]


def versions(shards: LocalTensors) -> list[list[int]]:
    return [[x._version for x in tensors] for tensors in shards]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(emulated_cuda.compiler() is None, reason="needs a C++ compiler")
def test_the_torch_binding_hands_over_the_lists_and_counts_what_was_written(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # has no kernels of the CPU
        pool.submit(run_binding, tmp_path).result()


# -- launches ----------------------------------------------------------------------------------------------------------

PLANS = {
    "small": [0, 1, 7, 2**16 + 1],
    "beyond 2^31": [2**31 + 3, 5, 2**33, 0, 2**31],
    "thousands": [(7919 * i) % 100_000 for i in range(5000)],
    "nothing": [0, 0, 0],
    "one": [2**15],
}
LIMITS = {"as built": (0, 2**23), "few tensors": (3, 2**23), "few chunks": (0, 1000), "few of both": (2, 7)}


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("name", PLANS)
def test_blocks_cover_every_element_once_and_in_order(library: ctypes.CDLL, name: str, limits: str) -> None:
    sizes = PLANS[name]
    chunks = emulated_cuda.chunks(library, sizes, *LIMITS[limits])
    tensor, offset, count = chunks.unbind(1)
    assert len(chunks) == sum(-(-size // 2**15) for size in sizes)
    assert (count > 0).all()
    first = torch.tensor([0, *sizes]).cumsum(0)  # where each tensor begins if all lie one behind the other
    begin = first[tensor] + offset
    assert torch.equal(begin, torch.tensor([0, *count.tolist()]).cumsum(0)[:-1])
    assert (offset + count <= torch.tensor(sizes)[tensor]).all()
    assert count.sum() == sum(sizes)
