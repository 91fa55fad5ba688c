"""Gate equivalents of the logic of a machine: circuit sizes counted from its description × coefficients from synthesis.

`part_terms` counts what a part of the RTL is made of: operand bits of multipliers squared, adder bits, register bits, inputs of
multiplexers. What one of each costs, in NAND2 gate equivalents, is fitted without negative values to Yosys runs of the same RTL
(`hwsim.area_fit`, stored in ``synthesis_data``). `component_gates` is their product, by component of `hwsim.area`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from math import gcd
from typing import Any

from hwsim.machine import Machine

__all__ = [
    "INDEX_BITS",
    "LOAD_LANES",
    "TERM_COMPONENTS",
    "area_model",
    "component_gates",
    "log2_ceil",
    "part_counts",
    "part_terms",
]

INDEX_BITS = 20
"""Bits of a block column's index: ``COLUMN_BITS`` of the RTL."""

LOAD_LANES = 13
"""Bytes a cycle of the load port that area is charged for: the presets' 12.8 GB/s at 1 GHz.

The same for every clock and DRAM: a sweep over them compares channels of one design, not designs.
"""

TERM_COMPONENTS = {
    "pe.multiplier_adders": "multipliers",
    "pe.operand_select_bits": "multipliers",
    "pe.tree_adder_bits": "dense_adder_tree",
    "pe.accumulator_bits": "accumulators",
    "pe.accumulator_adder_bits": "accumulators",
    "pe.accumulator_select_bits": "accumulators",
    "pe.sign_adder_bits": "sign_adders",
    "pe.sign_select_bits": "sign_adders",
    "pe.held_sum_bits": "sign_adders",
    "front_end.row": "front_end",
    "front_end.window_bits": "front_end",
    "front_end.queue_bits": "front_end",
    "row_control.word_bits": "operand_registers",
    "row_control.row": "control",
    "row_control.window": "front_end",
    "row_control.lanes": "control",
    "weight_feed.row": "weight_broadcast",
    "weight_feed.block_bits": "weight_broadcast",
    "weight_feed.port_shift_bits": "weight_broadcast",
    "weight_feed.sign_row": "weight_broadcast",
    "weight_feed.sign_bits": "weight_broadcast",
    "weight_feed.sign_select_bits": "weight_broadcast",
    "weight_feed.write_bits": "weight_broadcast",
    "multicast.pe": "multicast",
    "multicast.select_bits": "multicast",
    "arbiter.match_bits": "arbiter",
    "arbiter.tree_bits": "arbiter",
    "arbiter.select_bits": "arbiter",
    "requantizer.product_bits": "requantizer",
    "requantizer.accumulator_bits": "requantizer",
    "counters.machine": "control",
    "counters.rows": "control",
    "sequencer.machine": "control",
    "loader.machine": "control",
    "loader.rows": "control",
    "loader.lanes": "control",
    "loader.lane_rows": "control",
    "channel.machine": "control",
}
"""Every term of the model, ``part.term``, and the component of `hwsim.area` that it belongs to."""


def log2_ceil(count: int) -> int:
    """``ceil(log2 count)`` of a positive integer, exactly.

    >>> [log2_ceil(count) for count in (1, 2, 3, 4, 5)]
    [0, 1, 2, 2, 3]
    """
    return (count - 1).bit_length()


def part_counts(machine: Machine) -> dict[str, int]:
    """How many of each part the machine has; none of what its features leave out."""
    rows, pes = machine.array.rows, machine.array.rows * machine.array.columns
    skips = not machine.is_dense
    return {
        "pe": pes,
        "front_end": rows * skips,
        "row_control": rows,
        "weight_feed": rows,
        "multicast": pes,
        "arbiter": int(skips),
        "requantizer": machine.output.words_per_cycle,
        "counters": 1,
        "sequencer": 1,
        "loader": 1,
        "channel": 1,
    }


