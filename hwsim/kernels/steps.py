"""Steps of a layer: how row tiles and column tiles are grouped, and what the chain of passes and transfers costs.

The kernels take integers only: `plan_steps` groups, `moves_of_steps` says which bytes each step moves, `work_of_passes` what
it computes, and `time_steps` what both take over one DRAM channel. Units of columns are output rows or, where one output row
does not fit, single column tiles (``split``); a column group is a run of units. See
docs/microarchitecture.md, "A layer".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = [
    "INPUT_LOAD",
    "STEP_FIELDS",
    "Channel",
    "ColumnUnits",
    "StepConfig",
    "StepPlan",
    "Tiles",
    "bus_bytes",
    "moves_of_steps",
    "plan_steps",
    "time_steps",
    "transfer_cycles",
    "widest_unit_bits",
    "work_of_passes",
]

STEP_FIELDS = (
    "pass_cycles",
    "fill_stall_cycles",
    "drain_stall_cycles",
    "load_weight_cycles",
    "load_weight_bytes",
    "load_input_cycles",
    "load_input_bytes",
    "stream_cycles",
    "stream_bytes",
    "store_cycles",
    "store_bytes",
    "filled_words",
    "step_cycles",
)
"""Columns of the array that `time_steps` returns. Loads are those that the step itself needs, done in the step before."""
(
    _PASS,
    _FILL_STALL,
    _DRAIN_STALL,
    _LOAD_W,
    _LOAD_W_BYTES,
    _LOAD_A,
    _LOAD_A_BYTES,
    _STREAM,
    _STREAM_BYTES,
    _STORE,
    _STORE_BYTES,
    _FILLED,
    _STEP,
) = range(13)
WEIGHT_LOAD, INPUT_LOAD, STREAM, STORE = range(4)


class StepConfig(NamedTuple):
    """Integers of a machine that the steps need, all but the DRAM channel."""

    columns: int
    segment_words: int
    fill_words: int
    drain_words: int
    activation_bits: int
    output_half_bits: int


class Channel(NamedTuple):
    """The DRAM channel; ``dram_cycles / dram_bytes`` is the exact time of a byte."""

    burst_bytes: int
    dram_cycles: int
    dram_bytes: int


class StepPlan(NamedTuple):
    """How memories are used: limits in bits or bytes, -1 where the content is held whole or streamed.

    ``split`` is 1 where units are column tiles, ``weights_outer`` 1 for that loop order, ``streamed`` 1 where every pass
    fetches its weights.
    """

    weights_outer: int
    split: int
    streamed: int
    weight_limited: int
    input_half_bits: int


class Tiles(NamedTuple):
    """Row tiles of all groups.

    ``channels``: int64 ``[G, T]`` real output channels. ``usage``: int64 ``[G, T, R, 4]`` bytes in each row's type, sign,
    magnitude and dense memory, and ``share``: int64 ``[4]`` what a group of row tiles may use of each. ``order``: int64
    ``[G, Mb]`` block rows in execution order. ``row_bytes``: int64 ``[G, Mb, 6]`` bytes of a block row's offsets, channel
    parameters, type, sign, magnitude and dense stream; ``order_bytes`` of its place in the stored order.
    """

    channels: NDArray
    usage: NDArray
    share: NDArray
    order: NDArray
    row_bytes: NDArray
    order_bytes: int
    rows: int


class ColumnUnits(NamedTuple):
    """Units of columns of one group.

    ``row``: int64 ``[U]`` the unit's output row; ``start``, ``positions``: int64 ``[U]``; ``first``, ``last``: int64 ``[U]``
    span of input columns; ``needs``: int64 ``[output rows, taps]`` input rows of each output row, -1 for padding;
    ``input_rows``: rows of one group's input; ``width``: columns of an input row; ``element_bits``: bits of one column
    (channels × activation bits).
    """

    row: NDArray
    start: NDArray
    positions: NDArray
    first: NDArray
    last: NDArray
    needs: NDArray
    input_rows: int
    width: int
    element_bits: int


@njit(cache=True, nogil=True, error_model="numpy")
def bus_bytes(size_bytes, channel):  # type: ignore[no-untyped-def]
    """Bytes that a transfer occupies the channel with: whole bursts."""
    return (size_bytes + channel.burst_bytes - 1) // channel.burst_bytes * channel.burst_bytes


@njit(cache=True, nogil=True, error_model="numpy")
def transfer_cycles(bus, channel):  # type: ignore[no-untyped-def]
    """Cycles of a transfer of so many `bus_bytes` at the channel's exact rate, rounded up; 0 bytes take 0."""
    return (bus * channel.dram_cycles + channel.dram_bytes - 1) // channel.dram_bytes


