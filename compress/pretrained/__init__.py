"""Real weights that ship in packages, with the architectures that they fit: see `hwsim models` and docs/networks.md."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "PRETRAINED": "compress.pretrained.catalog",
    "Pretrained": "compress.pretrained.loading",
    "find_weights": "compress.pretrained.catalog",
    "load_pretrained": "compress.pretrained.loading",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'compress.pretrained' has no attribute {name!r}")
