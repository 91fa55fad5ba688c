"""The area of a machine by component, its geometry, and the dense machine of the same area.

Logic is gate equivalents (`hwsim.gates`, fitted to synthesis runs of the RTL) × the NAND2 area of a
`hwsim.technology.Technology`, which also gives the memory macros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

from pydantic import BaseModel

from hwsim.gates import INDEX_BITS, area_model, component_gates, log2_ceil
from hwsim.kept import kept_by
from hwsim.machine import MAX_KIB, MAX_ROWS, NO_FEATURES, Machine
from hwsim.technology import MemoryMacro, Technology, remembered

__all__ = [
    "AREA_COMPONENTS",
    "COLUMN_INDEX_BITS",
    "OPERAND_SETS",
    "SCALE_BITS",
    "TYPE_BITS",
    "ArrayGeometry",
    "Datapath",
    "Memory",
    "array_geometry",
    "built_memories",
    "datapath",
    "dense_at_equal_area",
    "leakage_mw",
    "log2_ceil",
    "logic_area_mm2",
    "machine_area",
    "memories",
    "register_bits",
]

AREA_COMPONENTS = (
    "multipliers",
    "sign_adders",
    "dense_adder_tree",
    "accumulators",
    "operand_registers",
    "weight_broadcast",
    "front_end",
    "arbiter",
    "multicast",
    "expander",
    "requantizer",
    "control",
    "operand_store",
    "type_memory",
    "sign_memory",
    "magnitude_memory",
    "dense_memory",
    "activation_buffer",
    "output_buffer",
)
"""Components of `machine_area`, in the order in which they are reported."""

TYPE_BITS = 2  # a type code at its widest (microarchitecture, section 5)
COLUMN_INDEX_BITS = INDEX_BITS  # an index of a block column in the queues and the arbiter, as in the RTL
SCALE_BITS = 16  # the requantiser's scale (microarchitecture, section 5)
OPERAND_SETS = 2  # the operand that was fetched, and the one that the PE works on
ACCUMULATOR_SETS = 2  # the pass that computes, and the one that drains


Part = TypeVar("Part", bound=BaseModel)


class Memory(NamedTuple):
    """Memory macros of one kind: how many, and the capacity and port width of each, in bits."""

    macros: int
    capacity_bits: float
    port_bits: int


@dataclass(frozen=True)
class Datapath:
    """The widths of a PE's datapath in bits, and how its lanes are grouped.

    Attributes
    ----------
    sum_bits : int
        ``Σ ±x`` over a block row: ``activation_bits + ceil(log2 g_k) + 1``.
    product_bits : int
        A dense product, and the sum of those that the adder tree takes together.
    tree_inputs : int
        Products of one output that the adder tree takes together: ``min(g_k, multipliers)``.
    dense_updates : int
        Accumulator updates of one dense block in one column.
    dense_tree_adds : int
        Additions in the adder tree for one dense block in one column; with the updates ``g_o · g_k`` in all.
    """

    sum_bits: int
    product_bits: int
    tree_inputs: int
    dense_updates: int
    dense_tree_adds: int


@dataclass(frozen=True)
class ArrayGeometry:
    """Height and width of the PE array in mm; a square tile holds a PE and its part of the multicast."""

    height_mm: float
    width_mm: float


@dataclass(frozen=True)
class _Logic:
    """Cells of a component: area of all of them in µm², registers included, and the register bits."""

    cell_um2: float
    register_bits: int = 0


def datapath(machine: Machine) -> Datapath:
    """The widths of a PE's datapath."""
    (g_o, g_k), precision = machine.array.block, machine.precision
    tree_inputs = min(g_k, machine.array.multipliers)
    updates = g_o * -(-g_k // tree_inputs)
    return Datapath(
        sum_bits=precision.activation_bits + log2_ceil(g_k) + 1,
        product_bits=precision.weight_bits + precision.activation_bits + log2_ceil(tree_inputs),
        tree_inputs=tree_inputs,
        dense_updates=updates,
        dense_tree_adds=g_o * g_k - updates,
    )


def memories(machine: Machine) -> dict[str, Memory]:
    """The on-chip memories of a machine by component; those that its features do not need are left out.

    Weight memories are one macro per row and stream. The operand store is ``banks`` × two halves. The
    activation buffer has a bank per column, the output buffer is one memory of the drain's width.
    """
    array, precision, weights = machine.array, machine.precision, machine.weights
    g_o, g_k = array.block

    def per_row(size_kib: float, port_bits: int) -> Memory:
        return Memory(array.rows, int(size_kib * 1024) // array.rows * 8, port_bits)

    store, buffer, output = machine.operand_store, machine.activation_buffer, machine.output
    fill_bits = g_k * precision.activation_bits * store.fill_words_per_cycle
    result = {
        "operand_store": Memory(
            2 * store.banks, store.size_kib * 8192 / (2 * store.banks), machine.word_bits
        ),
        "dense_memory": per_row(weights.dense_kib, weights.dense_port_bits),
        "activation_buffer": Memory(array.columns, buffer.size_kib * 8192 / array.columns, fill_bits),
        "output_buffer": Memory(
            1, output.size_kib * 8192, output.words_per_cycle * precision.activation_bits
        ),
    }
    if not machine.is_dense:
        result["type_memory"] = per_row(weights.type_kib, TYPE_BITS * machine.front_end.skip_window)
    if machine.features.unified_path:
        result["sign_memory"] = per_row(weights.sign_kib, min(g_o * g_k, weights.sign_port_bits))
        result["magnitude_memory"] = per_row(
            weights.magnitude_kib, min(precision.magnitude_bits, weights.sign_port_bits)
        )
    return result


@kept_by(Machine.static_fields_of, limit=64)
def built_memories(machine: Machine, technology: Technology) -> dict[str, tuple[Memory, MemoryMacro]]:
    """Each memory of `memories`, and one macro of it as the technology builds it."""
    memory_of = remembered(technology).memory
    return {
        name: (memory, memory_of(memory.capacity_bits, memory.port_bits))
        for name, memory in memories(machine).items()
    }


@kept_by(Machine.logic_fields_of)
def _logic(machine: Machine, technology: Technology) -> dict[str, _Logic]:
    array, precision, front_end = machine.array, machine.precision, machine.front_end
    g_o, g_k = array.block
    pes, word_bits, words = array.rows * array.columns, machine.word_bits, machine.output.words_per_cycle
    filled_bits = word_bits * machine.operand_store.fill_words_per_cycle
    registers = {
        "accumulators": pes * ACCUMULATOR_SETS * g_o * precision.accumulator_bits,
        "operand_registers": pes * OPERAND_SETS * g_k * precision.activation_bits,
        # the block that a row works on, held once per row and driven along it
        "weight_broadcast": array.rows * g_o * g_k * precision.weight_bits,
        "expander": filled_bits,
        "requantizer": words * (precision.accumulator_bits + precision.activation_bits),
    }
    if not machine.is_dense:
        window, depth = front_end.skip_window, front_end.queue_depth
        entry_bits = COLUMN_INDEX_BITS + TYPE_BITS
        registers["front_end"] = array.rows * (
            2 * TYPE_BITS * window + depth * entry_bits + COLUMN_INDEX_BITS
        )
    gates = component_gates(machine)
    # The expander stands outside the RTL: an aligned word, shifted by up to C positions over multiplexers like those of the
    # multicast, into registers like the operand's.
    model = area_model()["coefficients"]
    shifted = log2_ceil(array.columns) * model["multicast.select_bits"]
    gates["expander"] = filled_bits * (shifted + model["row_control.word_bits"])
    # The requantiser is combinational in the RTL; its registers are the drain's.
    gates["requantizer"] += registers["requantizer"] * model["row_control.word_bits"]
    gates["control"] += technology.interface_gates.value
    return {
        name: _Logic(count * technology.nand2_um2, registers.get(name, 0))
        for name, count in gates.items()
        if count
    }


def _placed_mm2(cell_um2: float, technology: Technology) -> float:
    return cell_um2 * 1e-6 / technology.logic_utilization.value


def machine_area(machine: Machine, technology: Technology) -> dict[str, float]:
    """Area in mm² by component (`AREA_COMPONENTS`, 0 for what the features leave out).

    Parameters
    ----------
    machine : Machine
    technology : Technology
    """
    area = dict.fromkeys(AREA_COMPONENTS, 0.0)
    area.update(_logic_mm2(machine, technology))
    area.update(_memory_mm2(machine, technology))
    return area


@kept_by(Machine.logic_fields_of)
def _logic_mm2(machine: Machine, technology: Technology) -> dict[str, float]:
    parts = _logic(machine, technology)
    return {name: _placed_mm2(part.cell_um2, technology) for name, part in parts.items()}


def _memory_mm2(machine: Machine, technology: Technology) -> dict[str, float]:
    built = built_memories(machine, technology)
    return {name: memory.macros * macro.area_mm2 for name, (memory, macro) in built.items()}


def register_bits(machine: Machine, technology: Technology) -> int:
    """Register bits of the machine: what the clock has to reach."""
    return sum(part.register_bits for part in _logic(machine, technology).values())


@kept_by(Machine.logic_fields_of)
def _cells_um2(machine: Machine, technology: Technology) -> float:
    return sum(part.cell_um2 for part in _logic(machine, technology).values())


def logic_area_mm2(machine: Machine, technology: Technology) -> float:
    """Placed area of everything but the memories."""
    return _placed_mm2(_cells_um2(machine, technology), technology)


def leakage_mw(machine: Machine, technology: Technology) -> float:
    """Leakage power of logic and memories in mW; nothing is switched off."""
    cells_mm2 = _cells_um2(machine, technology) * 1e-6
    memory_mw = sum(
        memory.macros * macro.leakage_mw for memory, macro in built_memories(machine, technology).values()
    )
    return cells_mm2 * technology.leakage_mw_per_mm2 + memory_mw


@kept_by(Machine.logic_fields_of)
def array_geometry(machine: Machine, technology: Technology) -> ArrayGeometry:
    """Height and width of the PE array; its wires are charged by these lengths.

    Source: assumption: square tiles, the weight memories left of the rows, the operand store above the
    columns.
    """
    parts = _logic(machine, technology)
    in_array = (
        "multipliers",
        "sign_adders",
        "dense_adder_tree",
        "accumulators",
        "operand_registers",
        "multicast",
    )
    cells_um2 = sum(parts[name].cell_um2 for name in in_array if name in parts)
    tiles = machine.array.rows * machine.array.columns
    pitch_mm = math.sqrt(_placed_mm2(cells_um2, technology) / tiles)
    return ArrayGeometry(machine.array.rows * pitch_mm, machine.array.columns * pitch_mm)


@lru_cache(maxsize=256)
def dense_at_equal_area(machine: Machine, technology: Technology) -> Machine:
    """The dense machine of the same area: features off, rows added one at a time while it fits.

    Its PE and weight feed are those that the RTL gives without the unified path, synthesised and fitted like the others.

    Features off takes away the sign adders, the front end and its arbiter, and the type, sign and magnitude
    memories. The rows of a dense machine run in lock step and never ask for two words at a time, so its
    operand store is one bank: the many banks and the network from them to the rows are part of what skipping
    costs. A row that is added brings a dense memory of its own, as large as the others'; everything else
    stays, but rows that are all alike need no order. A machine that is dense already is returned as it is.
    """
    if machine.is_dense:
        return machine
    technology = remembered(technology)
    budget_mm2 = sum(machine_area(machine, technology).values())
    first, row_bytes = machine.array.rows, int(machine.weights.dense_kib * 1024) // machine.array.rows
    memories_mm2 = _memory_mm2(_dense_machine(machine, first, row_bytes), technology)
    row_memory_mm2 = built_memories(machine, technology)["dense_memory"][1].area_mm2
    # the machine description ends here
    most = max(min(MAX_ROWS, MAX_KIB * 1024 // row_bytes), first)

    def area_mm2(rows: int) -> float:
        """Of the dense machine with so many rows: its memories are those of the smallest, less the rows' own."""
        area = dict.fromkeys(AREA_COMPONENTS, 0.0)
        area.update(_dense_logic_mm2(machine, technology, rows))
        area.update(memories_mm2, dense_memory=rows * row_memory_mm2)
        return sum(area.values())

    # Every row brings about the same area, so a straight line says where to look, and a look around says exactly.
    smallest_mm2 = area_mm2(first)
    row_mm2 = area_mm2(first + 1) - smallest_mm2
    rows = min(max(first + int((budget_mm2 - smallest_mm2) / row_mm2), first), most)
    while rows > first and area_mm2(rows) > budget_mm2:
        rows -= 1
    while rows < most and area_mm2(rows + 1) <= budget_mm2:
        rows += 1
    return _dense_machine(machine, rows, row_bytes)


@kept_by(Machine.logic_fields_of)
def _dense_logic_mm2(machine: Machine, technology: Technology, rows: int) -> dict[str, float]:
    """Logic of the dense machine with so many rows; their memories do not matter."""
    return _logic_mm2(_dense_machine(machine, rows, 1), technology)


def _dense_machine(machine: Machine, rows: int, row_bytes: int) -> Machine:
    parts = {
        "name": f"{machine.name[:180]} dense, {rows} rows",
        "features": NO_FEATURES,
        "array": _changed(machine.array, "rows", rows),
        "operand_store": _changed(machine.operand_store, "banks", 1),
        "weights": _changed(machine.weights, "dense_kib", rows * row_bytes / 1024),
    }
    return machine.model_copy(update=parts)


@lru_cache(maxsize=4096)
def _changed(part: Part, field: str, value: float) -> Part:
    """The part of a machine with another value; machines that have the same part share what is worked out of it."""
    return part.model_copy(update={field: value})
