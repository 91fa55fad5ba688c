"""Machines that `hwsim.simulator` runs: the block-skip machine itself, and the same array without its features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hwsim.area import dense_at_equal_area, machine_area
from hwsim.comparison.cost import LayerCost, MachineCost, energy_parts
from hwsim.energy import EventCounts, layer_energy
from hwsim.layer import DENSE, PRUNED, Layer, LayerShape
from hwsim.machine import Machine
from hwsim.simulator import layer_events, run_layer
from hwsim.technology import Technology

__all__ = ["array_text", "dense_array", "dense_layer", "kept_weights", "run_blocks"]


def kept_weights(layer: Layer) -> int:
    """Weights of the blocks that are not PRUNED, padding excluded."""
    g_o, g_k = layer.block
    m_blocks, k_blocks = layer.shape.blocks(layer.block)
    rows, columns = np.full(m_blocks, g_o), np.full(k_blocks, g_k)
    rows[-1] -= m_blocks * g_o - layer.shape.m
    columns[-1] -= k_blocks * g_k - layer.shape.k
    return int((rows @ (layer.types != PRUNED)).sum(axis=0) @ columns)


def dense_layer(shape: LayerShape, block: tuple[int, int]) -> Layer:
    """A layer whose blocks are all DENSE."""
    return Layer(shape, block, np.broadcast_to(np.uint8(DENSE), (shape.groups, *shape.blocks(block))).copy())


def dense_array(machine: Machine, technology: Technology, rows: int) -> Machine:
    """The dense machine of `hwsim.area.dense_at_equal_area` with so many rows: one bank, a dense memory per row."""
    dense = dense_at_equal_area(machine, technology)
    per_row_bytes = int(machine.weights.dense_kib * 1024) // machine.array.rows
    return dense.with_fields(
        {
            "name": f"{machine.name[:180]} dense, {rows} rows",
            "array.rows": rows,
            "weights.dense_kib": rows * per_row_bytes / 1024,
        }
    )


def array_text(machine: Machine) -> str:
    """The size of a block array: rows x columns of PEs, and the multipliers of one."""
    return f"{machine.array.rows}x{machine.array.columns}x{machine.array.multipliers}"


def run_blocks(machine: Machine, layers: Sequence[Layer], technology: Technology) -> MachineCost:
    """Compressed or dense layers on a block machine: what `hwsim.simulate` reports of them."""
    costs = []
    for layer in layers:
        run = run_layer(layer, machine)
        events = layer_events(run, machine)
        kept = kept_weights(layer)
        costs.append(
            LayerCost(
                layer=layer.name,
                weight_count=layer.shape.weight_count,
                kept_weights=kept,
                products=kept * layer.shape.n,
                compute_cycles=run.totals["cycles"],
                latency_cycles=run.mapping.latency_cycles,
                dram_bytes=run.mapping.traffic_bytes,
                storage_bytes=run.sizes.total_bytes,
                energy_pj=energy_parts(layer_energy(EventCounts(**events), machine, technology)),
            )
        )
    array = machine.array
    return MachineCost(
        array=array_text(machine),
        multipliers=array.rows * array.columns * array.multipliers,
        area_mm2=sum(machine_area(machine, technology).values()),
        layers=tuple(costs),
    )