@njit(cache=True, nogil=True)
def widest_unit_bits(units):  # type: ignore[no-untyped-def]
    """Bits of input that the most demanding single unit needs."""
    widest = np.int64(0)
    for u in range(units.row.size):
        rows = np.int64(0)
        for tap in range(units.needs.shape[1]):
            rows += units.needs[units.row[u], tap] >= 0
        widest = max(widest, rows * max(units.last[u] - units.first[u], 0) * units.element_bits)
    return widest


@njit(cache=True, nogil=True)
def _channels(tiles, group, first, last):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for t in range(first, last):
        total += tiles.channels[group, t]
    return total


@njit(cache=True, nogil=True)
def _positions(units, first, last):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for u in range(first, last):
        total += units.positions[u]
    return total


@njit(cache=True, nogil=True)
def _greedy_rows(tiles, group, first, positions, plan, config, used):  # type: ignore[no-untyped-def]
    """One past the last row tile of the group that starts at ``first``, to meet ``positions`` columns."""
    used[:] = 0
    channels = np.int64(0)
    for t in range(first, tiles.channels.shape[1]):
        channels += tiles.channels[group, t]
        fits = channels * positions * config.activation_bits <= config.output_half_bits
        if plan.weight_limited:
            for row in range(tiles.rows):
                for stream in range(4):
                    used[row, stream] += tiles.usage[group, t, row, stream]
                    fits &= used[row, stream] <= tiles.share[stream]
        if not fits and t > first:
            return t
    return tiles.channels.shape[1]


@njit(cache=True, nogil=True)
def _greedy_columns(units, first, channels, plan, config, seen, stamp):  # type: ignore[no-untyped-def]
    """One past the last unit of the column group that starts at ``first``, to meet ``channels`` output channels."""
    positions = np.int64(0)
    rows = np.int64(0)
    left, right = units.width, np.int64(0)
    for u in range(first, units.row.size):
        positions += units.positions[u]
        left, right = min(left, units.first[u]), max(right, units.last[u])
        for tap in range(units.needs.shape[1]):
            row = units.needs[units.row[u], tap]
            if row >= 0 and seen[row] != stamp:
                seen[row] = stamp
                rows += 1
        fits = channels * positions * config.activation_bits <= config.output_half_bits
        if plan.input_half_bits >= 0:
            fits &= rows * max(right - left, 0) * units.element_bits <= plan.input_half_bits
        if plan.split:
            fits &= units.row[u] == units.row[first]
        if not fits and u > first:
            return u
    return units.row.size


@njit(cache=True, nogil=True)
def plan_steps(tiles, units, plan, config):  # type: ignore[no-untyped-def]
    """``int64[steps, 5]``: group, first and last row tile, first and last column unit of each step, in order.

    The outer group is greedy within its memory, as long as the finest inner group's outputs still fit; the inner group takes
    what remains.
    """
    groups, n_tiles = tiles.channels.shape
    n_units = units.row.size
    n_outer, n_inner = (n_tiles, n_units) if plan.weights_outer else (n_units, n_tiles)
    seen = np.full(max(units.input_rows, 1), -1, np.int64)
    used = np.empty((tiles.rows, 4), np.int64)
    stamp = np.int64(0)
    steps = np.empty((64, 5), np.int64)
    n = 0
    finest_positions = np.int64(0)
    for u in range(n_units):
        finest_positions = max(finest_positions, units.positions[u])
    for group in range(groups):
        finest_channels = np.int64(0)
        for t in range(n_tiles):
            finest_channels = max(finest_channels, tiles.channels[group, t])
        outer = 0
        while outer < n_outer:
            stamp += 1
            if plan.weights_outer:
                outer_end = _greedy_rows(tiles, group, outer, finest_positions, plan, config, used)
                extent = _channels(tiles, group, outer, outer_end)
            else:
                outer_end = _greedy_columns(units, outer, finest_channels, plan, config, seen, stamp)
                extent = _positions(units, outer, outer_end)
            inner = 0
            while inner < n_inner:
                stamp += 1
                if plan.weights_outer:
                    inner_end = _greedy_columns(units, inner, extent, plan, config, seen, stamp)
                else:
                    inner_end = _greedy_rows(tiles, group, inner, extent, plan, config, used)
                if n == steps.shape[0]:
                    larger = np.empty((2 * n, 5), np.int64)
                    larger[:n] = steps
                    steps = larger
                rows, columns = (1, 3) if plan.weights_outer else (3, 1)
                steps[n, 0] = group
                steps[n, rows], steps[n, rows + 1] = outer, outer_end
                steps[n, columns], steps[n, columns + 1] = inner, inner_end
                n += 1
                inner = inner_end
            outer = outer_end
    return steps[:n]


