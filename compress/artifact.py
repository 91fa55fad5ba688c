"""The compressed model as one file. NumPy only: reading it needs no torch.

``docs/formats.md`` has the layout.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from compress.codec import DEFAULT_MAX_WEIGHTS, decode_network, encode_network, section_sizes, state_size
from compress.container import container_bytes, package_versions, read_container, write_container
from compress.layers import Activations, CompressedLayer
from compress.packed import STREAM_PARTS, PackedLayer, read_packed_layer
from hwsim.errors import FormatError, InputError, Problem, nearest_name
from hwsim.layer import STREAMS, Layer, LayerShape
from hwsim.machine import validation_problems

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "MAX_SHIFT",
    "Activations",
    "Artifact",
    "DatasetNote",
    "artifact_size",
    "integer_weight",
    "load_artifact",
    "matrix_to_weight",
    "save_artifact",
]

ARTIFACT_FORMAT, ARTIFACT_VERSION = "hwsim-compressed", 2

MAX_SHIFT = 48
"""Largest shift of a requantiser. ``(acc + bias) · scale`` has at most 33 + 16 = 49 bits, so a longer shift
gives 0 always.
"""


# --- the model


@dataclass(frozen=True)
class DatasetNote:
    """What a model was trained and calibrated on.

    Attributes
    ----------
    name, source : str
    mean, deviation : float
        The normalisation: input = (pixel / 255 − mean) / deviation.
    """

    name: str
    source: str
    mean: float
    deviation: float


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compressed model as it lies on disk.

    Attributes
    ----------
    network : str
        Name in the zoo; empty for a network of the user's own.
    num_classes : int
    input_shape : tuple of int
        Of one input, without the batch.
    compressed : dict of str to CompressedLayer
        By module name.
    weight_shapes : dict of str to tuple of int
        Shape of each compressed module's weight.
    shapes : tuple of LayerShape
        In order of execution with one input; a module that runs twice appears twice.
    state : dict of str to array
        Every other parameter and buffer, under its name in the module's state dict; float32 where it is a
        float.
    activations : dict of str to Activations
        By module name; empty when activations were not calibrated.
    activation_bits, accumulator_bits : int
    seed : int
    recipe : dict
        The configuration of the compression, as JSON values.
    results : dict
        What was measured, as JSON values.
    dataset : DatasetNote or None
    packages : dict of str to str
        Versions of what wrote the file.
    """

    network: str
    num_classes: int
    input_shape: tuple[int, ...]
    compressed: dict[str, CompressedLayer]
    weight_shapes: dict[str, tuple[int, ...]]
    shapes: tuple[LayerShape, ...]
    state: dict[str, NDArray]
    activations: dict[str, Activations] = field(default_factory=dict)
    activation_bits: int = 8
    accumulator_bits: int = 32
    seed: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    dataset: DatasetNote | None = None
    packages: dict[str, str] = field(default_factory=package_versions)

    def layers(self, batch: int = 1) -> list[Layer]:
        """What the simulator takes, in order of execution.

        Parameters
        ----------
        batch : int
            Inputs that the machine works on at a time.
        """
        return [
            self.compressed[name].on_hardware(replace(shape, batch=shape.batch * batch))
            for shape in self.shapes
            if (name := _module_of(shape.name)) in self.compressed
        ]

    def integer_weight(self, name: str) -> NDArray[np.int32]:
        """``int32``: the integers of one module's weight, in the module's own shape."""
        return integer_weight(self.compressed[name], self.weight_shapes[name])

    def weight(self, name: str) -> NDArray[np.float32]:
        """``integer × step_size`` in float32: the weight of one module, bit for bit."""
        layer = self.compressed[name]
        return matrix_to_weight(layer.float_matrix(), self.weight_shapes[name], layer.column_order)

    def size_report(self, preset: str = "small") -> pd.DataFrame:
        """Bytes on disk by layer and stream; the rows add up to the file of `save_artifact`.

        Parameters
        ----------
        preset : {"small", "fast"}

        Returns
        -------
        DataFrame
            One row per compressed layer, one for all other tensors, one for the headers. Columns: ``layer``,
            ``weights`` (count), ``type_bytes``, ``sign_bytes``, ``magnitude_bytes``, ``dense_bytes``,
            ``other_bytes`` (frequency tables, checksums, requantiser; biases and normalisation; headers),
            ``total_bytes``, ``bits_per_weight``, ``ratio_to_fp32``, ``ratio_to_int8`` (weights in 4 bytes or 1 byte
            each over ``total_bytes``). The last three are NaN where there are no weights. Streams of a layer share
            entropy-coded words, and are charged by their ideal code lengths.
        """
        import pandas as pd

        header, tensors = _file_parts(self, preset)
        sections = section_sizes(self.compressed, self.weight_shapes, preset)
        rows = []
        for name, sizes in sections.items():
            streams = {f"{stream}_bytes": sizes[stream] for stream in (*STREAMS, "other")}
            rows.append({"layer": name, "weights": math.prod(self.weight_shapes[name]), **streams})
        nothing = {"weights": 0, **{f"{stream}_bytes": 0 for stream in STREAMS}}
        state_bytes = state_size(self.state)
        rows.append({"layer": "(biases and normalisation)", **nothing, "other_bytes": state_bytes})
        in_sections = sum(sum(sizes.values()) for sizes in sections.values())
        header_bytes = len(container_bytes(header, tensors)) - in_sections - state_bytes
        rows.append({"layer": "(headers)", **nothing, "other_bytes": header_bytes})
        table = pd.DataFrame(rows)
        table["total_bytes"] = table[[*(f"{stream}_bytes" for stream in STREAMS), "other_bytes"]].sum(axis=1)
        counts = table["weights"].where(table["weights"] > 0).astype("float64")
        table["bits_per_weight"] = 8 * table["total_bytes"] / counts
        table["ratio_to_fp32"] = 4 * counts / table["total_bytes"]
        table["ratio_to_int8"] = counts / table["total_bytes"]
        return table


