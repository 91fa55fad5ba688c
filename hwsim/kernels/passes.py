"""The pass kernel: one row tile against one column tile, exact to the cycle, compiled.

The machine is stepped only where rows meet: at the banks. Everything else a row does follows from the cycles in which its
blocks were granted. For the i-th block of a row that is not pruned (cycles count from 1, Q the queue's depth):

- ``push(i) = max(push(i-1), grant(i-Q)) + steps(i)``: the scan for block i begins when the queue has room, and then takes one
  cycle per window looked at;
- ``accept(i) = max(grant(i) + 1, accept(i-1) + occ(i-1))``: the PE takes the operand when it is there and the PE is free;
- block i is requested from cycle ``max(push(i) + 1, accept(i-1))`` on, until the bank grants it.

So one update per executed block and one comparison per row and cycle suffice, and cycles without a request are skipped. The
classes of the row-cycles are lengths of intervals between these events. The plain-Python oracle steps every unit in every
cycle instead and counts one by one; the tests hold the two together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = [
    "MAX_BANKS",
    "MAX_BLOCK_COLUMNS",
    "Executed",
    "PassConfig",
    "list_executed",
    "run_executed",
    "run_passes",
]

N_COUNTERS = 13
MAX_BANKS = 4096
MAX_BLOCK_COLUMNS = 2**18
_BANK_MASK = MAX_BANKS - 1
_COLUMN_SHIFT = 13
_CYCLES, _WORDS, _LATCHES, _SCANNED, _EXAMINED, _UNIFIED, _DENSE = range(7)
_BUSY, _IMBALANCE, _ACCEPT, _FETCH, _CONFLICT, _STARVED = range(7, 13)


class PassConfig(NamedTuple):
    """What a pass needs to know of a machine, in integers.

    Attributes
    ----------
    rows, skip_window, queue_depth, banks : int
        R, S, Q and A.
    unified_cycles, dense_cycles : int
        Occupancy of a PE by a block.
    segment_words : int
        Block columns that half the operand store holds.
    """

    rows: int
    skip_window: int
    queue_depth: int
    banks: int
    unified_cycles: int
    dense_cycles: int
    segment_words: int


class Executed(NamedTuple):
    """The blocks of a layer that are not pruned: what is the same for all machines that see its types alike.

    ``begin``: int64 ``[G, Mb + 1]`` where each block row begins in ``blocks``; ``blocks``: int32 ``[any]`` twice the block
    column, plus 1 if the block is dense, ascending within a row; ``k_blocks``: block columns of the layer.
    """

    begin: NDArray
    blocks: NDArray
    k_blocks: int


@njit(cache=True, nogil=True)
def list_executed(types):  # type: ignore[no-untyped-def]
    """The `Executed` blocks of ``types``: uint8 ``[G, Mb, Kb]`` after feature conversion."""
    groups, m_blocks, k_blocks = types.shape
    begin = np.empty((groups, m_blocks + 1), np.int64)
    total = np.int64(0)
    for group in range(groups):
        for r in range(m_blocks):
            begin[group, r] = total
            for j in range(k_blocks):
                total += types[group, r, j] != 0
        begin[group, m_blocks] = total
    blocks = np.empty(total + 1, np.int32)  # one more, since a block is written before it is known to be kept
    at = np.uint64(0)
    for group in range(groups):
        for r in range(m_blocks):
            row = types[group, r]
            for j in range(k_blocks):
                code = row[j]
                blocks[at] = np.int32(2 * j + (code >> np.uint8(1)))
                at += np.uint64(code != 0)
    return Executed(begin, blocks, k_blocks)


@njit(cache=True, nogil=True)
def run_passes(types: NDArray, order: NDArray, config: PassConfig) -> NDArray:
    """Counters of every row tile and segment of a layer.

    Parameters
    ----------
    types : uint8 array ``[G, Mb, Kb]``
        Block types after feature conversion; at most `MAX_BLOCK_COLUMNS` columns.
    order : int64 array ``[G, Mb]``
        Block rows in execution order.
    config : PassConfig
        At most `MAX_BANKS` banks.

    Returns
    -------
    int64 array ``[G, ceil(Mb / rows), ceil(Kb / segment_words), 13]``
        In the order of `hwsim.oracle.COUNTERS`.
    """
    return run_executed(list_executed(types), order, config)


@njit(cache=True, nogil=True)
def run_executed(executed: Executed, order: NDArray, config: PassConfig) -> NDArray:
    """`run_passes` for blocks that are listed already."""
    groups, m_blocks = order.shape
    k_blocks = executed.k_blocks
    rows = config.rows
    segment_words = min(config.segment_words, k_blocks)
    tiles = (m_blocks + rows - 1) // rows
    segments = (k_blocks + segment_words - 1) // segment_words
    live = min(rows, m_blocks)
    width = segment_words + 1 + config.queue_depth
    out = np.zeros((groups, tiles, segments, N_COUNTERS), np.int64)
    work = _Work(
        _block_entries(k_blocks, config.banks),
        1 + np.arange(k_blocks + 1) // config.skip_window,
        np.zeros(2 * live * width, np.int32),
        np.empty(live, np.int64),
        np.empty(live, np.int64),
        np.empty(config.banks, np.int64),
        np.empty(8 * live, np.int64),
    )
    for group in range(groups):
        for tile in range(tiles):
            block_rows = order[group, tile * rows : (tile + 1) * rows]
            for r in range(block_rows.size):
                work.following[r] = executed.begin[group, block_rows[r]]
            for segment in range(segments):
                begin = segment * segment_words
                end = min(begin + segment_words, k_blocks)
                dense = _take_executed(executed, group, block_rows, begin, end, width, work)
                _segment(block_rows.size, begin, end, width, dense, config, work, out[group, tile, segment])
    return out


class _Work(NamedTuple):
    """Arrays that the segments of a GEMM share.

    ``entries[j]`` is block column j as `_block_entries` packs it; ``steps[d]`` the scan cycles that reach a block d columns
    ahead. ``blocks`` interleaves two arrays: at ``2 · (r * width + i)`` the entry of the i-th block of row r that is not
    pruned, its low bit set if it is dense, and -1 behind the last; at ``2 · (r * width + Q + i) + 1`` the cycle in which that
    block was granted, behind Q zeros. ``counts`` and ``following``: blocks of each row in this segment, and where those of the
    next one begin in ``Executed.blocks``. ``state`` holds, per active row, the fields named below it.
    ``best`` is the smallest request of each bank.
    """

    entries: NDArray
    steps: NDArray
    blocks: NDArray
    counts: NDArray
    following: NDArray
    best: NDArray
    state: NDArray


@njit(cache=True, nogil=True)
def _block_entries(k_blocks, banks):  # type: ignore[no-untyped-def]
    """``int32[Kb]``: column, bank and a free low bit in one integer, so that entries order as columns do."""
    entries = np.empty(k_blocks, np.int32)
    bank = 0
    for j in range(k_blocks):
        entries[j] = (j << _COLUMN_SHIFT) | (bank << 1)
        bank += 1
        if bank == banks:
            bank = 0
    return entries


# Fields of an active row: the entry of the block that it asks for next, the cycle of that block's push, the first cycle of its
# request, the cycle from which the PE is free, and where the block stands in `blocks`.
_WANTED, _PUSH, _READY, _FREE, _PLACE = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
_FIELDS = np.uint64(8)
_ONE, _TWO = np.uint64(1), np.uint64(2)


@njit(cache=True, nogil=True)
def _take_executed(executed, group, block_rows, begin, end, width, work):  # type: ignore[no-untyped-def]
    """The blocks of each row in a segment, into ``work.blocks``; returns how many of them are dense."""
    blocks, entries = work.blocks, work.entries[begin:end]
    dense = np.int64(0)
    limit = np.int32(2 * end)
    for r in range(block_rows.size):
        at = np.uint64(2 * r * width)
        taken = np.uint64(work.following[r])
        stop = np.uint64(executed.begin[group, block_rows[r] + 1])
        while taken < stop:
            code = executed.blocks[taken]
            if code >= limit:
                break
            is_dense = code & np.int32(1)
            blocks[at] = entries[np.uint64((code >> 1) - begin)] + is_dense
            at += _TWO
            dense += is_dense
            taken += _ONE
        work.following[r] = np.int64(taken)
        blocks[at] = -1
        work.counts[r] = np.int64(at) // 2 - r * width
    return dense


@njit(cache=True, nogil=True)
def _segment(n, begin, end, width, dense, config, work, out):  # type: ignore[no-untyped-def]
    window = config.skip_window
    unified_cycles, dense_cycles = config.unified_cycles, config.dense_cycles
    steps, blocks, best, state = work.steps, work.blocks, work.best, work.state
    to_grant = np.uint64(2 * config.queue_depth + 1)
    executed_blocks = np.int64(0)
    words = np.int64(0)
    scan_steps = np.int64(0)
    shortfall = np.int64(0)
    accept = np.int64(0)
    fetch = np.int64(0)
    starved = np.int64(0)
    finish_sum = np.int64(0)
    cycles = np.int64(0)
    active = np.uint64(0)
    for row in range(n):
        count = work.counts[row]
        executed_blocks += count
        shortfall += _shortfall(blocks, 2 * row * width, count, begin, end, window)
        if count == 0:
            last = (end - begin + window - 1) // window
            scan_steps += last
            starved += last
            finish_sum += last
            cycles = max(cycles, last)
            continue
        entry = blocks[2 * row * width]
        first = steps[(entry >> _COLUMN_SHIFT) - begin]
        scan_steps += first
        state[active + _WANTED] = entry
        state[active + _PUSH] = first
        state[active + _READY] = first + 1
        state[active + _FREE] = 0
        state[active + _PLACE] = 2 * row * width
        active += _FIELDS
    best[:] = 2**62
    now = np.int64(1)
    while active > np.uint64(0):
        # A bank's key of an older cycle is larger than any key of this one, so the banks need no reset.
        stamp = (np.int64(2) ** 30 - now) << 31
        newest = stamp + 2**31 - 1
        next_request = np.int64(2) ** 60
        r = np.uint64(0)
        while r < active:
            ready = state[r + _READY]
            next_request = min(next_request, ready)
            if ready <= now:
                entry = state[r + _WANTED]
                bank = np.uint64((entry >> 1) & _BANK_MASK)
                old = best[bank]
                words += old > newest
                best[bank] = min(old, stamp + entry)
            r += _FIELDS
        if next_request > now:
            now = next_request
            continue
        r = np.uint64(0)
        while r < active:
            entry = state[r + _WANTED]
            if (
                state[r + _READY] > now
                or best[np.uint64((entry >> 1) & _BANK_MASK)] >> 1 != (stamp + entry) >> 1
            ):
                r += _FIELDS
                continue
            was_free = state[r + _FREE]
            pushed = state[r + _PUSH]
            if now >= was_free:
                accept += 1
                if now > was_free:
                    fetch += 1
                    starved += max(pushed - was_free, 0)
            taken = max(now + 1, was_free)
            is_free = taken + (dense_cycles if entry & 1 else unified_cycles)
            at = np.uint64(state[r + _PLACE])
            blocks[at + to_grant] = now
            at += _TWO
            room = max(pushed, np.int64(blocks[at + _ONE]))
            following = np.int64(blocks[at])
            if following >= 0:
                step = steps[np.uint64((following >> _COLUMN_SHIFT) - (entry >> _COLUMN_SHIFT) - 1)]
                scan_steps += step
                pushed = room + step
                state[r + _WANTED] = following
                state[r + _PUSH] = pushed
                state[r + _READY] = max(pushed + 1, taken)
                state[r + _FREE] = is_free
                state[r + _PLACE] = np.int64(at)
                r += _FIELDS
                continue
            step = (end - 2 - (entry >> _COLUMN_SHIFT) + window) // window
            scan_steps += step
            scanned_at = room + step
            starved += max(scanned_at - is_free, 0)
            last = max(scanned_at, is_free)
            finish_sum += last
            cycles = max(cycles, last)
            active -= _FIELDS
            # Which row is which no longer matters: the last one, not yet seen in this cycle, moves up.
            for field in range(_FIELDS):
                state[r + field] = state[active + field]
        now += 1
    unified = executed_blocks - dense
    busy = unified * config.unified_cycles + dense * config.dense_cycles
    imbalance = config.rows * cycles - finish_sum
    out[_CYCLES] = cycles
    out[_WORDS] = words
    out[_LATCHES] = executed_blocks
    out[_SCANNED] = n * (end - begin)
    out[_EXAMINED] = scan_steps * window - shortfall
    out[_UNIFIED] = unified
    out[_DENSE] = dense
    out[_BUSY] = busy
    out[_IMBALANCE] = imbalance
    out[_ACCEPT] = accept
    out[_FETCH] = fetch
    out[_STARVED] = starved
    out[_CONFLICT] = config.rows * cycles - busy - imbalance - accept - fetch - starved


@njit(cache=True, nogil=True)
def _shortfall(blocks, base, count, begin, end, window):  # type: ignore[no-untyped-def]
    """Codes that the windows of one row reach beyond the last block column: only the last window of a scan can."""
    total = np.int64(0)
    after = np.int64(begin)
    if count > 0:
        after = np.int64(blocks[base + 2 * (count - 1)] >> _COLUMN_SHIFT) + 1
    if after < end:
        total += (window - (end - after) % window) % window
    for i in range(count - 1, -1, -1):
        j = np.int64(blocks[base + 2 * i] >> _COLUMN_SHIFT)
        if j < end - window:
            break
        after = np.int64(blocks[base + 2 * (i - 1)] >> _COLUMN_SHIFT) + 1 if i > 0 else begin
        at = after + (j - after) // window * window
        total += max(window - (end - at), 0)
    return total
