"""Co-design: the plan of the blocks and the machine, chosen together for one budget.

Importing the package is cheap: names are looked up on first use.
"""

from __future__ import annotations

from hwsim.lazy import lazy_exports

_EXPORTS = {
    "Alternation": "sweeps.codesign.alternation",
    "CoDesignSpace": "sweeps.codesign.settings",
    "Goal": "sweeps.codesign.settings",
    "alternate": "sweeps.codesign.alternation",
    "codesign": "sweeps.codesign.run",
    "load_codesign_space": "sweeps.codesign.settings",
    "parse_goal": "sweeps.codesign.settings",
}
__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
