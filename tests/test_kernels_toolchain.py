"""Errors for missing tools, each with its remedy, and the GPU architectures that kernels are compiled for."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

from adai_dist.kernels import build, toolchain
from adai_dist.kernels.build import Extension
from tests.tiny_extension import message_of, needs_toolchain, tiny_extension


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extension:
    return tiny_extension(tmp_path, monkeypatch)


def test_a_missing_compiler_is_reported(tiny: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert message_of(tiny).startswith("kernels need a C++ compiler; got none by the name 'c++' in PATH; install g++")
    monkeypatch.setenv("CXX", "icpx -O0")
    assert "got none by the name 'icpx -O0' in PATH" in message_of(tiny)


@needs_toolchain
def test_a_missing_ninja_is_reported(tiny: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", toolchain.cxx_path())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_, **__: str(tmp_path))
    assert message_of(tiny) == "kernels are compiled by ninja; got none in PATH; run: pip install ninja"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_kernels_for_cuda_need_a_torch_with_cuda() -> None:
    assert message_of(build.CUDA).startswith("kernels for CUDA need a torch that was built with CUDA; got torch ")


@needs_toolchain
@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        (
            None,
            "kernels for CUDA need nvcc; got none in CUDA_HOME, PATH or /usr/local/cuda; install the CUDA toolkit 13.0",
        ),
        ("echo 'Cuda compilation tools, release 12.8, V12.8.93'", "nvcc must be of CUDA 13, as torch is; got 12.8; "),
        ("echo release 13.0", "the compiler must find cuda_runtime.h; got none, with CUDA_HOME=/"),
        ("exit 3", "kernels for CUDA need an nvcc that runs; got "),
    ],
)
def test_an_nvcc_that_is_missing_or_does_not_match_torch_is_reported(
    nvcc: str | None, message: str, tiny: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path) if nvcc else None)
    if nvcc:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    assert message_of(dataclasses.replace(tiny, device_type="cuda")).startswith(message)


@needs_toolchain
def test_the_error_of_a_folder_that_is_not_writable_states_its_path_and_the_remedy(
    tiny: Extension, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tiny.sources[0]))  # a file; root may write into any folder
    message = message_of(tiny)
    assert message.startswith("the folder for compiled extensions must be writable, ")
    assert str(tiny.sources[0]) in message
    assert "TORCH_EXTENSIONS_DIR" in message.rpartition(";")[2]


@pytest.mark.parametrize(
    ("built", "devices", "serves"),
    [
        ("8.0;9.0;10.0+PTX", [(8, 0)], True),
        ("8.0;9.0;10.0+PTX", [(8, 6), (9, 0)], True),  # binaries run on later minor versions
        ("8.0;9.0;10.0+PTX", [(7, 5)], False),
        ("8.0;9.0;10.0+PTX", [(12, 1)], True),  # through PTX
        ("8.0;9.0", [(10, 0)], False),
        ("8.6", [(8, 0)], False),
        ("9.0+PTX", [(9, 0), (8, 0)], False),
        ("8.0 9.0+PTX", [], True),  # a library built ahead of time
        ("Ampere", [(8, 0)], False),
    ],
)
def test_a_library_is_used_if_its_code_runs_on_all_gpus(
    built: str, devices: list[tuple[int, int]], serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolchain, "_device_capabilities", lambda: devices)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert toolchain.runs_here(built) is serves
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", built)
    assert toolchain.runs_here(built), "a new build would have the same architectures"
    assert toolchain.wanted_architectures() == built


def test_without_a_gpu_kernels_are_compiled_for_the_recent_architectures_that_nvcc_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_86\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(toolchain, "_device_capabilities", list)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PYTORCH_NVCC", str(nvcc))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert toolchain.wanted_architectures() == "8.0;9.0+PTX"
    assert not torch.cuda.is_initialized()
