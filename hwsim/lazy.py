"""Names of a package that are looked up on first use, so that importing the package is cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(
    package: str, modules: Mapping[str, str], also: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package (Source: PEP 562).

    Parameters
    ----------
    package : str
        Its ``__name__``.
    modules : mapping from str to str
        The module of every public name.
    also : tuple of str
        Public names that the package defines itself.

    Examples
    --------
    >>> look_up, names = lazy_exports("hwsim", {"simulate": "hwsim.simulator"})
    >>> names()
    ['simulate']
    >>> look_up("simulate").__module__
    'hwsim.simulator'
    """

    def look_up(name: str) -> Any:
        if name in modules:
            return getattr(import_module(modules[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return look_up, lambda: [*also, *sorted(modules)]
