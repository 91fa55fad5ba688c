"""Version 1 of the compressed file, read only: streams of a few bits per value, packed without gaps. NumPy only.

Version 2 (`compress.codec`) holds the same integers in a fraction of the bytes; `hwsim pack` converts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from compress.codec import LayerSpec
from compress.layers import Activations, CompressedLayer
from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, STREAMS, UNIFIED, QuantizedWeights, Requantizer, check_types

__all__ = ["STREAM_PARTS", "PackedLayer", "read_packed_layer", "unpack_bits"]

CHUNK_VALUES = 1 << 20

REQUANTIZER_PARTS = ("bias", "scale", "shift")
STREAM_PARTS = (*STREAMS, *REQUANTIZER_PARTS)
"""Tensors that a layer may have."""

Size = Annotated[int, Field(strict=True, ge=1)]


class PackedLayer(BaseModel):
    """What the streams of a layer do not say themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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

    @property
    def spec(self) -> LayerSpec:
        """What both versions of the format know of a layer."""
        return LayerSpec(**self.model_dump(exclude={"type_bits", "activations"}))


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


def read_packed_layer(part: PackedLayer, tensors: Mapping[str, NDArray]) -> CompressedLayer:
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

    spec = part.spec
    grid, rows = (part.groups, *spec.block_grid), spec.groups * spec.block_grid[0]
    types = take("type", int(np.prod(grid)), part.type_bits).astype(np.uint8).reshape(grid)
    check_types(types, part.name)
    per_weight = spec.expand(types.reshape(rows, -1), slice(0, rows)).reshape(part.groups, *spec.matrix)
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


def _read_requantizer(part: PackedLayer, tensors: Mapping[str, NDArray]) -> Requantizer | None:
    found = {
        name: tensors[_key(part.name, name)] for name in REQUANTIZER_PARTS if _key(part.name, name) in tensors
    }
    if part.relu is None and not found:
        return None
    missing = sorted(set(REQUANTIZER_PARTS) - set(found))
    if part.relu is None or missing:
        message = (
            f"incomplete: {', '.join(missing)} missing" if missing else "without its relu flag in the header"
        )
        raise InputError(part.name, Problem("requantizer", message))
    return Requantizer(relu=part.relu, **found)


def _key(name: str, stream: str) -> str:
    return f"layers/{name}/{stream}"
