"""One-shot compression: layer after layer against the Hessian of calibration inputs, without training."""

from typing import Any

_EXPORTS = {
    "LayerError": "compress.one_shot.network",
    "OneShotRecipe": "compress.one_shot.recipe",
    "OneShotResult": "compress.one_shot.network",
    "one_shot": "compress.one_shot.network",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
