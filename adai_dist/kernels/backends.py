"""The backends that carry out the two local phases of a step, and the choice among them.

In order of preference: the compiled kernels of the device; the equations under ``torch.compile``, on CUDA where the
kernels cannot be built; the equations run operation by operation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from adai_dist import storage
from adai_dist.equations import LocalTensors, SquaredNorms, StepScalars
from adai_dist.hyper import Hyper
from adai_dist.kernels import build, foreach, ops, toolchain

logger: logging.Logger = logging.getLogger("adai_dist")

Mode = Literal["auto", "off", "require"]
MODES: tuple[Mode, ...] = get_args(Mode)
ENVIRONMENT_VARIABLE = "ADAI_DIST_KERNELS"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


@dataclass(frozen=True, eq=False)
class Backend:
    """The functions that carry out the local phases on lists of tensors; all results stay on the device.

    Collective: none.
    """

    name: str
    takes: Callable[[Sequence[Tensor]], bool]
    """Whether the backend can step a shard, given as parameter, gradient and states, or as some of them."""
    observe: Callable[[LocalTensors, Hyper, Tensor, Tensor], tuple[SquaredNorms, Tensor]]
    """:func:`adai_dist.equations.observe` and the current sum of each exp_avg_sq. The last argument, ``kept``, is the
    result of ``advance``, or :func:`nothing_kept`; float64, shape (shards, 2)."""
    advance: Callable[[LocalTensors, Hyper, StepScalars], Tensor | None]
    """:func:`adai_dist.equations.advance`. Returns ``kept``, which may save the next ``observe`` a read, or None."""
    sums: Callable[[list[Tensor], Tensor], Tensor]
    """The sum of each exp_avg_sq, float64, with the bits of the sum in ``observe``; the last argument is ``kept``."""


def nothing_kept(exp_avg_sqs: Sequence[Tensor]) -> Tensor:
    """Return the ``kept`` that makes a backend read every tensor: NaN, float64, shape (number of tensors, 2)."""
    device = exp_avg_sqs[0].device if exp_avg_sqs else None
    return torch.full((len(exp_avg_sqs), 2), torch.nan, dtype=torch.float64, device=device)


def _fits_kernels(shard: Sequence[Tensor]) -> bool:
    if any(tensor.dtype not in KERNEL_DTYPES for tensor in shard):
        return False
    if all(tensor.is_contiguous() for tensor in shard):
        return True
    param = shard[0]
    return all(x.stride() == param.stride() for x in shard) and torch.ops.aten.is_non_overlapping_and_dense(param)


def _fits_equations(shard: Sequence[Tensor]) -> bool:
    del shard
    return True


EQUATIONS = Backend(
    "the equations (foreach)",
    _fits_equations,
    foreach.observe_in_pieces,
    foreach.advance_in_pieces,
    foreach.sums_in_pieces,
)


def compiled_equations() -> Backend:
    """Return the equations under ``torch.compile``, which fuses their operations.

    The first step of every list of shapes compiles, which takes a while.
    """
    compiled = torch.compile(storage.advance, dynamic=False)
    return replace(EQUATIONS, name="the equations (torch.compile)", advance=compiled)


def compiled_kernels(library: str) -> Backend:
    """Return the compiled kernels, once loaded: one read for ``observe``, one pass for ``advance``."""
    return Backend(f"compiled kernels ({library})", _fits_kernels, ops.observe, ops.advance, ops.sums)


class Backends:
    """The backends of an optimizer: one per device type, chosen at the first step of a shard there."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self._of_device: dict[str, Backend] = {}

    def of(self, shard: Sequence[Tensor]) -> Backend:
        """Return the backend for a shard, given as parameter, gradient and states.

        Raises:
            RuntimeError: kernels are required and cannot be built.
            ValueError: kernels are required and cannot step this shard.
        """
        device_type = shard[0].device.type
        backend = self._of_device.get(device_type)
        if backend is None:
            backend = self._of_device[device_type] = choose(device_type, self.mode)
        if backend.takes(shard):
            return backend
        if self.mode == "require":
            got = ", ".join(f"{tensor.dtype} with strides {tensor.stride()}" for tensor in shard)
            raise ValueError(
                "tensors must be float32, bfloat16 or float16, dense and of equal strides for the compiled kernels, "
                f"which are required; got {got}; convert them, or do not require kernels"
            )
        return EQUATIONS

    def __reduce__(self) -> tuple[type[Backends], tuple[Mode]]:
        """Copy the mode alone: a copy chooses its own backends."""
        return Backends, (self.mode,)

    def __str__(self) -> str:
        if not self._of_device:
            return "chosen in the first step"
        return ", ".join(f"{device_type}: {backend.name}" for device_type, backend in self._of_device.items())


def mode_of(require_kernels: bool) -> Mode:
    """Return the mode that the environment and the argument ``require_kernels`` select.

    Raises:
        ValueError: the environment variable is none of auto, off, require, or contradicts the argument.
        TypeError: ``require_kernels`` is not a bool.
    """
    if not isinstance(require_kernels, bool):
        raise TypeError(f"require_kernels must be a bool, got {require_kernels!r}")
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
    if value not in MODES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(MODES)}, got {value!r}")
    if require_kernels and value == "off":
        raise ValueError(
            f"require_kernels=True must not be combined with {ENVIRONMENT_VARIABLE}=off in the environment, got both; "
            "remove one of them"
        )
    return "require" if require_kernels else MODES[MODES.index(value)]


def choose(device_type: str, mode: Mode) -> Backend:
    """Return the best backend that this machine has for a device type; may compile kernels, which takes a minute.

    Raises:
        RuntimeError: kernels are required and cannot be built.
    """
    extension = build.EXTENSIONS.get(device_type)
    if mode == "off" or (extension is None and mode == "auto"):
        return EQUATIONS
    if extension is None:
        raise RuntimeError(
            f"the device must have compiled kernels, which are required; got {device_type!r}; kernels exist for "
            f"{', '.join(build.EXTENSIONS)}"
        )
    try:
        build.load(extension)
    except build.BuildError as error:
        if mode == "require":
            raise RuntimeError(f"compiled kernels are required, but not available: {error}") from error
        # Triton compiles its launchers with the host's compiler.
        can_fuse = device_type == "cuda" and find_spec("triton") and toolchain.cxx_path()
        fallback = compiled_equations() if can_fuse else EQUATIONS
        _log_once(logging.WARNING, f"no compiled kernels for {device_type}, stepping with {fallback.name}: {error}")
        return fallback
    capability = f", {torch.backends.cpu.get_cpu_capability()}" if device_type == "cpu" else ""
    backend = compiled_kernels(f"{extension.name}{capability}")
    _log_once(logging.INFO, f"stepping {device_type} tensors with {backend.name}")
    return backend


_logged: set[str] = set()


def _log_once(level: int, message: str) -> None:
    """Log a message once per process and from one process per machine: all of them can build the same kernels."""
    if message not in _logged and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.log(level, message)
    _logged.add(message)