def part_terms(machine: Machine, lanes: int = LOAD_LANES) -> dict[str, float]:
    """Sizes of one of each part, by the terms of `TERM_COMPONENTS`, with a load port of ``lanes`` bytes a cycle."""
    array, precision, window = machine.array, machine.precision, machine.front_end.skip_window
    rows, banks = array.rows, machine.operand_store.banks
    return {
        **_pe_terms(machine),
        "front_end.row": 1,
        "front_end.window_bits": log2_ceil(window),
        "front_end.queue_bits": machine.front_end.queue_depth * (INDEX_BITS + 1),
        "row_control.word_bits": 2 * machine.word_bits,
        "row_control.row": 1,
        "row_control.window": 0 if machine.is_dense else window,
        # every lane of the load port writes any of the four bases of an entry of the directory, and the type memory
        "row_control.lanes": lanes,
        **_feed_terms(machine, lanes),
        # a multiplexer of A inputs for each bit of a PE's part of the word
        "multicast.pe": int(banks > 1),
        "multicast.select_bits": (banks - 1) * array.block[1] * precision.activation_bits,
        # A bank masks the index of every row; with 2ⁿ banks the lowest n bits of those that match are its own number. Then a
        # tree of comparators and multiplexers finds the smallest: its later levels have less in common to share.
        "arbiter.match_bits": banks * rows * (INDEX_BITS - log2_ceil(banks) * (banks & (banks - 1) == 0)),
        "arbiter.tree_bits": banks * (rows - 1) * log2_ceil(rows) * INDEX_BITS,
        # Each row looks at what its own bank has granted: a shifter over all banks.
        "arbiter.select_bits": banks * rows * INDEX_BITS * log2_ceil(banks),
        # the sum with a 32-bit bias times a 16-bit scale, and its shift
        "requantizer.product_bits": max(precision.accumulator_bits, 32) + 18,
        "requantizer.accumulator_bits": precision.accumulator_bits,
        "counters.machine": 1,
        "counters.rows": rows,
        "sequencer.machine": 1,
        "loader.machine": 1,
        "loader.rows": rows,
        "loader.lanes": lanes,
        "loader.lane_rows": lanes * rows,
        "channel.machine": 1,
    }


