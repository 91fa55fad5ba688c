"""The compressed form of one layer of a network: what the method hands to the artifact and to the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hwsim.layer import Layer, LayerShape, QuantizedWeights

__all__ = ["Activations", "CompressedLayer"]


_CHUNK_ENTRIES = 1 << 16
"""Entries of `CompressedLayer.float_matrix` that are filled together."""


@dataclass(frozen=True, eq=False)
class CompressedLayer:
    """Block types and integers of one Linear or convolution module.

    Attributes
    ----------
    name : str
        The module's name in the network (``"features.0"``).
    block : tuple of int
        ``(g_o, g_k)``.
    column_order : {"tap_major", "channel_major"}
    types : uint8 array ``[groups, Mb, Kb]``
    weights : QuantizedWeights
        Effective weight = integer × ``step_size`` in float32.
    """

    name: str
    block: tuple[int, int]
    column_order: Literal["tap_major", "channel_major"]
    types: NDArray[np.uint8]
    weights: QuantizedWeights

    def float_matrix(self) -> NDArray[np.float32]:
        """``float32[groups, m, k]``: integer × float32(``step_size``)."""
        weights = self.weights
        groups, m, k = weights.dense.shape
        values = np.empty((groups, m, k), np.float32)
        block_rows = max(1, _CHUNK_ENTRIES // (self.block[0] * k))
        for group in range(groups):
            for first in range(0, self.types.shape[1], block_rows):
                rows = slice(first * self.block[0], (first + block_rows) * self.block[0])
                self._fill(values[group, rows], group, rows, slice(first, first + block_rows))
        return values

    def _fill(self, values: NDArray[np.float32], group: int, rows: slice, block_rows: slice) -> None:
        """Some rows of `float_matrix`: temporaries are of a few rows and stay in the cache."""
        weights, (g_o, g_k) = self.weights, self.block
        magnitudes = weights.magnitudes[group, block_rows]
        values[...] = weights.dense[group, rows]
        if magnitudes.any():
            wide = magnitudes.astype(np.float32).repeat(g_k, axis=1)[:, : values.shape[1]]
            shared = wide.repeat(g_o, axis=0)[: len(values)]
            # The sign bit of a float is its highest; adding to 0 or to a dense 0 makes a −0 a +0.
            signs = weights.signs[group, rows].astype(np.uint32)
            signs <<= np.uint32(31)
            bits = shared.view(np.uint32)
            bits ^= signs
            values += shared
        values *= np.float32(weights.step_size)

    def on_hardware(self, shape: LayerShape) -> Layer:
        """The layer as the simulator takes it, with the geometry that a forward pass showed."""
        return Layer(shape, self.block, self.types, self.weights, self.column_order)


@dataclass(frozen=True)
class Activations:
    """Scales and surroundings of a layer in the integer model: real value = integer × scale.

    Attributes
    ----------
    input_scale, output_scale : float
        Of the tensor that the layer reads, and of the one that its requantiser writes.
    norm : str
        Module of the batch normalisation that the requantiser carries out; empty where there is none.
    nonlinearity : {"none", "relu", "relu6"}
        What the requantiser applies. relu6 is a relu whose output scale makes the largest integer at most 6.
    producer : str
        The layer whose integers are read as they are; empty where a float tensor is quantised first.
    """

    input_scale: float
    output_scale: float
    norm: str = ""
    nonlinearity: Literal["none", "relu", "relu6"] = "none"
    producer: str = ""
