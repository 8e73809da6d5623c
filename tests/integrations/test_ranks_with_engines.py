"""Ranks of the tests in this folder are forked from a process that has imported the engines."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed


def modules_at_start() -> set[str]:
    return set(sys.modules)


def test_a_rank_starts_with_the_engines_that_are_installed() -> None:
    (loaded,) = run_ranks(modules_at_start, 1)
    installed = {name for name in ("accelerate", "deepspeed", "transformers") if find_spec(name) is not None}
    assert installed <= loaded
    assert "tests.integrations.deepspeed_engines" in loaded
