"""From events to energy: pJ per event and component, and the energy of layers as counts × pJ.

Energy is linear in the events, so the whole model of one machine in one technology is a table ``pJ[event,
component]`` (`energy_per_event`, cached) and a network's energy is one matrix product (`layer_energy`). The
table of the reference machine stands in ``docs/assumptions.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hwsim.area import (
    COLUMN_INDEX_BITS,
    OPERAND_SETS,
    SCALE_BITS,
    TYPE_BITS,
    array_geometry,
    built_memories,
    datapath,
    leakage_mw,
    log2_ceil,
    logic_area_mm2,
    register_bits,
)
from hwsim.errors import InputError, Problem
from hwsim.kept import kept_by
from hwsim.kernels.totals import energy_of
from hwsim.machine import Machine
from hwsim.technology import Technology, remembered

__all__ = [
    "ENERGY_COMPONENTS",
    "EVENTS",
    "EnergyPerEvent",
    "EventCounts",
    "StaticEnergy",
    "block_energy_pj",
    "clock_pj_per_cycle",
    "clock_tree_pj",
    "energy_per_event",
    "layer_energy",
    "leakage_pj",
    "network_energy",
    "static_energy",
]

ENERGY_COMPONENTS = (
    "multipliers",
    "sign_adders",
    "dense_adder_tree",
    "accumulators",
    "operand_registers",
    "front_end",
    "arbiter",
    "operand_store_read",
    "operand_store_fill",
    "multicast",
    "weight_broadcast",
    "expander",
    "type_memory",
    "sign_memory",
    "magnitude_memory",
    "dense_memory",
    "activation_buffer",
    "output_buffer",
    "requantizer",
    "dram",
    "clock",
    "leakage",
)
"""Components of `layer_energy`, in the order of its last axis."""

Count = int | NDArray[np.integer]
Rates = TypeVar("Rates", float, NDArray[Any])


@dataclass(frozen=True, eq=False)
class EventCounts:
    """What happened, in physical terms: one integer per field, or one integer array ``[layers]`` per field.

    Attributes
    ----------
    dense_column_blocks, unified_column_blocks : int or int array
        Blocks executed by type × live output columns, summed over the passes (all column tiles, all groups).
        A block that R rows × C columns of PEs work on counts once per live column.
    latches : int or int array
        Row grants: words that a row latched. Every one of them is a queue entry and a block executed.
    words_read : int or int array
        Bank grants: words read from the operand store, however many rows share one.
    words_filled : int or int array
        Words written to the operand store by the expander.
    codes_examined : int or int array
        Type codes in the windows of the cycles in which a row scans.
    type_bits_read, sign_bits_read, magnitude_bits_read, dense_bits_read : int or int array
        Bits read from the weight memories, once per row (not per column) and pass.
    type_bits_written, sign_bits_written, magnitude_bits_written, dense_bits_written : int or int array
        Bits loaded into the weight memories.
    activation_bits_written, activation_bits_read : int or int array
        Activation buffer: bits loaded, bits read by the expander.
    output_bits_written, output_bits_read : int or int array
        Output buffer: bits drained into it, bits stored from it.
    outputs_requantised : int or int array
    dram_bits : int or int array
        Bits transferred over the channel, both directions, rounded up to whole bursts.
    cycles : int or int array
        Latency.
    """

    dense_column_blocks: Count = 0
    unified_column_blocks: Count = 0
    latches: Count = 0
    words_read: Count = 0
    words_filled: Count = 0
    codes_examined: Count = 0
    type_bits_read: Count = 0
    sign_bits_read: Count = 0
    magnitude_bits_read: Count = 0
    dense_bits_read: Count = 0
    type_bits_written: Count = 0
    sign_bits_written: Count = 0
    magnitude_bits_written: Count = 0
    dense_bits_written: Count = 0
    activation_bits_written: Count = 0
    activation_bits_read: Count = 0
    output_bits_written: Count = 0
    output_bits_read: Count = 0
    outputs_requantised: Count = 0
    dram_bits: Count = 0
    cycles: Count = 0


EVENTS = tuple(field.name for field in fields(EventCounts))
"""Names of the events, in the order of the rows of `EnergyPerEvent.pj`."""

_ROW = {name: index for index, name in enumerate(EVENTS)}
_COLUMN = {name: index for index, name in enumerate(ENERGY_COMPONENTS)}
CYCLES, DRAM_BITS, INPUT_BITS = _ROW["cycles"], _ROW["dram_bits"], _ROW["activation_bits_written"]
"""Rows of the events that depend on the DRAM channel."""


@dataclass(frozen=True, eq=False)
class EnergyPerEvent:
    """The energy model of one machine in one technology.

    Attributes
    ----------
    pj : float array ``[events, components]``
        pJ per event (`EVENTS`) and component (`ENERGY_COMPONENTS`).
    """

    pj: NDArray[np.float64]

    def event_pj(self, event: str, component: str | None = None) -> float:
        """pJ of one event, in one component or in all of them."""
        row = self.pj[EVENTS.index(event)]
        return float(row.sum() if component is None else row[ENERGY_COMPONENTS.index(component)])


def clock_pj_per_cycle(machine: Machine, technology: Technology) -> float:
    """Energy of the clock tree in one cycle, in pJ: its wires and the clock gates that it drives.

    The registers behind a closed gate are not clocked; a register's own clock pin is part of the energy of
    writing it. The tree reaches ``n`` gates spread over the logic area ``A`` with wires of ``0.7124 √(n·A)``,
    each of which rises and falls once per cycle: four times the energy of a bit of random data, which changes
    every other time.

    Source: length of the shortest tour through n random points, an upper bound of the shortest tree:
    Beardwood, Halton, Hammersley, Math. Proc. Camb. Phil. Soc. 55, 1959. One gate costs a register bit:
    assumption.
    """
    return clock_tree_pj(register_bits(machine, technology), logic_area_mm2(machine, technology), technology)


def clock_tree_pj(clocked_bits: int, area_mm2: float, technology: Technology) -> float:
    """Energy of one cycle of a clock tree that reaches ``clocked_bits`` register bits spread over ``area_mm2``, in pJ.

    Source: as for `clock_pj_per_cycle`.
    """
    gates = clocked_bits / technology.clock_gate_bits.value
    length_mm = 0.7124 * math.sqrt(gates * area_mm2)
    return length_mm * 4 * technology.wire_pj_per_mm + gates * technology.register_pj


@lru_cache(maxsize=256)
def energy_per_event(machine: Machine, technology: Technology) -> EnergyPerEvent:
    """pJ per event and component, computed once per machine and technology.

    Parameters
    ----------
    machine : Machine
    technology : Technology

    Examples
    --------
    >>> from hwsim.machine import load_machine
    >>> from hwsim.technology import load_technology
    >>> table = energy_per_event(load_machine("msa-16x16"), load_technology("45nm-horowitz"))
    >>> round(table.event_pj("dense_column_blocks", "multipliers"), 3)  # 16 products of 8 × 8 bits
    3.2
    """
    known = remembered(technology)
    pj = _energy_without_rates(machine, known).copy()
    pj[DRAM_BITS, _COLUMN["dram"]] = machine.dram.pj_per_bit
    pj[CYCLES, _COLUMN["leakage"]] = leakage_pj(leakage_mw(machine, known), machine.clock_mhz)
    pj.flags.writeable = False
    return EnergyPerEvent(pj)


@kept_by(Machine.static_fields_of, limit=64)
def _energy_without_rates(machine: Machine, technology: Technology) -> NDArray[np.float64]:
    """The table less the two entries that depend on clock and DRAM."""
    pj = _energy_without_memories(machine, technology).copy()
    _, store = built_memories(machine, technology)["operand_store"]
    pj[_ROW["words_read"], _COLUMN["operand_store_read"]] = store.read_energy_pj
    pj[_ROW["words_filled"], _COLUMN["operand_store_fill"]] = store.write_energy_pj
    _fill(pj, _memory_energies(machine, technology))
    pj.flags.writeable = False
    return pj


@kept_by(Machine.logic_fields_of)
def _energy_without_memories(machine: Machine, technology: Technology) -> NDArray[np.float64]:
    pj = np.zeros((len(EVENTS), len(ENERGY_COMPONENTS)))
    _fill(pj, _block_energies(machine, technology))
    _fill(pj, _word_energies(machine, technology))
    accumulator_bits, activation_bits = machine.precision.accumulator_bits, machine.precision.activation_bits
    pj[_ROW["outputs_requantised"], _COLUMN["requantizer"]] = (
        technology.multiplier_pj(accumulator_bits, SCALE_BITS)
        + 2 * technology.adder_pj(accumulator_bits)  # bias, rounding
        + technology.shifter_pj(accumulator_bits)
        + (accumulator_bits + activation_bits) * technology.register_pj
    )
    pj[CYCLES, _COLUMN["clock"]] = clock_pj_per_cycle(machine, technology)
    pj.flags.writeable = False
    return pj


def _fill(pj: NDArray[np.float64], table: dict[tuple[str, str], float]) -> None:
    for (event, component), value in table.items():
        pj[_ROW[event], _COLUMN[component]] = value


def _block_energies(machine: Machine, technology: Technology) -> dict[tuple[str, str], float]:
    """One block in one column: products, sums, accumulator updates (microarchitecture, section 2)."""
    (g_o, g_k), precision, widths = machine.array.block, machine.precision, datapath(machine)
    update_pj = (
        technology.adder_pj(precision.accumulator_bits) + precision.accumulator_bits * technology.register_pj
    )
    sign_add_pj = technology.adder_pj(widths.sum_bits) + precision.activation_bits * technology.gate_pj
    dense, unified = "dense_column_blocks", "unified_column_blocks"
    return {
        (dense, "multipliers"): g_o
        * g_k
        * technology.multiplier_pj(precision.weight_bits, precision.activation_bits),
        (dense, "dense_adder_tree"): widths.dense_tree_adds * technology.adder_pj(widths.product_bits),
        (dense, "accumulators"): widths.dense_updates * update_pj,
        (unified, "sign_adders"): g_o * g_k * sign_add_pj,
        (unified, "multipliers"): g_o * technology.multiplier_pj(precision.magnitude_bits, widths.sum_bits),
        (unified, "accumulators"): g_o * update_pj,
    }


def _word_energies(machine: Machine, technology: Technology) -> dict[tuple[str, str], float]:
    """One word through multicast network, front end and expander."""
    array, banks, word_bits = machine.array, machine.operand_store.banks, machine.word_bits
    geometry = array_geometry(machine, technology)
    gate_pj, register_pj, wire_pj = technology.gate_pj, technology.register_pj, technology.wire_pj_per_mm
    # down past all rows; across half the array on average to reach its columns
    multicast_mm = geometry.height_mm + geometry.width_mm / 2
    aligned_pj = log2_ceil(array.columns) * gate_pj + register_pj + geometry.width_mm * wire_pj
    result = {
        ("words_read", "multicast"): word_bits * multicast_mm * wire_pj,
        ("latches", "multicast"): word_bits * log2_ceil(banks) * gate_pj,
        ("latches", "operand_registers"): OPERAND_SETS * word_bits * register_pj,
        ("words_filled", "expander"): word_bits * aligned_pj,
    }
    if not machine.is_dense:
        window, depth = machine.front_end.skip_window, machine.front_end.queue_depth
        entry_bits = COLUMN_INDEX_BITS + TYPE_BITS
        # a code is aligned into the window and takes part in the search for the first that is not PRUNED
        result["codes_examined", "front_end"] = (
            TYPE_BITS * (register_pj + log2_ceil(window) * gate_pj) + (1 + log2_ceil(window)) * gate_pj
        )
        result["latches", "front_end"] = entry_bits * (register_pj + log2_ceil(depth) * gate_pj)
        # all rows compared, though usually fewer request
        compare_pj = technology.adder_pj(COLUMN_INDEX_BITS) + COLUMN_INDEX_BITS * gate_pj
        result["words_read", "arbiter"] = (array.rows - 1) * compare_pj
    return result


def _memory_energies(machine: Machine, technology: Technology) -> dict[tuple[str, str], float]:
    """One bit read from or written to a memory, and its way along a row where it is a weight's."""
    memories = built_memories(machine, technology)
    geometry = array_geometry(machine, technology)
    along_row_pj = technology.register_pj + geometry.width_mm * technology.wire_pj_per_mm
    result: dict[tuple[str, str], float] = {}
    for component, prefix in (
        ("type_memory", "type"),
        ("sign_memory", "sign"),
        ("magnitude_memory", "magnitude"),
        ("dense_memory", "dense"),
        ("activation_buffer", "activation"),
        ("output_buffer", "output"),
    ):
        if component in memories:
            memory, macro = memories[component]
            result[f"{prefix}_bits_read", component] = macro.read_energy_pj / memory.port_bits
            result[f"{prefix}_bits_written", component] = macro.write_energy_pj / memory.port_bits
            if component in ("sign_memory", "magnitude_memory", "dense_memory"):
                result[f"{prefix}_bits_read", "weight_broadcast"] = along_row_pj
    return result


