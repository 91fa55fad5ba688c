"""Studies: lists of training runs whose results are kept one by one, and the page that is written from them.

Importing the package is cheap: names are looked up on first use, and torch is imported only by those that need it.
"""

from __future__ import annotations

from hwsim.lazy import lazy_exports

_EXPORTS = {
    "STUDIES": "sweeps.study.catalogue",
    "Run": "sweeps.study.runs",
    "StudyFolder": "sweeps.study.folder",
    "Training": "sweeps.study.runs",
    "execute": "sweeps.study.methods",
    "read_results": "sweeps.study.folder",
    "run_study": "sweeps.study.runner",
    "write_results_page": "sweeps.study.report",
}
__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
