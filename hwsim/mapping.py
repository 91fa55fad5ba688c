"""The mapper: the steps of a layer on a machine, in the better of the two loop orders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import FitError
from hwsim.image import CHANNEL_BYTES, ImageSizes
from hwsim.kernels.steps import (
    STEP_FIELDS,
    ColumnUnits,
    StepPlan,
    Tiles,
    cost_steps,
    plan_steps,
    widest_unit_bits,
)
from hwsim.layer import LayerShape
from hwsim.lowering import LoweredMachine

__all__ = ["Mapping", "column_units", "map_layer", "needed_runs", "transfers"]

LoopOrder = Literal["weights outer", "columns outer"]
Residence = Literal["whole", "grouped", "streamed"]


@dataclass(frozen=True, eq=False)
class Mapping:
    """The steps of a layer.

    Attributes
    ----------
    loop_order : {"weights outer", "columns outer"}
    weight_residence : {"whole", "grouped", "streamed"}
        Loaded once, by groups of row tiles, or fetched again by every pass.
    input_residence : {"whole", "grouped"}
    steps : int64 array ``[steps, 5]``
        Group, first and last row tile, first and last column unit.
    cost : int64 array ``[steps, 13]``
        Columns `hwsim.kernels.steps.STEP_FIELDS`.
    passes : int64 array ``[G, T]``
        Passes of each row tile.
    loads : int64 array ``[G, T]``
        How often each row tile's weights were fetched from DRAM.
    """

    loop_order: LoopOrder
    weight_residence: Residence
    input_residence: Residence
    steps: NDArray[np.int64]
    cost: NDArray[np.int64]
    passes: NDArray[np.int64]
    loads: NDArray[np.int64]

    def column(self, field: str) -> NDArray[np.int64]:
        """One column of ``cost`` by its name."""
        return self.cost[:, STEP_FIELDS.index(field)]

    @cached_property
    def totals(self) -> dict[str, int]:
        """Every column of ``cost``, summed over the steps."""
        return dict(zip(STEP_FIELDS, self.cost.sum(axis=0).tolist(), strict=True))

    @cached_property
    def latency_cycles(self) -> int:
        """``load_0 + Σ step_i + store_last``."""
        load = self.column("load_weight_cycles")[0] + self.column("load_input_cycles")[0]
        return int(load + self.column("store_cycles")[-1]) + self.totals["step_cycles"]

    @cached_property
    def traffic_bytes(self) -> int:
        """Bytes over the DRAM channel, whole bursts counted."""
        fields = ("load_weight_bytes", "load_input_bytes", "stream_bytes", "store_bytes")
        return sum(self.totals[field] for field in fields)


@lru_cache(maxsize=4096)
def column_units(shape: LayerShape, columns: int, activation_bits: int, split: bool) -> ColumnUnits:
    """Units of columns of one group: output rows, or with ``split`` column tiles cut within each output row."""
    needs, input_rows = _needed_rows(shape)
    if shape.kind == "linear":
        n = shape.n
        row, start, positions = np.arange(n), np.arange(n), np.ones(n, np.int64)
        first, last = np.zeros(n, np.int64), np.ones(n, np.int64)
        return ColumnUnits(
            row, start, positions, first, last, needs, input_rows, 1, shape.k * activation_bits
        )
    out_width, in_width = shape.output_size[-1], shape.input_size[-1]
    n_rows = shape.n // out_width
    size = columns if split else out_width
    begin = np.arange(0, out_width, size)
    end = np.minimum(begin + size, out_width)
    first, last = np.zeros(1, np.int64), np.full(1, in_width)
    if split:
        columns_reached, inside = _reached(shape, -1)
        first = np.minimum.reduceat(np.where(inside, columns_reached, in_width).min(axis=1), begin)
        last = np.maximum.reduceat(np.where(inside, columns_reached + 1, 0).max(axis=1), begin)
    row = np.repeat(np.arange(n_rows), begin.size)
    return ColumnUnits(
        row=row,
        start=row * out_width + np.tile(begin, n_rows),
        positions=np.tile(end - begin, n_rows),
        first=np.tile(first, n_rows),
        last=np.tile(last, n_rows),
        needs=needs,
        input_rows=input_rows,
        width=in_width,
        element_bits=shape.in_channels // shape.groups * activation_bits,
    )


def _reached(shape: LayerShape, dim: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """``int64[outputs, taps]`` along one dimension: the input position of each tap, and whether it lies inside the input."""
    size, (before, _) = shape.input_size[dim], shape.padding[dim]
    outputs = np.arange(shape.output_size[dim])[:, None] * shape.stride[dim] - before
    taps = outputs + np.arange(shape.kernel[dim]) * shape.dilation[dim]
    return taps, (taps >= 0) & (taps < size)


def _needed_rows(shape: LayerShape) -> tuple[NDArray[np.int64], int]:
    """``(int64[output rows, taps], input rows)``: input rows that each output row needs, -1 for padding."""
    if shape.kind == "linear":
        return np.arange(shape.n)[:, None], shape.n
    needs = np.arange(shape.batch)[:, None]
    input_rows = shape.batch
    for dim in range(len(shape.kernel) - 1):
        size = shape.input_size[dim]
        rows, valid = _reached(shape, dim)
        combined = needs[:, None, :, None] * size + rows[None, :, None, :]
        known = (needs >= 0)[:, None, :, None] & valid[None, :, None, :]
        needs = np.where(known, combined, -1).reshape(
            needs.shape[0] * rows.shape[0], needs.shape[1] * rows.shape[1]
        )
        input_rows *= size
    if not _reached(shape, -1)[1].any():
        needs = np.full_like(needs, -1)
    return np.ascontiguousarray(needs, np.int64), input_rows


def map_layer(
    shape: LayerShape,
    pass_cycles: NDArray[np.int64],
    k_blocks: int,
    order: NDArray[np.int64],
    sizes: ImageSizes,
    machine: LoweredMachine,
    machine_name: str,
) -> Mapping:
    """The feasible loop order with the lower latency, then the lower traffic, then weights outer.

    Parameters
    ----------
    shape : LayerShape
    pass_cycles : int64 array ``[G, T, segments]``
        Cycles of a pass of each row tile.
    k_blocks : int
        Block columns of a group.
    order : int64 array ``[G, Mb]``
        Block rows in execution order.
    sizes : ImageSizes
    machine : LoweredMachine
    machine_name : str
        Named in messages.

    Raises
    ------
    FitError
        The finest step does not fit, with the demand, the capacity, the gap and what would close it.
    """
    config = machine.step_config
    tiles = _row_tiles(pass_cycles, k_blocks, order, sizes, machine)
    weights_whole = bool((tiles.usage.sum(axis=(0, 1)) <= np.array(machine.row_share_bytes)).all())
    streamed = not weights_whole and bool((tiles.usage > tiles.share).any())
    units, split, input_whole = _units(shape, tiles, machine, machine_name)
    half_bits = machine.activation_bits_capacity // 2
    whole_cycles, whole_bytes = np.zeros(2, np.int64), np.zeros(2, np.int64)
    if weights_whole:
        whole_cycles[0], whole_bytes[0] = transfers(list(sizes.part_bytes.values()), machine)
    if input_whole:
        whole_cycles[1], whole_bytes[1] = transfers(
            [-(-rows * units.width * units.element_bits // 8) for rows in needed_runs(shape)], machine
        )
    best: Mapping | None = None
    for weights_outer in (1, 0):
        plan = StepPlan(
            weights_outer=weights_outer,
            split=int(split),
            streamed=int(streamed),
            weight_limited=int(not weights_whole and not streamed),
            input_half_bits=-1 if input_whole else half_bits,
        )
        steps = plan_steps(tiles, units, plan, config)
        cost, passes, loads = cost_steps(tiles, units, steps, plan, whole_cycles, whole_bytes, config)
        mapping = Mapping(
            loop_order="weights outer" if weights_outer else "columns outer",
            weight_residence="whole" if weights_whole else "streamed" if streamed else "grouped",
            input_residence="whole" if input_whole else "grouped",
            steps=steps,
            cost=cost,
            passes=passes,
            loads=loads,
        )
        if best is None or (mapping.latency_cycles, mapping.traffic_bytes) < (
            best.latency_cycles,
            best.traffic_bytes,
        ):
            best = mapping
    assert best is not None
    return best


def _row_tiles(
    pass_cycles: NDArray[np.int64],
    k_blocks: int,
    order: NDArray[np.int64],
    sizes: ImageSizes,
    machine: LoweredMachine,
) -> Tiles:
    groups, m_blocks = order.shape
    rows = machine.pass_config.rows
    n_tiles = pass_cycles.shape[1]
    slots = n_tiles * rows
    usage = np.zeros((groups, slots, 4), np.int64)
    group_index = np.arange(groups)[:, None]
    usage[:, :m_blocks] = sizes.stream_bytes[group_index, order]
    channels = np.zeros((groups, slots), np.int64)
    channels[:, :m_blocks] = sizes.channel_rows[order]
    row_bytes = np.empty((groups, m_blocks, 6), np.int64)
    row_bytes[:, :, 0] = sizes.offset_bytes
    row_bytes[:, :, 1] = sizes.channel_rows * CHANNEL_BYTES
    row_bytes[:, :, 2:] = sizes.stream_bytes
    return Tiles(
        cycles=np.ascontiguousarray(pass_cycles),
        channels=channels.reshape(groups, n_tiles, rows).sum(axis=2),
        usage=usage.reshape(groups, n_tiles, rows, 4),
        share=np.array(machine.row_share_bytes, np.int64) // 2,
        order=np.ascontiguousarray(order),
        row_bytes=row_bytes,
        order_bytes=sizes.order_bytes,
        rows=rows,
        k_blocks=k_blocks,
    )


def _units(
    shape: LayerShape, tiles: Tiles, machine: LoweredMachine, machine_name: str
) -> tuple[ColumnUnits, bool, bool]:
    """Units of columns, whether they are column tiles (where one output row does not fit), whether the input is held whole."""
    config = machine.step_config
    half_bits = machine.activation_bits_capacity // 2
    channels = int(tiles.channels.max())
    gaps = []
    for split in (False, True):
        units = column_units(shape, config.columns, config.activation_bits, split)
        whole_bits = sum(needed_runs(shape)) * units.width * units.element_bits
        input_whole = whole_bits <= machine.activation_bits_capacity
        output_bits = channels * int(units.positions.max()) * config.activation_bits
        input_demand = 0 if input_whole else widest_unit_bits(units)
        if output_bits <= config.output_half_bits and input_demand <= half_bits:
            return units, split, input_whole
        if shape.kind == "linear" or split:
            if output_bits > config.output_half_bits:
                gaps.append(
                    _gap("outputs of one pass", "output.size_kib", output_bits, config.output_half_bits)
                )
            if input_demand > half_bits:
                gaps.append(
                    _gap("input of one column tile", "activation_buffer.size_kib", input_demand, half_bits)
                )
            break
    raise FitError(
        f"layer {shape.name} does not fit machine {machine_name}: its finest step is one row tile against one column "
        "tile. " + " ".join(gaps)
    )


def _gap(what: str, field: str, demand_bits: int, half_bits: int) -> str:
    demand, half = -(-demand_bits // 8), half_bits // 8
    return (
        f"The {what} needs {demand:,} bytes, half of {field} holds {half:,}: {demand - half:,} bytes too few. "
        f"Raise {field} to {2 * demand / 1024} or more, or use fewer array rows or columns."
    )


@lru_cache(maxsize=4096)
def needed_runs(shape: LayerShape) -> tuple[int, ...]:
    """Lengths of the runs of adjacent input rows that the layer needs at all; groups lie one behind the other."""
    needs, input_rows = _needed_rows(shape)
    needed = np.zeros(input_rows, bool)
    needed[needs[needs >= 0]] = True
    edges = np.diff(np.tile(needed, shape.groups), prepend=False, append=False)
    starts, ends = np.flatnonzero(edges).reshape(-1, 2).T
    return tuple((ends - starts).tolist())


def transfers(sizes_bytes: list[int], machine: LoweredMachine) -> tuple[int, int]:
    """``(cycles, bytes)`` of some transfers in plain Python integers."""
    config = machine.step_config
    bus = [-(-size // config.burst_bytes) * config.burst_bytes for size in sizes_bytes]
    cycles = sum(-(-size * config.dram_cycles // config.dram_bytes) for size in bus)
    return cycles, sum(bus)