@njit(cache=True, nogil=True)
def _add(moved, n, phase, kind, size, count):  # type: ignore[no-untyped-def]
    """Note ``count`` transfers of ``size`` bytes; returns the list, which may have moved, and its new length."""
    if size == 0 or count == 0:
        return moved, n
    if n > 0 and moved[n - 1, 0] == phase and moved[n - 1, 1] == kind and moved[n - 1, 2] == size:
        moved[n - 1, 3] += count
        return moved, n
    if n == moved.shape[0]:
        larger = np.empty((2 * n, 4), np.int64)
        larger[:n] = moved
        moved = larger
    moved[n, 0], moved[n, 1], moved[n, 2], moved[n, 3] = phase, kind, size, count
    return moved, n + 1


@njit(cache=True, nogil=True)
def _weight_ranges(tiles, group, first, last, chosen, moved, n, phase, kind, count):  # type: ignore[no-untyped-def]
    """The weights of row tiles ``first … last - 1``: one transfer per contiguous range and part."""
    m_blocks = tiles.order.shape[1]
    begin, end = first * tiles.rows, min(last * tiles.rows, m_blocks)
    chosen[:] = False
    for i in range(begin, end):
        chosen[tiles.order[group, i]] = True
    moved, n = _add(moved, n, phase, kind, tiles.order_bytes * (end - begin), count)
    for part in range(tiles.row_bytes.shape[2]):
        size = np.int64(0)
        for row in range(m_blocks + 1):
            if row < m_blocks and chosen[row]:
                size += tiles.row_bytes[group, row, part]
            elif size > 0:
                moved, n = _add(moved, n, phase, kind, size, count)
                size = np.int64(0)
    return moved, n


@njit(cache=True, nogil=True)
def _mark(units, first, last, seen, stamp):  # type: ignore[no-untyped-def]
    """Mark the input rows of some units; returns the lowest and one past the highest, and the span of columns."""
    low, high = units.input_rows, np.int64(0)
    left, right = units.width, np.int64(0)
    for u in range(first, last):
        left, right = min(left, units.first[u]), max(right, units.last[u])
        for tap in range(units.needs.shape[1]):
            row = units.needs[units.row[u], tap]
            if row >= 0:
                seen[row] = stamp
                low, high = min(low, row), max(high, row + 1)
    return low, high, left, right


