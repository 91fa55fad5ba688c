"""The memory image: the bytes that the weight memories are loaded with, and their sizes by stream.

The layout is the contract of `docs/formats.md`: what DRAM traffic counts and what the hardware reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import FitError, InputError, Problem
from hwsim.layer import DENSE, STREAMS, UNIFIED, Layer, Requantizer, expand_blocks
from hwsim.lowering import effective_counts, effective_types, execution_order
from hwsim.machine import Machine

__all__ = ["PARTS", "ImageSizes", "image_sizes", "memory_image", "type_code_bits"]

PARTS = ("offset", "order", "channel", *STREAMS)
"""The parts of an image, in order: offsets, row order, channel parameters, streams."""
CHANNEL_BYTES = 7
"""Bias (4), scale (2) and shift (1) of one output channel."""
_ORDER_BYTES = 2
_OFFSET_BYTES = 4


@dataclass(frozen=True, eq=False)
class ImageSizes:
    """Sizes of a layer's image.

    Attributes
    ----------
    stream_bytes : int64 array ``[G, Mb, 4]``
        Bytes of each block row in each stream, byte padding included.
    stream_bits : dict
        Bits of each stream without padding.
    offset_bytes : int
        Bytes of offsets per block row: four for each present stream.
    order_bytes : int
        Bytes of the stored execution order per block row: 2 with ``row_balance = "sorted"``, else 0.
    channel_rows : int64 array ``[Mb]``
        Real output channels of a block row.
    """

    stream_bytes: NDArray[np.int64]
    stream_bits: dict[str, int]
    offset_bytes: int
    order_bytes: int
    channel_rows: NDArray[np.int64]

    @cached_property
    def part_bytes(self) -> dict[str, int]:
        """Bytes of each of `PARTS`."""
        groups, m_blocks, _ = self.stream_bytes.shape
        rows = groups * m_blocks
        parts = {
            "offset": rows * self.offset_bytes,
            "order": rows * self.order_bytes,
            "channel": groups * int(self.channel_rows.sum()) * CHANNEL_BYTES,
        }
        totals = self.stream_bytes.sum(axis=(0, 1))
        return parts | {name: int(total) for name, total in zip(STREAMS, totals, strict=True)}

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole image."""
        return sum(self.part_bytes.values())


def image_sizes(counts: NDArray[np.int64], m: int, machine: Machine) -> ImageSizes:
    """Sizes of the image of a layer.

    Parameters
    ----------
    counts : int64 array ``[G, Mb, 3]``
        Blocks of each type in each block row, of `hwsim.lowering.effective_counts`.
    m : int
        Output channels of a group.
    machine : Machine
    """
    g_o, g_k = machine.array.block
    n, k_blocks = g_o * g_k, int(counts[0, 0].sum())
    row_bits = np.empty((*counts.shape[:2], 4), np.int64)
    row_bits[:, :, 0] = k_blocks * type_code_bits(counts, machine)
    row_bits[:, :, 1] = counts[:, :, UNIFIED] * n
    row_bits[:, :, 2] = counts[:, :, UNIFIED] * machine.precision.magnitude_bits
    row_bits[:, :, 3] = counts[:, :, DENSE] * (n * machine.precision.weight_bits)
    stream_bits = row_bits.sum(axis=(0, 1))
    present = int(np.count_nonzero(stream_bits))
    m_blocks = counts.shape[1]
    channel_rows = np.full(m_blocks, g_o, np.int64)
    channel_rows[-1] = m - (m_blocks - 1) * g_o
    balanced = machine.features.row_balance == "sorted"
    if balanced and m_blocks > 65536:
        raise FitError(f'{m_blocks:,} block rows do not fit the 16-bit row order; use row_balance = "none"')
    return ImageSizes(
        stream_bytes=(row_bits + 7) // 8,
        stream_bits={name: int(bits) for name, bits in zip(STREAMS, stream_bits, strict=True)},
        offset_bytes=_OFFSET_BYTES * present,
        order_bytes=_ORDER_BYTES if balanced else 0,
        channel_rows=channel_rows,
    )


def type_code_bits(counts: NDArray[np.int64], machine: Machine) -> int:
    """Bits of a stored type code: none in a dense machine, 1 where the layer has no DENSE block, else 2."""
    if machine.is_dense:
        return 0
    return 2 if counts[:, :, DENSE].any() else 1


