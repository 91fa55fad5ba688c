"""2:4 structured sparsity: of four weights along the reduction two are kept, each with a two-bit position.

The array is the dense block array with the same multipliers, so that only the pattern differs. A PE works on the kept half of
a block and picks each of their activations out of four that the operand word holds anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwsim.area import log2_ceil, machine_area
from hwsim.comparison.blocks import array_text, dense_array, dense_layer, run_blocks
from hwsim.comparison.cost import LayerCost, MachineCost, Silicon, energy_parts
from hwsim.energy import EventCounts, energy_per_event, layer_energy
from hwsim.image import ImageSizes, image_sizes
from hwsim.layer import LayerShape
from hwsim.lowering import effective_counts, execution_order, lower_machine
from hwsim.machine import Machine
from hwsim.mapping import map_layer
from hwsim.simulator import LayerRun, layer_events, pass_counters
from hwsim.technology import Technology

__all__ = [
    "GROUP",
    "KEPT",
    "POSITION_BITS",
    "StructuredArray",
    "kept_of_groups",
    "run_structured",
    "stored_share",
    "structured_array",
]

KEPT, GROUP = 2, 4
POSITION_BITS = 2
"""Bits that say where in its group a kept weight lies.

Source: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv 2104.08378, 2021 (the 2:4 format of NVIDIA's A100).
"""


def stored_share(machine: Machine) -> float:
    """Bits of a layer with the pattern over those of the dense layer."""
    bits = machine.precision.weight_bits
    return KEPT * (bits + POSITION_BITS) / (GROUP * bits)


def kept_of_groups(shape: LayerShape) -> int:
    """Weights that a layer with the pattern keeps; a last group of fewer than four keeps up to two.

    >>> kept_of_groups(LayerShape("fc", "linear", in_channels=9, out_channels=2))
    10
    """
    return shape.groups * shape.m * sum(min(KEPT, shape.k - first) for first in range(0, shape.k, GROUP))


@dataclass(frozen=True)
class StructuredArray:
    """A 2:4 array.

    Attributes
    ----------
    machine : Machine
        Its dense machine; the reduction side of the block is a multiple of four.
    """

    machine: Machine

    @property
    def half(self) -> Machine:
        """The machine whose blocks are the kept half: its arithmetic is that of a 2:4 block."""
        g_o, g_k = self.machine.array.block
        return self.machine.with_fields({"array.block": [g_o, g_k // 2]})

    @property
    def block_bits(self) -> int:
        """Bits of one stored block: kept weights and their positions."""
        g_o, g_k = self.machine.array.block
        return g_o * g_k * KEPT // GROUP * (self.machine.precision.weight_bits + POSITION_BITS)

    @property
    def block_cycles(self) -> int:
        """Cycles for which a PE works on one block: ``max(ceil(kept/μ), ceil(block_bits/dense_port_bits))``."""
        g_o, g_k = self.machine.array.block
        kept = g_o * g_k * KEPT // GROUP
        return max(
            -(-kept // self.machine.array.multipliers),
            -(-self.block_bits // self.machine.weights.dense_port_bits),
        )

    def selection(self, technology: Technology) -> Silicon:
        """What picks the activations: a multiplexer of four per multiplier, and the registers of the positions of a block."""
        array, precision = self.machine.array, self.machine.precision
        g_o, g_k = array.block
        per_multiplier = (GROUP - 1) * precision.activation_bits * technology.gate_um2
        multipliers = array.rows * array.columns * array.multipliers
        return Silicon(multipliers * per_multiplier, array.rows * g_o * g_k * KEPT // GROUP * POSITION_BITS)

    def area_mm2(self, technology: Technology) -> float:
        """Area of the machine: the dense one, its PEs with the arithmetic of half a block, and the selection."""
        area = machine_area(self.machine, technology)
        half = machine_area(self.half, technology)
        for name in ("multipliers", "dense_adder_tree", "accumulators"):
            area[name] = half[name]
        return sum(area.values()) + self.selection(technology).area_mm2(technology)


def structured_array(machine: Machine, technology: Technology, rows: int) -> StructuredArray:
    """The 2:4 array of so many rows beside ``machine``: multipliers per PE, columns, buffers and channel are its own.

    The weight memory is as small as the format allows for the same block rows; a reduction side of the block that is not a
    multiple of four becomes the next one.
    """
    g_o, g_k = machine.array.block
    dense = dense_array(machine, technology, rows)
    wide = -(-g_k // GROUP) * GROUP
    per_row = int(dense.weights.dense_kib * 1024 * stored_share(machine)) // rows
    return StructuredArray(
        dense.with_fields(
            {
                "name": f"{machine.name[:180]} 2:4, {rows} rows",
                "array.block": [g_o, wide],
                "operand_store.size_kib": machine.operand_store.size_kib * wide / g_k,
                "weights.dense_kib": rows * per_row / 1024,
            }
        )
    )


def run_structured(
    array: StructuredArray, shapes: Sequence[LayerShape], is_pruned: Sequence[bool], technology: Technology
) -> MachineCost:
    """Layers on a 2:4 array; those that are not pruned run dense on it.

    Parameters
    ----------
    array : StructuredArray
    shapes : sequence of LayerShape
    is_pruned : sequence of bool
        Whether the layer has the 2:4 pattern.
    technology : Technology
    """
    machine = array.machine
    dense = [dense_layer(shape, machine.array.block) for shape in shapes]
    as_dense = run_blocks(machine, dense, technology).layers
    selection_pj = array.selection(technology).static_pj_per_cycle(technology, machine.clock_mhz)
    costs = []
    for shape, pruned, cost in zip(shapes, is_pruned, as_dense, strict=True):
        found = _pruned_layer(array, shape, technology) if pruned else cost
        parts = found.energy_pj | {"static": found.energy_pj["static"] + found.latency_cycles * selection_pj}
        costs.append(replace(found, energy_pj=parts))
    pes = machine.array.rows * machine.array.columns
    return MachineCost(
        array=array_text(machine),
        multipliers=pes * machine.array.multipliers,
        area_mm2=array.area_mm2(technology),
        layers=tuple(costs),
    )


def _pruned_layer(array: StructuredArray, shape: LayerShape, technology: Technology) -> LayerCost:
    machine = array.machine
    lowered = lower_machine(machine)
    layer = dense_layer(shape, machine.array.block)
    blocks = effective_counts(layer.types, machine)
    order = execution_order(blocks, machine)
    config = lowered.pass_config._replace(dense_cycles=array.block_cycles)
    counters = pass_counters(layer.types, order, config, uniform=True)
    sizes = _sizes(array, image_sizes(blocks, shape.m, machine), layer.types.shape[2])
    mapping = map_layer(
        shape, counters[:, :, :, 0], layer.types.shape[2], order, sizes, lowered, machine.name
    )
    run = LayerRun(layer, blocks, order, machine.array.rows, counters, mapping, sizes)
    events = layer_events(run, machine)
    column_blocks = events["dense_column_blocks"]
    events |= {"dense_column_blocks": 0, "dense_bits_read": run.totals["dense"] * array.block_bits}
    arithmetic_pj = column_blocks * (
        energy_per_event(array.half, technology).event_pj("dense_column_blocks")
        + _selection_pj(machine, technology)
    )
    kept = kept_of_groups(shape)
    return LayerCost(
        layer=shape.name,
        weight_count=shape.weight_count,
        kept_weights=kept,
        products=kept * shape.n,
        compute_cycles=run.totals["cycles"],
        latency_cycles=mapping.latency_cycles,
        dram_bytes=mapping.traffic_bytes,
        storage_bytes=sizes.total_bytes,
        energy_pj=energy_parts(layer_energy(EventCounts(**events), machine, technology), array=arithmetic_pj),
    )


def _sizes(array: StructuredArray, dense: ImageSizes, k_blocks: int) -> ImageSizes:
    """The image of the dense layer, its blocks stored as kept weights and positions."""
    bits = k_blocks * array.block_bits
    stream_bytes = np.zeros_like(dense.stream_bytes)
    stream_bytes[:, :, 3] = -(-bits // 8)
    rows = dense.stream_bytes.shape[0] * dense.stream_bytes.shape[1]
    stream_bits = dict.fromkeys(dense.stream_bits, 0) | {"dense": rows * bits}
    return replace(dense, stream_bytes=stream_bytes, stream_bits=stream_bits)


def _selection_pj(machine: Machine, technology: Technology) -> float:
    """Energy of the multiplexers for one block in one column."""
    g_o, g_k = machine.array.block
    return (
        g_o * g_k * KEPT // GROUP * log2_ceil(GROUP) * machine.precision.activation_bits * technology.gate_pj
    )
