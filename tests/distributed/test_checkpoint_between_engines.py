"""Checkpoints that move from engine to engine, and all of torch's ways to read and restore a state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullOptimStateDictConfig, ShardedOptimStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from tests.distributed.checkpoint_layouts import PROBLEM, PROBLEMS, SAVED_AFTER, Training, assert_same_bits
from tests.distributed.layouts import Walk
from tests.problems import worst_relative_error
from tests.spawn import run_ranks

pytestmark = pytest.mark.distributed

ENGINES = ("ddp", "fsdp2", "fsdp1-orig", "fsdp1-flat")


@cache
def oracle() -> Any:
    return PROBLEM.solve()[0]


# -- from engine to engine ---------------------------------------------------------------------------------------------

CHAIN = ("fsdp2", "ddp", "fsdp1-orig", "plain", "fsdp1-flat", "fsdp2")


def wander(folder: str) -> Walk:
    """Take two steps in every engine; `plain` is a single process, while the other rank waits."""
    for index, layout in enumerate(CHAIN):
        alone = layout == "plain"
        if not alone or dist.get_rank() == 0:
            training = Training(layout, PROBLEM)
            if index:
                training.corrupt()
                training.load(f"{folder}/{index - 1}", alone)
            training.train(2 * index, min(2 * index + 2, PROBLEM.steps))
            training.save(f"{folder}/{index}", alone)
        dist.barrier()
    return training.seen()


def test_a_checkpoint_moves_through_all_engines(tmp_path: Any) -> None:
    assert 2 * len(CHAIN) >= PROBLEM.steps + 2, "the last engine only loads"
    for walk in run_ranks(wander, 2, str(tmp_path)):
        error = worst_relative_error(walk.parameters, oracle(), PROBLEM)
        print(f"{error:.1e}")
        assert error < 1e-13  # measured: 1.4e-15


# -- torch's ways to read and restore a state --------------------------------------------------------------------------

Carry = Callable[[Training, Training], None]
"""Copy the state from one training to another of the same layout."""


def through_options(load: dict[str, Any] | None = None, **options: Any) -> Carry:
    def carry(old: Training, new: Training) -> None:
        taken = get_state_dict(old.wrapped, old.optimizer, options=StateDictOptions(**options))
        model_state, optimizer_state = copy.deepcopy(taken)  # otherwise both would share the same tensors
        # Not set_state_dict(): given an empty dict on the other ranks, it skips the model there, and they hang.
        load_options = StateDictOptions(**options, **(load or {}))
        set_model_state_dict(new.wrapped, model_state, options=load_options)
        set_optimizer_state_dict(new.wrapped, new.optimizer, optimizer_state, options=load_options)

    return carry


def through_a_file(old: Training, new: Training) -> None:
    """Save and load on each rank, with torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    model_state = old.wrapped.state_dict()
    torch.save(copy.deepcopy({"model": model_state, "optimizer": old.optimizer.state_dict()}), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    new.wrapped.load_state_dict(loaded["model"])
    new.optimizer.load_state_dict(loaded["optimizer"])


def through_fsdp1(kind: StateDictType, config: Any) -> Carry:
    def carry(old: Training, new: Training) -> None:
        if not isinstance(old.wrapped, FSDP) or not isinstance(new.wrapped, FSDP):
            return through_a_file(old, new)
        with FSDP.state_dict_type(old.wrapped, kind, optim_state_dict_config=config):
            saved = FSDP.optim_state_dict(old.wrapped, old.optimizer)
        with FSDP.state_dict_type(new.wrapped, kind, optim_state_dict_config=config):
            loaded = FSDP.optim_state_dict_to_load(new.wrapped, new.optimizer, saved)
        new.optimizer.load_state_dict(copy.deepcopy(loaded))
        new.wrapped.load_state_dict(old.wrapped.state_dict())
        return None

    return carry


WAYS: dict[str, tuple[Carry, tuple[str, ...]]] = {
    "sharded": (through_options(), ENGINES),
    "flattened": (through_options(flatten_optimizer_state_dict=True), ENGINES),
    "full": (through_options(full_state_dict=True), ENGINES),
    # In the other layouts torch 2.13 raises KeyError 'param_groups.0.params.0', with Adam too.
    "flattened and full": (
        through_options(full_state_dict=True, flatten_optimizer_state_dict=True),
        ("fsdp1-orig", "fsdp1-flat"),
    ),
    # Not with FSDP1: on the CPU torch 2.13 returns the same tensor for all states of a parameter.
    "full on the main rank": (
        through_options(full_state_dict=True, cpu_offload=True, load={"broadcast_from_rank0": True}),
        ("ddp", "fsdp2"),
    ),
    "offloaded": (through_options(cpu_offload=True), ("ddp", "fsdp2", "fsdp1-flat")),
    "torch.save": (through_a_file, ENGINES),
    "FSDP.optim_state_dict, full": (
        through_fsdp1(StateDictType.FULL_STATE_DICT, FullOptimStateDictConfig(offload_to_cpu=False)),
        ("fsdp1-orig", "fsdp1-flat"),
    ),
    "FSDP.optim_state_dict, sharded": (
        through_fsdp1(StateDictType.SHARDED_STATE_DICT, ShardedOptimStateDictConfig(offload_to_cpu=False)),
        ("fsdp1-orig", "fsdp1-flat"),
    ),
}


def carried(way: str) -> list[tuple[str, Walk, Walk]]:
    """Return, by engine and dtype, the results of a training and of one that was restored from it."""
    carry, engines = WAYS[way]
    walks: list[tuple[str, Walk, Walk]] = []
    for layout in engines:
        for dtype, problem in PROBLEMS.items():
            old, new = Training(layout, problem), Training(layout, problem)
            old.train(0, SAVED_AFTER)
            new.corrupt()
            carry(old, new)
            wide = torch.float64 if dtype == "float64" else torch.float32
            assert new.state_dtypes() == {wide}, f"{layout}: {new.state_dtypes()}"
            for training in (old, new):
                training.train(SAVED_AFTER, problem.steps)
            walks.append((f"{layout} {dtype}", old.seen(), new.seen()))
    return walks


def carry_in_all_ways() -> dict[str, list[tuple[str, Walk, Walk]]]:
    return {way: carried(way) for way in WAYS}


def test_every_way_of_torch_restores_the_state_bitwise() -> None:
    for ways in run_ranks(carry_in_all_ways, 2):
        assert ways.keys() == WAYS.keys()
        for way, walks in ways.items():
            for where, old, new in walks:
                print(way, where)  # shown if the next line fails
                assert_same_bits(old, new)
