"""The compressed model as one file, and the container that every model file of the project uses. NumPy only.

The container is a safetensors file whose only metadata entry is a JSON header. The header carries a SHA-256
over the whole file (the digest itself read as zeros), so that a single changed byte anywhere is noticed.
``docs/formats.md`` has the layout.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from compress.layers import CompressedLayer
from hwsim.errors import FormatError, InputError, Problem, nearest_name
from hwsim.files import write_atomically
from hwsim.layer import DENSE, STREAMS, UNIFIED, Layer, LayerShape, QuantizedWeights, Requantizer, check_types
from hwsim.machine import validation_problems

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "MAX_SHIFT",
    "Activations",
    "Artifact",
    "DatasetNote",
    "check_writable",
    "integer_weight",
    "load_artifact",
    "matrix_to_weight",
    "pack_bits",
    "package_versions",
    "read_container",
    "save_artifact",
    "unpack_bits",
    "write_container",
]

ARTIFACT_FORMAT, ARTIFACT_VERSION = "hwsim-compressed", 1

MAX_SHIFT = 48
"""Largest shift of a requantiser. ``(acc + bias) · scale`` has at most 33 + 16 = 49 bits, so a longer shift
gives 0 always.
"""

METADATA_KEY = "hwsim"
WRONG_FORMAT_HINTS = {
    "hwsim-dense": "a dense network; `hwsim compress` makes a compressed model of it",
    "hwsim-compressed": "a compressed model already; this wants the dense network that `hwsim train` wrote",
}
# The header is a JSON string inside the JSON of safetensors, so its quotes are escaped.
DIGEST_PATTERN = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
NO_DIGEST = "0" * 64
CHUNK_VALUES = 1 << 20


# --- the container


def check_writable(path: str | Path) -> None:
    """Refuse a path that cannot be written, before the work whose result goes there.

    Raises
    ------
    InputError
        The path is a folder, or its folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(path), f"cannot be written: {error.strerror or error}") from error
    if path.is_dir():
        raise InputError(str(path), "cannot be written: is a folder")
    if not os.access(path.parent, os.W_OK):
        raise InputError(str(path), "cannot be written: no permission to write the folder")


def container_bytes(header: Mapping[str, Any], tensors: Mapping[str, NDArray]) -> bytes:
    """The content of a container file; the same header and tensors always give the same bytes."""
    text = json.dumps({"sha256": NO_DIGEST, **header}, allow_nan=False, separators=(",", ":"))
    arrays = {name: np.asarray(values, order="C") for name, values in tensors.items()}
    content = safetensors.numpy.save(arrays, metadata={METADATA_KEY: text})
    digest, (start, stop) = _digest(content)
    return b"".join((content[:start], digest.encode(), content[stop:]))


def write_container(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, NDArray]) -> int:
    """Write a container file atomically; gives its size in bytes.

    Parameters
    ----------
    path : str or Path
    header : mapping
        JSON values, with ``format`` (str) and ``version`` (int).
    tensors : mapping of str to array

    Raises
    ------
    InputError
        The file cannot be written.
    """
    content = container_bytes(header, tensors)
    write_atomically(path, content)
    return len(content)


