"""Machine and layer, lowered to integers: the only place that converts units.

KiB become bits, GB/s and MHz become one exact fraction, block types become the types that the features let the machine see.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import FitError
from hwsim.kernels.counts import count_types
from hwsim.kernels.passes import MAX_BLOCK_COLUMNS, PassConfig
from hwsim.kernels.steps import StepConfig
from hwsim.layer import DENSE, PRUNED, UNIFIED
from hwsim.machine import Machine

__all__ = [
    "LoweredMachine",
    "effective_counts",
    "effective_types",
    "execution_order",
    "lower_machine",
    "occupancy",
    "pass_config",
]


@dataclass(frozen=True)
class LoweredMachine:
    """What the kernels and the mapper need of a machine.

    Attributes
    ----------
    pass_config : PassConfig
        For the pass kernel.
    step_config : StepConfig
        For the step kernels.
    row_share_bytes : tuple of int
        One row's private part of the type, sign, magnitude and dense memory.
    activation_bits_capacity : int
        Bits of the whole activation buffer.
    """

    pass_config: PassConfig
    step_config: StepConfig
    row_share_bytes: tuple[int, int, int, int]
    activation_bits_capacity: int


def occupancy(machine: Machine) -> tuple[int, int]:
    """``(unified, dense)``: cycles for which one block occupies a PE.

    ``occ(DENSE) = max(ceil(n/μ), ceil(n·weight_bits/dense_port))`` and ``occ(UNIFIED) = max(ceil(n/α), ceil(g_o/μ),
    ceil((n + magnitude_bits)/sign_port))`` with ``n = g_o·g_k``. Source: docs/microarchitecture.md, "Machine".
    """
    g_o, g_k = machine.array.block
    n = g_o * g_k
    array, weights, precision = machine.array, machine.weights, machine.precision
    dense = max(-(-n // array.multipliers), -(-n * precision.weight_bits // weights.dense_port_bits))
    unified = max(
        -(-n // array.sign_adders),
        -(-g_o // array.multipliers),
        -(-(n + precision.magnitude_bits) // weights.sign_port_bits),
    )
    return unified, dense


def pass_config(machine: Machine, *, one_segment: bool = False) -> PassConfig:
    """The integers of the pass kernel; with ``one_segment`` the operand store is taken to hold every word."""
    unified, dense = occupancy(machine)
    half_bits = int(machine.operand_store.size_kib * 1024) * 8 // 2
    return PassConfig(
        rows=machine.array.rows,
        skip_window=machine.front_end.skip_window,
        queue_depth=machine.front_end.queue_depth,
        banks=machine.operand_store.banks,
        unified_cycles=unified,
        dense_cycles=dense,
        segment_words=MAX_BLOCK_COLUMNS if one_segment else half_bits // machine.word_bits,
    )


@lru_cache(maxsize=256)
def lower_machine(machine: Machine) -> LoweredMachine:
    """Every integer that follows from the machine alone."""
    weights = machine.weights
    cycles_per_byte = Fraction(str(machine.clock_mhz)) / (Fraction(str(machine.dram.gb_per_s)) * 1000)
    passes = pass_config(machine)
    return LoweredMachine(
        pass_config=passes,
        step_config=StepConfig(
            columns=machine.array.columns,
            segment_words=passes.segment_words,
            fill_words=machine.operand_store.fill_words_per_cycle,
            drain_words=machine.output.words_per_cycle,
            activation_bits=machine.precision.activation_bits,
            output_half_bits=int(machine.output.size_kib * 1024) * 8 // 2,
            burst_bytes=machine.dram.burst_bytes,
            dram_cycles=cycles_per_byte.numerator,
            dram_bytes=cycles_per_byte.denominator,
        ),
        row_share_bytes=(
            int(weights.type_kib * 1024) // machine.array.rows,
            int(weights.sign_kib * 1024) // machine.array.rows,
            int(weights.magnitude_kib * 1024) // machine.array.rows,
            int(weights.dense_kib * 1024) // machine.array.rows,
        ),
        activation_bits_capacity=int(machine.activation_buffer.size_kib * 1024) * 8,
    )


def effective_types(types: NDArray[np.uint8], machine: Machine) -> NDArray[np.uint8]:
    """Block types after feature conversion: what a switched-off feature leaves unseen runs as DENSE."""
    features = machine.features
    if features.skip_pruned and features.unified_path:
        return types
    if machine.is_dense:
        return np.broadcast_to(np.uint8(DENSE), types.shape)
    table = np.array([PRUNED, UNIFIED, DENSE], np.uint8)
    table[UNIFIED if features.skip_pruned else PRUNED] = DENSE
    return table[types]


def effective_counts(types: NDArray[np.uint8], machine: Machine) -> NDArray[np.int64]:
    """``int64[G, Mb, 3]``: PRUNED, UNIFIED and DENSE blocks of each block row, after feature conversion."""
    if machine.is_dense:
        counts = np.zeros((*types.shape[:2], 3), np.int64)
        counts[:, :, DENSE] = types.shape[2]
        return counts
    counts = count_types(np.require(types, np.uint8, ("C", "W")))
    for code, kept in ((PRUNED, machine.features.skip_pruned), (UNIFIED, machine.features.unified_path)):
        if not kept:
            counts[:, :, DENSE] += counts[:, :, code]
            counts[:, :, code] = 0
    return counts


def execution_order(counts: NDArray[np.int64], machine: Machine) -> NDArray[np.int64]:
    """``int64[groups, Mb]``: block rows in execution order.

    Natural, or with ``row_balance = "sorted"`` by falling total occupancy, ties by index.

    Parameters
    ----------
    counts : int64 array ``[G, Mb, 3]``
        Of `effective_counts`.
    machine : Machine

    Raises
    ------
    FitError
        A pass of this layer could outrun the kernel's counters.
    """
    groups, m_blocks, _ = counts.shape
    k_blocks = int(counts[0, 0].sum())
    unified, dense = occupancy(machine)
    cycles = 2 * k_blocks * max(unified, dense, 2)
    if k_blocks > MAX_BLOCK_COLUMNS or cycles >= 2**29:
        raise FitError(
            f"a pass over {k_blocks:,} block columns of up to {max(unified, dense):,} cycles each is beyond what the "
            f"simulator counts ({MAX_BLOCK_COLUMNS:,} block columns and 2**29 cycles); use wider blocks or ports"
        )
    natural = np.repeat(np.arange(m_blocks)[None, :], groups, axis=0)
    if machine.features.row_balance == "none":
        return natural
    total = counts[:, :, UNIFIED] * unified + counts[:, :, DENSE] * dense
    return np.argsort(-total, axis=1, kind="stable")
