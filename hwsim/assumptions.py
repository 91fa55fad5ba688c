"""What every figure takes for granted, in a few sentences for reports; `docs/assumptions.md` has them at length."""

from __future__ import annotations

__all__ = ["ASSUMPTIONS"]

ASSUMPTIONS = "\n".join(
    (
        "Activations are dense in time: zeros among them save no cycles and no energy.",
        "Weight streams are prefetched perfectly; the expander follows the loader without a gap.",
        "DRAM is one channel with a bandwidth and a burst size: no banks, rows, refresh or turnaround, no idle power.",
        "Pooling, residual additions and other element-wise work run outside the array and cost nothing here.",
        "Layers run one after the other; activations go to DRAM and back between them, in the order of their reader.",
        "Padded positions of ragged blocks cost time and storage like real ones; columns without an output are gated.",
        "Energy and memory areas come from published tables (CACTI 7, Horowitz 2014, Aladdin), logic area from synthesis "
        "of the RTL, neither from a layout: trust ratios before absolute values.",
        "The dense machine of the same area has no sign adders, front end, type, sign and magnitude memories, "
        "and one operand bank.",
        "docs/assumptions.md of hwsim has all of it, with sources.",
    )
)
