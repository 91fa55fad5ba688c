"""Keeping what was computed, under exactly what it depends on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ["Kept", "kept_by"]

Subject = TypeVar("Subject")
Rest = ParamSpec("Rest")
Value = TypeVar("Value")


class Kept(OrderedDict[Hashable, Any]):
    """Values by key; of more than ``limit`` the one that was not asked for longest is forgotten.

    Examples
    --------
    >>> squares = Kept(2)
    >>> [squares.find(n, lambda n=n: n * n) for n in (1, 2, 3)], list(squares)
    ([1, 4, 9], [2, 3])
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def find(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made now if it is not there."""
        if key in self:
            self.move_to_end(key)
            return self[key]
        value = make()
        self.keep(key, value)
        return value

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep a value."""
        self[key] = value
        if len(self) > self.limit:
            self.popitem(last=False)


def kept_by(
    key: Callable[[Subject], Hashable], limit: int = 4096
) -> Callable[[Callable[Concatenate[Subject, Rest], Value]], Callable[Concatenate[Subject, Rest], Value]]:
    """Like `functools.lru_cache`, for functions that depend on a part of their first argument only.

    Parameters
    ----------
    key : callable
        That part, as something hashable.
    limit : int
        Results kept.
    """

    def decorate(
        function: Callable[Concatenate[Subject, Rest], Value],
    ) -> Callable[Concatenate[Subject, Rest], Value]:
        kept = Kept(limit)

        @wraps(function)
        def find(subject: Subject, *rest: Rest.args, **named: Rest.kwargs) -> Value:
            return kept.find((key(subject), *rest), lambda: function(subject, *rest, **named))

        return find

    return decorate
