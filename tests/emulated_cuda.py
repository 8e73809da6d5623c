"""The CUDA kernels on the CPU: adai_cuda.cu compiled as C++ with a runtime that runs its threads as coroutines.

Speed is not representative; arithmetic, indexing and barriers are those of a GPU.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adai_dist.eight_bits import RECORD_BYTES, RECORD_ELEMENTS
from tests.kernel_cases import Operators

CSRC = Path(__file__).parent.parent / "adai_dist" / "kernels" / "csrc"
CPP = Path(__file__).parent / "cpp"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> ctypes.CDLL:
    """Compile the kernels into a folder and load them."""
    library = folder / "emulated_cuda.so"
    command = [compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-o", str(library)]
    command += [f'-DADAI_CUDA_SOURCE="{_kernels(folder)}"', f"-I{CPP / 'emulated_cuda'}", f"-I{CSRC}"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", str(CPP / "emulated_cuda.cpp")]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    for name in ("observe", "advance", "sum"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.chunks.restype = ctypes.c_int64
    return loaded


def build_binding(folder: Path) -> None:
    """Compile the kernels and their torch binding, and register them as torch.ops.adai_dist for the CPU."""
    from torch.utils.cpp_extension import load

    binding = folder / "adai_cuda_binding.cpp"
    text = (CSRC / "adai_cuda.cpp").read_text()
    assert "TORCH_LIBRARY_IMPL(adai_dist, CUDA, " in text
    binding.write_text(text.replace("TORCH_LIBRARY_IMPL(adai_dist, CUDA, ", "TORCH_LIBRARY_IMPL(adai_dist, CPU, "))
    load(
        "emulated_cuda_binding",
        [str(binding), str(_kernels(folder))],
        extra_cflags=["-O1", "-ffp-contract=off", "-Wno-unknown-pragmas"],
        extra_include_paths=[str(CPP / "emulated_cuda"), str(CSRC)],
        build_directory=str(folder),
        is_python_module=False,
    )


def _kernels(folder: Path) -> Path:
    """Write the source of the kernels as C++."""
    text = (CSRC / "adai_cuda.cu").read_text()
    text, num_launches = re.subn(r"(\w+)<<<(.*?)>>>\(", r"emulated::launch(\1, \2, ", text)
    assert num_launches == 1, "all launches must go through one function"
    source = folder / "adai_cuda_kernels.cpp"
    source.write_text(text)
    return source


def operators(library: ctypes.CDLL) -> Operators:
    """Return the operators of torch.ops.adai_dist for CPU tensors."""

    def observe(
        grads: list[Tensor],
        params: list[Tensor],
        remainders: list[Tensor],
        exp_avg_sqs: list[Tensor],
        kept: Tensor,
        c: Tensor,
        decay: float,
    ) -> Tensor:
        result = torch.full((len(grads), 5), float("nan"), dtype=torch.float64)
        lists = [_pointers(tensors) for tensors in (grads, params, remainders, exp_avg_sqs)]
        scalars = _address(kept), _address(c), ctypes.c_float(decay)
        _check(library.observe(*_sizes(grads), *lists, _dtypes(grads, params, exp_avg_sqs), *scalars, _address(result)))
        return result

    def advance(*arguments: Any) -> Tensor:
        *lists, inverse_means, coefficient, lr, is_finite, is_live, rounding, hyper = arguments
        params, grads, _, exp_avg_sqs = lists[:4]
        result = torch.full((len(params), 2), float("nan"), dtype=torch.float64)
        pointers = [_pointers(tensors) for tensors in lists]
        error = library.advance(
            *_sizes(params),
            (ctypes.c_void_p * 6)(*(ctypes.cast(x, ctypes.c_void_p) if x else None for x in pointers)),
            _dtypes(params, grads, exp_avg_sqs),
            _address(inverse_means),
            (ctypes.c_float * 2)(coefficient, lr),
            (ctypes.c_bool * 2)(is_finite, is_live),
            _pointers(rounding),
            (ctypes.c_double * len(hyper))(*hyper),
            _address(result),
        )
        _check(error)
        return result

    def sums(exp_avg_sqs: list[Tensor], kept: Tensor) -> Tensor:
        result = torch.full((len(exp_avg_sqs),), float("nan"), dtype=torch.float64)
        lists = _pointers(exp_avg_sqs), *_dtypes(exp_avg_sqs)
        _check(library.sum(*_sizes(exp_avg_sqs), *lists, _address(kept), _address(result)))
        return result

    return Operators(observe, advance, sums, torch.device("cpu"))


def chunks(library: ctypes.CDLL, sizes: Sequence[int], max_tensors: int, max_chunks: int) -> Tensor:
    """Return (tensor, offset, number of elements) of the chunk of every block, in the order of partials."""
    result = torch.zeros(sum(-(-size // 2**15) for size in sizes) + 1, 3, dtype=torch.int64)
    sizes_array = (ctypes.c_int64 * len(sizes))(*sizes)
    limits = ctypes.c_int64(max_tensors), ctypes.c_int64(max_chunks)
    num_chunks = library.chunks(sizes_array, ctypes.c_int64(len(sizes)), *limits, _address(result))
    return result[:num_chunks] if num_chunks >= 0 else result[:0]


def _check(error: bytes | None) -> None:
    assert error is None, error


def _sizes(tensors: list[Tensor]) -> tuple[Any, ctypes.c_int64]:
    sizes = [x.numel() if x.dtype != torch.uint8 else x.numel() // RECORD_BYTES * RECORD_ELEMENTS for x in tensors]
    num_elements = (ctypes.c_int64 * len(tensors))(*sizes)
    return num_elements, ctypes.c_int64(len(tensors))


def _pointers(tensors: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors)) if tensors else None


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _dtypes(*lists: list[Tensor]) -> Any:
    """Return the dtype of each list; that of an empty one does not matter."""
    return (ctypes.c_int32 * len(lists))(*(DTYPES.index(x[0].dtype) if x else 0 for x in lists))
