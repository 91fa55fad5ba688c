"""One-shot compression: layer after layer against the Hessian of calibration inputs, without training."""

from hwsim.lazy import lazy_exports

_EXPORTS = {
    "LayerError": "compress.one_shot.state",
    "OneShotRecipe": "compress.one_shot.recipe",
    "OneShotResult": "compress.one_shot.network",
    "one_shot": "compress.one_shot.network",
}
__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
