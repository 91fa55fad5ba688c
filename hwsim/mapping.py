"""The mapper: the steps of a layer on a machine, in the better of the two loop orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import FitError
from hwsim.image import CHANNEL_BYTES, ImageSizes
from hwsim.kernels.steps import (
    STEP_FIELDS,
    ColumnUnits,
    StepConfig,
    StepPlan,
    Tiles,
    moves_of_steps,
    plan_steps,
    time_steps,
    widest_unit_bits,
    work_of_passes,
)
from hwsim.kernels.totals import Demand, Memories, plan_memories
from hwsim.layer import LayerShape
from hwsim.lowering import LoweredMachine

__all__ = [
    "Mapping",
    "StoredLayer",
    "column_units",
    "does_not_fit",
    "layer_demand",
    "map_layer",
    "memories",
    "needed_runs",
    "plan_inputs",
    "row_tiles",
    "stored_layer",
    "transfers",
]

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
    stored = stored_layer(shape, order, sizes, machine.pass_config.rows)
    config = machine.step_config
    demand = layer_demand(shape, stored, config.columns, config.activation_bits)
    plan = plan_memories(demand, memories([machine]))[0]
    if plan[0] < 0:
        raise does_not_fit(shape, demand, machine, machine_name)
    units, whole_weights, whole_inputs = plan_inputs(shape, stored, plan, config)
    tiles = row_tiles(stored, plan[4:8])
    best: Mapping | None = None
    for weights_outer in (1, 0):
        step_plan = StepPlan(weights_outer, int(plan[0]), int(plan[1]), int(plan[2]), int(plan[3]))
        steps = plan_steps(tiles, units, step_plan, config)
        spans, moved, passes, loads = moves_of_steps(
            tiles, units, steps, step_plan, whole_weights, whole_inputs, config
        )
        work = work_of_passes(pass_cycles, stored.channels, k_blocks, spans, config)
        mapping = Mapping(
            loop_order="weights outer" if weights_outer else "columns outer",
            weight_residence="streamed" if plan[1] else "grouped" if plan[2] else "whole",
            input_residence="whole" if plan[3] < 0 else "grouped",
            steps=steps,
            cost=time_steps(work, moved, machine.channel),
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


class StoredLayer(NamedTuple):
    """What the weight memories of an array of so many rows hold of a layer; arrays as in `hwsim.kernels.steps.Tiles`.

    ``part_bytes``: int64 ``[parts]`` of the image.
    """

    rows: int
    channels: NDArray[np.int64]
    usage: NDArray[np.int64]
    order: NDArray[np.int64]
    row_bytes: NDArray[np.int64]
    order_bytes: int
    part_bytes: NDArray[np.int64]


def stored_layer(shape: LayerShape, order: NDArray[np.int64], sizes: ImageSizes, rows: int) -> StoredLayer:
    """Row tiles of ``rows`` block rows each, and the bytes of every block row."""
    groups, m_blocks = order.shape
    n_tiles = -(-m_blocks // rows)
    slots = n_tiles * rows
    usage = np.zeros((groups, slots, 4), np.int64)
    usage[:, :m_blocks] = sizes.stream_bytes[np.arange(groups)[:, None], order]
    channels = np.zeros((groups, slots), np.int64)
    channels[:, :m_blocks] = sizes.channel_rows[order]
    row_bytes = np.empty((groups, m_blocks, 6), np.int64)
    row_bytes[:, :, 0] = sizes.offset_bytes
    row_bytes[:, :, 1] = sizes.channel_rows * CHANNEL_BYTES
    row_bytes[:, :, 2:] = sizes.stream_bytes
    return StoredLayer(
        rows=rows,
        channels=channels.reshape(groups, n_tiles, rows).sum(axis=2),
        usage=usage.reshape(groups, n_tiles, rows, 4),
        order=np.ascontiguousarray(order),
        row_bytes=row_bytes,
        order_bytes=sizes.order_bytes,
        part_bytes=np.array(list(sizes.part_bytes.values()), np.int64),
    )


def row_tiles(stored: StoredLayer, share: NDArray[np.int64]) -> Tiles:
    """The row tiles, and what a group of them may use of a row's weight memories."""
    return Tiles(
        channels=stored.channels,
        usage=stored.usage,
        share=share,
        order=stored.order,
        row_bytes=stored.row_bytes,
        order_bytes=stored.order_bytes,
        rows=stored.rows,
    )