def read_container(
    path: str | Path, format_name: str, version: int
) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Header (without its digest) and tensors of a container file, checked byte for byte.

    Raises
    ------
    FormatError
        Truncated, damaged, edited, not of this format, or of a version that this program does not read.
    InputError
        The file cannot be read at all.
    """
    source = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(source, f"cannot be read: {error.strerror or error}") from None
    header = _read_header(content, source)
    found = header.pop("format", None)
    if found != format_name:
        hint = WRONG_FORMAT_HINTS.get(str(found), "")
        raise FormatError(source, Problem("format", f'"{found}", must be "{format_name}"', hint))
    found = header.pop("version", None)
    if found != version:
        raise FormatError(source, Problem("version", f"{found}; this program reads version {version}"))
    try:
        return header, dict(sorted(safetensors.numpy.load(content).items()))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError(source, f"not a valid safetensors file: {error}") from None


def _read_header(content: bytes, source: str) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or len(content) < 8 + length:
        raise FormatError(source, f"{len(content)} bytes: truncated, or not a safetensors file")
    try:
        outer = json.loads(content[8 : 8 + length])
        header = json.loads(outer["__metadata__"][METADATA_KEY])
        stored = header.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(
            source, "has no readable hwsim header: damaged, or written by another program"
        ) from None
    digest, _ = _digest(content)
    if stored != digest:
        raise FormatError(
            source,
            Problem(
                "sha256", f"header says {stored}, content gives {digest}: the file was damaged or edited"
            ),
        )
    return header


def _digest(content: bytes) -> tuple[str, tuple[int, int]]:
    """SHA-256 of the file with its digest read as zeros, and where that digest stands."""
    length = int.from_bytes(content[:8], "little")
    place = DIGEST_PATTERN.search(content, 8, 8 + length)
    if place is None:
        return "", (0, 0)
    start, stop = place.span(1)
    view = memoryview(content)
    digest = hashlib.sha256(view[:start])
    digest.update(NO_DIGEST.encode())
    digest.update(view[stop:])
    return digest.hexdigest(), (start, stop)


def package_versions() -> dict[str, str]:
    """Versions of what shaped a model file, for its header."""
    names = ("hwsim", "torch", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


# --- integers of a few bits


def pack_bits(values: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """Integers of ``bits`` bits one after the other, least significant bit first; the last byte is filled
    with zeros.

    Parameters
    ----------
    values : integer array ``[n]``
        The low ``bits`` bits of each are stored (two's complement for negative ones).
    bits : int
        1 to 16.

    Returns
    -------
    uint8 array ``[ceil(n · bits / 8)]``

    Examples
    --------
    >>> pack_bits(np.array([1, 2, 3, 0, 2]), 2).tolist()
    [57, 2]
    """
    parts = [np.zeros(0, np.uint8)]
    for start in range(0, len(values), CHUNK_VALUES):
        part = values[start : start + CHUNK_VALUES].astype("<i4").astype("<u2")
        planes = np.unpackbits(part.view(np.uint8).reshape(-1, 2), axis=1, count=bits, bitorder="little")
        parts.append(np.packbits(planes, bitorder="little"))
    return np.concatenate(parts)


def unpack_bits(stream: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint16]:
    """The inverse of `pack_bits`, unsigned: uint16 array ``[count]``.

    Examples
    --------
    >>> unpack_bits(np.array([57, 2], np.uint8), 5, 2).tolist()
    [1, 2, 3, 0, 2]
    """
    values = np.zeros(count, "<u2")
    for start in range(0, count, CHUNK_VALUES):
        stop = min(start + CHUNK_VALUES, count)
        part = stream[start * bits // 8 : -(-stop * bits // 8)]
        planes = np.unpackbits(part, count=(stop - start) * bits, bitorder="little").reshape(-1, bits)
        packed = np.packbits(planes, axis=1, bitorder="little")
        bytes_of = values[start:stop].view(np.uint8).reshape(-1, 2)
        bytes_of[:, : packed.shape[1]] = packed
    return values.astype(np.uint16)


# --- the model


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
        return self.integer_weight(name).astype(np.float32) * np.float32(
            self.compressed[name].weights.step_size
        )

    def size_report(self) -> pd.DataFrame:
        """Bytes on disk by layer and stream; the rows add up to the file.

        Returns
        -------
        DataFrame
            One row per compressed layer, one for all other tensors, one for the headers. Columns: ``layer``,
            ``weights`` (count), ``type_bytes``, ``sign_bytes``, ``magnitude_bytes``, ``dense_bytes``,
            ``other_bytes`` (requantiser; biases and normalisation; headers), ``total_bytes``,
            ``bits_per_weight``, ``ratio_to_fp32``, ``ratio_to_int8`` (weights in 4 bytes or 1 byte each over
            ``total_bytes``). The last three are NaN where there are no weights.
        """
        import pandas as pd

        header, tensors = _file_parts(self)
        rows = []
        sizes = {key: values.nbytes for key, values in tensors.items()}
        state_bytes = sum(size for key, size in sizes.items() if key.startswith(STATE))
        for name in self.compressed:
            streams = {f"{stream}_bytes": sizes.get(_key(name, stream), 0) for stream in STREAMS}
            requantizer_bytes = sum(sizes.get(_key(name, part), 0) for part in REQUANTIZER_DTYPES)
            weights = math.prod(self.weight_shapes[name])
            rows.append({"layer": name, "weights": weights, **streams, "other_bytes": requantizer_bytes})
        nothing = {"weights": 0, **{f"{stream}_bytes": 0 for stream in STREAMS}}
        rows.append({"layer": "(biases and normalisation)", **nothing, "other_bytes": state_bytes})
        header_bytes = len(container_bytes(header, tensors)) - sum(sizes.values())
        rows.append({"layer": "(headers)", **nothing, "other_bytes": header_bytes})
        table = pd.DataFrame(rows)
        table["total_bytes"] = table[[*(f"{stream}_bytes" for stream in STREAMS), "other_bytes"]].sum(axis=1)
        counts = table["weights"].where(table["weights"] > 0).astype("float64")
        table["bits_per_weight"] = 8 * table["total_bytes"] / counts
        table["ratio_to_fp32"] = 4 * counts / table["total_bytes"]
        table["ratio_to_int8"] = counts / table["total_bytes"]
        return table


def save_artifact(path: str | Path, artifact: Artifact) -> int:
    """Write a compressed model; gives the bytes of the file.

    Parameters
    ----------
    path : str or Path
        Replaced atomically.
    artifact : Artifact

    Raises
    ------
    InputError
        Integers that do not fit their bits, parameters that are not finite, a full disk: nothing is written.
    """
    return write_container(path, *_file_parts(artifact))


def load_artifact(path: str | Path) -> Artifact:
    """Read a compressed model and check all of it.

    Raises
    ------
    FormatError
        Truncated, damaged, edited, of another kind or version, or inconsistent in itself.
    InputError
        The file cannot be read at all.
    """
    header, tensors = read_container(path, ARTIFACT_FORMAT, ARTIFACT_VERSION)
    source = str(path)
    try:
        parsed = _Header.model_validate_json(json.dumps(header))
    except ValidationError as error:
        raise FormatError(source, validation_problems(error, _Header)) from None
    problems: list[Problem] = []
    compressed: dict[str, CompressedLayer] = {}
    for part in parsed.layers:
        try:
            compressed[part.name] = _read_layer(part, tensors)
        except InputError as error:
            problems += [
                Problem(f"{part.name}.{problem.field}", problem.message) for problem in error.problems
            ]
    known = {_key(part.name, stream) for part in parsed.layers for stream in (*STREAMS, *REQUANTIZER_DTYPES)}
    state = {key.removeprefix(STATE): values for key, values in tensors.items() if key.startswith(STATE)}
    problems += [
        Problem(key, "unknown tensor") for key in tensors if key not in known and not key.startswith(STATE)
    ]
    if problems:
        raise FormatError(source, problems)
    artifact = Artifact(
        network=parsed.network,
        num_classes=parsed.num_classes,
        input_shape=parsed.input_shape,
        compressed=compressed,
        weight_shapes={part.name: part.weight_shape for part in parsed.layers},
        shapes=parsed.shapes,
        state=state,
        activations={part.name: part.activations for part in parsed.layers if part.activations is not None},
        activation_bits=parsed.activation_bits,
        accumulator_bits=parsed.accumulator_bits,
        seed=parsed.seed,
        recipe=dict(parsed.recipe),
        results=dict(parsed.results),
        dataset=parsed.dataset,
        packages=parsed.packages,
    )
    problems = list(_problems(artifact))
    if problems:
        raise FormatError(source, problems)
    return artifact


# --- from the model to header and tensors, and back

STATE = "state/"
REQUANTIZER_DTYPES = {"bias": np.dtype(np.int32), "scale": np.dtype(np.int16), "shift": np.dtype(np.uint8)}

Size = Annotated[int, Field(strict=True, ge=1)]
Bits = Annotated[int, Field(strict=True, ge=1, le=62)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _LayerPart(_Part):
    """What the streams of a layer do not say themselves."""

    name: Annotated[str, Field(min_length=1)]
    weight_shape: Annotated[tuple[Size, ...], Field(min_length=2)]
    groups: Size
    block: tuple[Size, Size]
    column_order: Literal["tap_major", "channel_major"]
    type_bits: Literal[1, 2]
    weight_bits: Annotated[int, Field(strict=True, ge=2, le=16)]
    magnitude_bits: Annotated[int, Field(strict=True, ge=1, le=16)]
    step_size: Annotated[float, Field(gt=0)]
    relu: bool | None
    activations: Activations | None


class _Header(_Part):
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
    layers: tuple[_LayerPart, ...]
    shapes: tuple[LayerShape, ...]


def _file_parts(artifact: Artifact) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Header and tensors of an artifact, checked."""
    problems = list(_problems(artifact))
    if problems:
        raise InputError("compressed model", problems)
    tensors: dict[str, NDArray] = {}
    parts = []
    for name, layer in artifact.compressed.items():
        weights, shape = layer.weights, artifact.weight_shapes[name]
        type_bits = 2 if (layer.types == DENSE).any() else 1
        tensors |= {_key(name, stream): values for stream, values in _streams(layer, shape, type_bits)}
        parts.append(
            {
                "name": name,
                "weight_shape": shape,
                "groups": len(layer.types),
                "block": layer.block,
                "column_order": layer.column_order,
                "type_bits": type_bits,
                "weight_bits": weights.weight_bits,
                "magnitude_bits": weights.magnitude_bits,
                "step_size": weights.step_size,
                "relu": weights.requantizer.relu if weights.requantizer else None,
                "activations": asdict(artifact.activations[name]) if name in artifact.activations else None,
            }
        )
    tensors |= {STATE + name: values for name, values in artifact.state.items()}
    header = {
        "format": ARTIFACT_FORMAT,
        "version": ARTIFACT_VERSION,
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
        "layers": parts,
        "shapes": [asdict(shape) for shape in artifact.shapes],
    }
    return header, tensors


def _streams(layer: CompressedLayer, shape: tuple[int, ...], type_bits: int) -> Iterator[tuple[str, NDArray]]:
    """The streams that a layer has: those without an entry are left out."""
    weights = layer.weights
    per_weight = _per_weight(layer.types, layer.block, _gemm_shape(layer.name, shape, len(layer.types)))
    packed = {
        "type": pack_bits(layer.types.ravel(), type_bits),
        "sign": pack_bits(weights.signs[per_weight == UNIFIED], 1),
        "magnitude": pack_bits(weights.magnitudes[layer.types == UNIFIED], weights.magnitude_bits),
        "dense": pack_bits(weights.dense[per_weight == DENSE], weights.weight_bits),
    }
    yield from ((stream, values) for stream, values in packed.items() if values.size)
    if weights.requantizer is not None:
        yield from ((name, getattr(weights.requantizer, name)) for name in REQUANTIZER_DTYPES)


def _read_layer(part: _LayerPart, tensors: Mapping[str, NDArray]) -> CompressedLayer:
    """One layer from its header and streams.

    Raises
    ------
    InputError
        A stream that is missing, of a wrong type or of a wrong length; a type code above 2.
    """

    def take(stream: str, count: int, bits: int) -> NDArray[np.uint16]:
        found = tensors.get(_key(part.name, stream), np.zeros(0, np.uint8))
        expected = -(-count * bits // 8)
        if found.dtype != np.uint8 or found.shape != (expected,):
            message = f"{found.dtype}{list(found.shape)}, must be uint8[{expected}]: {count} × {bits} bits"
            raise InputError(part.name, Problem(stream, message))
        return unpack_bits(found, count, bits)

    shape = _gemm_shape(part.name, part.weight_shape, part.groups)
    grid = (part.groups, *shape.blocks(part.block))
    types = take("type", int(np.prod(grid)), part.type_bits).astype(np.uint8).reshape(grid)
    check_types(types, part.name)
    per_weight = _per_weight(types, part.block, shape)
    unified, dense = per_weight == UNIFIED, per_weight == DENSE
    signs = np.zeros(per_weight.shape, np.uint8)
    signs[unified] = take("sign", int(unified.sum()), 1)
    magnitudes = np.zeros(grid, np.uint16)
    magnitudes[types == UNIFIED] = take("magnitude", int((types == UNIFIED).sum()), part.magnitude_bits)
    integers = np.zeros(per_weight.shape, np.int16)
    sign_bit = 1 << (part.weight_bits - 1)
    integers[dense] = (
        take("dense", int(dense.sum()), part.weight_bits).astype(np.int32) ^ sign_bit
    ) - sign_bit
    weights = QuantizedWeights(
        dense=integers,
        signs=signs,
        magnitudes=magnitudes,
        weight_bits=part.weight_bits,
        magnitude_bits=part.magnitude_bits,
        step_size=part.step_size,
        requantizer=_read_requantizer(part, tensors),
    )
    return CompressedLayer(part.name, part.block, part.column_order, types, weights)


def _read_requantizer(part: _LayerPart, tensors: Mapping[str, NDArray]) -> Requantizer | None:
    found = {
        name: tensors[_key(part.name, name)]
        for name in REQUANTIZER_DTYPES
        if _key(part.name, name) in tensors
    }
    if part.relu is None and not found:
        return None
    missing = sorted(set(REQUANTIZER_DTYPES) - set(found))
    if part.relu is None or missing:
        message = (
            f"incomplete: {', '.join(missing)} missing" if missing else "without its relu flag in the header"
        )
        raise InputError(part.name, Problem("requantizer", message))
    return Requantizer(relu=part.relu, **found)


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
    `compress.blocks.matrix_to_weight`).

    Examples
    --------
    >>> matrix_to_weight(np.array([[[0, 3, 1, 4, 2, 5]]]), (1, 2, 3), "tap_major").tolist()
    [[[0, 1, 2], [3, 4, 5]]]
    """
    out_channels, in_channels, *kernel = weight_shape
    if column_order == "channel_major":
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


def _per_weight(types: NDArray[np.uint8], block: tuple[int, int], shape: LayerShape) -> NDArray[np.uint8]:
    """The block type of every real weight: ``[groups, m, k]``."""
    return np.repeat(np.repeat(types, block[0], axis=1), block[1], axis=2)[:, : shape.m, : shape.k]


def _module_of(layer_name: str) -> str:
    """Second and later uses of a module carry a mark behind its name (`compress.shapes.layer_shapes`)."""
    return layer_name.split("#")[0]


def _key(name: str, stream: str) -> str:
    return f"layers/{name}/{stream}"
