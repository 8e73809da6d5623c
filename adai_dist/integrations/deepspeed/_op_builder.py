"""The kernels as DeepSpeed operators, compiled by its builders and listed by `ds_report`.

Sources, flags and the compiled library are those of :mod:`adai_dist.kernels.build`.
"""

# Private because the types of the classes are partially unknown: DeepSpeed has no annotations, and the types that
# pyright infers for its methods are too narrow.
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
    """Base of both builders, combined with DeepSpeed's builder for the device."""

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
        """Return whether the operator can be compiled on this machine; ``error_log`` says why not."""
        try:
            check_toolchain(self.extension.device_type)
        except BuildError as error:
            if verbose:
                self.warning(f"{self.name}: {error}")
            self.error_log: str = str(error)
            return False
        return super().is_compatible(verbose)

    def load(self, verbose: bool = False) -> Any:
        """Compile the operator if necessary and load it, once per process.

        Returns:
            ``torch.ops.adai_dist``, the namespace of the operators.

        Raises:
            BuildError: the operator cannot be compiled or loaded on this machine.
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
                # DeepSpeed imports its operators as Python modules; this library only registers with torch.
                libraries = list(folder.glob("*.so"))
                if not libraries:
                    raise
                torch.ops.load_library(str(libraries[0]))


class CPUAdaiBuilder(AdaiBuilder, CPUOpBuilder):
    """Builder of the CPU kernels."""

    BUILD_VAR = "DS_BUILD_CPU_ADAI"
    NAME = "cpu_adai"
    extension: Extension = build.CPU


class FusedAdaiBuilder(AdaiBuilder, CUDAOpBuilder):
    """Builder of the CUDA kernels."""

    BUILD_VAR = "DS_BUILD_FUSED_ADAI"
    NAME = "fused_adai"
    extension: Extension = build.CUDA

    def nvcc_args(self) -> list[str]:
        return [*self.extension.nvcc_flags, *([] if self.is_rocm_pytorch() else self.compute_capability_args())]


BUILDERS = {builder.extension.device_type: builder for builder in (CPUAdaiBuilder, FusedAdaiBuilder)}


def compile_with_deepspeed(extension: Extension, folder: Path) -> None:
    """Compile an extension with the builder for its device."""
    BUILDERS[extension.device_type](extension)._compile(folder, verbose=False)


def add_to(operators: dict[str, OpBuilder]) -> None:
    """Add the builders to DeepSpeed's table of operators."""
    for builder in BUILDERS.values():
        operators.setdefault(builder.NAME, builder())