def layer_energy(events: EventCounts, machine: Machine, technology: Technology) -> NDArray[np.float64]:
    """Energy by component, in pJ.

    Parameters
    ----------
    events : EventCounts
        Integers, or integer arrays ``[layers]``.
    machine : Machine
    technology : Technology

    Returns
    -------
    float64 array ``[components]`` or ``[layers, components]``
        In the order of `ENERGY_COMPONENTS`. The sum over the last axis is the energy of the layer.

    Raises
    ------
    InputError
        A count is negative or not an integer, arrays differ in length, or unified blocks or bits of a stream
        are counted that the machine, with its features, does not have. (Codes examined are free on a dense
        machine: its sequencer counts block columns and looks at no code.)
    """
    counts = _stacked(events)
    table = energy_per_event(machine, technology).pj
    absent = (counts.reshape(-1, len(EVENTS)) > 0).any(axis=0) & _absent_events(machine)
    if absent.any():
        names = [name for name, is_absent in zip(EVENTS, absent, strict=True) if is_absent]
        raise InputError(
            f"events on machine {machine.name}",
            [
                Problem(name, "counted, but with its features the machine has no such part", "count 0")
                for name in names
            ],
        )
    return counts.astype(np.float64) @ table


def network_energy(events: NDArray[np.int64], machine: Machine, technology: Technology) -> float:
    """Energy of all layers together, in pJ: the sum of their events × pJ, in the order of the events.

    Parameters
    ----------
    events : int64 array ``[layers, events]``
    machine : Machine
    technology : Technology
    """
    static = static_energy(machine, technology)
    zero = np.zeros(1, np.int64)
    [energy_pj] = energy_of(
        events.sum(axis=0)[None],
        zero,
        static.per_event_pj[None],
        zero,
        DRAM_BITS,
        np.array([machine.dram.pj_per_bit]),
        CYCLES,
        np.array([static.per_event_pj[CYCLES] + leakage_pj(static.leakage_mw, machine.clock_mhz)]),
    )
    return float(energy_pj)


