"""An element-skipping array with bitmaps, after SparTen, on its weight side.

Source: Gondimalla, Chesnut, Thottethodi, Vijaykumar, SparTen: A Sparse Tensor Accelerator for Convolutional Neural Networks,
MICRO 2019, doi:10.1145/3352460.3358291. Taken from it: sparse vectors as a bitmap and the values of its ones; clusters of
compute units that a chunk of inputs is broadcast to, each unit with filters of its own and one multiplier; the barrier at
each chunk, where a cluster waits for the unit with the most work; and the greedy balancing that puts two filters on a unit,
the densest with the sparsest, chunk by chunk. Not taken: zero activations. No machine of the comparison skips those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hwsim.area import Memory, log2_ceil, machine_area, memories
from hwsim.comparison.blocks import dense_array
from hwsim.comparison.cost import LayerCost, MachineCost, Silicon, energy_parts
from hwsim.comparison.patterns import Pattern
from hwsim.energy import EventCounts, energy_per_event, layer_energy
from hwsim.errors import InputError, Problem
from hwsim.image import ImageSizes
from hwsim.lowering import LoweredMachine, lower_machine
from hwsim.machine import Machine
from hwsim.mapping import map_layer
from hwsim.technology import Technology

__all__ = ["BitmapArray", "bitmap_array", "chunk_sizes", "pass_cycles", "run_bitmap"]

FILTERS_PER_UNIT = 2
"""Greedy balancing puts so many filters on a unit."""
UNITS_PER_CLUSTER = 32
"""Units of a cluster: SparTen's, quoted second hand; the paper's text was not at hand to confirm it."""
CHUNK = 128
"""Positions of a chunk: SparTen's, quoted second hand as well."""


@dataclass(frozen=True)
class BitmapArray:
    """Clusters of compute units; a cluster works on one output position at a time, all clusters on the same filters.

    Attributes
    ----------
    machine : Machine
        The dense machine whose buffers, weight memories and output side it has: a row holds the filters of one unit of each
        cluster, a column is a cluster, a word of its expander brings ``block[1]`` activations to every cluster.
    chunk : int
        Reduction positions between two barriers.
    is_balanced : bool
        Whether filters are paired by density, chunk by chunk. Off, unit i has filters i and i + units.
    """

    machine: Machine
    chunk: int = CHUNK
    is_balanced: bool = True

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise InputError("bitmap array", Problem("chunk", f"{self.chunk}, must be at least 1"))

    @property
    def units(self) -> int:
        """Units of a cluster."""
        return self.machine.array.rows

    @property
    def clusters(self) -> int:
        """Clusters: output positions at a time."""
        return self.machine.array.columns

    def logic(self, technology: Technology) -> Silicon:
        """What the dense machine lacks.

        Per cluster two chunks of activations (one arrives) and the network that brings sums to the unit that has the filter
        now; per unit a multiplexer of a whole chunk; per row of units, shared by the clusters since they do the same, the
        bitmaps of a chunk and the next, the search for the next one, and a value.
        """
        array, precision = self.machine.array, self.machine.precision
        gate = technology.gate_um2
        units = array.rows * array.columns
        select_um2 = units * (self.chunk - 1) * precision.activation_bits * gate
        # as in the front end of a block-skip row: a code takes part in a search, over log2 levels
        search_um2 = array.rows * self.chunk * (1 + log2_ceil(self.chunk)) * gate
        network_um2 = 0.0
        if self.is_balanced:
            network_um2 = units * log2_ceil(2 * array.rows) * precision.accumulator_bits * gate
        held_bits = array.columns * 2 * self.chunk * precision.activation_bits
        held_bits += array.rows * (2 * FILTERS_PER_UNIT * self.chunk + precision.weight_bits)
        return Silicon(select_um2 + search_um2 + network_um2, held_bits)

    def area_mm2(self, technology: Technology) -> float:
        """Area: the dense machine without operand store, operand registers and multicast, and `logic`."""
        area = machine_area(self.machine, technology)
        for name in ("operand_store", "operand_registers", "multicast", "weight_broadcast"):
            area[name] = 0.0
        return sum(area.values()) + self.logic(technology).area_mm2(technology)


