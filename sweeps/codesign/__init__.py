"""Co-design: the plan of the blocks and the machine, chosen together for one budget.

Importing the package is cheap: names are looked up on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Alternation": "sweeps.codesign.alternate",
    "CoDesignSpace": "sweeps.codesign.settings",
    "Goal": "sweeps.codesign.settings",
    "alternate": "sweeps.codesign.alternate",
    "codesign": "sweeps.codesign.run",
    "load_codesign_space": "sweeps.codesign.settings",
    "parse_goal": "sweeps.codesign.settings",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'sweeps.codesign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
