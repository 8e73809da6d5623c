"""The check that DeepSpeed has the methods and attributes that the adapters use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import deepspeed

from adai_dist.integrations.deepspeed.adapters.releases import TESTED, Release


def check_names(owner: Any, release: Release, *tables: str) -> None:
    """Refuse an object of DeepSpeed that lacks a name of its tables.

    Args:
        owner: the object.
        release: range of the installed release.
        tables: keys of :attr:`Release.methods` and :attr:`Release.attributes`; the first starts with the class.

    Raises:
        RuntimeError: a method is missing or has other parameters, or an attribute is missing.

    Collective: none; the same on all ranks.
    """
    for table in tables:
        for name, expected in release.methods.get(table, {}).items():
            method: Callable[..., Any] | None = getattr(owner, name, None)
            found = _parameters(method) if callable(method) else None
            if found is None or found[: len(expected)] != expected:
                _refuse(owner, f"{name} must take {expected}", "no such method" if found is None else str(found))
        for name in release.attributes.get(table, ()):
            if not hasattr(owner, name):
                _refuse(owner, f"{name} must exist", "no such attribute")
        for name in release.set_by_step.get(table, ()):
            if name not in _unwrapped(owner.step).__code__.co_names:
                _refuse(owner, f"step must set {name}", "no such attribute")


def _unwrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    function = inspect.unwrap(getattr(method, "__func__", method))
    # DeepSpeed's profiling decorator keeps the method in its closure under this name, without functools.wraps.
    return inspect.getclosurevars(function).nonlocals.get("func", function)


def _parameters(method: Callable[..., Any]) -> tuple[str, ...]:
    parameters = tuple(inspect.signature(_unwrapped(method)).parameters)
    return parameters[1:] if parameters[:1] == ("self",) else parameters


def _refuse(owner: Any, rule: str, found: str) -> None:
    raise RuntimeError(
        f"{type(owner).__name__}.{rule}, got {found} in DeepSpeed {deepspeed.__version__}, which this release of "
        f"adai_dist does not support; use DeepSpeed {TESTED[-1][1]}, or a newer adai_dist"
    )