def save_artifact(path: str | Path, artifact: Artifact, preset: str = "small") -> int:
    """Write a compressed model; gives the bytes of the file.

    Parameters
    ----------
    path : str or Path
        Replaced atomically.
    artifact : Artifact
    preset : {"small", "fast"}
        How hard the encoder tries (`compress.codec.PRESETS`). The integers are the same.

    Raises
    ------
    InputError
        Integers that do not fit their bits, parameters that are not finite, a full disk: nothing is written.

    Notes
    -----
    A network above the limit of `load_artifact` is written all the same, with a warning that says how to read it.
    """
    size_bytes = write_container(path, *_file_parts(artifact, preset))
    count = _parameters(artifact.weight_shapes.values(), artifact.state)
    if count > DEFAULT_MAX_WEIGHTS:
        message = (
            f"{path} holds {count:,} parameters, above the limit of {DEFAULT_MAX_WEIGHTS:,} for files of unknown origin: "
            f"load_artifact(path, max_weights={count}) reads it"
        )
        warnings.warn(message, stacklevel=2)
    return size_bytes


def _parameters(weight_shapes: Iterable[tuple[int, ...]], state: Mapping[str, NDArray]) -> int:
    return sum(map(math.prod, weight_shapes)) + sum(values.size for values in state.values())


def artifact_size(artifact: Artifact, preset: str = "small") -> int:
    """Bytes of the file that `save_artifact` would write."""
    return len(container_bytes(*_file_parts(artifact, preset)))


