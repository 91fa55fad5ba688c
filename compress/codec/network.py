"""All layers of a network and its other parameters as one checked byte string."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.codec.fields import Reader, Writer
from compress.codec.layer import (
    LayerSpec,
    decode_layer,
    encode_layer,
    inflate,
    read_spec,
    spec_of,
    write_spec,
)
from compress.layers import CompressedLayer
from hwsim.errors import FormatError, InputError, Problem, nearest_name

__all__ = [
    "DEFAULT_MAX_WEIGHTS",
    "PRESETS",
    "DecodedNetwork",
    "decode_network",
    "encode_network",
    "open_network",
    "section_sizes",
    "state_size",
]

MAGIC, VERSION = b"HWSC", 1

DEFAULT_MAX_WEIGHTS = 1 << 28
"""Weights that a file may announce unless the reader allows more: all-pruned layers cost nearly nothing, so a few bytes
could ask for any amount of memory.
"""

PRESETS: dict[str, tuple[float, ...]] = {"small": (0.2, 0.35, 0.6), "fast": ()}
"""Steps between the levels of rows and columns that the encoder tries (`compress.codec.entropy.choose_levels`); none: one class
of symbols, so that a group is a few calls of the coder. The format is the same: any decoder reads both.
"""

_DTYPES = ("<f4", "<i8", "<i4", "<i2", "|i1", "|u1", "|b1", "<f8", "<f2")
_RAW, _DEFLATED, _FIXED_POINT = 0, 1, 2


@dataclass(frozen=True, eq=False)
class DecodedNetwork:
    """What a byte string of `encode_network` holds.

    Attributes
    ----------
    layers : dict of str to CompressedLayer
        Dense weights of a layer without DENSE blocks, and signs of one without UNIFIED blocks, are a single 0 in memory that
        stands for all; they cannot be written to.
    weight_shapes : dict of str to tuple of int
    state : dict of str to array
    """

    layers: dict[str, CompressedLayer]
    weight_shapes: dict[str, tuple[int, ...]]
    state: dict[str, NDArray]


def encode_network(
    layers: Mapping[str, CompressedLayer],
    weight_shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, NDArray],
    preset: str = "small",
) -> bytes:
    """Layers and other parameters, losslessly.

    Parameters
    ----------
    layers : mapping of str to CompressedLayer
    weight_shapes : mapping of str to tuple of int
        Of each layer's module.
    state : mapping of str to array
        Every other parameter.
    preset : {"small", "fast"}
        See `PRESETS`.

    Raises
    ------
    InputError
        No such preset; a dtype that the format does not have.
    """
    return _encode(layers, weight_shapes, state, preset)[0]


def section_sizes(
    layers: Mapping[str, CompressedLayer],
    weight_shapes: Mapping[str, tuple[int, ...]],
    preset: str = "small",
) -> dict[str, dict[str, int]]:
    """Bytes of each layer by stream (``type``, ``sign``, ``magnitude``, ``dense``, ``other``).

    Types, magnitudes and dense weights of a group share its words; they are charged by their ideal code lengths.
    """
    return _encode(layers, weight_shapes, {}, preset, with_sizes=True)[1]


def state_size(state: Mapping[str, NDArray]) -> int:
    """Bytes that the values of other parameters take in `encode_network`."""
    return sum(len(_encode_tensor(name, values)[1]) for name, values in state.items())


def _encode(
    layers: Mapping[str, CompressedLayer],
    weight_shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, NDArray],
    preset: str,
    *,
    with_sizes: bool = False,
) -> tuple[bytes, dict[str, dict[str, int]]]:
    if preset not in PRESETS:
        raise InputError("codec", Problem("preset", f'"{preset}"', nearest_name(preset, PRESETS)))
    out = Writer()
    out.raw(MAGIC)
    out.varint(VERSION)
    out.varint(len(layers))
    sections, sizes = [], {}
    for name, layer in layers.items():
        spec = spec_of(layer, weight_shapes[name])
        section, sizes[name] = encode_layer(layer, spec, PRESETS[preset], with_sizes=with_sizes)
        sections.append(section)
        write_spec(out, spec)
        out.varint(len(section))
    out.varint(len(state))
    tensors = []
    for name, values in state.items():
        mode, content = _encode_tensor(name, values)
        tensors.append(content)
        out.text(name)
        out.varint(_DTYPES.index(_dtype_of(name, values)))
        out.varint(values.ndim)
        for size in values.shape:
            out.varint(size)
        out.varint(mode)
        out.varint(len(content))
    out.checksum()
    for section in sections:
        out.raw(section)
    last = Writer()
    for content in tensors:
        last.raw(content)
    last.checksum()
    out.raw(last.content())
    return out.content(), sizes


def decode_network(
    content: bytes | memoryview,
    source: str = "codec",
    max_weights: int = DEFAULT_MAX_WEIGHTS,
    only: Mapping[str, range] | None = None,
) -> DecodedNetwork:
    """The inverse of `encode_network`, bit for bit.

    Parameters
    ----------
    content : bytes
    source : str
        Named in messages.
    max_weights : int
        Weights and other parameters that may be announced; more are refused before anything is allocated.
    only : mapping of str to range, optional
        Read just these layers, and of each just these groups of block rows; the rest of such a layer is left PRUNED.

    Raises
    ------
    FormatError
        Truncated, damaged, of another version, or nothing that an encoder writes.
    """
    contents = open_network(content, source, max_weights)
    names = contents.weight_shapes if only is None else only
    layers = {name: contents.layer(name, None if only is None else only[name]) for name in names}
    return DecodedNetwork(layers, contents.weight_shapes, contents.state)


@dataclass(frozen=True, eq=False)
class NetworkContents:
    """A checked header, and the layers of a byte string one at a time: never more than one of them in memory.

    Attributes
    ----------
    weight_shapes : dict of str to tuple of int
    state : dict of str to array
    """

    weight_shapes: dict[str, tuple[int, ...]]
    state: dict[str, NDArray]
    _sections: dict[str, tuple[LayerSpec, memoryview]]
    _source: str

    def layer(self, name: str, only: range | None = None) -> CompressedLayer:
        """One layer, or just some of its groups of block rows.

        Raises
        ------
        FormatError
            As `decode_network`.
        """
        spec, section = self._sections[name]
        try:
            return decode_layer(section, spec, self._source, only)
        except (OverflowError, MemoryError) as error:  # no size of a valid file gets here
            raise FormatError(self._source, f"{type(error).__name__}: damaged") from None


def open_network(
    content: bytes | memoryview, source: str = "codec", max_weights: int = DEFAULT_MAX_WEIGHTS
) -> NetworkContents:
    """Header and other parameters of a byte string of `encode_network`; its layers are decoded when they are asked for.

    Raises
    ------
    FormatError
        As `decode_network`.
    """
    head = Reader(content, source)
    if bytes(head.raw(len(MAGIC), "magic")) != MAGIC:
        raise head.refuse("magic", "is not the entropy-coded form of a network")
    version = head.varint("version", 1 << 30)
    if version != VERSION:
        raise head.refuse("version", f"{version}; this program reads version {VERSION}")
    specs: list[tuple[LayerSpec, int]] = []
    left = max_weights
    for _ in range(head.varint("layers", len(content))):
        spec = read_spec(head, left)
        left -= spec.weight_count
        specs.append((spec, head.varint(f"{spec.name}.bytes", len(content))))
    tensors = [_read_tensor_head(head, left) for _ in range(head.varint("state", len(content)))]
    if sum(tensor.count for tensor in tensors) > left:
        raise head.refuse("state", f"more than {max_weights:,} parameters")
    names = [spec.name for spec, _ in specs], [tensor.name for tensor in tensors]
    if any(len(set(part)) != len(part) for part in names):
        raise head.refuse("name", "a name that appears twice")
    head.checksum("header")
    sections = {spec.name: (spec, head.raw(size, spec.name)) for spec, size in specs}
    last = Reader(head.content[head.at :], source)
    contents = [last.raw(tensor.size, tensor.name) for tensor in tensors]
    last.checksum("state")
    last.end("state")
    state = {
        tensor.name: _decode_tensor(tensor, part, last)
        for tensor, part in zip(tensors, contents, strict=True)
    }
    return NetworkContents({spec.name: spec.weight_shape for spec, _ in specs}, state, sections, source)


# --- other parameters


@dataclass(frozen=True)
class _TensorHead:
    name: str
    dtype: str
    shape: tuple[int, ...]
    mode: int
    size: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _dtype_of(name: str, values: NDArray) -> str:
    text = values.dtype.newbyteorder("<").str
    if text not in _DTYPES:
        raise InputError("codec", Problem(name, f"{values.dtype} has no place in the format"))
    return text


def _encode_tensor(name: str, values: NDArray) -> tuple[int, bytes]:
    """The shortest of the forms, each exact."""
    plain = values.astype(_dtype_of(name, values)).tobytes()
    forms = [(_RAW, plain), (_DEFLATED, zlib.compress(plain, 9))]
    fixed = _fixed_point(values) if values.dtype == np.float32 and values.size else None
    if fixed is not None:
        forms.append((_FIXED_POINT, fixed))
    return min(forms, key=lambda form: len(form[1]))


def _fixed_point(values: NDArray[np.float32]) -> bytes | None:
    """Integers times a power of two, as few bits each as the largest needs; None where that is not exact."""
    flat = values.ravel().astype(np.float64)
    if not np.isfinite(flat).all() or np.signbit(flat[flat == 0]).any():
        return None
    mantissas, exponents = np.frexp(flat[flat != 0])
    integers = (mantissas * 2**24).astype(np.int64)
    trailing = np.log2((integers & -integers).astype(np.float64))
    exponent = int((exponents - 24 + trailing).min()) if integers.size else 0
    largest = np.abs(flat).max() / 2.0**exponent
    if largest >= 2**31 or not -140 <= exponent <= 127:
        return None
    scaled = np.ldexp(flat, -exponent).astype(np.int64)
    bits = max(1, int(max(scaled.max(), -scaled.min() - 1)).bit_length() + 1)
    planes = (scaled[:, None] >> np.arange(bits)) & 1
    out = Writer()
    out.varint(exponent + 140)
    out.varint(bits)
    out.raw(np.packbits(planes.astype(np.uint8).ravel(), bitorder="little").tobytes())
    return out.content()


def _read_tensor_head(source: Reader, most: int) -> _TensorHead:
    name = source.text("state")
    dtype = _DTYPES[source.varint(f"{name}.dtype", len(_DTYPES) - 1)]
    shape = tuple(source.varint(f"{name}.shape", most) for _ in range(source.varint(f"{name}.rank", 32)))
    if math.prod(shape) > most:
        raise source.refuse(f"{name}.shape", f"{shape}: more than {most:,} values")
    mode = source.varint(f"{name}.mode", _FIXED_POINT)
    return _TensorHead(name, dtype, shape, mode, source.varint(f"{name}.bytes", len(source.content)))


def _decode_tensor(head: _TensorHead, content: memoryview, source: Reader) -> NDArray:
    dtype = np.dtype(head.dtype)
    if head.mode == _FIXED_POINT:
        return _from_fixed_point(head, content, source)
    size = head.count * dtype.itemsize
    plain = inflate(content, size, source, head.name) if head.mode == _DEFLATED else bytes(content)
    if len(plain) != size:
        raise source.refuse(head.name, f"{len(plain)} bytes, must be {size}")
    return np.frombuffer(plain, dtype).astype(dtype.newbyteorder("=")).reshape(head.shape)


def _from_fixed_point(head: _TensorHead, content: memoryview, source: Reader) -> NDArray[np.float32]:
    inner = Reader(content, source.source)
    exponent = inner.varint(f"{head.name}.exponent", 267) - 140
    bits = inner.varint(f"{head.name}.bits", 32, 1)
    packed = np.frombuffer(inner.raw(-(-head.count * bits // 8), head.name), np.uint8)
    inner.end(head.name)
    if head.dtype != "<f4":
        raise source.refuse(head.name, f"fixed point of {head.dtype}")
    planes = np.unpackbits(packed, count=head.count * bits, bitorder="little").reshape(-1, bits)
    place = 1 << np.arange(bits, dtype=np.int64)
    place[-1] *= -1  # two's complement
    with np.errstate(over="ignore"):
        values = np.ldexp(planes.astype(np.int64) @ place, exponent).astype(np.float32)
    if not np.isfinite(values).all():
        raise source.refuse(head.name, "a number beyond float32: damaged")
    return values.reshape(head.shape)
