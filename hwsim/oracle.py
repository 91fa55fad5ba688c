"""The pass, in plain Python: slow, obvious, and the judge of the compiled kernel and of the RTL.

Written for reading beside `docs/microarchitecture.md`, rule by rule; it shares no code with the kernel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hwsim.layer import DENSE, PRUNED, UNIFIED

__all__ = ["COUNTERS", "RowState", "oracle_layer", "oracle_pass"]

COUNTERS = (
    "cycles",
    "words",
    "latches",
    "scanned",
    "examined",
    "unified",
    "dense",
    "busy",
    "imbalance",
    "accept",
    "fetch",
    "conflict",
    "starved",
)
"""Names of the counters of a pass, in the order in which every implementation reports them."""


class RowState(NamedTuple):
    """One row at the start of a cycle, and what it asks for and gets in it. Block columns are -1 where there is none.

    Attributes
    ----------
    scan : int
        Next block column to look at.
    queue : int
        Entries in the queue.
    operand : int
        Block column whose activations wait for the PEs.
    busy : int
        Cycles that the PEs still need.
    executing : int
        Type of the block that they work on, PRUNED where ``busy`` is 0.
    request : int
        Block column that the row asks its bank for.
    granted : int
        1 if it gets it.
    row_class : int
        Class of the row-cycle: index into `COUNTERS`.
    """

    scan: int
    queue: int
    operand: int
    busy: int
    executing: int
    request: int
    granted: int
    row_class: int


@dataclass
class _Row:
    types: Sequence[int]
    scan: int
    end: int
    queue: deque[int] = field(default_factory=deque)
    operand: int | None = None
    busy: int = 0
    executing: int = PRUNED

    @property
    def finished(self) -> bool:
        return self.scan == self.end and not self.queue and self.operand is None and self.busy == 0

    def requests(self) -> int | None:
        """The block column that the row asks its bank for in this cycle."""
        emptied = self.operand is not None and self.busy <= 1
        if self.queue and (self.operand is None or emptied):
            return self.queue[0]
        return None


def oracle_pass(
    types: Sequence[Sequence[int]],
    *,
    rows: int,
    skip_window: int,
    queue_depth: int,
    banks: int,
    unified_cycles: int,
    dense_cycles: int,
    begin: int = 0,
    end: int | None = None,
    observe: Callable[[list[RowState]], None] | None = None,
) -> dict[str, int]:
    """One pass (or one segment ``begin … end`` of it) of at most ``rows`` block rows.

    Parameters
    ----------
    types : sequence of sequences of int
        Block types of the real rows, after feature conversion; rows that are missing are finished from the start.
    rows, skip_window, queue_depth, banks : int
        R, S, Q and A of the machine.
    unified_cycles, dense_cycles : int
        Occupancy of a PE by a block.
    begin, end : int
        Range of block columns.
    observe : callable, optional
        Is handed the states of the real rows in every cycle.

    Returns
    -------
    dict
        The counters of `COUNTERS`.
    """
    last = len(types[0]) if end is None else end
    occupancy = {UNIFIED: unified_cycles, DENSE: dense_cycles}
    array = [_Row(row, begin, last) for row in types]
    array += [_Row((), last, last) for _ in range(rows - len(types))]
    count = dict.fromkeys(COUNTERS, 0)
    while not all(row.finished for row in array):
        count["cycles"] += 1
        requests = [row.requests() for row in array]
        granted: dict[int, int] = {}
        for j in requests:
            if j is not None:
                granted[j % banks] = min(j, granted.get(j % banks, j))
        count["words"] += len(granted)
        grants = [j is not None and granted[j % banks] == j for j in requests]
        if observe is not None:
            real = zip(array[: len(types)], requests, grants, strict=False)
            observe([_state(row, j, grant) for row, j, grant in real])
        for row, grant in zip(array, grants, strict=True):
            count[_row_class(row, grant)] += 1
            queue_had_room = len(row.queue) < queue_depth
            _execute(row, occupancy)
            if grant:
                row.operand = row.queue.popleft()
                count["latches"] += 1
                count["unified" if row.types[row.operand] == UNIFIED else "dense"] += 1
            if row.scan < row.end and queue_had_room:
                _scan(row, skip_window, count)
    return count


def _state(row: _Row, request: int | None, grant: bool) -> RowState:
    return RowState(
        scan=row.scan,
        queue=len(row.queue),
        operand=-1 if row.operand is None else row.operand,
        busy=row.busy,
        executing=row.executing if row.busy else PRUNED,
        request=-1 if request is None else request,
        granted=int(grant),
        row_class=COUNTERS.index(_row_class(row, grant)),
    )


def _row_class(row: _Row, grant: bool) -> str:
    if row.busy > 0:
        return "busy"
    if row.finished:
        return "imbalance"
    if row.operand is not None:
        return "accept"
    if row.queue:
        return "fetch" if grant else "conflict"
    return "starved"


def _execute(row: _Row, occupancy: dict[int, int]) -> None:
    if row.busy <= 1 and row.operand is not None:
        row.executing = row.types[row.operand]
        row.busy = occupancy[row.executing]
        row.operand = None
    else:
        row.busy = max(row.busy - 1, 0)


def _scan(row: _Row, skip_window: int, count: dict[str, int]) -> None:
    stop = min(row.scan + skip_window, row.end)
    count["examined"] += stop - row.scan
    for j in range(row.scan, stop):
        count["scanned"] += 1
        if row.types[j] != PRUNED:
            row.queue.append(j)
            row.scan = j + 1
            return
    row.scan = stop


def oracle_layer(
    types: Sequence[Sequence[int]], order: Sequence[int], *, rows: int, **machine: Any
) -> list[dict[str, int]]:
    """Every row tile of one GEMM in execution order, each as one pass in one segment (see `oracle_pass`)."""
    return [
        oracle_pass([types[i] for i in order[first : first + rows]], rows=rows, **machine)
        for first in range(0, len(order), rows)
    ]