def memories(machines: Sequence[LoweredMachine]) -> Memories:
    """The memories of some machines side by side."""
    return Memories(
        row_share_bytes=np.array([machine.row_share_bytes for machine in machines], np.int64),
        activation_bits=np.array([machine.activation_bits_capacity for machine in machines], np.int64),
        output_half_bits=np.array([machine.step_config.output_half_bits for machine in machines], np.int64),
    )


def layer_demand(shape: LayerShape, stored: StoredLayer, columns: int, activation_bits: int) -> Demand:
    """What a layer demands of the memories of a machine with so many columns."""
    channels = int(stored.channels.max())
    input_bits, unit_input_bits, positions = _unit_demand(shape, columns, activation_bits)
    return Demand(
        row_bytes=stored.usage.sum(axis=(0, 1)).max(axis=0),
        tile_bytes=stored.usage.max(axis=(0, 1, 2)),
        input_bits=input_bits,
        unit_input_bits=unit_input_bits,
        unit_output_bits=positions * (channels * activation_bits),
        can_split=int(shape.kind != "linear"),
        output_bits=shape.m * shape.n * activation_bits,
    )


@lru_cache(maxsize=4096)
def _unit_demand(
    shape: LayerShape, columns: int, activation_bits: int
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """Bits of the whole input; of one unit's input, and positions of one unit, for units of rows and of column tiles."""
    rows, tiles = (column_units(shape, columns, activation_bits, split) for split in (False, True))
    return (
        sum(needed_runs(shape)) * rows.width * rows.element_bits,
        np.array([widest_unit_bits(units) for units in (rows, tiles)], np.int64),
        np.array([units.positions.max() for units in (rows, tiles)], np.int64),
    )


def plan_inputs(
    shape: LayerShape, stored: StoredLayer, plan: NDArray[np.int64], config: StepConfig
) -> tuple[ColumnUnits, NDArray[np.int64], NDArray[np.int64]]:
    """Units of columns, and the transfers in bytes that load weights and inputs which are held whole.

    Parameters
    ----------
    shape : LayerShape
    stored : StoredLayer
    plan : int64 array ``[9]``
        A row of `hwsim.kernels.totals.plan_memories`.
    config : StepConfig
    """
    units = column_units(shape, config.columns, config.activation_bits, bool(plan[0]))
    nothing = np.zeros(0, np.int64)
    whole_weights, whole_inputs = nothing, nothing
    if not (plan[1] or plan[2]):
        whole_weights = stored.part_bytes
    if plan[3] < 0:
        row_bits = units.width * units.element_bits
        whole_inputs = -(-np.array(needed_runs(shape), np.int64) * row_bits // 8)
    return units, whole_weights, whole_inputs


def does_not_fit(shape: LayerShape, demand: Demand, machine: LoweredMachine, machine_name: str) -> FitError:
    """The finest step does not fit: the demand, the capacity, the gap and what would close it."""
    gaps = []
    output_bits, input_bits = (
        demand.unit_output_bits[demand.can_split],
        demand.unit_input_bits[demand.can_split],
    )
    half_bits = machine.activation_bits_capacity // 2
    if output_bits > machine.step_config.output_half_bits:
        gaps.append(
            _gap("outputs of one pass", "output.size_kib", output_bits, machine.step_config.output_half_bits)
        )
    if demand.input_bits > machine.activation_bits_capacity and input_bits > half_bits:
        gaps.append(_gap("input of one column tile", "activation_buffer.size_kib", input_bits, half_bits))
    return FitError(
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
    channel = machine.channel
    bus = [-(-size // channel.burst_bytes) * channel.burst_bytes for size in sizes_bytes]
    cycles = sum(-(-size * channel.dram_cycles // channel.dram_bytes) for size in bus)
    return cycles, sum(bus)
