"""An extension that compiles quickly, for tests of compiling and loading extensions."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from adai_dist.kernels import build, toolchain
from adai_dist.kernels.build import BuildError, Extension

needs_toolchain = pytest.mark.skipif(
    not toolchain.cxx_path() or toolchain._ninja_folder() is None, reason="needs a C++ compiler and ninja"
)
TINY = 'extern "C" const char* adai_tiny() {{ return "{}"; }}\n'


def tiny_extension(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Extension:
    """Create an extension in ``folder``, and an empty cache for its library."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
    monkeypatch.setattr(logging.root, "handlers", logging.root.handlers[:])  # the command line adds a handler
    source = folder / "tiny.cpp"
    source.write_text(TINY.format("first"))
    return Extension("tiny", "cpu", (source,), ("-O1",))


def message_of(extension: Extension) -> str:
    with pytest.raises(BuildError) as caught:
        build.load(extension)
    return str(caught.value)
