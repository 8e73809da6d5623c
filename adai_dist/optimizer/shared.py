"""What an optimizer shares with the objects that stand for it.

Trainers wrap an optimizer into an object that passes for one: of a subclass of its class, but with a ``__dict__`` of
its own, which is a copy of the optimizer's or has a ``__getattr__`` beside it that asks the optimizer. What is set on
such a proxy must arrive at the optimizer, and what becomes of the optimizer must show in the proxy. So all that is
assigned anew after construction lies in one object, which a copy of the ``__dict__`` refers to as well.
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


class Shared(Generic[T]):
    """An attribute of an optimizer and of all its proxies."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, obj: None, owner: type) -> Shared[T]: ...

    @overload
    def __get__(self, obj: object, owner: type | None = None) -> T: ...

    def __get__(self, obj: object, owner: type | None = None) -> T | Shared[T]:
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
    """Values of the shared attributes of one optimizer."""

    def __init__(self, optimizer: StatefulOptimizer) -> None:
        super().__init__()
        self.optimizer = weakref.ref(optimizer)


def begin_sharing(optimizer: StatefulOptimizer) -> None:
    """Give an optimizer that is being made its shared attributes, without values."""
    optimizer.__dict__[_NAME] = _Values(optimizer)
    _live.add(optimizer)


def itself(optimizer: OptimizerT) -> OptimizerT:
    """The optimizer that a proxy stands for; any other optimizer, as it is."""
    found = _values_of(optimizer).optimizer()
    return optimizer if found is None else found  # pyright: ignore[reportReturnType] of the proxy's class or its base


def optimizers_of(params: Iterable[Tensor]) -> list[StatefulOptimizer]:
    """The optimizers of this process that hold one of the parameters and are still referred to."""
    ids = {id(param) for param in params}
    return [optimizer for optimizer in _live if not ids.isdisjoint(map(id, optimizer.params()))]


def _values_of(obj: object) -> _Values:
    try:
        return getattr(obj, _NAME)
    except AttributeError:
        raise AttributeError(
            f"an optimizer must have been made by its constructor, or stand for one that has, got an object of type "
            f"{type(obj).__name__} without its attributes; call super().__init__(...), or copy the __dict__ of the "
            "optimizer, or delegate to it by __getattr__"
        ) from None
