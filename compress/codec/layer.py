"""One layer: its streams as entropy-coded groups of block rows, each with its own checksum."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compress.codec.entropy import AnsReader, AnsWriter, Grid, Tables
from compress.codec.fields import Reader, Writer
from compress.codec.symbols import Coding, ReadCoding, coding_of, read_coding, read_sizes, write_coding
from compress.layers import CompressedLayer
from hwsim.errors import FormatError, Problem
from hwsim.layer import DENSE, UNIFIED, QuantizedWeights, Requantizer

__all__ = ["LayerSpec", "decode_layer", "encode_layer", "read_spec", "spec_of", "write_spec"]

GROUP_WEIGHTS = 1 << 17
"""Weights that a group of block rows aims at."""

COLUMN_ORDERS: tuple[Literal["tap_major", "channel_major"], ...] = ("tap_major", "channel_major")


@dataclass(frozen=True)
class LayerSpec:
    """What the streams of a layer do not say themselves.

    Attributes
    ----------
    name : str
    weight_shape : tuple of int
    groups : int
    block : tuple of int
    column_order : {"tap_major", "channel_major"}
    weight_bits, magnitude_bits : int
    step_size : float
    relu : bool or None
        None: the layer has no requantiser.
    """

    name: str
    weight_shape: tuple[int, ...]
    groups: int
    block: tuple[int, int]
    column_order: Literal["tap_major", "channel_major"]
    weight_bits: int
    magnitude_bits: int
    step_size: float
    relu: bool | None

    @property
    def weight_count(self) -> int:
        """Weights of the layer."""
        return math.prod(self.weight_shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """``(m, k)`` of one group."""
        return self.weight_shape[0] // self.groups, math.prod(self.weight_shape[1:])

    @property
    def block_grid(self) -> tuple[int, int]:
        """``(Mb, Kb)`` of one group."""
        (m, k), (g_o, g_k) = self.matrix, self.block
        return -(-m // g_o), -(-k // g_k)

    @property
    def rows_per_group(self) -> int:
        """Block rows of a coded group; the last may have fewer."""
        return max(1, GROUP_WEIGHTS // (self.block[0] * self.matrix[1]))

    def row_groups(self) -> list[tuple[slice, slice]]:
        """Block rows and matrix rows of every coded group; rows run over all groups of the layer."""
        total, step = self.groups * self.block_grid[0], self.rows_per_group
        edges = [*range(0, total, step), total]
        return [
            (slice(start, stop), slice(self._matrix_row(start), self._matrix_row(stop)))
            for start, stop in pairwise(edges)
        ]

    def _matrix_row(self, block_row: int) -> int:
        group, row = divmod(block_row, self.block_grid[0])
        return group * self.matrix[0] + min(row * self.block[0], self.matrix[0])

    def expand(self, blocks: NDArray, block_rows: slice) -> NDArray:
        """The value of every block ``[rows, Kb]`` at each of its real weights."""
        (m, k), (g_o, g_k) = self.matrix, self.block
        within = np.arange(block_rows.start, block_rows.stop) % self.block_grid[0]
        heights = np.minimum(m - within * g_o, g_o)
        # Columns first, while there is one row per block: rows are then copied whole.
        rows = blocks.repeat(g_k, axis=1)[:, :k]
        return rows.repeat(g_o if (heights == g_o).all() else heights, axis=0)


def spec_of(layer: CompressedLayer, weight_shape: tuple[int, ...]) -> LayerSpec:
    """The specification of a layer."""
    weights = layer.weights
    return LayerSpec(
        layer.name,
        tuple(weight_shape),
        len(layer.types),
        layer.block,
        layer.column_order,
        weights.weight_bits,
        weights.magnitude_bits,
        weights.step_size,
        weights.requantizer.relu if weights.requantizer else None,
    )


def write_spec(out: Writer, spec: LayerSpec) -> None:
    """The specification as bytes."""
    out.text(spec.name)
    out.varint(len(spec.weight_shape))
    for size in (*spec.weight_shape, spec.groups, *spec.block):
        out.varint(size)
    out.varint(COLUMN_ORDERS.index(spec.column_order))
    out.varint(spec.weight_bits)
    out.varint(spec.magnitude_bits)
    out.varint(0 if spec.relu is None else 1 + spec.relu)
    out.float64(spec.step_size)


def read_spec(source: Reader, max_weights: int) -> LayerSpec:
    """The inverse of `write_spec`; refuses what no layer can be, before anything is allocated."""
    name = source.text("name")
    rank = source.varint(f"{name}.rank", 8, 2)
    shape = tuple(source.varint(f"{name}.weight_shape", max_weights, 1) for _ in range(rank))
    if math.prod(shape) > max_weights:
        raise source.refuse(f"{name}.weight_shape", f"{shape}: more than {max_weights:,} weights")
    groups = source.varint(f"{name}.groups", shape[0], 1)
    if shape[0] % groups:
        raise source.refuse(f"{name}.groups", f"{groups} does not divide {shape[0]} output channels")
    block = (source.varint(f"{name}.block", 1 << 16, 1), source.varint(f"{name}.block", 1 << 16, 1))
    order = COLUMN_ORDERS[source.varint(f"{name}.column_order", 1)]
    weight_bits = source.varint(f"{name}.weight_bits", 16, 2)
    magnitude_bits = source.varint(f"{name}.magnitude_bits", 16, 1)
    relu = source.varint(f"{name}.relu", 2)
    step_size = source.float64(f"{name}.step_size")
    if not 0 < step_size < math.inf:
        raise source.refuse(f"{name}.step_size", f"{step_size}, must be positive and finite")
    flags = {0: None, 1: False, 2: True}
    return LayerSpec(name, shape, groups, block, order, weight_bits, magnitude_bits, step_size, flags[relu])


# --- a layer

_KINDS = ("type", "magnitude", "dense")


def _limits(spec: LayerSpec) -> dict[str, tuple[int, int]]:
    half = 1 << (spec.weight_bits - 1)
    return {"type": (0, DENSE), "magnitude": (0, (1 << spec.magnitude_bits) - 1), "dense": (-half, half - 1)}


def _grid_shapes(spec: LayerSpec) -> dict[str, tuple[int, int]]:
    (m, k), (m_blocks, k_blocks) = spec.matrix, spec.block_grid
    blocks = (spec.groups * m_blocks, k_blocks)
    return {"type": blocks, "magnitude": blocks, "dense": (spec.groups * m, k)}


@dataclass(frozen=True, eq=False)
class _Streams:
    """The arrays of a layer with the rows of all groups one under the other."""

    types: NDArray[np.uint8]
    magnitudes: NDArray[np.uint16]
    dense: NDArray[np.int16]
    signs: NDArray[np.uint8]


def _streams_of(layer: CompressedLayer, spec: LayerSpec) -> _Streams:
    shapes = _grid_shapes(spec)
    weights = layer.weights
    return _Streams(
        layer.types.reshape(shapes["type"]),
        weights.magnitudes.reshape(shapes["magnitude"]),
        weights.dense.reshape(shapes["dense"]),
        weights.signs.reshape(shapes["dense"]),
    )


def encode_layer(
    layer: CompressedLayer, spec: LayerSpec, steps: tuple[float, ...], *, with_sizes: bool = False
) -> tuple[bytes, dict[str, int]]:
    """The section of a layer, and where asked for its bytes by stream (``other`` is all that is no stream).

    Parameters
    ----------
    layer : CompressedLayer
    spec : LayerSpec
    steps : tuple of float
        As of `compress.codec.entropy.choose_levels`.
    """
    streams = _streams_of(layer, spec)
    everywhere = slice(0, len(streams.types))
    unified, dense = streams.types == UNIFIED, streams.types == DENSE
    is_mixed = dense.any() and not dense.all()
    # Where all blocks are alike, one value stands for the whole mask in memory.
    dense_mask = (
        spec.expand(dense, everywhere) if is_mixed else np.broadcast_to(dense.any(), streams.dense.shape)
    )
    masks = {"type": np.broadcast_to(True, unified.shape), "magnitude": unified, "dense": dense_mask}
    values = {
        "type": streams.types.ravel(),
        "magnitude": streams.magnitudes[unified],
        "dense": streams.dense.ravel() if dense.all() else streams.dense[dense_mask],
    }
    codings, symbols = {}, {}
    for kind in _KINDS:
        codings[kind], symbols[kind] = coding_of(values[kind], masks[kind], kind=kind, steps=steps)
    vanished = unified & (streams.magnitudes == 0)
    zero_signs = bool(vanished.any() and streams.signs[spec.expand(vanished, everywhere)].any())
    out, header_ans = Writer(), AnsWriter()
    for kind in _KINDS:
        write_coding(out, header_ans, codings[kind])
    out.varint(int(zero_signs))
    parts, sizes = [], dict.fromkeys((*_KINDS, "sign"), 0)
    at = dict.fromkeys(_KINDS, 0)
    for block_rows, rows in spec.row_groups():
        ans = AnsWriter()
        group_bits = {}
        for kind in _KINDS:
            here = rows if kind == "dense" else block_rows
            mask = masks[kind][here]
            count = int(np.count_nonzero(mask))
            chosen = symbols[kind][at[kind] : at[kind] + count]
            at[kind] += count
            _put_group(ans, codings[kind], chosen, here, mask)
            if with_sizes:
                group_bits[kind] = _group_bits(codings[kind], chosen, here, mask)
        words = ans.words().astype("<u4").tobytes()
        shown = (
            unified[block_rows] if zero_signs else unified[block_rows] & (streams.magnitudes[block_rows] > 0)
        )
        sign_mask = spec.expand(shown, block_rows)
        signs = np.packbits(streams.signs[rows][sign_mask], bitorder="little").tobytes()
        parts.append((words, signs))
        sizes["sign"] += len(signs)
        total = sum(group_bits.values()) or 1.0
        for kind, bits in group_bits.items():
            sizes[kind] += int(len(words) * bits / total)
    _finish(out, header_ans, layer.weights.requantizer, parts)
    content = out.content()
    return content, sizes | {"other": len(content) - sum(sizes.values())}


def _put_group(
    ans: AnsWriter, coding: Coding, symbols: NDArray[np.int32], rows: slice, mask: NDArray[np.bool_]
) -> None:
    """Levels of the rows, then the symbols."""
    if not coding.is_coded or not symbols.size:
        return
    grid = coding.grid
    if grid.row_levels.any():
        ans.put(grid.row_levels[rows], _row_tables(grid).weights(0))
    grid.put(ans, symbols, rows, None if mask.all() else mask)


def _row_tables(grid: Grid) -> Tables:
    return Tables.of_counts(np.bincount(grid.row_levels, minlength=int(grid.row_levels.max()) + 1)[None])


def _group_bits(coding: Coding, symbols: NDArray[np.int32], rows: slice, mask: NDArray[np.bool_]) -> float:
    """Ideal bits of what `_put_group` writes."""
    if not coding.is_coded or not symbols.size:
        return 0.0
    grid, costs = coding.grid, coding.grid.tables.bits()
    levels = _row_tables(grid).bits()[0][grid.row_levels[rows]].sum() if grid.row_levels.any() else 0.0
    classes = grid.classes(rows, mask) if len(costs) > 1 else np.zeros(symbols.size, np.uint8)
    return float(levels + costs[classes, symbols].sum())


def _finish(
    out: Writer, header_ans: AnsWriter, requantizer: Requantizer | None, parts: list[tuple[bytes, bytes]]
) -> None:
    """Lengths, words of the header, requantiser, checksum; then the groups, each with its own."""
    words = header_ans.words().astype("<u4").tobytes()
    out.varint(len(words) // 4)
    for group, signs in parts:
        out.varint(len(group) // 4)
        out.varint(len(signs))
    out.raw(words)
    if requantizer is not None:
        plain = b"".join(
            values.astype(dtype).tobytes()
            for values, dtype in (
                (requantizer.bias, "<i4"),
                (requantizer.scale, "<i2"),
                (requantizer.shift, "u1"),
            )
        )
        packed = zlib.compress(plain, 9)
        out.varint(len(packed))
        out.raw(packed)
    out.checksum()
    for group, signs in parts:
        inner = Writer()
        inner.raw(group)
        inner.raw(signs)
        inner.checksum()
        out.raw(inner.content())


def inflate(packed: memoryview, size: int, source: Reader, field: str) -> bytes:
    """The inverse of zlib for a known size: never more memory than that.

    Raises
    ------
    FormatError
        Not zlib's format, or of another size.
    """
    engine = zlib.decompressobj()
    try:
        content = engine.decompress(bytes(packed), size + 1)
    except zlib.error as error:
        raise source.refuse(field, f"{error}: damaged") from None
    if len(content) != size or not engine.eof or engine.unused_data:
        raise source.refuse(field, f"is not {size} bytes when unpacked: damaged")
    return content


@dataclass(frozen=True, eq=False)
class _Header:
    codings: dict[str, ReadCoding]
    zero_signs: bool
    group_sizes: list[tuple[int, int]]
    requantizer: Requantizer | None


def _read_header(source: Reader, spec: LayerSpec) -> _Header:
    limits, shapes = _limits(spec), _grid_shapes(spec)
    sizes = {kind: read_sizes(source, f"{spec.name}.{kind}", *limits[kind]) for kind in _KINDS}
    zero_signs = bool(source.varint(f"{spec.name}.zero_signs", 1))
    most = len(source.content) // 4
    words = source.varint(f"{spec.name}.header", most)
    group_sizes = [
        (source.varint(f"{spec.name}.groups", most), source.varint(f"{spec.name}.groups", 4 * most + 4))
        for _ in spec.row_groups()
    ]
    raw = source.raw(4 * words, f"{spec.name}.header")
    packed = None
    if spec.relu is not None:
        packed = source.raw(
            source.varint(f"{spec.name}.requantizer", 4 * most + 4), f"{spec.name}.requantizer"
        )
    source.checksum(f"{spec.name}.header")
    ans = AnsReader(np.frombuffer(raw, "<u4").astype(np.uint32), source.source)
    codings = {kind: read_coding(ans, sizes[kind], *shapes[kind]) for kind in _KINDS}
    ans.end()
    requantizer = None
    if packed is not None:
        channels = spec.weight_shape[0]
        plain = inflate(packed, 7 * channels, source, f"{spec.name}.requantizer")
        requantizer = Requantizer(
            np.frombuffer(plain, "<i4", channels).astype(np.int32),
            np.frombuffer(plain, "<i2", channels, 4 * channels).astype(np.int16),
            np.frombuffer(plain, "u1", channels, 6 * channels).copy(),
            relu=bool(spec.relu),
        )
    return _Header(codings, zero_signs, group_sizes, requantizer)


def decode_layer(
    section: memoryview, spec: LayerSpec, origin: str, only: range | None = None
) -> CompressedLayer:
    """The layer of a section; with ``only``, just those groups of block rows, all other blocks pruned.

    Raises
    ------
    FormatError
        A checksum that does not match, or anything that no encoder writes.
    """
    source = Reader(section, origin)
    header = _read_header(source, spec)
    announced = sum(4 * words + signs + 4 for words, signs in header.group_sizes)
    if announced != len(section) - source.at:  # before memory is asked for
        message = f"{announced} bytes announced, {len(section) - source.at} are there: truncated or damaged"
        raise source.refuse(f"{spec.name}.groups", message)
    shapes = _grid_shapes(spec)
    streams = _Streams(
        np.zeros(shapes["type"], np.uint8),
        np.zeros(shapes["magnitude"], np.uint16),
        _zeros(shapes["dense"], np.int16, header.codings["dense"]),
        _zeros(shapes["dense"], np.uint8, header.codings["magnitude"]),
    )
    for number, (where, (words, signs)) in enumerate(zip(spec.row_groups(), header.group_sizes, strict=True)):
        field = f"{spec.name}.groups.{number}"
        inner = Reader(source.raw(4 * words + signs + 4, field), origin)
        if only is not None and number not in only:
            continue
        content = inner.raw(4 * words + signs, field)
        inner.checksum(field)
        ans = AnsReader(np.frombuffer(content[: 4 * words], "<u4").astype(np.uint32), f"{origin}: {field}")
        _decode_group(ans, np.frombuffer(content[4 * words :], np.uint8), spec, header, where, streams)
    (m, k), grid = spec.matrix, (spec.groups, *spec.block_grid)
    weights = QuantizedWeights(
        dense=streams.dense.reshape(spec.groups, m, k),
        signs=streams.signs.reshape(spec.groups, m, k),
        magnitudes=streams.magnitudes.reshape(grid),
        weight_bits=spec.weight_bits,
        magnitude_bits=spec.magnitude_bits,
        step_size=spec.step_size,
        requantizer=header.requantizer,
    )
    return CompressedLayer(spec.name, spec.block, spec.column_order, streams.types.reshape(grid), weights)


def _zeros(shape: tuple[int, int], dtype: type[np.integer], read: ReadCoding) -> NDArray[Any]:
    """To be filled; one value for all, in memory and read-only, where the layer has no block that would be written there."""
    is_used = len(read.coding.alphabet.values) > 0
    return np.zeros(shape, dtype) if is_used else np.broadcast_to(dtype(0), shape)


def _decode_group(
    ans: AnsReader,
    packed_signs: NDArray[np.uint8],
    spec: LayerSpec,
    header: _Header,
    where: tuple[slice, slice],
    streams: _Streams,
) -> None:
    """One group into its rows of the arrays."""
    block_rows, rows = where
    types = streams.types[block_rows]
    types[...] = _take(ans, header.codings["type"], block_rows, None, types.size).reshape(types.shape)
    unified, dense = types == UNIFIED, types == DENSE
    magnitudes = streams.magnitudes[block_rows]
    magnitudes[unified] = _take(
        ans, header.codings["magnitude"], block_rows, unified, int(np.count_nonzero(unified))
    )
    if dense.all():
        found = _take(ans, header.codings["dense"], rows, None, streams.dense[rows].size)
        streams.dense[rows] = found.reshape(-1, spec.matrix[1])
    elif dense.any():
        mask = spec.expand(dense, block_rows)
        found = _take(ans, header.codings["dense"], rows, mask, int(np.count_nonzero(mask)))
        streams.dense[rows][mask] = found
    ans.end()
    signed = unified if header.zero_signs else unified & (magnitudes > 0)
    is_signed = spec.expand(signed, block_rows) if signed.any() else np.zeros(0, np.bool_)
    count = int(np.count_nonzero(is_signed))
    if len(packed_signs) != -(-count // 8):
        message = f"{len(packed_signs)} bytes of signs, {count} weights have one: damaged"
        raise FormatError(ans.source, Problem("sign", message))
    if count:
        streams.signs[rows][is_signed] = np.unpackbits(packed_signs, count=count, bitorder="little")


def _take(
    ans: AnsReader, read: ReadCoding, rows: slice, mask: NDArray[np.bool_] | None, count: int
) -> NDArray[np.integer]:
    """Values of one kind in one group."""
    values = read.coding.alphabet.values
    if not count:
        return np.zeros(0, np.int64)
    if not read.coding.is_coded:
        if not len(values):
            raise FormatError(ans.source, "blocks of a type whose values are missing: damaged")
        return np.full(count, values[0])
    if read.row_tables is not None:
        levels = ans.take(rows.stop - rows.start, read.row_tables.weights(0))
        read.coding.grid.row_levels[rows] = levels
    symbols = read.coding.grid.take(ans, rows, mask, count)
    return values[symbols]
