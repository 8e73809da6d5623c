"""Configuration of all tests: environment, marks and compilation."""

from __future__ import annotations

import os
import signal
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from torch.torch_version import TorchVersion

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

# Limitations of older releases: (distribution, fixed in, parts of test ids, reason).
FIXED_IN = (
    (
        "torch",
        "2.9",
        (
            *("fsdp2", "hsdp", "test_recipe_runs", "test_recipe_engines", "test_pipelining", "test_expert_parallel"),
            *("test_late_parameters", "test_refusals", "test_documentation_of", "test_checkpoint", "test_kill"),
            *("tests/launch/", "tests/configs/", "test_recipe_images", "test_recipe_train"),
            "test_without_arguments_the_sharding_is_read",
        ),
        "FSDP2 does not run on a CPU, or gloo sums gradients where it requests their mean, or has no reduce_scatter",
    ),
    (
        "torch",
        "2.9",
        ("test_deepspeed",),
        "DeepSpeed needs gloo features that older releases lack, and is untested there",
    ),
    ("torch", "2.10", ("tp-fsdp2",), "DTensor.full_tensor() misplaces rows of uneven strided shards"),
    ("torch", "2.10", ("low_precision_gradients", "test_odd_model"), "a gradient must have the dtype of its parameter"),
    ("deepspeed", "0.16.4", ("test_tensor_parallel_layers", "autotp"), "there is no tensor_parallel"),
    (
        "deepspeed",
        "0.16.9",
        ("stage-3-not-contiguous", "refused_on_all_ranks[stage-0]", "loaded_without_its_states[stage-0]"),
        "engine.destroy() and load_module_only fail with any optimizer",
    ),
    ("deepspeed", "0.17.2", ("refused[autocast-fp16]",), "there is no torch_autocast"),
    ("deepspeed", "0.17.5", ("refused[zenflow",), "there is no ZenFlow"),
    ("deepspeed", "0.18.0", ("refused[super-offload]",), "there is no SuperOffload"),
    ("deepspeed", "0.18.3", ("refused[fp16-without-zero]",), "the gradients are those of the scaled loss"),
    (
        "deepspeed",
        "0.19.2",
        ("mixture_of_experts_follows_the_oracle[bf16-optimizer", "mixture_of_experts_follows_the_oracle[stage-0-bf16"),
        "BF16_Optimizer cannot have experts on a CPU",
    ),
    (
        "deepspeed",
        "0.19.7",
        ("parameter-alignment", "round-robin-aligned", "no-grad-norm"),
        "there is no parameter_alignment and no compute_grad_norm",
    ),
    (
        "deepspeed",
        "0.19.8",
        ("stage-2-not-contiguous", "test_deepspeed_classified_keys", "test_deepspeed_settings", "_model_settings"),
        "gradients that are not contiguous are not reduced on a CPU, and other settings have other names",
    ),
    (
        "accelerate",
        "1.6",
        (
            *("environment_of_the_ranks[fsdp", "environment_of_the_ranks[multi_node", "key_is_detected[fsdp_config"),
            *("test_every_variable_of_fsdp_is_read", "test_two_machines_with_fsdp2"),
        ),
        "there is no FSDP2, and fsdp_version is ignored",
    ),
    (
        "accelerate",
        "1.9",
        ("test_launched_by_accelerate.py::test_deepspeed",),
        "Accelerator() under DeepSpeed refuses an earlier PartialState(), with which this test selects gloo",
    ),
    (
        "accelerate",
        "1.10",
        ("unknown_key[hsdp]", "environment_of_the_ranks[hsdp]", "is_read[hsdp]", "key_is_detected[parallelism_config"),
        "there is no parallelism_config",
    ),
)


# DeepSpeed 0.18.3 to 0.18.9 does not reduce the gradients of BF16_Optimizer, which is refused.
REFUSED_WITH_BF16_OPTIMIZER = ("0.18.3", "0.19.0")


def _is_before(distribution: str, release: str) -> bool:
    return find_spec(distribution) is not None and TorchVersion(version(distribution)) < release


def _is_between(distribution: str, first: str, end: str) -> bool:
    return _is_before(distribution, end) and not _is_before(distribution, first)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limitations = [
        (words, f"before {distribution} {release}: {reason}")
        for distribution, release, words, reason in FIXED_IN
        if _is_before(distribution, release)
    ]
    for item in items:
        for words, reason in limitations:
            if any(word in item.nodeid for word in words):
                item.add_marker(pytest.mark.skip(reason=reason))
        if "bf16-optimizer" in item.nodeid and _is_between("deepspeed", *REFUSED_WITH_BF16_OPTIMIZER):
            item.add_marker(pytest.mark.skip(reason="this release does not reduce the gradients of BF16_Optimizer"))
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
