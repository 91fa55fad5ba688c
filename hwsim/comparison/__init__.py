"""Other machines on the same layers: what an architect would build instead, priced with the same tables.

`compare` sets them beside the block-skip machine at equal multipliers and at equal area. See docs/comparison.md.
"""

from __future__ import annotations

from hwsim.lazy import lazy_exports

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
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
