"""hwsim: a cycle, energy, bandwidth and storage model of the block-skip accelerator.

Importing the package is cheap: names are looked up on first use, and torch is never imported from here.
"""

from __future__ import annotations

from hwsim.lazy import lazy_exports

__version__ = "0.1.0"

_EXPORTS = {
    "Comparison": "hwsim.comparison.table",
    "FitError": "hwsim.errors",
    "FormatError": "hwsim.errors",
    "HwsimError": "hwsim.errors",
    "InputError": "hwsim.errors",
    "Layer": "hwsim.layer",
    "LayerShape": "hwsim.layer",
    "Machine": "hwsim.machine",
    "Report": "hwsim.report",
    "compare": "hwsim.comparison.side_by_side",
    "load_machine": "hwsim.machine",
    "preset_names": "hwsim.machine",
    "simulate": "hwsim.simulator",
}
__all__ = ["__version__", *sorted(_EXPORTS)]
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS, ("__version__",))