def _pe_terms(machine: Machine) -> dict[str, float]:
    """A PE; names and widths are those of hwsim/rtl/pe.sv."""
    (g_o, g_k), array, precision = machine.array.block, machine.array, machine.precision
    unified, n = machine.features.unified_path, g_o * g_k
    lanes = min(array.multipliers, n)
    sum_bits = precision.activation_bits + log2_ceil(g_k) + 1
    operand_bits = sum_bits if unified else precision.activation_bits
    factor_bits = (
        max(precision.weight_bits, precision.magnitude_bits + 1) if unified else precision.weight_bits
    )
    tree = gcd(g_k, lanes)
    trees = lanes // tree
    # Only as many lanes as the block has outputs multiply sums; the others see activations alone.
    wide_lanes = min(lanes, g_o) if unified else 0
    product_bits = operand_bits + factor_bits
    tree_bits = product_bits + log2_ceil(tree)
    outputs_of_tree = min(g_o, -(-n // lanes))
    # Where a row of the block does not fall on whole trees, each output adds up several before its accumulator.
    trees_of_output = min(g_k // tree, trees)
    inputs_of_lane = g_k // tree
    # Shared adders pay where they are half as many as the outputs; with as many there is nothing to choose.
    shared = not unified and tree in (g_k, lanes) and (2 * trees <= g_o or trees >= g_o)
    select_bits = lanes * precision.activation_bits * (inputs_of_lane - 1)
    terms: dict[str, float] = {
        # An array multiplier of F × B bits has (F − 1) · (B − 1) adder cells.
        "pe.multiplier_adders": (factor_bits - 1)
        * (wide_lanes * (sum_bits - 1) + (lanes - wide_lanes) * (precision.activation_bits - 1)),
        "pe.tree_adder_bits": (lanes - trees) * tree_bits,
        "pe.accumulator_bits": 2 * g_o * precision.accumulator_bits,
        "pe.accumulator_adder_bits": (trees if shared else g_o * trees_of_output)
        * precision.accumulator_bits,
        "pe.accumulator_select_bits": trees
        * outputs_of_tree
        * (2 * precision.accumulator_bits if shared else tree_bits),
        "pe.sign_adder_bits": 0,
        "pe.sign_select_bits": 0,
        "pe.held_sum_bits": 0,
    }
    if unified:
        adders = min(array.sign_adders, n)
        outputs_of_lane = -(-g_o // lanes)
        select_bits += wide_lanes * sum_bits * outputs_of_lane
        terms["pe.accumulator_select_bits"] += g_o * product_bits
        cycles = _unified_cycles(machine)
        places, outputs = _adder_places(
            array.block, adders, machine.weights.sign_port_bits, precision.magnitude_bits, cycles
        )
        held = g_o if cycles > 1 else 0
        # The sum of an output: one addition fewer than lanes that can be told it, and one for the sum held from before.
        terms["pe.sign_adder_bits"] = (outputs - g_o + held) * sum_bits
        terms["pe.sign_select_bits"] = (places - adders) * precision.activation_bits
        terms["pe.held_sum_bits"] = held * sum_bits
    return terms | {"pe.operand_select_bits": select_bits}


@lru_cache(maxsize=256)
def _adder_places(
    block: tuple[int, int], adders: int, port_bits: int, magnitude_bits: int, cycles: int
) -> tuple[int, int]:
    """Weights of a block, and outputs, that each lane of the sign adders can be told; summed over the lanes.

    As ``adder_places`` of hwsim/rtl/pe.sv: the lanes take the signs as the port brings them, behind the magnitude or before it.
    """
    weights = block[0] * block[1]
    places = set()
    for first_bits in (0, magnitude_bits):
        added = 0
        for cycle in range(1, cycles + 1):
            signs = min(max(cycle * port_bits - first_bits, 0), weights)
            taken = range(added, min(added + adders, signs))
            places |= {(place - added, place) for place in taken}
            added = taken.stop
    return len(places), len({(lane, place // block[1]) for lane, place in places})


def _unified_cycles(machine: Machine) -> int:
    (g_o, g_k), array = machine.array.block, machine.array
    bits = g_o * g_k + machine.precision.magnitude_bits
    return max(
        -(-g_o * g_k // array.sign_adders),
        -(-g_o // array.multipliers),
        -(-bits // machine.weights.sign_port_bits),
    )


def _memory_word(read_bits: int) -> int:
    """Bits of a word of a weight memory that is read ``read_bits`` wide: a power of two, at least a byte."""
    return max(8, 1 << log2_ceil(read_bits))


def _feed_terms(machine: Machine, lanes: int) -> dict[str, float]:
    """The weight feed of a row; hwsim/rtl/weight_feed.sv and bit_memory.sv."""
    (g_o, g_k), array, precision = machine.array.block, machine.array, machine.precision
    weights, n, unified = machine.weights, g_o * g_k, machine.features.unified_path
    block_bits = n * precision.weight_bits
    dense_port = min(weights.dense_port_bits, block_bits)
    dense_word = _memory_word(dense_port)
    unified_ports = (min(weights.sign_port_bits, n), min(weights.sign_port_bits, precision.magnitude_bits))
    words = [dense_word, *([_memory_word(port) for port in unified_ports] if unified else [])]
    return {
        "weight_feed.row": 1,
        # Held, and each weight selected for the multiplier that takes it: the more multipliers, the fewer choices each.
        "weight_feed.block_bits": block_bits,
        # The dense port begins at any bit of a word.
        "weight_feed.port_shift_bits": dense_port * log2_ceil(dense_word),
        "weight_feed.sign_row": int(unified),
        "weight_feed.sign_bits": (n + precision.magnitude_bits) * unified,
        "weight_feed.sign_select_bits": min(array.sign_adders, n) * n * unified,
        # Every lane of the load port puts its byte anywhere into a word that is wider than one.
        "weight_feed.write_bits": lanes * sum(word for word in words if word > 8),
    }


@lru_cache(maxsize=1)
def area_model() -> dict[str, Any]:
    """The stored fit: ``coefficients`` in gate equivalents by term, its errors, and what it was made from."""
    file = resources.files("hwsim").joinpath("synthesis_data", "area_model.json")
    return json.loads(file.read_text("utf-8"))


def component_gates(machine: Machine) -> dict[str, float]:
    """Gate equivalents of all parts of a machine, by component of `hwsim.area`."""
    coefficients, counts = area_model()["coefficients"], part_counts(machine)
    gates: dict[str, float] = {}
    for term, size in part_terms(machine).items():
        part = term.split(".")[0]
        component = TERM_COMPONENTS[term]
        gates[component] = gates.get(component, 0.0) + counts[part] * size * coefficients[term]
    return gates
