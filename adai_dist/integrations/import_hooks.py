"""Import hooks: change a module of another project when it is imported, without importing it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Hook = Callable[[ModuleType], None]

ENVIRONMENT_VARIABLE = "ADAI_DIST_REGISTER"

_MARK = "_is_wrapped_by_adai_dist"


def after_import(name: str, hook: Hook) -> None:
    """Call ``hook(module)`` when the module is imported, or immediately if it has been.

    Args:
        name: fully qualified name of the module, such as ``"deepspeed.runtime.engine"``.
        hook: called once; an exception that it raises fails the import.
    """
    module = sys.modules.get(name)
    if module is not None:
        hook(module)
        return
    _finder.hooks.setdefault(name, []).append(hook)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def import_hooks_are_on() -> bool:
    """Return whether ``import adai_dist`` sets hooks: false if the environment has ``ADAI_DIST_REGISTER=0``.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of 0, 1, got {value!r}")
    return value == "1"


def wrap_once(cls: type | ModuleType, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Replace a method or function with ``wrap(original)``, unless this was done before.

    Returns:
        Whether it was replaced.
    """
    original = getattr(cls, name)
    if hasattr(original, _MARK):
        return False
    wrapped = functools.wraps(original)(wrap(original))
    setattr(wrapped, _MARK, True)
    setattr(cls, name, wrapped)
    return True


class _Finder(MetaPathFinder):
    """Finder that wraps the loaders of the modules with hooks."""

    def __init__(self) -> None:
        self.hooks: dict[str, list[Hook]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.hooks:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self.hooks)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader, hooks: dict[str, list[Hook]]) -> None:
        self._loader = loader
        self._hooks = hooks

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its original loader, through which resources and sources are read.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for hook in self._hooks.pop(module.__name__, []):
            hook(module)


_finder = _Finder()
