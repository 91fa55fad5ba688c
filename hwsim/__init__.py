"""hwsim: a cycle, energy, bandwidth and storage model of the block-skip accelerator.

Importing the package is cheap: names are looked up on first use, and torch is never imported from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

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


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hwsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