def memory_image(layer: Layer, machine: Machine) -> bytes:
    """The image of a layer with weights, byte for byte as `docs/formats.md` says.

    A layer without a requantiser gets bias 0, scale 1 and shift 0.

    Raises
    ------
    InputError
        No weights, number formats wider than the machine's, or a value that the machine's dense format cannot hold.
    """
    layer = layer.at_native_block(machine.array.block)
    values = layer.integer_matrix()
    weights = layer.weights
    assert weights is not None  # integer_matrix refuses a layer without weights
    types = effective_types(layer.types, machine)
    _check_ranges(layer, types, values, machine)
    counts = effective_counts(layer.types, machine)
    sizes = image_sizes(counts, layer.shape.m, machine)
    g_o, g_k = machine.array.block
    blocked = _blocked(values, types.shape, g_o, g_k)
    signs = _blocked(weights.signs, types.shape, g_o, g_k)
    precision = machine.precision
    type_bits = type_code_bits(counts, machine)
    rows: dict[str, list[bytes]] = {name: [] for name in STREAMS}
    for row_types, row_values, row_signs, row_magnitudes in zip(
        types.reshape(-1, types.shape[2]),
        blocked.reshape(-1, types.shape[2], g_o * g_k),
        signs.reshape(-1, types.shape[2], g_o * g_k),
        weights.magnitudes.reshape(-1, types.shape[2]),
        strict=True,
    ):
        unified, dense = row_types == UNIFIED, row_types == DENSE
        rows["type"].append(_pack(row_types, type_bits))
        rows["sign"].append(_pack(row_signs[unified], 1))
        rows["magnitude"].append(_pack(row_magnitudes[unified], precision.magnitude_bits))
        rows["dense"].append(_pack(row_values[dense], precision.weight_bits))
    header_bytes = sum(sizes.part_bytes[part] for part in ("offset", "order", "channel"))
    return (
        _offsets(rows, header_bytes)
        + _order(counts, machine)
        + _channels(weights.requantizer, layer.shape.out_channels)
        + b"".join(b"".join(rows[name]) for name in STREAMS)
    )


def _offsets(rows: dict[str, list[bytes]], header_bytes: int) -> bytes:
    present = [name for name in STREAMS if any(rows[name])]
    table = np.empty((len(rows["type"]), len(present)), "<u4")
    at = header_bytes
    for column, name in enumerate(present):
        lengths = [len(part) for part in rows[name]]
        table[:, column] = at + np.concatenate(([0], np.cumsum(lengths)[:-1]))
        at += sum(lengths)
    return table.tobytes()


def _order(counts: NDArray[np.int64], machine: Machine) -> bytes:
    if machine.features.row_balance == "none":
        return b""
    return execution_order(counts, machine).astype("<u2").tobytes()


def _channels(requantizer: Requantizer | None, channels: int) -> bytes:
    table = np.zeros(channels, np.dtype([("bias", "<i4"), ("scale", "<i2"), ("shift", "u1")]))
    table["scale"] = 1
    if requantizer is not None:
        table["bias"], table["scale"], table["shift"] = requantizer.bias, requantizer.scale, requantizer.shift
    return table.tobytes()


def _blocked(values: NDArray, block_shape: tuple[int, ...], g_o: int, g_k: int) -> NDArray:
    """``[G, Mb, Kb, g_o·g_k]``: the values of each block, output index outside, padded positions 0."""
    groups, m_blocks, k_blocks = block_shape
    padded = np.zeros((groups, m_blocks * g_o, k_blocks * g_k), values.dtype)
    padded[:, : values.shape[1], : values.shape[2]] = values
    split = padded.reshape(groups, m_blocks, g_o, k_blocks, g_k)
    return split.transpose(0, 1, 3, 2, 4).reshape(groups, m_blocks, k_blocks, g_o * g_k)


def _pack(values: NDArray, bits: int) -> bytes:
    """Fields of ``bits`` bits, least significant bit first, two's complement where negative, padded to a byte."""
    if bits == 0 or values.size == 0:
        return b""
    flat = values.reshape(-1).astype(np.int64)
    planes = (flat[:, None] >> np.arange(bits)) & 1
    return np.packbits(planes.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def _check_ranges(layer: Layer, types: NDArray[np.uint8], values: NDArray, machine: Machine) -> None:
    weights = layer.weights
    assert weights is not None
    problems = []
    precision = machine.precision
    if weights.magnitudes.size and int(weights.magnitudes.max()) >= 2**precision.magnitude_bits:
        problems.append(
            Problem(
                "magnitudes",
                f"{int(weights.magnitudes.max())} needs more than the machine's {precision.magnitude_bits} magnitude_bits",
            )
        )
    dense_values = values[expand_blocks(types == DENSE, machine.array.block, *values.shape[1:])]
    low, high = -(2 ** (precision.weight_bits - 1)), 2 ** (precision.weight_bits - 1) - 1
    if dense_values.size and (dense_values.min() < low or dense_values.max() > high):
        worst = dense_values[np.argmax(np.abs(dense_values))]
        hint = "compress with as many weight_bits as the machine has"
        if (layer.types[types == DENSE] != DENSE).any():
            hint = "unified magnitudes beyond the dense format need a machine with unified_path on"
        problems.append(Problem("dense weights", f"{int(worst)} is outside [{low}, {high}]", hint))
    if problems:
        raise InputError(f"layer {layer.name} on machine {machine.name}", problems)
