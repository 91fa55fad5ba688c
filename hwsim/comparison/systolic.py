"""Systolic arrays: weight stationary and output stationary, by their closed forms; weight stationary also with 2:4 sparsity.

``positions`` is what a layer calls n (output positions), ``reduction`` its k, ``filters`` its m.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from hwsim.area import Memory, log2_ceil, machine_area
from hwsim.comparison.cost import (
    ENERGY_PARTS,
    LayerCost,
    MachineCost,
    Silicon,
    pj_per_bit,
    requantizer_pj,
)
from hwsim.comparison.structured import GROUP, KEPT, POSITION_BITS, kept_of_groups
from hwsim.errors import InputError, Problem
from hwsim.image import CHANNEL_BYTES
from hwsim.layer import LayerShape
from hwsim.lowering import lower_machine
from hwsim.machine import Machine
from hwsim.mapping import needed_runs, transfers
from hwsim.technology import Technology

__all__ = ["DATAFLOWS", "SystolicArray", "best_array", "run_systolic", "systolic_area_mm2", "systolic_cycles"]

Dataflow = Literal["weight_stationary", "output_stationary"]
DATAFLOWS: tuple[Dataflow, ...] = ("weight_stationary", "output_stationary")
ASPECT_LIMIT = 4
"""Widest over narrowest side of the arrays that `best_array` looks at."""
MOST_BANKS = 16
"""Source: assumption, the banks of the activation buffer of the preset msa-16x16; the way to more is not priced."""


@dataclass(frozen=True)
class SystolicArray:
    """An array of processing elements (PEs), operands moving one PE per cycle.

    Attributes
    ----------
    rows, columns : int
        Weight stationary: reduction positions × filters. Output stationary: output positions × filters.
    dataflow : {"weight_stationary", "output_stationary"}
    is_overlapped : bool
        Whether a tile follows the one before without a gap (a second weight register or accumulator per PE). Off, tiles run one
        after the other: the published closed form.
    accumulator_rows : int
        Weight stationary: output positions for which the accumulator memory below the array has room. With overlap the
        positions are cut into runs of so many; the published closed form knows no such limit.
    is_structured : bool
        Weight stationary with 2:4 sparsity: a PE has two multipliers for the two kept weights of a group of four, four
        activations pass it, and it picks two. A layer without the pattern gives it two reduction positions instead.
        Source: after the PEs of Jeong et al., VEGETA, HPCA 2023, arXiv 2302.08687, reduced to 2:4.
    """

    rows: int
    columns: int
    dataflow: Dataflow
    is_overlapped: bool = False
    accumulator_rows: int = 512
    is_structured: bool = False

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"{getattr(self, name)}, must be at least 1")
            for name in ("rows", "columns", "accumulator_rows")
            if getattr(self, name) < 1
        ]
        if self.dataflow not in DATAFLOWS:
            problems.append(Problem("dataflow", f'"{self.dataflow}"', f"allowed: {', '.join(DATAFLOWS)}"))
        elif self.is_structured and self.dataflow != "weight_stationary":
            problems.append(Problem("is_structured", "True", "only for weight_stationary"))
        if problems:
            raise InputError("systolic array", problems)

    @property
    def multipliers(self) -> int:
        """Multipliers of all PEs."""
        return self.rows * self.columns * (KEPT if self.is_structured else 1)

    @property
    def activations_per_pe(self) -> int:
        """Activations that pass a PE side by side: those of a whole group with 2:4 sparsity."""
        return GROUP if self.is_structured else 1

    def reduction(self, shape: LayerShape, is_pruned: bool) -> int:
        """The reduction of a layer in what one PE takes at a time."""
        if not self.is_structured:
            return shape.k
        return -(-shape.k // (GROUP if is_pruned else KEPT))


def systolic_cycles(array: SystolicArray, positions: int, reduction: int, filters: int) -> int:
    """Cycles of one GEMM, from the first operand that enters to the last sum that is complete.

    A tile without overlap takes ``2R + C + positions - 2`` cycles weight stationary (R to load weights, then the wavefront)
    and ``R + C + reduction - 2`` output stationary. With overlap a tile begins ``max(positions, R)`` or
    ``max(reduction, R)`` cycles after the one before: its weights slide down behind the wavefront, or the finished sums leave
    through the column, in R cycles.

    Source: Samajdar et al., A Systematic Methodology for Characterizing Scalability of DNN Accelerators using SCALE-Sim, ISPASS
    2020, analytical model; its tool counts one cycle less per layer. Output stationary leaves out the R cycles in which sums
    leave the array. The overlapped forms are derived here. The tests hold all four against a simulation that moves the data.

    Examples
    --------
    >>> systolic_cycles(SystolicArray(16, 16, "weight_stationary"), 49, 512, 512)
    97280
    >>> systolic_cycles(SystolicArray(16, 16, "output_stationary"), 49, 512, 512)
    69376
    """
    rows, columns = array.rows, array.columns
    fill = rows + columns - 2
    filter_tiles = -(-filters // columns)
    if array.dataflow == "output_stationary":
        tiles = -(-positions // rows) * filter_tiles
        if not array.is_overlapped:
            return tiles * (fill + reduction)
        return (tiles - 1) * max(reduction, rows) + reduction + fill
    folds = -(-reduction // rows) * filter_tiles
    if not array.is_overlapped:
        return folds * (rows + fill + positions)
    runs = [
        min(array.accumulator_rows, positions - first)
        for first in range(0, positions, array.accumulator_rows)
    ]
    spaced = sum(max(run, rows) for run in runs) * folds
    return rows + spaced - max(runs[-1], rows) + runs[-1] + fill


def _silicon(array: SystolicArray, machine: Machine, technology: Technology) -> Silicon:
    precision, rows, columns = machine.precision, array.rows, array.columns
    pes, words = rows * columns, min(columns, machine.output.words_per_cycle)
    sum_bits = _sum_bits(array, machine)
    lanes = KEPT if array.is_structured else 1
    pe_um2 = lanes * (
        technology.multiplier_um2(precision.weight_bits, precision.activation_bits)
        + technology.adder_um2(sum_bits)
    )
    if array.is_structured:
        pe_um2 += lanes * (GROUP - 1) * precision.activation_bits * technology.gate_um2
    cell_um2 = pes * pe_um2 + technology.interface_gates.value * technology.nand2_um2
    # words that enter a row (or column) together wait in a triangle of registers for their turn
    activation_bits = array.activations_per_pe * precision.activation_bits
    skew_bits = rows * (rows - 1) // 2 * activation_bits
    memories = _memories(array, machine, technology)
    if array.dataflow == "weight_stationary":
        held_bits = _pe_weight_bits(array, machine) * (2 if array.is_overlapped else 1)
        held_bits += activation_bits + sum_bits
        cell_um2 += columns * technology.adder_um2(precision.accumulator_bits)
    else:
        held_bits = precision.weight_bits + precision.activation_bits + 2 * sum_bits
        skew_bits += columns * (columns - 1) // 2 * precision.weight_bits
    requantizer_bits = precision.accumulator_bits + precision.activation_bits
    # the requantiser of the block-skip machine, for as many words as a row of the array gives
    share = words / machine.output.words_per_cycle
    requantizer_mm2 = machine_area(machine, technology)["requantizer"] * share
    requantizer_um2 = requantizer_mm2 * 1e6 * technology.logic_utilization.value
    cell_um2 += requantizer_um2 - words * requantizer_bits * technology.register_um2
    return Silicon(cell_um2, pes * held_bits + skew_bits + words * requantizer_bits, memories)


def _pe_weight_bits(array: SystolicArray, machine: Machine) -> int:
    """Bits of the weights that a PE holds, with their positions."""
    bits = machine.precision.weight_bits
    return KEPT * (bits + POSITION_BITS) if array.is_structured else bits


def _sum_bits(array: SystolicArray, machine: Machine) -> int:
    """Width of the sums in a PE: weight stationary those of one column, which cannot overflow."""
    precision = machine.precision
    if array.dataflow == "output_stationary":
        return precision.accumulator_bits
    summed = array.rows * (KEPT if array.is_structured else 1)
    column_bits = precision.weight_bits + precision.activation_bits + (summed - 1).bit_length()
    return min(column_bits, precision.accumulator_bits)


def _memories(array: SystolicArray, machine: Machine, technology: Technology) -> dict[str, Memory]:
    precision = machine.precision
    is_weight_stationary = array.dataflow == "weight_stationary"
    row_bits = array.rows * array.activations_per_pe * precision.activation_bits
    words = min(array.columns, machine.output.words_per_cycle)
    memories = {
        "activation": _banked(machine.activation_buffer.size_kib * 8192, row_bits, technology),
        "weight": _banked(
            machine.weights.dense_kib * 8192,
            array.columns * _pe_weight_bits(array, machine),
            technology,
            is_busy=not is_weight_stationary,
        ),
        "output": Memory(1, machine.output.size_kib * 8192, words * precision.activation_bits),
    }
    if is_weight_stationary:
        # read and written in every cycle: even and odd positions lie in different banks
        word_bits = array.columns * precision.accumulator_bits
        memories["accumulator"] = _banked(array.accumulator_rows * word_bits, word_bits, technology, least=2)
    return memories


@lru_cache(maxsize=4096)
def _banked(
    capacity_bits: float, port_bits: int, technology: Technology, *, least: int = 1, is_busy: bool = True
) -> Memory:
    """A memory in up to `MOST_BANKS` banks, of which an access takes one.

    As many as make the product of area and read energy smallest; the area alone where it is seldom read.
    """

    def price(banks: int) -> float:
        macro = technology.memory(capacity_bits / banks, port_bits)
        return banks * macro.area_mm2 * (macro.read_energy_pj if is_busy else 1.0)

    counts = [2**power for power in range(MOST_BANKS.bit_length()) if 2**power >= least]
    banks = min(counts, key=price)
    return Memory(banks, capacity_bits / banks, port_bits)


def systolic_area_mm2(array: SystolicArray, machine: Machine, technology: Technology) -> float:
    """Area of the array with the buffers of ``machine`` (no operand store) and its share of requantiser and control."""
    return _silicon(array, machine, technology).area_mm2(technology)


@dataclass(frozen=True)
class _Traffic:
    """Bytes of a layer: before the array begins, while it works, after it; and how often weights and inputs were loaded."""

    first_cycles: int
    middle_cycles: int
    last_cycles: int
    dram_bytes: int
    weight_bytes: int
    input_bytes: int
    storage_bytes: int

    def latency_cycles(self, compute_cycles: int) -> int:
        return self.first_cycles + max(compute_cycles, self.middle_cycles) + self.last_cycles


@lru_cache(maxsize=4096)
def _traffic(shape: LayerShape, weight_bits: int, machine: Machine) -> _Traffic:
    """Transfers of a layer with so many bits of weights through the buffers of ``machine``.

    As in the steps of the block-skip machine, what fits its memory whole is loaded once, before the array begins; of the rest
    the first half buffer is; everything else overlaps the array, but for the last half buffer of outputs. Where neither weights
    nor inputs fit, the cheaper of both is loaded again for every half buffer of the other.
    """
    lowered = lower_machine(machine)
    precision = machine.precision
    weights = -(-weight_bits // 8) + shape.out_channels * CHANNEL_BYTES
    width = shape.input_size[-1] if shape.kind == "conv" else 1
    depth = shape.in_channels // shape.groups if shape.kind == "conv" else shape.k
    inputs = sum(-(-rows * width * depth * precision.activation_bits // 8) for rows in needed_runs(shape))
    outputs = -(-shape.out_channels * shape.n * precision.activation_bits // 8)
    weight_room = int(machine.weights.dense_kib * 1024)
    input_room = int(machine.activation_buffer.size_kib * 1024)
    first = sum(
        size if size <= room else room // 2 for size, room in ((weights, weight_room), (inputs, input_room))
    )
    weight_loads = input_loads = 1
    if weights > weight_room and inputs > input_room:
        # A memory of one byte has no half; it is loaded byte by byte.
        by_weights = -(-weights // max(weight_room // 2, 1))
        by_inputs = -(-inputs // max(input_room // 2, 1))
        if weights + by_weights * inputs <= inputs + by_inputs * weights:
            input_loads = by_weights
        else:
            weight_loads = by_inputs
    last = min(outputs, int(machine.output.size_kib * 1024) // 2)
    middle = weights * weight_loads + inputs * input_loads + outputs - first - last
    (first_cycles, first_moved), (middle_cycles, middle_moved), (last_cycles, last_moved) = (
        transfers([size], lowered) for size in (first, middle, last)
    )
    return _Traffic(
        first_cycles=first_cycles,
        middle_cycles=middle_cycles,
        last_cycles=last_cycles,
        dram_bytes=first_moved + middle_moved + last_moved,
        weight_bytes=weights * weight_loads,
        input_bytes=inputs * input_loads,
        storage_bytes=weights,
    )


@dataclass(frozen=True)
class _Work:
    """A layer on an array: what is stored and done, whichever way."""

    shape: LayerShape
    is_pruned: bool
    kept: int
    weight_bits: int

    @classmethod
    def of(cls, array: SystolicArray, machine: Machine, shape: LayerShape, is_pruned: bool) -> _Work:
        bits = machine.precision.weight_bits
        if not (array.is_structured and is_pruned):
            return cls(shape, False, shape.weight_count, shape.weight_count * bits)
        kept = kept_of_groups(shape)
        return cls(shape, True, kept, kept * (bits + POSITION_BITS))

    def compute_cycles(self, array: SystolicArray) -> int:
        reduction = array.reduction(self.shape, self.is_pruned)
        return self.shape.groups * systolic_cycles(array, self.shape.n, reduction, self.shape.m)

    def latency_cycles(self, array: SystolicArray, machine: Machine) -> int:
        traffic = _traffic(self.shape, self.weight_bits, machine)
        return traffic.latency_cycles(self.compute_cycles(array))


def run_systolic(
    array: SystolicArray,
    shapes: Sequence[LayerShape],
    machine: Machine,
    technology: Technology,
    is_pruned: Sequence[bool] | None = None,
) -> MachineCost:
    """Layers on a systolic array with the buffers, formats and channel of ``machine``.

    ``is_pruned`` says which layers have the 2:4 pattern, for an array that makes use of it; none by default.
    """
    silicon = _silicon(array, machine, technology)
    pruned = is_pruned or [False] * len(shapes)
    works = [_Work.of(array, machine, *pair) for pair in zip(shapes, pruned, strict=True)]
    size = f"{array.rows}x{array.columns}" + (f"x{KEPT}" if array.is_structured else "")
    return MachineCost(
        array=size,
        multipliers=array.multipliers,
        area_mm2=silicon.area_mm2(technology),
        layers=tuple(_layer(array, work, machine, technology, silicon) for work in works),
    )


def _layer(
    array: SystolicArray, work: _Work, machine: Machine, technology: Technology, silicon: Silicon
) -> LayerCost:
    shape = work.shape
    traffic = _traffic(shape, work.weight_bits, machine)
    latency = work.latency_cycles(array, machine)
    energy = _dynamic_pj(array, work, machine, technology, silicon.memories, traffic)
    energy["dram"] = traffic.dram_bytes * 8 * machine.dram.pj_per_bit
    energy["static"] = latency * silicon.static_pj_per_cycle(technology, machine.clock_mhz)
    return LayerCost(
        layer=shape.name,
        weight_count=shape.weight_count,
        kept_weights=work.kept,
        products=work.kept * shape.n,
        compute_cycles=work.compute_cycles(array),
        latency_cycles=latency,
        dram_bytes=traffic.dram_bytes,
        storage_bytes=traffic.storage_bytes,
        energy_pj=energy,
    )


def _dynamic_pj(
    array: SystolicArray,
    work: _Work,
    machine: Machine,
    technology: Technology,
    memories: dict[str, Memory],
    traffic: _Traffic,
) -> dict[str, float]:
    """Energy of the products, of what moves, and of the memories. PEs without a live weight or position cost nothing."""
    precision, shape = machine.precision, work.shape
    weight_bits, activation_bits = precision.weight_bits, precision.activation_bits
    sum_bits, outputs = _sum_bits(array, machine), shape.out_channels * shape.n
    adder_pj, register_pj = technology.adder_pj, technology.register_pj
    hop_pj = register_pj + _pitch_mm(array, machine, technology) * technology.wire_pj_per_mm
    filter_tiles = -(-shape.m // array.columns)
    activations = shape.groups * filter_tiles * shape.k * shape.n
    reduction = array.reduction(shape, work.is_pruned)
    steps = shape.groups * shape.m * reduction * shape.n  # PEs that work in a cycle, summed
    passing_bits = array.activations_per_pe if work.is_pruned or not array.is_structured else KEPT
    passing_bits *= activation_bits
    product_pj = technology.multiplier_pj(weight_bits, activation_bits) + adder_pj(sum_bits)
    if array.is_structured:
        product_pj += log2_ceil(GROUP) * activation_bits * technology.gate_pj
    read, write = zip(*(pj_per_bit(memory, technology) for memory in memories.values()), strict=True)
    reads, writes = dict(zip(memories, read, strict=True)), dict(zip(memories, write, strict=True))
    down = (array.rows + 1) / 2  # PEs that a word passes on its way into or out of a column, on average
    skew_pj = (array.rows - 1) / 2 * activation_bits * register_pj
    stored = outputs * activation_bits * (reads["output"] + writes["output"])
    loaded = 8 * (traffic.input_bytes * writes["activation"] + traffic.weight_bytes * writes["weight"])
    if array.dataflow == "weight_stationary":
        step_pj = (passing_bits + sum_bits) * hop_pj
        runs = -(-shape.n // array.accumulator_rows) if array.is_overlapped else 1
        held_bits = work.weight_bits * runs
        delivered = activations * skew_pj + held_bits * down * hop_pj
        # the first tile along the reduction has nothing to read
        updates = outputs * -(-reduction // array.rows)
        bits = precision.accumulator_bits
        sums = updates * bits * writes["accumulator"] + (updates - outputs) * (
            bits * reads["accumulator"] + adder_pj(bits)
        )
        sums += outputs * bits * reads["accumulator"]
    else:
        step_pj = (passing_bits + weight_bits) * hop_pj + sum_bits * register_pj
        held_bits = work.weight_bits * -(-shape.n // array.rows)
        skew_bit_pj = (array.columns - 1) / 2 * register_pj
        delivered = activations * skew_pj + held_bits * skew_bit_pj + outputs * down * sum_bits * hop_pj
        sums = 0.0
    read_pj = activations * activation_bits * reads["activation"] + held_bits * reads["weight"]
    return dict.fromkeys(ENERGY_PARTS, 0.0) | {
        "array": work.kept * shape.n * product_pj + steps * step_pj,
        "delivery": delivered,
        "memories": read_pj + loaded + stored + sums,
        "requantizer": outputs * requantizer_pj(machine, technology),
    }


def _pitch_mm(array: SystolicArray, machine: Machine, technology: Technology) -> float:
    """Side of the square tile of a PE."""
    precision, sum_bits = machine.precision, _sum_bits(array, machine)
    lanes = KEPT if array.is_structured else 1
    um2 = lanes * technology.multiplier_um2(precision.weight_bits, precision.activation_bits)
    um2 += lanes * technology.adder_um2(sum_bits)
    bits = _pe_weight_bits(array, machine) + array.activations_per_pe * precision.activation_bits + sum_bits
    um2 += bits * technology.register_um2
    return math.sqrt(um2 * 1e-6 / technology.logic_utilization.value)


def best_array(
    template: SystolicArray,
    shapes: Sequence[LayerShape],
    machine: Machine,
    technology: Technology,
    *,
    multipliers: int | None = None,
    area_mm2: float | None = None,
    is_pruned: Sequence[bool] | None = None,
) -> SystolicArray | None:
    """The array of so many multipliers, or within an area, with the lowest latency of the network; None where none fits.

    A designer chooses the sides for the work; so all sides up to `ASPECT_LIMIT` apart are tried (any, where a number of
    multipliers has no such pair of factors). Ties: the first, from few rows to many.
    """
    if multipliers is not None:
        pes = max(1, multipliers // (KEPT if template.is_structured else 1))
        pairs = [(r, pes // r) for r in range(1, pes + 1) if pes % r == 0]
        near = [pair for pair in pairs if max(pair) <= ASPECT_LIMIT * min(pair)]
        squarest = min(pairs, key=lambda pair: max(pair))
        candidates = [replace(template, rows=r, columns=c) for r, c in near or [squarest]]
    else:
        candidates = list(_within_area(template, machine, technology, area_mm2 or 0.0))
    pruned = is_pruned or [False] * len(shapes)
    works = [_Work.of(template, machine, *pair) for pair in zip(shapes, pruned, strict=True)]
    return min(
        candidates,
        key=lambda array: sum(work.latency_cycles(array, machine) for work in works),
        default=None,
    )


def _within_area(
    template: SystolicArray, machine: Machine, technology: Technology, budget_mm2: float
) -> Iterator[SystolicArray]:
    """For every number of rows the most columns that have room; they fall as the rows rise."""
    columns = 0
    for rows in range(1, 4097):
        if columns == ASPECT_LIMIT * (rows - 1):  # so far only the aspect has limited them
            columns = ASPECT_LIMIT * rows
        array = replace(template, rows=rows, columns=max(columns, 1))
        while columns and systolic_area_mm2(array, machine, technology) > budget_mm2:
            columns -= 1
            array = replace(array, columns=max(columns, 1))
        if columns * ASPECT_LIMIT < rows:
            return
        yield array
