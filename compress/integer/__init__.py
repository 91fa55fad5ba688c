"""The integer model: what the machine computes, to the last bit, and so the accuracy that it really has."""

from hwsim.lazy import lazy_exports

_EXPORTS = {
    "IntegerModel": "compress.integer.model",
    "IntegerOutput": "compress.integer.model",
    "LayerTrace": "compress.integer.arithmetic",
    "make_requantizer": "compress.integer.arithmetic",
    "quantize_activations": "compress.integer.calibration",
    "width_problems": "compress.integer.calibration",
}
__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
