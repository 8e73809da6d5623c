"""What compiling needs beside the sources: a C++ compiler, ninja, and for CUDA an nvcc that fits torch."""

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
"""Environment variable: the GPUs to compile for, such as ``8.0;9.0+PTX``."""

ARCHITECTURES_WITHOUT_DEVICE = ((8, 0), (9, 0), (10, 0))
"""Compute capabilities to compile for where no GPU says otherwise; PTX of the last one serves later GPUs."""


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here. The message has the reason and the remedy."""


def check_toolchain(device_type: str) -> None:
    """Make sure that kernels for ``device_type`` can be compiled.

    Raises:
        BuildError: something is missing.
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
    """The C++ compiler that torch will call, with links followed; empty if there is none."""
    words = shlex.split(_cxx())
    path = shutil.which(words[0]) if words else None
    return os.path.realpath(path) if path else ""


def chosen_cxx_path() -> str:
    """The compiler if the environment names it, else empty: any will do."""
    return cxx_path() if os.environ.get("CXX") else ""


def _cxx() -> str:
    return os.environ.get("CXX", "c++")


def _ninja_folder() -> str | None:
    """A folder to add to PATH for ninja; empty if it is in PATH already, None if there is none.

    `pip install ninja` puts it beside python, which is not in PATH where an environment is used without activation.
    """
    if shutil.which("ninja"):
        return ""
    scripts = sysconfig.get_path("scripts")
    return scripts if shutil.which("ninja", path=scripts) else None


@contextmanager
def toolchain_environment(architectures: str) -> Generator[None]:
    """While it lasts, torch finds ninja, and compiles for these GPUs."""
    changes: dict[str, str] = {}
    if folder := _ninja_folder():
        # at the end: a compiler or ninja beside python must not take the place of another
        changes["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), folder])
    if architectures:
        changes[ARCHITECTURES] = architectures
    with environment(changes):
        yield


@contextmanager
def environment(changes: dict[str, str]) -> Generator[None]:
    """Environment variables of this process that hold for a while."""
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
    """The words that call nvcc, as torch would; none if it cannot be found."""
    from torch.utils.cpp_extension import CUDA_HOME

    words = shlex.split(os.environ.get("PYTORCH_NVCC") or f"{CUDA_HOME}/bin/nvcc")
    return words if CUDA_HOME and shutil.which(words[0]) else []


def _output_of_nvcc(option: str) -> str:
    try:
        return subprocess.run([*_nvcc(), option], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"kernels for CUDA need an nvcc that runs; got {error}; install the CUDA toolkit") from error


def _check_nvcc() -> None:
    of_torch = str(torch.version.cuda)
    remedy = f"install the CUDA toolkit {of_torch}, or set CUDA_HOME to its folder"
    if not _nvcc():
        raise BuildError(f"kernels for CUDA need nvcc; got none in CUDA_HOME, PATH or /usr/local/cuda; {remedy}")
    found = re.search(r"release (\d+)\.(\d+)", _output_of_nvcc("--version"))
    if found is None or found[1] != of_torch.split(".")[0]:
        release = f"{found[1]}.{found[2]}" if found else "one without a release"
        raise BuildError(f"nvcc must be of CUDA {of_torch.split('.')[0]}, as torch is; got {release}; {remedy}")
    _check_cuda_headers(remedy)


def _check_cuda_headers(remedy: str) -> None:
    """torch takes the folder above the nvcc in PATH for the toolkit, which is wrong where that is a link or script."""
    from torch.utils.cpp_extension import CUDA_HOME, include_paths

    folders = [word for path in include_paths("cuda") for word in ("-isystem", path)]
    command = [*shlex.split(_cxx()), "-E", "-x", "c++", *folders, "-include", "cuda_runtime.h", os.devnull]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        raise BuildError(f"the compiler must find cuda_runtime.h; got none, with CUDA_HOME={CUDA_HOME}; {remedy}")


class Architecture(NamedTuple):
    """An entry of the list of architectures, such as ``9.0+PTX``."""

    capability: tuple[int, int]
    has_ptx: bool

    @classmethod
    def of(cls, words: str) -> list[Architecture]:
        """The entries of a list that are numbers; names such as ``Ampere`` are left out."""
        found = (re.fullmatch(r"(\d+)\.(\d+)(\+PTX)?", word) for word in re.split(r"[;\s]+", words))
        return [cls((int(match[1]), int(match[2])), bool(match[3])) for match in found if match]

    def runs_on(self, capability: tuple[int, int]) -> bool:
        is_binary = self.capability[0] == capability[0] and self.capability <= capability
        return is_binary or (self.has_ptx and self.capability <= capability)


def wanted_architectures() -> str:
    """What to compile for: what the environment says; else the GPUs of this machine; else those of the last years."""
    if torch.version.cuda is None:
        return ""
    if named := os.environ.get(ARCHITECTURES):
        return named
    return _listed(_of_devices() or _known_to_nvcc(ARCHITECTURES_WITHOUT_DEVICE))


def run_here(architectures: str) -> bool:
    """Whether a library for ``architectures`` runs on every GPU of this machine; without any, whether it is wanted."""
    if architectures == os.environ.get(ARCHITECTURES) or torch.version.cuda is None:
        return True
    built = Architecture.of(architectures)
    if devices := _of_devices():
        return all(any(architecture.runs_on(capability) for architecture in built) for capability in devices)
    return not os.environ.get(ARCHITECTURES)


def _of_devices() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    # As torch does it: an nvcc of the age of torch knows no newer GPUs.
    known = [
        tuple(map(int, re.findall(r"sm_(\d+)(\d)", name)[0])) for name in torch.cuda.get_arch_list() if "sm_" in name
    ]
    newest = max(known, default=(99, 0))
    devices = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return sorted({min(capability, (newest[0], newest[1])) for capability in devices})


def _known_to_nvcc(capabilities: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    known = _output_of_nvcc("--list-gpu-arch").split()
    return [(major, minor) for major, minor in capabilities if f"compute_{major}{minor}" in known]


def _listed(capabilities: Sequence[tuple[int, int]]) -> str:
    return ";".join(f"{major}.{minor}" for major, minor in capabilities) + "+PTX"
