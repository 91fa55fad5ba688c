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
from hwsim.kernels.steps import Channel, StepConfig
from hwsim.layer import DENSE, PRUNED, UNIFIED
from hwsim.machine import Machine

__all__ = [
    "LoweredMachine",
    "check_length",
    "dram_channel",
    "dram_channels",
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
    channel : Channel
        The DRAM channel, in cycles of this clock.
    row_share_bytes : tuple of int
        One row's private part of the type, sign, magnitude and dense memory.
    activation_bits_capacity : int
        Bits of the whole activation buffer.
    """

    pass_config: PassConfig
    step_config: StepConfig
    channel: Channel
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


@lru_cache(maxsize=65536)
def dram_channel(clock_mhz: float, gb_per_s: float, burst_bytes: int) -> Channel:
    """The channel of a clock and a bandwidth: the cycles of a byte as one exact fraction.

    Examples
    --------
    >>> dram_channel(1000.0, 12.8, 64)
    Channel(burst_bytes=64, dram_cycles=5, dram_bytes=64)
    """
    cycles_per_byte = Fraction(str(clock_mhz)) / (Fraction(str(gb_per_s)) * 1000)
    return Channel(burst_bytes, cycles_per_byte.numerator, cycles_per_byte.denominator)


def dram_channels(
    clock_mhz: NDArray[np.float64], gb_per_s: NDArray[np.float64], burst_bytes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``int64[n, 3]``: `dram_channel` of many clocks, bandwidths and bursts at once.

    Examples
    --------
    >>> dram_channels(np.array([1000.0]), np.array([12.8]), np.array([64])).tolist()
    [[64, 5, 64]]
    """
    millionths = [np.rint(rate * 1e6) for rate in (clock_mhz, gb_per_s)]
    channels = np.empty((len(clock_mhz), 3), np.int64)
    cycles, moved = millionths[0].astype(np.int64), millionths[1].astype(np.int64) * 1000
    divisor = np.maximum(np.gcd(cycles, moved), 1)
    channels[:, 0], channels[:, 1], channels[:, 2] = burst_bytes, cycles // divisor, moved // divisor
    # A decimal of up to 15 digits is the shortest text of its float. The few rates with more decimals go the long way.
    longer = (millionths[0] / 1e6 != clock_mhz) | (millionths[1] / 1e6 != gb_per_s)
    for i in np.flatnonzero(longer).tolist():
        channels[i] = dram_channel(float(clock_mhz[i]), float(gb_per_s[i]), int(burst_bytes[i]))
    return channels


def lower_machine(machine: Machine) -> LoweredMachine:
    """Every integer that follows from the machine alone."""
    weights = machine.weights
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
        ),
        channel=dram_channel(machine.clock_mhz, machine.dram.gb_per_s, machine.dram.burst_bytes),
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
    check_length(int(counts[0, 0].sum()), machine)
    natural = np.repeat(np.arange(m_blocks)[None, :], groups, axis=0)
    if machine.features.row_balance == "none":
        return natural
    unified, dense = occupancy(machine)
    total = counts[:, :, UNIFIED] * unified + counts[:, :, DENSE] * dense
    return np.argsort(-total, axis=1, kind="stable")


def check_length(k_blocks: int, machine: Machine) -> None:
    """Refuse a layer with so many block columns where a pass of it could outrun the kernel's counters.

    Raises
    ------
    FitError
    """
    unified, dense = occupancy(machine)
    cycles = 2 * k_blocks * max(unified, dense, 2)
    if k_blocks > MAX_BLOCK_COLUMNS or cycles >= 2**29:
        raise FitError(
            f"a pass over {k_blocks:,} block columns of up to {max(unified, dense):,} cycles each is beyond what the "
            f"simulator counts ({MAX_BLOCK_COLUMNS:,} block columns and 2**29 cycles); use wider blocks or ports"
        )
