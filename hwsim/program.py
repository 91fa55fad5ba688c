"""The program of a layer for the array: its steps, and every transfer of the DRAM channel with its address and size.

Plain Python beside the compiled cost model, transfer by transfer as `docs/microarchitecture.md`, section 4, says; the
verification holds the two together. The RTL is driven with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hwsim.image import CHANNEL_BYTES, PARTS
from hwsim.layer import STREAMS, Layer, LayerShape
from hwsim.lowering import lower_machine
from hwsim.machine import Machine
from hwsim.mapping import column_units
from hwsim.simulator import LayerRun

__all__ = [
    "CHANNEL_PARTS",
    "Program",
    "Step",
    "Transfer",
    "input_matrix",
    "layer_program",
    "run_steps",
    "taps",
]

CHANNEL_PARTS = ("order", "offset", "channel", *STREAMS)
"""Parts of the image in the order in which a group of row tiles is loaded; the RTL's numbers of them."""
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Transfer:
    """One contiguous range of DRAM.

    Attributes
    ----------
    part : str
        One of `CHANNEL_PARTS`, ``"input"`` or ``"output"``.
    size_bytes : int
    first, count : int
        Block rows of all groups; output channels of ``"channel"``, places of ``"order"``; cells of an input (a cell is one
        column of an input row with all channels of the group).
    place, tile : int
        The first block row's place in its group, and its row tile counted over all groups.
    address : int
        In the image; of other parts 0.
    """

    part: str
    size_bytes: int
    first: int = 0
    count: int = 0
    place: int = 0
    tile: int = 0
    address: int = 0


@dataclass(frozen=True)
class Step:
    """A step as the sequencer takes it: a group's row tiles against a run of positions, and what must be loaded before.

    ``kept`` are the ranges of input cells that the step needs, where inputs are not held whole; ``outputs`` is how many leave.
    """

    group: int
    first_tile: int
    tiles: int
    start: int
    positions: int
    weights: tuple[Transfer, ...] = field(repr=False)
    inputs: tuple[Transfer, ...] = field(repr=False)
    kept: Ranges = field(repr=False)
    outputs: int
    store: Transfer = field(repr=False)


