"""What carries out the two local phases of a step, and which of it is chosen where.

In this order: the compiled kernels of the device; ``torch.compile`` of the equations on CUDA, where the kernels cannot
be built; the equations as they stand.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from adai_dist.equations import LocalTensors, SquaredNorms, StepScalars
from adai_dist.hyper import Hyper
from adai_dist.kernels import build, ops, toolchain
from adai_dist.kernels.foreach import CompiledEquations, Equations

logger: logging.Logger = logging.getLogger("adai_dist")

Mode = Literal["auto", "off", "require"]
MODES: tuple[Mode, ...] = get_args(Mode)
ENVIRONMENT_VARIABLE = "ADAI_DIST_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(Protocol):
    """Carries out the local phases on lists of tensors; all results stay on the device.

    Collective: none.
    """

    name: str

    def takes(self, shard: Sequence[Tensor]) -> bool:
        """Whether it can step a shard, given as parameter, gradient and states, or as some of them."""
        ...

    def observe(self, shards: LocalTensors, hyper: Hyper, c: Tensor, kept: Tensor) -> tuple[SquaredNorms, Tensor]:
        """:func:`adai_dist.equations.observe`, and the sum of each exp_avg_sq as it stands, whoever has written to it.

        Args:
            kept: what ``advance`` returned, or NaN where there is nothing to go by; float64, shape (shards, 2).
        """
        ...

    def advance(self, shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> Tensor | None:
        """:func:`adai_dist.equations.advance`. Returns: what may save the next ``observe`` a read, see there."""
        ...

    def sums(self, exp_avg_sqs: list[Tensor], kept: Tensor) -> Tensor:
        """The sum of each tensor, float64, to the bit what ``observe`` finds; ``kept`` as there."""
        ...


def nothing_kept(exp_avg_sqs: Sequence[Tensor]) -> Tensor:
    """Where there is nothing to go by: NaN, float64, shape (number of tensors, 2)."""
    device = exp_avg_sqs[0].device if exp_avg_sqs else None
    return torch.full((len(exp_avg_sqs), 2), torch.nan, dtype=torch.float64, device=device)


class Kernels:
    """The compiled kernels: one read for ``observe``, one pass for ``advance``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def observe(self, shards: LocalTensors, hyper: Hyper, c: Tensor, kept: Tensor) -> tuple[SquaredNorms, Tensor]:
        return ops.observe(shards, hyper, c, kept)

    def advance(self, shards: LocalTensors, hyper: Hyper, scalars: StepScalars) -> Tensor:
        return ops.advance(shards, hyper, scalars)

    def sums(self, exp_avg_sqs: list[Tensor], kept: Tensor) -> Tensor:
        return ops.sums(exp_avg_sqs, kept)

    def takes(self, shard: Sequence[Tensor]) -> bool:
        # States are float32 where parameters are no wider, see state.py.
        if any(tensor.dtype not in DTYPES for tensor in shard):
            return False
        if all(tensor.is_contiguous() for tensor in shard):
            return True
        param = shard[0]
        return all(x.stride() == param.stride() for x in shard) and torch.ops.aten.is_non_overlapping_and_dense(param)


class Backends:
    """The backends of an optimizer: one per type of device, chosen when it first has to step something there."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self._equations = Equations()
        self._of_device: dict[str, Backend] = {}

    def of(self, shard: Sequence[Tensor]) -> Backend:
        """The backend for a shard, given as parameter, gradient and states.

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
                "compiled kernels, which are required, step float32, bfloat16 and float16 tensors that are dense and "
                f"laid out alike, got {got}; convert them, or do not require kernels"
            )
        return self._equations

    def __reduce__(self) -> tuple[type[Backends], tuple[Mode]]:
        """Copies choose anew."""
        return Backends, (self.mode,)

    def __str__(self) -> str:
        if not self._of_device:
            return "chosen in the first step"
        return ", ".join(f"{device_type}: {backend.name}" for device_type, backend in self._of_device.items())


def mode_of(require_kernels: bool) -> Mode:
    """What the environment and the argument ``require_kernels`` ask for.

    Raises:
        ValueError: the environment variable has another value than auto, off, require, or contradicts the argument.
        TypeError: ``require_kernels`` is not a bool.
    """
    if not isinstance(require_kernels, bool):
        raise TypeError(f"require_kernels must be a bool, got {require_kernels!r}")
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
    if value not in MODES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(MODES)}, got {value!r}")
    if require_kernels and value == "off":
        raise ValueError(
            f"require_kernels=True must not be asked for with {ENVIRONMENT_VARIABLE}=off in the environment, got both; "
            "take one of them back"
        )
    return "require" if require_kernels else MODES[MODES.index(value)]


def choose(device_type: str, mode: Mode) -> Backend:
    """The best backend that this machine has for a type of device; may compile kernels, which takes a minute.

    Raises:
        RuntimeError: kernels are required and cannot be built.
    """
    extension = build.EXTENSIONS.get(device_type)
    if mode == "off" or (extension is None and mode == "auto"):
        return Equations()
    if extension is None:
        raise RuntimeError(
            f"compiled kernels, which are required, must exist for the device, got {device_type!r}; "
            f"there are some for {', '.join(build.EXTENSIONS)}"
        )
    try:
        build.load(extension)
    except build.BuildError as error:
        if mode == "require":
            raise RuntimeError(f"compiled kernels are required, and there are none: {error}") from error
        # Triton compiles its launchers with the host's compiler.
        can_fuse = device_type == "cuda" and find_spec("triton") and toolchain.cxx_path()
        fallback = CompiledEquations() if can_fuse else Equations()
        _say_once(logging.WARNING, f"no compiled kernels for {device_type}, stepping with {fallback.name}: {error}")
        return fallback
    capability = f", {torch.backends.cpu.get_cpu_capability()}" if device_type == "cpu" else ""
    backend = Kernels(f"compiled kernels ({extension.name}{capability})")
    _say_once(logging.INFO, f"stepping {device_type} tensors with {backend.name}")
    return backend


_said: set[str] = set()


def _say_once(level: int, message: str) -> None:
    """Once per process, and by one process of a machine: what can be built differs between machines, not processes."""
    if message not in _said and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.log(level, message)
    _said.add(message)