def bitmap_array(
    machine: Machine,
    technology: Technology,
    clusters: int,
    kept_share: float,
    *,
    units: int = UNITS_PER_CLUSTER,
    chunk: int = CHUNK,
) -> BitmapArray:
    """The array of so many clusters beside ``machine``: buffers, ports, channel and expander width are its own.

    A unit's weight memory holds two filters where the machine's row holds ``block[0]``, as small as bitmaps and ``kept_share``
    of the values allow.
    """
    precision, array = machine.precision, machine.array
    g_o, g_k = array.block
    per_filter = int(machine.weights.dense_kib * 1024) // array.rows / g_o
    stored = min(1.0, kept_share) + 1 / precision.weight_bits
    per_row = max(int(per_filter * FILTERS_PER_UNIT * stored), FILTERS_PER_UNIT * precision.weight_bits)
    arriving = min(max(1, g_k * array.columns // clusters), 256)  # the widest block of a description
    dense = dense_array(machine, technology, array.rows)
    return BitmapArray(
        dense.with_fields(
            {
                "name": f"{machine.name[:180]} bitmap, {clusters} clusters",
                "array.rows": units,
                "array.columns": clusters,
                "array.block": [FILTERS_PER_UNIT, arriving],
                "array.multipliers": 1,
                # not there; large enough for the description to be valid
                "operand_store.size_kib": max(
                    machine.operand_store.size_kib, arriving * clusters * precision.activation_bits / 2048
                ),
                "weights.dense_kib": units * per_row / 1024,
            }
        ),
        chunk=chunk,
    )


def chunk_sizes(reduction: int, chunk: int) -> NDArray[np.int64]:
    """Positions of each chunk of a reduction; the last may be shorter."""
    sizes = np.full(-(-reduction // chunk), chunk, np.int64)
    sizes[-1] = reduction - (sizes.size - 1) * chunk
    return sizes


@njit(cache=True, nogil=True)
def pass_cycles(nonzeros, units, is_balanced, least):  # type: ignore[no-untyped-def]
    """``int64[G, T]``: cycles in which a cluster works through each tile of ``2·units`` filters for one output position.

    A chunk takes as long as the unit with the most kept weights in it, and at least as long as the chunk takes to arrive.
    A tile with fewer filters is filled up with empty ones, so that as many units as possible have one filter only.

    Parameters
    ----------
    nonzeros : int64 ``[G, filters, chunks]``
        Kept weights of each filter in each chunk.
    units : int
    is_balanced : bool
        Pair the filters of a tile by their kept weights in the chunk, the most with the fewest; else i with i + units.
    least : int64 ``[chunks]``
        Cycles that a chunk takes to arrive.
    """
    groups, filters, chunks = nonzeros.shape
    size = 2 * units
    tiles = (filters + size - 1) // size
    cycles = np.zeros((groups, tiles), np.int64)
    work = np.empty(size, np.int64)
    for group in range(groups):
        for tile in range(tiles):
            for c in range(chunks):
                work[:] = 0
                for i in range(min(size, filters - tile * size)):
                    work[i] = nonzeros[group, tile * size + i, c]
                if is_balanced:
                    work.sort()
                longest = least[c]
                for i in range(units):
                    partner = size - 1 - i if is_balanced else i + units
                    longest = max(longest, work[i] + work[partner])
                cycles[group, tile] += longest
    return cycles


def run_bitmap(array: BitmapArray, patterns: Sequence[Pattern], technology: Technology) -> MachineCost:
    """Layers whose kept weights lie where ``patterns`` say, on a bitmap array."""
    lowered = lower_machine(array.machine)
    # no operand store, so no segments, and a fill is part of the chunk's arrival
    lowered = replace(
        lowered, step_config=lowered.step_config._replace(segment_words=2**40, fill_words=2**40)
    )
    return MachineCost(
        array=f"{array.units}x{array.clusters}",
        multipliers=array.units * array.clusters,
        area_mm2=array.area_mm2(technology),
        layers=tuple(_layer(array, pattern, lowered, technology) for pattern in patterns),
    )


def _layer(
    array: BitmapArray, pattern: Pattern, lowered: LoweredMachine, technology: Technology
) -> LayerCost:
    machine, shape = array.machine, pattern.shape
    nonzeros = pattern.nonzeros(array.chunk)
    sizes_k = chunk_sizes(shape.k, array.chunk)
    arriving = machine.array.block[1] * machine.operand_store.fill_words_per_cycle
    cycles = pass_cycles(nonzeros, array.units, array.is_balanced, -(-sizes_k // arriving))
    sizes = _sizes(array, nonzeros, shape.k)
    rows = sizes.stream_bytes.shape[1]
    order = np.repeat(np.arange(rows)[None, :], shape.groups, axis=0)
    mapping = map_layer(shape, cycles[:, :, None], shape.k, order, sizes, lowered, machine.name)
    passes = mapping.passes
    kept = int(nonzeros.sum())
    compute = int((passes * cycles).sum())
    # rows of weights are read once per pass, a tile of 2·units filters at a time
    bits_read = _tile_bits(array, nonzeros, shape.k) * passes
    precision = machine.precision
    words = int(passes.sum()) * -(-shape.k // machine.array.block[1])
    outputs = shape.out_channels * shape.n
    events = EventCounts(
        dense_bits_read=int(bits_read.sum()),
        dense_bits_written=int((_tile_bits(array, nonzeros, shape.k) * mapping.loads).sum()),
        activation_bits_read=words * machine.word_bits,
        activation_bits_written=mapping.totals["load_input_bytes"] * 8,
        output_bits_written=outputs * precision.activation_bits,
        output_bits_read=outputs * precision.activation_bits,
        outputs_requantised=outputs,
        dram_bits=mapping.traffic_bytes * 8,
    )
    chunks = int(passes.sum()) * sizes_k.size
    return LayerCost(
        layer=shape.name,
        weight_count=shape.weight_count,
        kept_weights=kept,
        products=kept * shape.n,
        compute_cycles=compute,
        latency_cycles=mapping.latency_cycles,
        dram_bytes=mapping.traffic_bytes,
        storage_bytes=sizes.total_bytes,
        energy_pj=energy_parts(
            layer_energy(events, machine, technology),
            array=kept * shape.n * _product_pj(array, technology),
            delivery=_delivery_pj(array, technology, words, chunks),
            static=mapping.latency_cycles * _static_pj_per_cycle(array, technology),
        ),
    )


def _sizes(array: BitmapArray, nonzeros: NDArray[np.int64], reduction: int) -> ImageSizes:
    """Bitmaps and values of the filters of a unit, one stream per unit; an offset per unit."""
    groups, filters, _ = nonzeros.shape
    rows = -(-filters // FILTERS_PER_UNIT)
    bits = np.zeros((groups, rows * FILTERS_PER_UNIT), np.int64)
    bits[:, :filters] = reduction + nonzeros.sum(axis=2) * array.machine.precision.weight_bits
    per_row = bits.reshape(groups, rows, FILTERS_PER_UNIT).sum(axis=2)
    stream_bytes = np.zeros((groups, rows, 4), np.int64)
    stream_bytes[:, :, 3] = -(-per_row // 8)
    channel_rows = np.full(rows, FILTERS_PER_UNIT, np.int64)
    channel_rows[-1] = filters - (rows - 1) * FILTERS_PER_UNIT
    stream_bits = {"type": 0, "sign": 0, "magnitude": 0, "dense": int(per_row.sum())}
    return ImageSizes(stream_bytes, stream_bits, offset_bytes=4, order_bytes=0, channel_rows=channel_rows)


def _tile_bits(array: BitmapArray, nonzeros: NDArray[np.int64], reduction: int) -> NDArray[np.int64]:
    """``int64[G, T]``: bitmap and value bits of the filters of each tile."""
    size = FILTERS_PER_UNIT * array.units
    bits = reduction + nonzeros.sum(axis=2) * array.machine.precision.weight_bits
    return np.add.reduceat(bits, np.arange(0, bits.shape[1], size), axis=1)


def _product_pj(array: BitmapArray, technology: Technology) -> float:
    """One kept weight in one cluster: its activation picked out of the chunk, the product, the sum."""
    precision = array.machine.precision
    accumulator_bits = precision.accumulator_bits
    return (
        log2_ceil(array.chunk) * precision.activation_bits * technology.gate_pj
        + technology.multiplier_pj(precision.weight_bits, precision.activation_bits)
        + technology.adder_pj(accumulator_bits)
        + accumulator_bits * technology.register_pj
    )


def _delivery_pj(array: BitmapArray, technology: Technology, words: int, chunks: int) -> float:
    """Activations from the expander into the chunk registers and down a cluster; the search; sums that change units."""
    machine = array.machine
    precision, gate_pj = machine.precision, technology.gate_pj
    height_mm = _height_mm(array, technology)
    expander_pj = energy_per_event(machine, technology).event_pj("words_filled", "expander")
    word_pj = expander_pj + machine.word_bits * (
        technology.register_pj + height_mm * technology.wire_pj_per_mm
    )
    # every bit of a bitmap is a code that is examined, once per row of units
    code_pj = technology.register_pj + (1 + log2_ceil(array.chunk)) * gate_pj
    chunk_pj = array.units * FILTERS_PER_UNIT * array.chunk * code_pj
    if array.is_balanced:
        hop_pj = log2_ceil(2 * array.units) * gate_pj + technology.register_pj
        moved_bits = array.clusters * array.units * FILTERS_PER_UNIT * precision.accumulator_bits
        chunk_pj += moved_bits * (hop_pj + height_mm / 2 * technology.wire_pj_per_mm)
    return words * word_pj + chunks * chunk_pj


def _height_mm(array: BitmapArray, technology: Technology) -> float:
    """Height of a cluster: its share of the logic as a column of square tiles, one per unit."""
    area = machine_area(array.machine, technology)
    logic_mm2 = area["multipliers"] + area["accumulators"] + array.logic(technology).logic_mm2(technology)
    return array.units * float(np.sqrt(logic_mm2 / (array.units * array.clusters)))


def _static_pj_per_cycle(array: BitmapArray, technology: Technology) -> float:
    """Clock and leakage of what is there: the dense machine's parts that stay, and `BitmapArray.logic`."""
    machine = array.machine
    precision = machine.precision
    area = machine_area(machine, technology)
    extra = array.logic(technology)
    stays = ("multipliers", "accumulators", "expander", "requantizer", "control")
    bits = machine.array.rows * machine.array.columns * 2 * FILTERS_PER_UNIT * precision.accumulator_bits
    bits += machine.output.words_per_cycle * (precision.accumulator_bits + precision.activation_bits)
    cell_um2 = sum(area[name] for name in stays) * 1e6 * technology.logic_utilization.value
    cell_um2 += extra.cell_um2 - bits * technology.register_um2
    held: dict[str, Memory] = memories(machine)
    del held["operand_store"]
    silicon = Silicon(cell_um2, bits + extra.register_bits, held)
    return silicon.static_pj_per_cycle(technology, machine.clock_mhz)