def load_artifact(path: str | Path, max_weights: int = DEFAULT_MAX_WEIGHTS) -> Artifact:
    """Read a compressed model of any version and check all of it.

    Parameters
    ----------
    path : str or Path
    max_weights : int
        A file that announces more is refused before memory is asked for.

    Raises
    ------
    FormatError
        Truncated, damaged, edited, of another kind or version, or inconsistent in itself.
    InputError
        The file cannot be read at all.
    """
    plain, tensors = read_container(path, ARTIFACT_FORMAT, 1, ARTIFACT_VERSION)
    source = str(path)
    content = (
        _read_packed(plain, tensors, source, max_weights)
        if plain
        else _read_coded(tensors, source, max_weights)
    )
    header = content.header
    artifact = Artifact(
        network=header.network,
        num_classes=header.num_classes,
        input_shape=header.input_shape,
        compressed=content.layers,
        weight_shapes=content.weight_shapes,
        shapes=header.shapes,
        state=content.state,
        activations=content.activations,
        activation_bits=header.activation_bits,
        accumulator_bits=header.accumulator_bits,
        seed=header.seed,
        recipe=dict(header.recipe),
        results=dict(header.results),
        dataset=header.dataset,
        packages=header.packages,
    )
    problems = list(_problems(artifact))
    if problems:
        raise FormatError(source, problems)
    return artifact


# --- from the model to header and tensors, and back

STATE = "state/"
HEADER, WEIGHTS = "header", "weights"
MAX_HEADER_BYTES = 1 << 26
"""Of the unpacked header: far above what any network needs, far below what hurts."""

REQUANTIZER_DTYPES = {"bias": np.dtype(np.int32), "scale": np.dtype(np.int16), "shift": np.dtype(np.uint8)}

Size = Annotated[int, Field(strict=True, ge=1)]
Bits = Annotated[int, Field(strict=True, ge=1, le=62)]


class _Header(BaseModel):
    """What both versions say of a network."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    network: str
    num_classes: Size
    input_shape: tuple[Size, ...]
    seed: int
    activation_bits: Annotated[int, Field(strict=True, ge=2, le=16)]
    accumulator_bits: Bits
    dataset: DatasetNote | None
    recipe: dict[str, JsonValue]
    results: dict[str, JsonValue]
    packages: dict[str, str]
    shapes: tuple[LayerShape, ...]


class _CodedHeader(_Header):
    activations: dict[str, Activations]


class _PackedHeader(_Header):
    layers: tuple[PackedLayer, ...]


@dataclass(frozen=True, eq=False)
class _Content:
    """What a file holds, whatever its version."""

    header: _Header
    layers: dict[str, CompressedLayer]
    weight_shapes: dict[str, tuple[int, ...]]
    state: dict[str, NDArray]
    activations: dict[str, Activations]


def _file_parts(artifact: Artifact, preset: str) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Header and tensors of an artifact, checked."""
    problems = list(_problems(artifact))
    if problems:
        raise InputError("compressed model", problems)
    header = {
        "network": artifact.network,
        "num_classes": artifact.num_classes,
        "input_shape": artifact.input_shape,
        "seed": artifact.seed,
        "activation_bits": artifact.activation_bits,
        "accumulator_bits": artifact.accumulator_bits,
        "dataset": asdict(artifact.dataset) if artifact.dataset else None,
        "recipe": artifact.recipe,
        "results": artifact.results,
        "packages": artifact.packages,
        "activations": {name: asdict(scales) for name, scales in artifact.activations.items()},
        "shapes": [asdict(shape) for shape in artifact.shapes],
    }
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    weights = encode_network(artifact.compressed, artifact.weight_shapes, artifact.state, preset)
    tensors = {
        HEADER: np.frombuffer(zlib.compress(text, 9), np.uint8),
        WEIGHTS: np.frombuffer(weights, np.uint8),
    }
    return {"format": ARTIFACT_FORMAT, "version": ARTIFACT_VERSION}, tensors


