"""Attributes that an optimizer shares with its proxies.

Trainers wrap an optimizer in a proxy: an object of a subclass of its class, whose ``__dict__`` is a copy of the
optimizer's, or whose ``__getattr__`` delegates to the optimizer. Assignments to the proxy must reach the optimizer, and
changes of the optimizer must show in the proxy. So all attributes that are reassigned after construction are stored in
one object, to which a copy of the ``__dict__`` refers too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from torch import Tensor

if TYPE_CHECKING:
    from adai_dist.optimizer.stateful import StatefulOptimizer

T = TypeVar("T")
OptimizerT = TypeVar("OptimizerT", bound="StatefulOptimizer")

_NAME = "_shared"
_UNSET: Any = object()
_live: weakref.WeakSet[StatefulOptimizer] = weakref.WeakSet()


class SharedAttribute(Generic[T]):
    """A descriptor of an attribute that an optimizer and all its proxies share."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, obj: None, owner: type) -> SharedAttribute[T]: ...

    @overload
    def __get__(self, obj: object, owner: type | None = None) -> T: ...

    def __get__(self, obj: object, owner: type | None = None) -> T | SharedAttribute[T]:
        if obj is None:
            return self
        try:
            return _values_of(obj)[self._name]
        except KeyError:
            raise AttributeError(f"{type(obj).__name__!r} object has no attribute {self._name!r}") from None

    def __set__(self, obj: object, value: T) -> None:
        _values_of(obj)[self._name] = value

    def __delete__(self, obj: object) -> None:
        if _values_of(obj).pop(self._name, _UNSET) is _UNSET:
            raise AttributeError(f"{type(obj).__name__!r} object has no attribute {self._name!r}")


class _Values(dict[str, Any]):
    """The values of the shared attributes of one optimizer."""

    def __init__(self, optimizer: StatefulOptimizer) -> None:
        super().__init__()
        self.optimizer = weakref.ref(optimizer)


def init_shared_attributes(optimizer: StatefulOptimizer) -> None:
    """Attach an empty set of shared attributes to an optimizer that is being constructed."""
    optimizer.__dict__[_NAME] = _Values(optimizer)
    _live.add(optimizer)


def unproxied(optimizer: OptimizerT) -> OptimizerT:
    """Return the optimizer behind a proxy; any other optimizer is returned unchanged."""
    found = _values_of(optimizer).optimizer()
    return optimizer if found is None else found  # pyright: ignore[reportReturnType] of the proxy's class or its base


def live_optimizers_of(params: Iterable[Tensor]) -> list[StatefulOptimizer]:
    """Return the optimizers of this process that hold any of the parameters and are still referenced."""
    ids = {id(param) for param in params}
    return [optimizer for optimizer in _live if not ids.isdisjoint(map(id, optimizer.params()))]


def _values_of(obj: object) -> _Values:
    try:
        return getattr(obj, _NAME)
    except AttributeError:
        raise AttributeError(
            f"an optimizer must have been constructed, or be a proxy of one that has, got an object of type "
            f"{type(obj).__name__} without its attributes; call super().__init__(...), or copy the __dict__ of the "
            "optimizer, or delegate to it by __getattr__"
        ) from None
