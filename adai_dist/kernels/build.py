"""Compilation of the kernels, once per machine, and loading, which gives `torch.ops.adai_dist` its implementations.

A library is compiled in a temporary folder and moved into the cache, with a stamp that records its inputs. If the stamp
matches, loading needs neither compiler nor ninja.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from adai_dist.kernels import build_cache, toolchain
from adai_dist.kernels.toolchain import BuildError
from adai_dist.kernels.wait_notices import write_to_stderr

__all__ = ["CPU", "CUDA", "EXTENSIONS", "BuildError", "Extension", "Library", "find", "load", "set_compiler"]

CSRC = Path(__file__).parent / "csrc"
NUM_LINES_OF_OUTPUT = 6


@dataclass(frozen=True)
class Extension:
    """Sources and flags of one library."""

    name: str
    """Name of the library and of its folder, in the style of DeepSpeed's operators."""
    device_type: str
    sources: tuple[Path, ...]
    """Absolute paths; headers in the same folders count as sources."""
    cxx_flags: tuple[str, ...]
    nvcc_flags: tuple[str, ...] = ()
    takes: str = "seconds"
    """Compile time, as messages state it."""


# No -std: torch passes the one that its headers need. No -march: the instruction set is selected at run time. Every
# operation is rounded separately, so that vector loops, their tails and CUDA agree. Without errno and floating-point
# exceptions, which nothing reads, loops with conditionals vectorise.
_CXX_FLAGS = ("-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_NVCC_FLAGS = ("-O3", "-ffp-contract=off" if torch.version.hip else "-fmad=false")

CPU = Extension(
    name="cpu_adai",
    device_type="cpu",
    sources=tuple(CSRC / f"adai_cpu{part}.cpp" for part in ("", "_default", "_avx2", "_avx512")),
    cxx_flags=_CXX_FLAGS,
    takes="about 30 s on two cores",
)
CUDA = Extension(
    name="fused_adai",
    device_type="cuda",
    sources=(CSRC / "adai_cuda.cpp", CSRC / "adai_cuda.cu"),
    cxx_flags=_CXX_FLAGS,
    nvcc_flags=_NVCC_FLAGS,
    takes="about four minutes per type of GPU",
)

EXTENSIONS = {extension.device_type: extension for extension in (CPU, CUDA)}

Compiler = Callable[[Extension, Path], None]
"""A function that compiles and loads an extension, leaving one library in the given folder, which is empty before."""


def compile_with_torch(extension: Extension, folder: Path) -> None:
    """Compile with ``torch.utils.cpp_extension``."""
    from torch.utils.cpp_extension import load as torch_load

    torch_load(
        extension.name,
        [str(source) for source in extension.sources],
        extra_cflags=list(extension.cxx_flags),
        extra_cuda_cflags=list(extension.nvcc_flags),
        build_directory=str(folder),
        is_python_module=False,
    )


_compiler: Compiler = compile_with_torch


def set_compiler(compiler: Compiler) -> None:
    """Replace the default compiler of extensions, for example by DeepSpeed's."""
    global _compiler
    _compiler = compiler


class Library(NamedTuple):
    """A compiled extension."""

    path: Path
    seconds: float | None
    """Compile time; None if the library was found in the cache."""


_loaded: dict[Extension, Library] = {}
_failed: dict[str, str] = {}
"""Messages of failed attempts, by fingerprint and compiler."""


def load(extension: Extension, compiler: Compiler | None = None) -> Library:
    """Load the implementations of ``torch.ops.adai_dist`` for the extension's device, compiling them if necessary.

    If several processes call it at the same time, one compiles and the others wait. A failed compilation is not
    repeated by the same process, nor by those that waited.

    Args:
        extension: :data:`CPU` or :data:`CUDA`.
        compiler: see :func:`set_compiler`.

    Raises:
        BuildError: the extension cannot be compiled or loaded here.

    Collective: none.
    """
    if extension not in _loaded:
        library = find(extension) or _build(extension, compiler or _compiler)
        if library.seconds is None:
            _load(library.path)
        _loaded[extension] = library
    return _loaded[extension]


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(
            f"the compiled library must load; got {error}; delete the folder {path.parent} to recompile it"
        ) from error


def find(extension: Extension) -> Library | None:
    """Find a compiled library of these sources and flags that fits this torch and the GPUs of this machine."""
    path = build_cache.library_path(extension.name)
    stamp = build_cache.read(build_cache.stamp_path(path))
    fits = (
        stamp.get("fingerprint") == fingerprint(extension)
        and toolchain.chosen_cxx_path() in ("", stamp.get("compiler"))
        and (extension.device_type == "cpu" or toolchain.runs_here(stamp.get("architectures", "")))
        and stamp.get("size") == build_cache.size_of(path)  # loading a truncated library would crash the process
    )
    return Library(path, None) if fits else None


def fingerprint(extension: Extension) -> str:
    """Return a hash of the inputs of a library, except the compiler and the GPU architectures."""
    headers = {header for source in extension.sources for header in source.parent.glob("*.h")}
    files = {path.name: _text(path) for path in (*extension.sources, *sorted(headers))}
    versions = (torch.__version__, torch.version.git_version, torch.version.cuda, torch.version.hip)
    python = (sys.implementation.cache_tag, sys.platform, platform.machine())
    inputs = [extension.name, files, extension.cxx_flags, extension.nvcc_flags, versions, python]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"the sources of the kernels must be readable; got {error}; reinstall the package") from error