def _read_coded(tensors: Mapping[str, NDArray], source: str, max_weights: int) -> _Content:
    """Version 2: a deflated header, and the byte string of `compress.codec`."""
    problems = [
        Problem(name, "is missing or no byte string")
        for name in (HEADER, WEIGHTS)
        if name not in tensors or tensors[name].dtype != np.uint8 or tensors[name].ndim != 1
    ]
    problems += [Problem(name, "unknown tensor") for name in tensors if name not in (HEADER, WEIGHTS)]
    if problems:
        raise FormatError(source, problems)
    engine = zlib.decompressobj()
    try:
        text = engine.decompress(tensors[HEADER].tobytes(), MAX_HEADER_BYTES)
    except zlib.error as error:
        raise FormatError(source, Problem(HEADER, str(error))) from None
    if not engine.eof or engine.unused_data:
        raise FormatError(source, Problem(HEADER, f"longer than {MAX_HEADER_BYTES:,} bytes, or cut short"))
    header = _parse(_CodedHeader, text, source)
    found = decode_network(tensors[WEIGHTS].data, source, max_weights)
    return _Content(header, found.layers, found.weight_shapes, found.state, header.activations)


def _read_packed(
    plain: Mapping[str, Any], tensors: Mapping[str, NDArray], source: str, max_weights: int
) -> _Content:
    """Version 1: a plain header, and one tensor per stream."""
    header = _parse(_PackedHeader, json.dumps(plain).encode(), source)
    announced = _parameters((part.weight_shape for part in header.layers), {})
    if announced > max_weights:
        message = f"{announced:,} weights announced, more than {max_weights:,}"
        raise FormatError(source, Problem("layers", message))
    problems: list[Problem] = []
    layers: dict[str, CompressedLayer] = {}
    for part in header.layers:
        try:
            layers[part.name] = read_packed_layer(part, tensors)
        except InputError as error:
            problems += [
                Problem(f"{part.name}.{problem.field}", problem.message) for problem in error.problems
            ]
    known = {f"layers/{part.name}/{stream}" for part in header.layers for stream in STREAM_PARTS}
    problems += [
        Problem(key, "unknown tensor") for key in tensors if key not in known and not key.startswith(STATE)
    ]
    if problems:
        raise FormatError(source, problems)
    return _Content(
        header,
        layers,
        {part.name: part.weight_shape for part in header.layers},
        {key.removeprefix(STATE): values for key, values in tensors.items() if key.startswith(STATE)},
        {part.name: part.activations for part in header.layers if part.activations is not None},
    )


_H = TypeVar("_H", bound=_Header)


def _parse(kind: type[_H], text: bytes, source: str) -> _H:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise FormatError(source, validation_problems(error, kind)) from None


def _problems(artifact: Artifact) -> Iterator[Problem]:
    """What is inconsistent in an artifact, whether it comes from a file or goes into one."""
    for field_name in ("recipe", "results"):
        try:
            json.dumps(getattr(artifact, field_name), allow_nan=False)
        except (TypeError, ValueError) as error:
            yield Problem(field_name, f"holds what JSON cannot: {error}")
    for name, layer in artifact.compressed.items():
        if name not in artifact.weight_shapes:
            yield Problem(name, "has no weight shape")
            continue
        yield from _layer_problems(name, layer, artifact.weight_shapes[name])
    for shape in artifact.shapes:
        name = _module_of(shape.name)
        if name not in artifact.compressed:
            continue
        gemm = _gemm_shape(name, artifact.weight_shapes[name], len(artifact.compressed[name].types))
        found, expected = ((part.groups, part.m, part.k) for part in (shape, gemm))
        if found != expected:
            yield Problem(f"shapes.{shape.name}", f"groups, m, k = {found}, the weight says {expected}")
    for name, values in artifact.state.items():
        if values.dtype.kind == "f" and (values.dtype != np.float32 or not np.isfinite(values).all()):
            yield Problem(f"{STATE}{name}", f"{values.dtype}, must be finite float32", "a diverged training?")
    for name, scales in artifact.activations.items():
        if name not in artifact.compressed:
            yield Problem(f"activations.{name}", "no such layer", nearest_name(name, artifact.compressed))
        if not all(0 < scale < float("inf") for scale in (scales.input_scale, scales.output_scale)):
            yield Problem(f"activations.{name}", f"{scales}, scales must be positive and finite")