@dataclass(frozen=True)
class Program:
    """A layer's steps, and cycles of a transfer by the channel's exact rate.

    Attributes
    ----------
    steps : tuple of Step
    burst_bytes, dram_cycles, dram_bytes : int
        ``dram_cycles / dram_bytes`` is the exact time of a byte.
    """

    steps: tuple[Step, ...]
    burst_bytes: int
    dram_cycles: int
    dram_bytes: int

    def cycles(self, transfers: Iterable[Transfer]) -> int:
        """Cycles of some transfers, one after the other."""
        return sum(self.transfer_cycles(transfer) for transfer in transfers)

    def transfer_cycles(self, transfer: Transfer) -> int:
        """``ceil(ceil(n/burst)·burst · cycles per byte)``."""
        bus_bytes = -(-transfer.size_bytes // self.burst_bytes) * self.burst_bytes
        return -(-bus_bytes * self.dram_cycles // self.dram_bytes)


def layer_program(run: LayerRun, machine: Machine) -> Program:
    """The steps and transfers of a layer whose weights are held whole or grouped (of streamed ones the loads are left out)."""
    lowered = lower_machine(machine)
    config = lowered.step_config
    weights, inputs = _Weights(run, machine), _Inputs(run, machine)
    steps: list[Step] = []
    rows_before: tuple[int, int, int] | None = None
    for group, first_tile, tiles, start, positions in run_steps(run, machine):
        rows = (group, first_tile, tiles)
        if run.mapping.weight_residence == "whole":
            loads = weights.whole() if not steps else ()
        elif run.mapping.weight_residence == "grouped" and rows != rows_before:
            loads = tuple(weights.of_tiles(*rows))
        else:
            loads = ()
        rows_before = rows
        slots = run.order[group, first_tile * run.rows : (first_tile + tiles) * run.rows]
        outputs = int(run.sizes.channel_rows[slots].sum()) * positions
        store = Transfer("output", -(-outputs * config.activation_bits // 8))
        loaded, kept = inputs.load(group, start, positions)
        steps.append(
            Step(group, first_tile, tiles, start, positions, loads, tuple(loaded), kept, outputs, store)
        )
    return Program(tuple(steps), *lowered.channel)


def run_steps(run: LayerRun, machine: Machine) -> list[tuple[int, int, int, int, int]]:
    """The mapper's steps with column units resolved: group, first row tile, row tiles, first position, positions."""
    units = column_units(
        run.layer.shape, machine.array.columns, machine.precision.activation_bits, _is_split(run, machine)
    )
    return [
        (group, t0, t1 - t0, int(units.start[u0]), int(units.positions[u0:u1].sum()))
        for group, t0, t1, u0, u1 in run.mapping.steps.tolist()
    ]


def _is_split(run: LayerRun, machine: Machine) -> bool:
    """Whether the mapper's column units are column tiles."""
    units = column_units(run.layer.shape, machine.array.columns, machine.precision.activation_bits, False)
    return units.start.size != int(run.mapping.steps[:, 4].max())


class _Weights:
    """Transfers of weights: where each block row's part of each part of the image lies."""

    def __init__(self, run: LayerRun, machine: Machine) -> None:
        groups, self.m_blocks = run.order.shape
        self.order, self.rows = run.order, run.rows
        self.tiles = -(-self.m_blocks // run.rows)
        self.g_o, self.m = machine.array.block[0], run.layer.shape.m
        sizes = run.sizes
        row_bytes = {
            "offset": np.full((groups, self.m_blocks), sizes.offset_bytes),
            "order": np.full((groups, self.m_blocks), sizes.order_bytes),
            "channel": np.repeat(sizes.channel_rows[None] * CHANNEL_BYTES, groups, axis=0),
            **{name: sizes.stream_bytes[:, :, index] for index, name in enumerate(STREAMS)},
        }
        self.starts, self.ends = {}, {}
        base = 0
        for part in PARTS:
            ends = base + np.cumsum(row_bytes[part])
            self.ends[part] = ends.tolist()
            self.starts[part] = [base, *ends[:-1].tolist()]
            base = int(ends[-1])

    def whole(self) -> tuple[Transfer, ...]:
        rows = self.order.size
        return tuple(
            transfer
            for part in CHANNEL_PARTS
            for transfer in self._rows(part, 0, 0, rows, 0, rows // self.m_blocks * self.m)
        )

    def of_tiles(self, group: int, first_tile: int, tiles: int) -> Iterator[Transfer]:
        begin = first_tile * self.rows
        end = min(begin + tiles * self.rows, self.m_blocks)
        tile, base = group * self.tiles + first_tile, group * self.m_blocks
        chosen = sorted(self.order[group, begin:end].tolist())
        runs = [(chosen[a], chosen[b - 1] + 1) for a, b in _runs(chosen)]
        yield from self._rows("order", base + begin, begin, end - begin, tile, 0)
        for part in CHANNEL_PARTS[1:]:
            for low, high in runs:
                channels = min(high * self.g_o, self.m) - low * self.g_o
                yield from self._rows(part, base + low, low, high - low, tile, channels)

    def _rows(
        self, part: str, first: int, place: int, count: int, tile: int, channels: int
    ) -> Iterator[Transfer]:
        address = self.starts[part][first]
        size = self.ends[part][first + count - 1] - address
        if part == "channel":
            first, count = first // self.m_blocks * self.m + place * self.g_o, channels
        if size:
            yield Transfer(part, size, first, count, place, tile, address)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Index ranges of runs of consecutive integers in an ascending list."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return list(zip([0, *breaks], [*breaks, len(numbers)], strict=True)) if numbers else []


def taps(shape: LayerShape) -> tuple[NDArray[np.int64], int]:
    """``(int64[n, taps], width)``: the input cell of each tap of each position of a group, -1 for padding; cells of a row."""
    if shape.kind == "linear":
        return np.arange(shape.n)[:, None], 1
    cells = np.arange(shape.batch)[:, None]
    for size, out, kernel, stride, (before, _), dilation in zip(
        shape.input_size,
        shape.output_size,
        shape.kernel,
        shape.stride,
        shape.padding,
        shape.dilation,
        strict=True,
    ):
        reached = np.arange(out)[:, None] * stride - before + np.arange(kernel) * dilation
        inside = (reached >= 0) & (reached < size)
        combined = cells[:, None, :, None] * size + reached[None, :, None, :]
        known = (cells >= 0)[:, None, :, None] & inside[None, :, None, :]
        cells = np.where(known, combined, -1).reshape(cells.shape[0] * out, cells.shape[1] * kernel)
    return cells, shape.input_size[-1]


def input_matrix(layer: Layer, activations: NDArray[np.int64]) -> NDArray[np.int64]:
    """``int64[groups, k, n]``: the matrix that the expander makes of a layer's input, padding 0, in the layer's column order.

    Parameters
    ----------
    layer : Layer
    activations : int64 array ``[batch, channels, …]``
        Of a linear layer ``[batch, …, features]``.
    """
    shape = layer.shape
    if shape.kind == "linear":
        return np.ascontiguousarray(activations.reshape(shape.n, shape.k).T)[None]
    cells, _ = taps(shape)
    channels = shape.in_channels // shape.groups
    by_cell = np.moveaxis(activations, 1, -1).reshape(-1, shape.groups, channels)
    by_cell = np.concatenate([by_cell, np.zeros_like(by_cell[:1])])  # what a tap of -1 reads
    gathered = by_cell[cells]  # [n, taps, groups, channels]
    order = (2, 1, 3, 0) if layer.column_order == "tap_major" else (2, 3, 1, 0)
    return np.ascontiguousarray(gathered.transpose(order)).reshape(shape.groups, shape.k, shape.n)


class _Inputs:
    """Transfers of inputs: what a column group needs and the one before it has not left."""

    def __init__(self, run: LayerRun, machine: Machine) -> None:
        shape = run.layer.shape
        self.is_whole = run.mapping.input_residence == "whole"
        self.is_split = _is_split(run, machine)
        self.taps, self.width = taps(shape)
        self.cells = shape.batch * int(np.prod(shape.input_size, dtype=np.int64))
        channels = shape.k if shape.kind == "linear" else shape.in_channels // shape.groups
        self.cell_bits = channels * machine.precision.activation_bits
        self.groups = shape.groups
        self.before: tuple[int, int, int] | None = None
        self.rows_before: tuple[set[int], int, int] = (set(), 0, 0)

    def load(self, group: int, start: int, positions: int) -> tuple[list[Transfer], Ranges]:
        """Transfers that a column group needs before its step, and the ranges of cells that it keeps."""
        if self.is_whole:
            loads = self._whole() if self.before is None else []
            self.before = (group, start, positions)
            return loads, ()
        rows, left, right = self._needs(start, positions)
        base = group * self.cells
        kept = tuple(_merged([(base + row * self.width + left, right - left) for row in sorted(rows)]))
        if self.before == (group, start, positions):
            return [], kept
        held: tuple[set[int], int, int] = (set(), 0, 0)
        if self.before is not None and self.before[0] == group:
            held = self.rows_before
        self.before, self.rows_before = (group, start, positions), (rows, left, right)
        return [
            self._transfer(base + first, count) for first, count in self._missing(rows, left, right, held)
        ], kept

    def _whole(self) -> list[Transfer]:
        rows = np.unique(self.taps[self.taps >= 0] // self.width).tolist()
        span = self.cells
        ranges = [(g * span + row * self.width, self.width) for g in range(self.groups) for row in rows]
        return [self._transfer(*cells) for cells in _merged(ranges)]

    def _needs(self, start: int, positions: int) -> tuple[set[int], int, int]:
        cells = self.taps[start : start + positions]
        cells = cells[cells >= 0]
        rows = set(np.unique(cells // self.width).tolist())
        if not self.is_split:
            return rows, 0, self.width
        if not rows:
            return rows, 0, 0
        return rows, int((cells % self.width).min()), int((cells % self.width).max()) + 1

    def _missing(
        self, rows: set[int], left: int, right: int, held: tuple[set[int], int, int]
    ) -> Iterator[tuple[int, int]]:
        held_rows, held_left, held_right = held
        fresh: list[tuple[int, int]] = []
        for row in sorted(rows):
            at = row * self.width
            if row not in held_rows:
                fresh.append((at + left, right - left))
                continue
            if min(right, held_left) > left:
                yield at + left, min(right, held_left) - left
            if right > max(left, held_right):
                yield at + max(left, held_right), right - max(left, held_right)
        yield from _merged(fresh) if right - left == self.width else fresh

    def _transfer(self, first: int, count: int) -> Transfer:
        return Transfer("input", -(-count * self.cell_bits // 8), first, count)


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges ``(first, count)``, adjacent ones made one."""
    merged: list[tuple[int, int]] = []
    for first, count in ranges:
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return merged