@njit(cache=True, nogil=True)
def _input_ranges(units, u0, u1, v0, v1, seen, held, stamp, moved, n, phase):  # type: ignore[no-untyped-def]
    """The input of units ``u0 … u1 - 1`` that units ``v0 … v1 - 1`` did not leave resident.

    Whole adjacent rows are one contiguous range; a part of a row is a range of its own.
    """
    low, high, left, right = _mark(units, u0, u1, seen, stamp)
    old_left, old_right = np.int64(0), np.int64(0)
    if v1 > v0:
        _, _, old_left, old_right = _mark(units, v0, v1, held, stamp)
    run = np.int64(0)
    for row in range(low, high + 1):
        needed = row < high and seen[row] == stamp
        resident = needed and held[row] == stamp and old_right > old_left
        whole_row = left == 0 and right == units.width
        if needed and not resident and whole_row:
            run += units.width
            continue
        if run > 0:
            moved, n = _add(moved, n, phase, INPUT_LOAD, (run * units.element_bits + 7) // 8, 1)
            run = np.int64(0)
        if needed and not resident and right > left:
            size = ((right - left) * units.element_bits + 7) // 8
            moved, n = _add(moved, n, phase, INPUT_LOAD, size, 1)
        elif resident:
            if min(right, old_left) > left:
                size = ((min(right, old_left) - left) * units.element_bits + 7) // 8
                moved, n = _add(moved, n, phase, INPUT_LOAD, size, 1)
            if right > max(left, old_right):
                size = ((right - max(left, old_right)) * units.element_bits + 7) // 8
                moved, n = _add(moved, n, phase, INPUT_LOAD, size, 1)
    return moved, n


@njit(cache=True, nogil=True)
def moves_of_steps(tiles, units, steps, plan, whole_weights, whole_inputs, config):  # type: ignore[no-untyped-def]
    """What the steps move and repeat, whatever the DRAM and however long a pass takes.

    Parameters
    ----------
    tiles, units, steps, plan, config
        As for `plan_steps`, with its result; the cycles of the tiles do not matter.
    whole_weights, whole_inputs : int64 ``[any]``
        Bytes of the transfers that load weights and inputs held whole, before the first step; empty where they are not.

    Returns
    -------
    int64 ``[steps, 5]``
        Group, first and last row tile, first column and columns of each step, for `work_of_passes`.
    int64 ``[transfers, 4]``
        Phase, kind (`WEIGHT_LOAD`, `INPUT_LOAD`, `STREAM`, `STORE`), bytes, and how many of them. Phase 0 is before the first
        step, phase ``i + 1`` step i, the last one after the last step: what step i needs is loaded in phase i, what it
        produced is stored in phase ``i + 2``.
    int64 ``[G, T]``
        Passes of each row tile.
    int64 ``[G, T]``
        How often each row tile's weights were loaded.
    """
    n_steps = steps.shape[0]
    spans = np.empty((n_steps, 5), np.int64)
    passes = np.zeros(tiles.channels.shape, np.int64)
    loads = np.zeros(tiles.channels.shape, np.int64)
    seen = np.full(max(units.input_rows, 1), -1, np.int64)
    held = np.full(max(units.input_rows, 1), -1, np.int64)
    chosen = np.zeros(tiles.order.shape[1], np.bool_)
    moved = np.empty((64, 4), np.int64)
    n = np.int64(0)
    for size in whole_weights:
        moved, n = _add(moved, n, 0, WEIGHT_LOAD, size, 1)
    for size in whole_inputs:
        moved, n = _add(moved, n, 0, INPUT_LOAD, size, 1)
    for i in range(n_steps):
        group, t0, t1, u0, u1 = steps[i, 0], steps[i, 1], steps[i, 2], steps[i, 3], steps[i, 4]
        same_group = i > 0 and steps[i - 1, 0] == group
        same_rows = same_group and steps[i - 1, 1] == t0 and steps[i - 1, 2] == t1
        same_columns = same_group and steps[i - 1, 3] == u0 and steps[i - 1, 4] == u1
        if plan.weight_limited and not same_rows:
            moved, n = _weight_ranges(tiles, group, t0, t1, chosen, moved, n, i, WEIGHT_LOAD, 1)
            for t in range(t0, t1):
                loads[group, t] += 1
        if plan.input_half_bits >= 0 and not same_columns:
            v0, v1 = np.int64(0), np.int64(0)
            if same_group:
                v0, v1 = steps[i - 1, 3], steps[i - 1, 4]
            moved, n = _input_ranges(units, u0, u1, v0, v1, seen, held, i, moved, n, i)
        positions = _positions(units, u0, u1)
        outputs = _channels(tiles, group, t0, t1) * positions
        moved, n = _add(moved, n, i + 2, STORE, (outputs * config.activation_bits + 7) // 8, 1)
        column_tiles = (positions + config.columns - 1) // config.columns
        spans[i, 0], spans[i, 1], spans[i, 2] = group, t0, t1
        spans[i, 3], spans[i, 4] = units.start[u0], positions
        for t in range(t0, t1):
            passes[group, t] += column_tiles
            if plan.streamed:
                moved, n = _weight_ranges(
                    tiles, group, t, t + 1, chosen, moved, n, i + 1, STREAM, column_tiles
                )
    if plan.streamed:
        loads[:] = passes
    elif not plan.weight_limited:
        loads[:] = 1
    return spans, moved[:n].copy(), passes, loads


@njit(cache=True, nogil=True)
def time_steps(work, moved, channel):  # type: ignore[no-untyped-def]
    """``int64[steps, 13]``: cycles and traffic of every step over one channel (`STEP_FIELDS`).

    Parameters
    ----------
    work, moved
        Of `work_of_passes` and `moves_of_steps`.
    channel : Channel
    """
    n = work.shape[0]
    cost = np.zeros((n, 13), np.int64)
    cost[:, _PASS], cost[:, _FILL_STALL] = work[:, 0], work[:, 1]
    cost[:, _DRAIN_STALL], cost[:, _FILLED] = work[:, 2], work[:, 3]
    memory = np.zeros(n + 2, np.int64)
    for i in range(moved.shape[0]):
        phase, kind, count = moved[i, 0], moved[i, 1], moved[i, 3]
        bus = bus_bytes(moved[i, 2], channel)
        cycles = count * transfer_cycles(bus, channel)
        memory[phase] += cycles
        step, field = phase, _LOAD_W
        if kind == INPUT_LOAD:
            field = _LOAD_A
        elif kind == STREAM:
            step, field = phase - 1, _STREAM
        elif kind == STORE:
            step, field = phase - 2, _STORE
        cost[step, field] += cycles
        cost[step, field + 1] += count * bus
    for i in range(n):
        cost[i, _STEP] = max(work[i, 0] + work[i, 1] + work[i, 2], memory[i + 1])
    return cost


@njit(cache=True, nogil=True)
def work_of_passes(cycles, channels, k_blocks, spans, config):  # type: ignore[no-untyped-def]
    """Walk the passes of the layer in order: fills overlap the segment before, drains the pass after.

    Parameters
    ----------
    cycles : int64 ``[G, T, segments]``
        Of a pass of each row tile.
    channels : int64 ``[G, T]``
        Real output channels of each row tile.
    k_blocks : int
        Block columns of a group.
    spans : int64 ``[steps, 5]``
        Of `moves_of_steps`.
    config : StepConfig

    Returns
    -------
    int64 ``[steps, 4]``
        Cycles of the passes, of fill stalls and of drain stalls, and words filled.
    """
    segments = cycles.shape[2]
    words = np.empty(segments, np.int64)
    fill = np.empty(segments, np.int64)
    for s in range(segments):
        words[s] = min(config.segment_words, k_blocks - s * config.segment_words)
        fill[s] = (words[s] + config.fill_words - 1) // config.fill_words
    n = spans.shape[0]
    work = np.zeros((n, 4), np.int64)
    # The first fill and the last drain overlap nothing.
    work[0, 1] += fill[0]
    work[0, 3] += words[0]
    drain = np.int64(0)
    for i in range(n):
        group, t0, t1, start, positions = spans[i, 0], spans[i, 1], spans[i, 2], spans[i, 3], spans[i, 4]
        column_tiles = (positions + config.columns - 1) // config.columns
        tile = np.int64(0)
        while tile < column_tiles:
            # All column tiles but the first and the last do the same: they are looked at once.
            alike = max(column_tiles - 2, np.int64(1)) if tile == 1 else np.int64(1)
            live_columns = min(config.columns, positions - tile * config.columns)
            for t in range(t0, t1):
                total = np.int64(0)
                for s in range(segments):
                    if s + 1 < segments:
                        following = s + 1
                    else:
                        following = 0
                        if t + 1 < t1:
                            refill = segments > 1
                        elif tile + 1 < column_tiles:
                            refill = True
                        elif i + 1 < n:
                            refill = (
                                segments > 1
                                or spans[i + 1, 0] != group
                                or spans[i + 1, 3] != start + tile * config.columns
                                or min(config.columns, spans[i + 1, 4]) != live_columns
                            )
                        else:
                            refill = False
                        if not refill:
                            following = -1
                    own = cycles[group, t, s]
                    next_fill = np.int64(0)
                    if following >= 0:
                        next_fill = fill[following]
                        work[i, 3] += alike * words[following]
                    work[i, 0] += alike * own
                    work[i, 1] += alike * max(next_fill - own, 0)
                    total += max(own, next_fill)
                work[i, 2] += alike * max(drain - total, np.int64(0))
                outputs = channels[group, t] * live_columns
                drain = (outputs + config.drain_words - 1) // config.drain_words
            tile += alike
    work[n - 1, 2] += drain
    return work