@dataclass(frozen=True, eq=False)
class StaticEnergy:
    """The energy model of machines that differ in clock and DRAM only.

    Attributes
    ----------
    per_event_pj : float64 array ``[events]``
        pJ per event in all components together, leakage and DRAM left out.
    leakage_mw : float
    """

    per_event_pj: NDArray[np.float64]
    leakage_mw: float


def static_energy(machine: Machine, technology: Technology) -> StaticEnergy:
    """The part of `energy_per_event` that clock and DRAM do not touch, summed over the components."""
    known = remembered(technology)
    pj = _energy_without_rates(machine, known)
    return StaticEnergy(pj.sum(axis=1), leakage_mw(machine, known))


def leakage_pj(leakage_mw: Rates, clock_mhz: Rates) -> Rates:
    """Energy that leaks in one cycle, in pJ."""
    return leakage_mw * (1000 / clock_mhz)  # mW × ns = pJ


def _absent_events(machine: Machine) -> NDArray[np.bool_]:
    absent: tuple[str, ...] = ()
    if machine.is_dense:
        absent += ("type_bits_read", "type_bits_written")
    if not machine.features.unified_path:
        absent += ("unified_column_blocks", "sign_bits_read", "sign_bits_written")
        absent += ("magnitude_bits_read", "magnitude_bits_written")
    return np.isin(EVENTS, absent)


