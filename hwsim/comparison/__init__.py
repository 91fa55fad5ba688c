"""Other machines on the same layers: what an architect would build instead, priced with the same tables.

`compare` sets them beside the block-skip machine at equal multipliers and at equal area. See docs/comparison.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "BASELINES": "hwsim.comparison.side_by_side",
    "BitmapArray": "hwsim.comparison.bitmap",
    "Comparison": "hwsim.comparison.table",
    "StructuredArray": "hwsim.comparison.structured",
    "SystolicArray": "hwsim.comparison.systolic",
    "compare": "hwsim.comparison.side_by_side",
    "prune_channels": "hwsim.comparison.channels",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hwsim.comparison' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
