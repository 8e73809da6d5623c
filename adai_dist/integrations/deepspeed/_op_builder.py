"""The kernels as operators of DeepSpeed: compiled by its builders, under its rules, and listed by `ds_report`.

Sources, flags and the compiled library are those of :mod:`adai_dist.kernels.build`, whoever compiles them.
"""

# This module is private because the classes have types that are known in part only: DeepSpeed has no annotations.
# What pyright infers from the bodies of its methods is narrower than what they mean.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

from adai_dist.kernels import build
from adai_dist.kernels.build import BuildError, Extension
from adai_dist.kernels.toolchain import check_toolchain, environment


class AdaiBuilder(OpBuilder):
    """What both builders have in common, in front of DeepSpeed's own for the device."""

    extension: Extension

    def __init__(self, extension: Extension | None = None) -> None:
        self.extension = extension or self.extension
        super().__init__(name=self.extension.name)

    def absolute_name(self) -> str:
        return f"adai_dist.kernels.{self.name}_op"

    def sources(self) -> list[str]:
        return [str(source) for source in self.extension.sources]

    def include_paths(self) -> list[str]:
        return []

    def cxx_args(self) -> list[str]:
        return list(self.extension.cxx_flags)

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether the operator can be compiled here; the reason why not is in ``error_log``."""
        try:
            check_toolchain(self.extension.device_type)
        except BuildError as error:
            if verbose:
                self.warning(f"{self.name}: {error}")
            self.error_log: str = str(error)
            return False
        return super().is_compatible(verbose)

    def load(self, verbose: bool = False) -> Any:
        """Compile the operator if need be, and load it, once per process.

        Returns:
            ``torch.ops.adai_dist``, where the operators are.

        Raises:
            BuildError: it cannot be compiled or loaded here.
        """

        def compile_(_: Extension, folder: Path) -> None:
            self._compile(folder, verbose)

        if self.name not in OpBuilder._loaded_ops:
            build.load(self.extension, compile_)
            OpBuilder._loaded_ops[self.name] = torch.ops.adai_dist
        return OpBuilder._loaded_ops[self.name]

    def _compile(self, folder: Path, verbose: bool) -> None:
        with environment({"TORCH_EXTENSIONS_DIR": str(folder.parent)}):
            try:
                self.jit_load(verbose)
            except ImportError:
                # DeepSpeed's operators are Python modules. Ours registers with torch, and has no module to import.
                libraries = list(folder.glob("*.so"))
                if not libraries:
                    raise
                torch.ops.load_library(str(libraries[0]))


class CPUAdaiBuilder(AdaiBuilder, CPUOpBuilder):
    """Compiles the kernels for the CPU."""

    BUILD_VAR = "DS_BUILD_CPU_ADAI"
    NAME = "cpu_adai"
    extension: Extension = build.CPU


class FusedAdaiBuilder(AdaiBuilder, CUDAOpBuilder):
    """Compiles the kernels for CUDA."""

    BUILD_VAR = "DS_BUILD_FUSED_ADAI"
    NAME = "fused_adai"
    extension: Extension = build.CUDA

    def nvcc_args(self) -> list[str]:
        return [*self.extension.nvcc_flags, *([] if self.is_rocm_pytorch() else self.compute_capability_args())]


BUILDERS = {builder.extension.device_type: builder for builder in (CPUAdaiBuilder, FusedAdaiBuilder)}


def compile_with_deepspeed(extension: Extension, folder: Path) -> None:
    """Compile with the builder for the extension's device."""
    BUILDERS[extension.device_type](extension)._compile(folder, verbose=False)


def add_to(operators: dict[str, OpBuilder]) -> None:
    """Put the builders into DeepSpeed's list of operators."""
    for builder in BUILDERS.values():
        operators.setdefault(builder.NAME, builder())
