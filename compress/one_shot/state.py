"""Finished layers of a run on disk, one file each, so that a run that was stopped goes on after the last of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.container import read_container, write_container
from compress.layers import CompressedLayer
from compress.quantize import dequantize
from compress.rules import PlannedLayer
from compress.run_state import differences
from hwsim.errors import FormatError, InputError, Problem
from hwsim.layer import QuantizedWeights

__all__ = ["LayerError", "LayerFiles", "surroundings"]

FORMAT, VERSION = "hwsim-one-shot-layer", 1
_INTEGERS = ("dense", "signs", "magnitudes")


@dataclass(frozen=True)
class LayerError:
    """How well the outputs of a layer are kept on the calibration inputs.

    Attributes
    ----------
    layer : str
    projected_percent, reached_percent : float
        Squared error of the outputs as a share of their energy, with the plain projection of the original weights and with what
        was found (integers). Against the layer's target; the damping counts as inputs.
    iterations : int
        Of ADMM.
    is_settled : bool
        Whether types and signs had come to rest.
    is_fitted : bool
        False where the plain projection was taken, since with it the network's outputs are nearer to the original ones on the
        inputs that were held out.
    """

    layer: str
    projected_percent: float
    reached_percent: float
    iterations: int
    is_settled: bool
    is_fitted: bool


@dataclass(frozen=True, eq=False)
class LayerFiles:
    """The folder of a run; with None nothing is kept."""

    folder: Path | None
    identity: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | Path | None, identity: Mapping[str, Any]) -> LayerFiles:
        """Of a run with this identity: JSON values."""
        return cls(None if folder is None else Path(folder), identity)

    def _path(self, number: int) -> Path:
        assert self.folder is not None  # both callers looked
        return self.folder / f"one-shot-{number:04d}.safetensors"

    def write(
        self,
        number: int,
        layer: PlannedLayer,
        norm: nn.Module | None,
        compressed: CompressedLayer,
        error: LayerError | None,
    ) -> None:
        """A finished layer, with the bias and the normalisation that were changed with it."""
        if self.folder is None:
            return
        weights = compressed.weights
        arrays = {name: getattr(weights, name) for name in _INTEGERS} | {"types": compressed.types}
        arrays |= {
            f"around.{name}": values.cpu().numpy() for name, values in surroundings(layer, norm).items()
        }
        header = {
            "format": FORMAT,
            "version": VERSION,
            "layer": layer.name,
            "step_size": weights.step_size,
            "error": None if error is None else asdict(error),
            "identity": dict(self.identity),
        }
        write_container(self._path(number), header, arrays)

    def read(
        self, number: int, layer: PlannedLayer, norm: nn.Module | None
    ) -> tuple[CompressedLayer, LayerError | None] | None:
        """The layer as it was left, put into the network too; None where it was not reached.

        Raises
        ------
        FormatError
            Damaged, or not of this layer.
        InputError
            Of another run: all that differs is named.
        """
        if self.folder is None or not self._path(number).exists():
            return None
        path = self._path(number)
        header, arrays = read_container(path, FORMAT, VERSION)
        problems = list(differences(header.get("identity"), dict(self.identity)))
        if problems:
            raise InputError(str(path), problems)
        around = {f"around.{name}": values for name, values in surroundings(layer, norm).items()}
        if header.get("layer") != layer.name or set(arrays) != {*_INTEGERS, "types", *around}:
            raise FormatError(str(path), Problem("layer", f'does not hold "{layer.name}": damaged'))
        settings = layer.settings
        integers = QuantizedWeights(
            dense=arrays["dense"],
            signs=arrays["signs"],
            magnitudes=arrays["magnitudes"],
            weight_bits=settings.weight_bits,
            magnitude_bits=settings.magnitude_bits,
            step_size=float(header["step_size"]),
        )
        compressed = CompressedLayer(
            layer.name, settings.block, settings.column_order, np.asarray(arrays["types"], np.uint8), integers
        )
        with torch.no_grad():
            layer.module.get_parameter("weight").copy_(dequantize(compressed, layer.weight_shape))
            for name, values in around.items():
                values.copy_(torch.from_numpy(arrays[name].copy()))
        error = header["error"]
        return compressed, None if error is None else LayerError(**error)


def surroundings(layer: PlannedLayer, norm: nn.Module | None) -> dict[str, Tensor]:
    """What changes with a layer besides its weight."""
    bias = layer.module._parameters.get("bias")
    found: dict[str, Tensor] = {} if bias is None else {"bias": bias.detach()}
    if norm is not None:
        found |= {name: norm.get_buffer(name) for name in ("running_mean", "running_var")}
    return found
