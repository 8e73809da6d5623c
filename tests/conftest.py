"""What holds for all tests."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

# Where several test processes share the cores, more threads wait for each other.
torch.set_num_threads(1)

# What older releases of torch cannot do: (fixed in, words in the name of a test, reason).
FIXED_IN_TORCH = (
    (
        "2.9",
        (
            *("fsdp2", "hsdp", "test_recipe_runs", "test_recipe_engines", "test_pipelining", "test_expert_parallel"),
            *("test_late_parameters", "test_refusals", "test_documentation_of", "test_checkpoint", "test_kill"),
            *("tests/launch/", "tests/configs/", "test_recipe_images"),
        ),
        "gloo adds gradients up where FSDP2 asks for their mean, or has no reduce_scatter at all",
    ),
    ("2.9", ("test_deepspeed",), "DeepSpeed needs more of gloo than older releases have, and was not tried there"),
    ("2.10", ("tp-fsdp2",), "DTensor.full_tensor() misplaces rows of uneven strided shards"),
    ("2.10", ("low_precision_gradients", "test_odd_model"), "a gradient must have the dtype of its parameter"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for release, words, reason in FIXED_IN_TORCH:
            if torch.__version__ < release and any(word in item.nodeid for word in words):
                item.add_marker(pytest.mark.skip(reason=f"before torch {release}: {reason}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the kernels once, before any test's time runs. Without a compiler, tests that need them say so."""
    is_worker = hasattr(session.config, "workerinput")
    if session.items and not is_worker and not session.config.option.collectonly:
        subprocess.run(
            [sys.executable, "-m", "adai_dist", "build", "--device", "cpu"], capture_output=True, check=False
        )
