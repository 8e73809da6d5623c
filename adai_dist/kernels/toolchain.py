"""The tools that compile the kernels: a C++ compiler, ninja, and for CUDA an nvcc that matches torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"
"""Environment variable with the GPU architectures to compile for, such as ``8.0;9.0+PTX``."""

ARCHITECTURES_WITHOUT_DEVICE = ((8, 0), (9, 0), (10, 0))
"""Compute capabilities to compile for on a machine without GPUs; PTX of the last one serves later GPUs."""


class BuildError(RuntimeError):
    """A failure to compile or load the kernels; the message states the reason and the remedy."""


def check_toolchain(device_type: str) -> None:
    """Check that kernels for ``device_type`` can be compiled.

    Raises:
        BuildError: a tool is missing.
    """
    if sys.platform == "win32":
        raise BuildError("kernels are compiled on Linux and macOS; got Windows; use WSL")
    if device_type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise BuildError(
            f"kernels for CUDA need a torch that was built with CUDA; got torch {torch.__version__}; install another "
            "build of torch, see https://pytorch.org/get-started/locally"
        )
    if not cxx_path():
        raise BuildError(
            f"kernels need a C++ compiler; got none by the name {_cxx()!r} in PATH; install g++ or clang++ "
            "(apt-get install g++), or name one in the environment variable CXX"
        )
    if _ninja_folder() is None:
        raise BuildError("kernels are compiled by ninja; got none in PATH; run: pip install ninja")
    if device_type == "cuda" and torch.version.hip is None:
        _check_nvcc()


def cxx_path() -> str:
    """Return the resolved path of the C++ compiler that torch will call; empty if there is none."""
    words = shlex.split(_cxx())
    path = shutil.which(words[0]) if words else None
    return os.path.realpath(path) if path else ""


def chosen_cxx_path() -> str:
    """Return the path of the compiler named in the environment; empty if none is, so that any will do."""
    return cxx_path() if os.environ.get("CXX") else ""


def _cxx() -> str:
    return os.environ.get("CXX", "c++")


def _ninja_folder() -> str | None:
    """Return the folder to add to PATH for ninja; empty if PATH already has ninja, None if there is none.

    `pip install ninja` installs it beside python, which is not in PATH when an environment is used without activation.
    """
    if shutil.which("ninja"):
        return ""
    scripts = sysconfig.get_path("scripts")
    return scripts if shutil.which("ninja", path=scripts) else None


@contextmanager
def toolchain_environment(architectures: str) -> Generator[None]:
    """Let torch find ninja and compile for these architectures within the block."""
    changes: dict[str, str] = {}
    if folder := _ninja_folder():
        # at the end, so that a compiler beside python does not take precedence
        changes["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), folder])
    if architectures:
        changes[ARCHITECTURES] = architectures
    with environment(changes):
        yield


@contextmanager
def environment(changes: dict[str, str]) -> Generator[None]:
    """Set environment variables of this process within the block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# -- CUDA ------------------------------------------------------------------------------------------------------------


def _nvcc() -> list[str]:
    """Return the command for nvcc that torch would use; empty if there is no nvcc."""
    from torch.utils.cpp_extension import CUDA_HOME

    words = shlex.split(os.environ.get("PYTORCH_NVCC") or f"{CUDA_HOME}/bin/nvcc")
    return words if CUDA_HOME and shutil.which(words[0]) else []


def _nvcc_output(option: str) -> str:
    try:
        return subprocess.run([*_nvcc(), option], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"kernels for CUDA need an nvcc that runs; got {error}; install the CUDA toolkit") from error


def _check_nvcc() -> None:
    required = str(torch.version.cuda)
    remedy = f"install the CUDA toolkit {required}, or set CUDA_HOME to its folder"
    if not _nvcc():
        raise BuildError(f"kernels for CUDA need nvcc; got none in CUDA_HOME, PATH or /usr/local/cuda; {remedy}")
    found = re.search(r"release (\d+)\.(\d+)", _nvcc_output("--version"))
    if found is None or found[1] != required.split(".")[0]:
        release = f"{found[1]}.{found[2]}" if found else "an unknown release"
        raise BuildError(f"nvcc must be of CUDA {required.split('.')[0]}, as torch is; got {release}; {remedy}")
    _check_cuda_headers(remedy)


def _check_cuda_headers(remedy: str) -> None:
    """Check the include path, which torch derives from the path of nvcc even if that is a link or a script."""
    from torch.utils.cpp_extension import CUDA_HOME, include_paths

    folders = [word for path in include_paths("cuda") for word in ("-isystem", path)]
    command = [*shlex.split(_cxx()), "-E", "-x", "c++", *folders, "-include", "cuda_runtime.h", os.devnull]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        raise BuildError(f"the compiler must find cuda_runtime.h; got none, with CUDA_HOME={CUDA_HOME}; {remedy}")


class Architecture(NamedTuple):
    """A GPU architecture to compile for, such as ``9.0+PTX``."""

    capability: tuple[int, int]
    has_ptx: bool

    @classmethod
    def parse(cls, architectures: str) -> list[Architecture]:
        """Parse a list of architectures, ignoring names such as ``Ampere``."""
        found = (re.fullmatch(r"(\d+)\.(\d+)(\+PTX)?", entry) for entry in re.split(r"[;\s]+", architectures))
        return [cls((int(match[1]), int(match[2])), bool(match[3])) for match in found if match]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        is_binary = self.capability[0] == capability[0] and self.capability <= capability
        return is_binary or (self.has_ptx and self.capability <= capability)


def wanted_architectures() -> str:
    """Return the architectures to compile for: those in the environment, of this machine's GPUs, or of recent GPUs."""
    if torch.version.cuda is None:
        return ""
    if requested := os.environ.get(ARCHITECTURES):
        return requested
    return _formatted(_device_capabilities() or _known_to_nvcc(ARCHITECTURES_WITHOUT_DEVICE))


def runs_here(architectures: str) -> bool:
    """Return whether a library for ``architectures`` fits the environment, or else every GPU of this machine."""
    if architectures == os.environ.get(ARCHITECTURES) or torch.version.cuda is None:
        return True
    built = Architecture.parse(architectures)
    if devices := _device_capabilities():
        return all(any(architecture.runs_on(capability) for architecture in built) for capability in devices)
    return not os.environ.get(ARCHITECTURES)


def _device_capabilities() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    # Limited as in torch, because an nvcc of the same age does not know newer GPUs.
    known = [
        tuple(map(int, re.findall(r"sm_(\d+)(\d)", name)[0])) for name in torch.cuda.get_arch_list() if "sm_" in name
    ]
    newest = max(known, default=(99, 0))
    devices = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return sorted({min(capability, (newest[0], newest[1])) for capability in devices})


def _known_to_nvcc(capabilities: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    known = _nvcc_output("--list-gpu-arch").split()
    return [(major, minor) for major, minor in capabilities if f"compute_{major}{minor}" in known]


def _formatted(capabilities: Sequence[tuple[int, int]]) -> str:
    return ";".join(f"{major}.{minor}" for major, minor in capabilities) + "+PTX"
