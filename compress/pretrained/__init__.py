"""Real weights that ship in packages, with the architectures that they fit: see `hwsim models` and docs/networks.md."""

from __future__ import annotations

from hwsim.lazy import lazy_exports

_EXPORTS = {
    "PRETRAINED": "compress.pretrained.catalog",
    "Pretrained": "compress.pretrained.loading",
    "find_weights": "compress.pretrained.catalog",
    "load_pretrained": "compress.pretrained.loading",
}
__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
