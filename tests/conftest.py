"""Configuration of all tests: environment, marks and compilation."""

from __future__ import annotations

import os
import signal
import sysconfig
from importlib.util import find_spec

import pytest
import torch

from tests.operators import (
    COPY,
    CompilationError,
    compile_for_deepspeed,
    compile_kernels,
    copy_operators,
    remove_locks,
)

os.environ["TORCH_EXTENSIONS_DIR"] = str(COPY)
# One ninja for compilation, ranks and programs: another version would compile everything again.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

# A process that a script starts in the background ignores Ctrl-C, and its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Several test processes share the cores; more threads would only wait for each other.
torch.set_num_threads(1)

EXHAUSTIVE = ("configs", "faults", "launch")  # folders that only `make check` runs

# Limitations of older releases of torch: (fixed in, parts of test ids, reason).
FIXED_IN_TORCH = (
    (
        "2.9",
        (
            *("fsdp2", "hsdp", "test_recipe_runs", "test_recipe_engines", "test_pipelining", "test_expert_parallel"),
            *("test_late_parameters", "test_refusals", "test_documentation_of", "test_checkpoint", "test_kill"),
            *("tests/launch/", "tests/configs/", "test_recipe_images", "test_recipe_train"),
        ),
        "gloo sums gradients where FSDP2 requests their mean, or has no reduce_scatter",
    ),
    ("2.9", ("test_deepspeed",), "DeepSpeed needs gloo features that older releases lack, and is untested there"),
    ("2.10", ("tp-fsdp2",), "DTensor.full_tensor() misplaces rows of uneven strided shards"),
    ("2.10", ("low_precision_gradients", "test_odd_model"), "a gradient must have the dtype of its parameter"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for release, words, reason in FIXED_IN_TORCH:
            if torch.__version__ < release and any(word in item.nodeid for word in words):
                item.add_marker(pytest.mark.skip(reason=f"before torch {release}: {reason}"))
        compiles_long = any(mark.args for mark in item.iter_markers("deepspeed"))
        if item.path.parent.name in EXHAUSTIVE or compiles_long:
            item.add_marker(pytest.mark.exhaustive)
        if item.get_closest_marker("deepspeed") and find_spec("deepspeed") is None:
            item.add_marker(pytest.mark.skip(reason="DeepSpeed is not installed"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the kernels and operators that the tests load, before any test's timeout starts."""
    if not session.items or session.config.option.collectonly:
        return
    try:
        compile_kernels()
        if marks := [mark for item in session.items for mark in item.iter_markers("deepspeed")]:
            compile_for_deepspeed({"ShareMemComm", *(name for mark in marks for name in mark.args)})
        copy_operators()
    except CompilationError as error:
        pytest.exit(str(error), returncode=1)


@pytest.fixture(autouse=True)
def _no_lock_of_an_earlier_test() -> None:
    remove_locks()
