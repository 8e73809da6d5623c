"""Hooks that run when a module of another project is imported."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adai_dist.integrations.import_hooks import after_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Create a package with a module that is not imported yet, and return the module's name."""
    name = f"other_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "engine.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield f"{name}.engine"
    for loaded in (name, f"{name}.engine"):
        sys.modules.pop(loaded, None)


def test_a_hook_runs_once_immediately_after_the_import(module: str) -> None:
    seen: list[int] = []
    after_import(module, lambda loaded: seen.append(loaded.VALUE))
    assert module not in sys.modules
    assert seen == []
    importlib.import_module(module)
    assert seen == [1]
    importlib.import_module(module)
    assert seen == [1]


def test_a_hook_runs_immediately_if_the_module_is_imported(module: str) -> None:
    importlib.import_module(module)
    seen: list[int] = []
    after_import(module, lambda loaded: seen.append(loaded.VALUE))
    assert seen == [1]


def test_hooks_run_in_the_order_of_their_registration(module: str) -> None:
    seen: list[str] = []
    after_import(module, lambda _: seen.append("first"))
    after_import(module, lambda _: seen.append("second"))
    importlib.import_module(module)
    assert seen == ["first", "second"]


def test_the_module_keeps_its_original_loader(module: str) -> None:
    after_import(module, lambda _: None)
    loaded = importlib.import_module(module)
    assert loaded.__spec__ is not None
    assert loaded.__spec__.loader is loaded.__loader__
    assert type(loaded.__loader__).__module__ == "_frozen_importlib_external"
    assert inspect.getsource(loaded) == "VALUE = 1\n"
    assert importlib.reload(loaded) is loaded


def test_a_module_that_does_not_exist_raises_the_usual_error(module: str) -> None:
    after_import(f"{module}.nothing", lambda _: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{module}.nothing")


def test_an_error_in_a_hook_fails_the_import(module: str) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no")

    after_import(module, fail)
    with pytest.raises(RuntimeError, match="no"):
        importlib.import_module(module)
    assert module not in sys.modules
