"""sweeps: design spaces, the result store, Pareto fronts, figures and the report.

Importing the package is cheap: names are looked up on first use.
"""

from __future__ import annotations

from hwsim.lazy import lazy_exports

_EXPORTS = {
    "Plot": "sweeps.figures",
    "Point": "sweeps.space",
    "ResultStore": "sweeps.store",
    "Space": "sweeps.space",
    "hypervolume": "sweeps.pareto",
    "knee_point": "sweeps.pareto",
    "load_space": "sweeps.space",
    "machine_for_block": "sweeps.space",
    "paper_figures": "sweeps.figures",
    "pareto_front": "sweeps.pareto",
    "run_sweep": "sweeps.runner",
    "save_plot": "sweeps.figures",
    "write_report": "sweeps.html",
}
__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