def _build(extension: Extension, compiler: Compiler) -> Library:
    toolchain.check_toolchain(extension.device_type)
    attempt = f"{fingerprint(extension)} {toolchain.cxx_path()}"
    if attempt in _failed:
        raise BuildError(_failed[attempt])
    path = build_cache.library_path(extension.name)
    failure_path = build_cache.failure_path(path)
    earlier = build_cache.read(failure_path)
    try:
        with build_cache.locked(path.parent):
            if found := find(extension):
                return found
            failure = build_cache.read(failure_path)
            if failure != earlier and failure.get("attempt") == attempt:
                raise BuildError(failure["message"])  # in the process that this one has waited for
            write_to_stderr(f"compiling {extension.name} into {path}, once per machine; it takes {extension.takes}")
            try:
                return _compile(extension, compiler, path)
            except BuildError as error:
                failure = {"attempt": attempt, "message": str(error), "time": str(time.time_ns())}
                build_cache.write(failure_path, failure)
                raise
    except OSError as error:
        raise BuildError(
            f"the folder for compiled extensions must be writable, on a file system with file locks; got {error}; set "
            "the environment variable TORCH_EXTENSIONS_DIR to a folder on a local disk"
        ) from error
    except BuildError as error:
        _failed[attempt] = str(error)
        raise


def _compile(extension: Extension, compiler: Compiler, path: Path) -> Library:
    """Compile in a new folder, because processes of a killed build may still be writing to the old one."""
    for leftover in path.parent.glob("build-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    architectures = toolchain.wanted_architectures() if extension.device_type == "cuda" else ""
    stamp = {"fingerprint": fingerprint(extension), "compiler": toolchain.cxx_path(), "architectures": architectures}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-", ignore_cleanup_errors=True) as build_folder:
        folder = Path(build_folder) / extension.name
        folder.mkdir()
        try:
            with toolchain.toolchain_environment(architectures):
                compiler(extension, folder)
            (built,) = folder.glob("*.so")
        except Exception as error:
            raise _failure_of(extension, error, path) from error
        build_cache.sync(built)
        build_cache.remove(build_cache.stamp_path(path))
        if path.is_dir():
            build_cache.remove(path)
        os.replace(built, path)  # processes that have loaded the old one keep it
        build_cache.write(build_cache.stamp_path(path), {**stamp, "size": build_cache.size_of(path)})
    for outdated in (build_cache.failure_path(path), build_cache.log_path(path)):
        build_cache.remove(outdated)
    seconds = time.perf_counter() - start
    write_to_stderr(f"compiled {extension.name} in {seconds:.1f} s")
    return Library(path, seconds)


def _failure_of(extension: Extension, error: Exception, path: Path) -> BuildError:
    if isinstance(error, BuildError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return BuildError(f"compilation needs the package {error.name}; got none; run: pip install {error.name}")
    output = str(error)
    log = build_cache.log_path(path)
    log.write_text(output, encoding="utf-8")
    lines = [line for line in output.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if "error:" in line), len(lines))
    start = max(0, min(first - 1, len(lines) - NUM_LINES_OF_OUTPUT))
    excerpt = lines[start : start + NUM_LINES_OF_OUTPUT]
    return BuildError(
        f"{extension.name} must compile with {toolchain.cxx_path()}; got:\n" + "\n".join(excerpt) + "\n"
        f"read the full output in {log}, or name another compiler in the environment variable CXX"
    )
