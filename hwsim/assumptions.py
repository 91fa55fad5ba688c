"""What every figure takes for granted, in a few sentences for reports; `docs/assumptions.md` has them at length."""

from __future__ import annotations

__all__ = ["ASSUMPTIONS"]

ASSUMPTIONS = """\
Activations are dense in time: zeros among them save no cycles and no energy.
Weight streams are prefetched perfectly, so the latency of the weight memories is hidden; the expander follows the loader without a gap.
DRAM is one channel with a bandwidth and a burst size: no banks, rows, refresh or turnaround. Its idle power is not counted.
Pooling, residual additions and other element-wise work run outside the array and are not counted in time or energy.
Layers run one after the other; activations go to DRAM and back between them, each in the order in which its reader wants them.
Padded positions of ragged blocks cost time and storage like real ones; columns that a narrow tile leaves empty are gated.
Energy and area per event come from published tables (CACTI 7, Horowitz 2014, Aladdin) and are not a layout; use ratios before absolute values.
The dense machine of the same area has neither sign adders, front end, type, sign nor magnitude memories, and one operand bank.
"""