def _layer_problems(name: str, layer: CompressedLayer, weight_shape: tuple[int, ...]) -> Iterator[Problem]:
    weights = layer.weights
    try:
        shape = _gemm_shape(name, weight_shape, len(layer.types))
        layer.on_hardware(shape)
    except InputError as error:
        yield from error.problems
        return
    per_weight = (shape.groups, shape.m, shape.k)
    expected = {"dense": per_weight, "signs": per_weight, "magnitudes": layer.types.shape}
    low, high = -(1 << (weights.weight_bits - 1)), (1 << (weights.weight_bits - 1)) - 1
    bounds = {"dense": (low, high), "signs": (0, 1), "magnitudes": (0, (1 << weights.magnitude_bits) - 1)}
    for part, (least, most) in bounds.items():
        values = getattr(weights, part)
        if values.shape != expected[part]:
            yield Problem(f"{name}.{part}", f"shape {values.shape}, must be {expected[part]}")
        elif values.min() < least or values.max() > most:
            yield Problem(
                f"{name}.{part}", f"{values.min()} to {values.max()}, must lie in {least} to {most}"
            )
    if not 0 < weights.step_size < float("inf"):
        yield Problem(f"{name}.step_size", f"{weights.step_size}, must be positive and finite")
    if weights.requantizer is None:
        return
    for part, dtype in REQUANTIZER_DTYPES.items():
        values = getattr(weights.requantizer, part)
        if values.dtype != dtype or values.shape != (shape.out_channels,):
            yield Problem(
                f"{name}.requantizer.{part}",
                f"{values.dtype}{list(values.shape)}, must be {dtype}[{shape.out_channels}]",
            )
        elif part == "shift" and values.max() > MAX_SHIFT:
            yield Problem(f"{name}.requantizer.shift", f"{values.max()}, must not exceed {MAX_SHIFT}")


def integer_weight(layer: CompressedLayer, weight_shape: tuple[int, ...]) -> NDArray[np.int32]:
    """``int32[weight_shape]``: the integers of a compressed module's weight.

    Raises
    ------
    InputError
        The layer's block types do not fit such a weight.
    """
    matrix = layer.on_hardware(_gemm_shape(layer.name, weight_shape, len(layer.types))).integer_matrix()
    return matrix_to_weight(matrix, weight_shape, layer.column_order)


def matrix_to_weight(
    matrix: NDArray, weight_shape: tuple[int, ...], column_order: Literal["tap_major", "channel_major"]
) -> NDArray:
    """``[groups, m, k]`` to the shape of the module's weight (the NumPy twin of
    `compress.blocks.matrix_to_weight`); it may share memory with the matrix.

    Examples
    --------
    >>> matrix_to_weight(np.array([[[0, 3, 1, 4, 2, 5]]]), (1, 2, 3), "tap_major").tolist()
    [[[0, 1, 2], [3, 4, 5]]]
    """
    out_channels, in_channels, *kernel = weight_shape
    if column_order == "channel_major" or not kernel:
        return matrix.reshape(weight_shape)
    # A copy also where the order in memory is the same: torch takes the strides of a single channel for a layout.
    return np.moveaxis(matrix.reshape(out_channels, *kernel, in_channels), -1, 1).copy()


def _gemm_shape(name: str, weight_shape: tuple[int, ...], groups: int) -> LayerShape:
    """A geometry with the m, k and groups of a weight; sizes that the weight does not show are arbitrary."""
    out_channels, in_channels, *kernel = weight_shape
    if not kernel:
        return LayerShape(name, "linear", in_channels, out_channels)
    ones = (1,) * len(kernel)
    return LayerShape(
        name,
        "conv",
        in_channels * groups,
        out_channels,
        input_size=tuple(kernel),
        kernel=tuple(kernel),
        stride=ones,
        padding=((0, 0),) * len(kernel),
        dilation=ones,
        groups=groups,
    )


def _module_of(layer_name: str) -> str:
    """Second and later uses of a module carry a mark behind its name (`compress.shapes.layer_shapes`)."""
    return layer_name.split("#")[0]
