"""Studies: lists of training runs whose results are kept one by one, and the page that is written from them.

Importing the package is cheap: names are looked up on first use, and torch is imported only by those that need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

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


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'sweeps.study' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
