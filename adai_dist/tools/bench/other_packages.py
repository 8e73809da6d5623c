"""Benchmark cases of other packages, where these are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

from adai_dist.tools.bench.cases import LR, Case, Model, adam_case, bytes_of_states
from adai_dist.tools.bench.traffic import TWO_PASSES


def other_cases(model: Model) -> tuple[list[Case], list[str]]:
    """Return the cases of installed packages, and a line of text for each case that is missing."""
    makers: dict[str, Callable[[Model], list[Case]]] = {
        "DeepSpeed FusedAdam" if model.device.type == "cuda" else "DeepSpeed CPUAdam": _deepspeed,
        "pytorch_optimizer Adai": _pytorch_optimizer,
    }
    found = [_try(name, make, model) for name, make in makers.items()]
    return [case for cases, _ in found for case in cases], [line for _, line in found if line]


def _try(name: str, make: Callable[[Model], list[Case]], model: Model) -> tuple[list[Case], str]:
    try:
        return make(model.copy()), ""
    except ModuleNotFoundError as error:
        return [], f"not installed: {name} (package {error.name})"
    except Exception as error:  # such as a missing compiler, which must not end the benchmark
        return [], f"not measured: {name} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def _deepspeed(model: Model) -> list[Case]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    # FusedAdam keeps states in the dtype of the parameters, CPUAdam in float32.
    if model.device.type == "cuda":
        name, optimizer, state_dtype = "DeepSpeed FusedAdam", FusedAdam(model.params, lr=LR), model.dtype
    else:
        name, optimizer, state_dtype = "DeepSpeed CPUAdam", DeepSpeedCPUAdam(model.params, lr=LR), torch.float32
    optimizer.step()
    case = partial(adam_case, model=model, optimizer=optimizer, state_dtype=state_dtype, package="deepspeed")
    return [case(name), case(f"{name}, clipped", is_clipped=True)]


def _pytorch_optimizer(model: Model) -> list[Case]:
    optimizer = import_module("pytorch_optimizer").Adai(model.params, lr=LR)
    optimizer.step()
    num_bytes, state_bytes = model.num_bytes(TWO_PASSES, model.dtype.itemsize), bytes_of_states(optimizer)
    return [Case("pytorch_optimizer Adai", "pytorch_optimizer", optimizer.step, num_bytes, state_bytes)]
