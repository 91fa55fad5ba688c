"""compress: train a network into micro-structured blocks and hand it to the hardware.

Importing the package is cheap: names are looked up on first use, and torch is imported only by those that
need it.
"""

from __future__ import annotations

from hwsim.lazy import lazy_exports

_EXPORTS = {
    "ADMM": "compress.admm",
    "Allocation": "compress.rules",
    "Artifact": "compress.artifact",
    "Budget": "compress.budget",
    "Checkpoint": "compress.train",
    "CompressedLayer": "compress.layers",
    "CompressionConfig": "compress.rules",
    "CompressionResult": "compress.fit",
    "MaskedRetraining": "compress.retrain",
    "IntegerModel": "compress.integer.model",
    "OneShotRecipe": "compress.one_shot",
    "OneShotResult": "compress.one_shot",
    "Permutation": "compress.permute",
    "Plan": "compress.rules",
    "Progress": "compress.fit",
    "Recipe": "compress.rules",
    "Rule": "compress.rules",
    "allocate": "compress.allocation",
    "check_invariants": "compress.retrain",
    "build": "compress.zoo",
    "coarsen_within": "compress.rate_distortion",
    "compress": "compress.fit",
    "compress_checkpoint": "compress.rebuild",
    "compress_network": "compress.any_network",
    "compress_within": "compress.file_budget",
    "dequantize": "compress.quantize",
    "diagonal_fisher": "compress.curvature",
    "diagonal_hessian": "compress.curvature",
    "evaluate": "compress.train",
    "layer_shapes": "compress.shapes",
    "load_artifact": "compress.artifact",
    "load_checkpoint": "compress.train",
    "load_config": "compress.rules",
    "load_dataset": "compress.data",
    "parse_budget": "compress.budget",
    "parse_config": "compress.rules",
    "permute_channels": "compress.permute",
    "plan_layers": "compress.rules",
    "project": "compress.projection",
    "quantize_activations": "compress.integer.calibration",
    "save_artifact": "compress.artifact",
    "to_plain": "compress.plain",
}
__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
