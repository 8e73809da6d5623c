"""Configuration of all tests: environment, marks and compilation."""

from __future__ import annotations

import os
import signal
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.operators import (
    COPY,
    CompilationError,
    compile_operators,
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


class Limitation(NamedTuple):
    """Tests that cannot run with some releases of a distribution."""

    distribution: str
    fixed_in: str
    words: tuple[str, ...]
    """Parts of the ids of the tests."""
    reason: str
    since: str = "0"


LIMITATIONS = (
    Limitation(
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
    Limitation(
        "torch",
        "2.9",
        ("test_deepspeed",),
        "DeepSpeed needs features of gloo that older releases lack",
    ),
    Limitation("torch", "2.10", ("tp-fsdp2",), "DTensor.full_tensor() misplaces rows of uneven strided shards"),
    Limitation(
        "torch",
        "2.10",
        ("low_precision_gradients", "test_odd_model"),
        "a gradient must have the dtype of its parameter",
    ),
    Limitation("deepspeed", "0.16.4", ("test_tensor_parallel_layers",), "there is no AutoTP in training"),
    Limitation(
        "deepspeed",
        "0.16.9",
        ("stage-3-not-contiguous", "refused_on_all_ranks[stage-0]", "loaded_without_its_states[stage-0]"),
        "engine.destroy() and load_module_only fail with any optimizer",
    ),
    Limitation(
        "deepspeed",
        "0.18.6",
        (
            *("refused[autocast-fp16]", "refused[zenflow", "refused[super-offload]", "refused[fp16-without-zero]"),
            *("with-sequence-parallelism", "test_sequence_parallelism"),
        ),
        "these settings are missing, or are supported",
    ),
    Limitation(
        "deepspeed",
        "0.18.6",
        (
            *("[1-stage-3-stage", "[2-stage-3-stage", "[4-stage-3-stage", "-bf16-stage-3-"),
            *("beta1_prod[stage-3]", "beta1_prod[bf16-stage-3]"),
        ),
        "several sub-groups of ZeRO 3 are not converted, which is refused",
    ),
    Limitation(
        "deepspeed",
        "0.18.6",
        ("makes_all_ranks_skip_the_step[stage-0-bf16",),
        "BF16_Optimizer is used without ZeRO, and fails for gradients that are not finite, with any optimizer",
    ),
    Limitation(
        "deepspeed",
        "0.18.6",
        ("with_no_sync", "with_backward_of_torch"),
        "engine.backward() and engine.step() must be called for every micro-batch",
    ),
    Limitation(
        "deepspeed",
        "0.18.9",
        ("sequential-gathers", "stage-3-checked", "oracle[leaf", "granularity", "overlap-stage", "preset-stage"),
        "these settings are missing, or fail with any optimizer",
    ),
    Limitation(
        "deepspeed",
        "0.19.0",
        ("bf16-optimizer",),
        "the gradients of BF16_Optimizer are not reduced, which is refused",
        since="0.18.6",
    ),
    Limitation(
        "deepspeed",
        "0.19.2",
        ("mixture_of_experts_follows_the_oracle[bf16-optimizer", "mixture_of_experts_follows_the_oracle[stage-0-bf16"),
        "BF16_Optimizer cannot have experts on a CPU",
    ),
    Limitation("deepspeed", "0.19.4", ("test_deepspeed_nvme", "nvme-buffers"), "the swapper fails, which is refused"),
    Limitation(
        "deepspeed", "0.19.7", ("nvme_follow_the_oracle[pipelined",), "the pipelined swapper fails with any optimizer"
    ),
    Limitation(
        "deepspeed",
        "0.19.7",
        ("parameter-alignment", "round-robin-aligned", "no-grad-norm"),
        "there is no parameter_alignment and no compute_grad_norm",
    ),
    Limitation(
        "deepspeed",
        "0.19.7",
        ("makes_all_ranks_skip_the_step[bf16-optimizer]",),
        "BF16_Optimizer fails for gradients that are not finite, with any optimizer",
    ),
    Limitation(
        "deepspeed",
        "0.19.8",
        ("stage-2-not-contiguous", "test_deepspeed_classified_keys"),
        "gradients that are not contiguous are not reduced on a CPU, and other settings have other names",
    ),
    Limitation(
        "deepspeed",
        "0.19.8",
        (
            *("hybrid-engine", "with_a_single_step", "with_coalesced_reduction", "test_summed_gradients"),
            *("partitions_follow_the_oracle[uneven", "oracle[autoep", "refused[autoep-autotp", "vocabulary-stage"),
            "two_stages_on_each_rank",
        ),
        "these settings are missing, or fail with any optimizer",
    ),
    Limitation("transformers", "5.0", ("in_one_line[indivisible]",), "num_attention_heads need not divide hidden_size"),
    Limitation(
        "accelerate",
        "1.6",
        (
            *("environment_of_the_ranks[fsdp", "environment_of_the_ranks[multi_node", "key_is_detected[fsdp_config"),
            "test_every_variable_of_fsdp_is_read",
        ),
        "there is no FSDP2, and fsdp_version is ignored",
    ),
    Limitation(
        "accelerate", "1.7", ("test_two_machines_with_fsdp2",), "FSDP2 wraps only models that have _no_split_modules"
    ),
    Limitation(
        "accelerate",
        "1.9",
        ("test_launched_by_accelerate.py::test_deepspeed",),
        "Accelerator() under DeepSpeed refuses an earlier PartialState(), with which this test selects gloo",
    ),
    Limitation(
        "accelerate",
        "1.10",
        ("unknown_key[hsdp]", "environment_of_the_ranks[hsdp]", "is_read[hsdp]", "key_is_detected[parallelism_config"),
        "there is no parallelism_config",
    ),
)


def _is_before(distribution: str, release: str) -> bool:
    return find_spec(distribution) is not None and TorchVersion(version(distribution)) < release


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    limitations = [
        (one.words, f"before {one.distribution} {one.fixed_in}: {one.reason}")
        for one in LIMITATIONS
        if _is_before(one.distribution, one.fixed_in) and not _is_before(one.distribution, one.since)
    ]
    for item in items:
        for words, reason in limitations:
            if any(word in item.nodeid for word in words):
                item.add_marker(pytest.mark.skip(reason=reason))
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
        items = [item for item in session.items if item.get_closest_marker("skip") is None]
        marks = [mark for item in items for mark in item.iter_markers("deepspeed")]
        compile_operators({"ShareMemComm", *(name for mark in marks for name in mark.args)} if marks else set())
        copy_operators()
    except CompilationError as error:
        pytest.exit(str(error), returncode=1)


@pytest.fixture(autouse=True)
def _no_lock_of_an_earlier_test() -> None:
    remove_locks()