def _stacked(events: EventCounts) -> NDArray[np.integer]:
    """``int[..., events]``: the counts side by side."""
    values = [np.asarray(getattr(events, name)) for name in EVENTS]
    problems = [
        Problem(name, f"{value.dtype} counts, must be integers")
        for name, value in zip(EVENTS, values, strict=True)
        if value.dtype.kind not in "iu"
    ]
    shapes = {value.shape for value in values if value.ndim}
    if len(shapes) > 1 or any(len(shape) > 1 for shape in shapes):
        problems.append(Problem("", f"shapes {sorted(shapes)}; integers, or arrays of one length [layers]"))
    if not problems:
        problems = [
            Problem(name, f"{value.min()}, a count must not be negative")
            for name, value in zip(EVENTS, values, strict=True)
            if value.size and value.min() < 0
        ]
    if problems:
        raise InputError("events", problems)
    return np.stack(np.broadcast_arrays(*values), axis=-1)


def block_energy_pj(machine: Machine, technology: Technology, block: str) -> float:
    """Arithmetic energy of one block in one column, in pJ: products, sums, accumulators, operand registers.

    Parameters
    ----------
    block : {"dense", "unified"}
    """
    table = energy_per_event(machine, technology)
    registers_pj = table.event_pj("latches", "operand_registers") / machine.array.columns
    return table.event_pj(f"{block}_column_blocks") + registers_pj
