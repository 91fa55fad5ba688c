"""A second implementation of docs/microarchitecture.md, written from that page alone: plain Python, no NumPy arithmetic.

It is slow and says everything the long way. Where the page leaves a choice, the comment at the place says which was taken.
Only the containers `Machine` and `LayerShape` are shared with the code under test, never one of their formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

PRUNED, UNIFIED, DENSE = 0, 1, 2
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
STREAMS = ("type", "sign", "magnitude", "dense")
TypeRow = Sequence[int]


class DoesNotFit(Exception):
    """The finest step of a layer does not fit."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---------------------------------------------------------------- section 2: occupancy


def occupancies(machine: Any) -> tuple[int, int, int]:
    """Cycles of a PE per PRUNED, UNIFIED and DENSE block."""
    g_o, g_k = machine.array.block
    n = g_o * g_k
    weights, precision = machine.weights, machine.precision
    dense = max(
        ceil_div(n, machine.array.multipliers), ceil_div(n * precision.weight_bits, weights.dense_port_bits)
    )
    unified = max(
        ceil_div(n, machine.array.sign_adders),
        ceil_div(g_o, machine.array.multipliers),
        ceil_div(n + precision.magnitude_bits, weights.sign_port_bits),
    )
    return 0, unified, dense


def converted(types: Any, machine: Any) -> list[list[list[int]]]:
    """``[G][Mb][Kb]``: the types after feature conversion."""
    becomes = {
        PRUNED: PRUNED if machine.features.skip_pruned else DENSE,
        UNIFIED: UNIFIED if machine.features.unified_path else DENSE,
        DENSE: DENSE,
    }
    return [[[becomes[int(code)] for code in row] for row in group] for group in types]


# ---------------------------------------------------------------- section 3: a pass


def execution_order(group: Sequence[TypeRow], machine: Any) -> list[int]:
    """Block rows of one group in execution order."""
    if machine.features.row_balance == "none":
        return list(range(len(group)))
    occ = occupancies(machine)
    total = [sum(occ[code] for code in row) for row in group]
    return sorted(range(len(group)), key=lambda row: (-total[row], row))


def segments_of(k_blocks: int, machine: Any) -> list[tuple[int, int]]:
    """``(first, one past the last)`` block column of each segment."""
    word_bits = machine.array.block[1] * machine.array.columns * machine.precision.activation_bits
    words = int(Fraction(machine.operand_store.size_kib) * 8192 / 2 / word_bits)
    return [(first, min(first + words, k_blocks)) for first in range(0, k_blocks, words)]


@dataclass
class _Row:
    types: TypeRow
    scan: int
    end: int
    queue: list[int] = field(default_factory=list)
    operand: int | None = None
    busy: int = 0

    def finished(self) -> bool:
        return self.scan == self.end and not self.queue and self.operand is None and self.busy == 0

    def accepts(self) -> bool:
        return self.busy <= 1 and self.operand is not None

    def request(self) -> int | None:
        if self.queue and (self.operand is None or self.accepts()):
            return self.queue[0]
        return None


def run_segment(
    rows: Sequence[TypeRow],
    span: tuple[int, int],
    *,
    array_rows: int,
    occ: tuple[int, int, int],
    skip_window: int,
    queue_depth: int,
    banks: int,
) -> dict[str, int]:
    """The counters of one segment. ``rows`` are the block rows that there are, at most ``array_rows``."""
    start, end = span
    state = [_Row(types, start, end) for types in rows]
    count = dict.fromkeys(COUNTERS, 0)
    while True:
        # Everything is decided on the state at the start of the cycle.
        requests = [row.request() for row in state]
        granted: dict[int, int] = {}
        for j in requests:
            if j is not None:
                granted[j % banks] = min(j, granted.get(j % banks, j))
        grants = [j is not None and granted[j % banks] == j for j in requests]
        scans = [row.scan < end and len(row.queue) < queue_depth for row in state]
        accepts = [row.accepts() for row in state]
        count["cycles"] += 1
        count["words"] += len(granted)
        count["latches"] += sum(grants)
        count["imbalance"] += array_rows - len(state)
        for row, grant in zip(state, grants, strict=True):
            count[_row_class(row, grant)] += 1
        # Every change lands at the end of the cycle.
        for row, j, grant, scan, accept in zip(state, requests, grants, scans, accepts, strict=True):
            if accept:
                assert row.operand is not None
                code = row.types[row.operand]
                count["unified" if code == UNIFIED else "dense"] += 1
                row.busy, row.operand = occ[code], None
            else:
                row.busy = max(row.busy - 1, 0)
            if grant:
                row.queue.pop(0)
                row.operand = j
            if scan:
                _scan(row, skip_window, count)
        if all(row.finished() for row in state):
            return count


def _row_class(row: _Row, granted: bool) -> str:
    if row.busy > 0:
        return "busy"
    if row.finished():
        return "imbalance"
    if row.operand is not None:
        return "accept"
    if row.queue:
        return "fetch" if granted else "conflict"
    return "starved"


def _scan(row: _Row, skip_window: int, count: dict[str, int]) -> None:
    window = range(row.scan, min(row.scan + skip_window, row.end))
    count["examined"] += len(window)
    before = row.scan
    for column in window:
        row.scan = column + 1
        if row.types[column] != PRUNED:
            row.queue.append(column)
            break
    count["scanned"] += row.scan - before


def run_pass(
    rows: Sequence[TypeRow], spans: Sequence[tuple[int, int]], **config: Any
) -> list[dict[str, int]]:
    """The counters of each segment of one pass."""
    return [run_segment(rows, span, **config) for span in spans]


# ---------------------------------------------------------------- section 5: sizes


def type_bits(types: Any, machine: Any) -> int:
    """Bits of a stored type code; ``types`` after conversion."""
    if not machine.features.skip_pruned and not machine.features.unified_path:
        return 0
    return 2 if any(code == DENSE for group in types for row in group for code in row) else 1


def block_row_bits(row: TypeRow, code_bits: int, machine: Any) -> tuple[int, int, int, int]:
    """Bits of one block row in each stream."""
    g_o, g_k = machine.array.block
    unified, dense = row.count(UNIFIED), row.count(DENSE)
    return (
        len(row) * code_bits,
        unified * g_o * g_k,
        unified * machine.precision.magnitude_bits,
        dense * g_o * g_k * machine.precision.weight_bits,
    )


# ---------------------------------------------------------------- section 4: geometry


@dataclass(frozen=True)
class Geometry:
    """A layer as output rows and input rows; rows are numbered in the order they lie in memory."""

    m: int
    k: int
    groups: int
    width: int
    """Positions of an output row."""
    row_columns: int
    """Columns of an input row."""
    row_channels: int
    """Channels of a group in an input row."""
    input_rows: int
    """Input rows of one group."""
    reached: tuple[frozenset[int], ...]
    """Per output row, the input rows that its taps can reach, were the last dimension never in the padding."""
    taps: tuple[tuple[int, ...], ...]
    """Per position of an output row, the columns that its taps reach inside the input."""


def geometry(shape: Any) -> Geometry:
    if shape.kind == "linear":
        vectors = shape.batch * math.prod(shape.input_size)
        return Geometry(
            m=shape.out_channels,
            k=shape.in_channels,
            groups=1,
            width=1,
            row_columns=1,
            row_channels=shape.in_channels,
            input_rows=vectors,
            reached=tuple(frozenset([row]) for row in range(vectors)),
            taps=((0,),),
        )
    axes = [
        _axis_taps(*axis)
        for axis in zip(
            shape.input_size, shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True
        )
    ]
    outer_sizes = shape.input_size[:-1]
    reached = []
    for image in range(shape.batch):
        for position in itertools.product(*axes[:-1]):
            rows = set()
            for index in itertools.product(*position):
                number = image
                for size, at in zip(outer_sizes, index, strict=True):
                    number = number * size + at
                rows.add(number)
            reached.append(frozenset(rows))
    return Geometry(
        m=shape.out_channels // shape.groups,
        k=math.prod(shape.kernel) * shape.in_channels // shape.groups,
        groups=shape.groups,
        width=len(axes[-1]),
        row_columns=shape.input_size[-1],
        row_channels=shape.in_channels // shape.groups,
        input_rows=shape.batch * math.prod(outer_sizes),
        reached=tuple(reached),
        taps=tuple(axes[-1]),
    )


def _axis_taps(
    size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int
) -> list[tuple[int, ...]]:
    """Per output position along one axis, the input positions that its taps reach inside the input."""
    positions = []
    first = -padding[0]
    while first + dilation * (kernel - 1) < size + padding[1]:
        reach = [first + tap * dilation for tap in range(kernel)]
        positions.append(tuple(at for at in reach if 0 <= at < size))
        first += stride
    return positions


# ---------------------------------------------------------------- section 4: groups, steps, latency


@dataclass(frozen=True)
class Unit:
    """A column unit: an output row, or a column tile of one. Positions count over the whole layer."""

    row: int
    first: int
    last: int


Need = dict[int, tuple[int, int]]
"""Input row -> span of columns, last excluded."""


@dataclass
class Step:
    group: int
    row_tiles: tuple[int, ...]
    positions: tuple[int, int]
    pass_cycles: int = 0
    fill_stall_cycles: int = 0
    drain_stall_cycles: int = 0
    stream_cycles: int = 0
    load_weight_cycles: int = 0
    load_input_cycles: int = 0
    store_cycles: int = 0
    stream_bytes: int = 0
    load_weight_bytes: int = 0
    load_input_bytes: int = 0
    store_bytes: int = 0
    step_cycles: int = 0
    filled_words: int = 0

    @property
    def busy_cycles(self) -> int:
        return self.pass_cycles + self.fill_stall_cycles + self.drain_stall_cycles


@dataclass
class Schedule:
    loop_order: str
    weight_residence: str
    input_residence: str
    units_are_rows: bool
    segments: int
    steps: list[Step]

    @property
    def latency_cycles(self) -> int:
        first, last = self.steps[0], self.steps[-1]
        load = first.load_weight_cycles + first.load_input_cycles
        return load + sum(step.step_cycles for step in self.steps) + last.store_cycles

    @property
    def traffic_bytes(self) -> int:
        return sum(
            step.stream_bytes + step.load_weight_bytes + step.load_input_bytes + step.store_bytes
            for step in self.steps
        )

    def attribution(self) -> dict[str, int]:
        """Cycles by what bounds them. Ties of the channel's classes go to the first of weights, activations, outputs."""
        parts = {
            "compute": sum(step.pass_cycles for step in self.steps),
            "fill": sum(step.fill_stall_cycles for step in self.steps),
            "drain": sum(step.drain_stall_cycles for step in self.steps),
            "weights": self.steps[0].load_weight_cycles,
            "activations": self.steps[0].load_input_cycles,
            "outputs": self.steps[-1].store_cycles,
        }
        for index, step in enumerate(self.steps):
            channel = {"weights": step.stream_cycles, "activations": 0, "outputs": 0}
            if index + 1 < len(self.steps):
                channel["weights"] += self.steps[index + 1].load_weight_cycles
                channel["activations"] += self.steps[index + 1].load_input_cycles
            if index:
                channel["outputs"] += self.steps[index - 1].store_cycles
            parts[max(channel, key=lambda name: channel[name])] += step.step_cycles - step.busy_cycles
        return parts

    def flows(self) -> list[tuple[int, int]]:
        """Bytes that the channel moves and cycles, of each phase: ``load_0``, the steps, the last store."""
        first, last = self.steps[0], self.steps[-1]
        loads = [step.load_weight_bytes + step.load_input_bytes for step in self.steps]
        phases = [(loads[0], first.load_weight_cycles + first.load_input_cycles)]
        for index, step in enumerate(self.steps):
            moved = step.stream_bytes
            if index + 1 < len(self.steps):
                moved += loads[index + 1]
            if index:
                moved += self.steps[index - 1].store_bytes
            phases.append((moved, step.step_cycles))
        return [*phases, (last.store_bytes, last.store_cycles)]


class LayerReference:
    """Section 4 for one layer: ``schedules()`` gives both loop orders, ``best()`` the one that the mapper takes."""

    def __init__(self, shape: Any, types: Any, machine: Any) -> None:
        """``types`` is ``[G][Mb][Kb]`` at the native block, before feature conversion."""
        self.machine = machine
        self.geometry = geometry(shape)
        self.types = converted(types, machine)
        self.order = [execution_order(group, machine) for group in self.types]
        self.g_o, self.g_k = machine.array.block
        self.m_blocks = ceil_div(self.geometry.m, self.g_o)
        self.k_blocks = ceil_div(self.geometry.k, self.g_k)
        self.tiles = range(ceil_div(self.m_blocks, machine.array.rows))
        self.code_bits = type_bits(self.types, machine)
        bits = [[block_row_bits(row, self.code_bits, machine) for row in group] for group in self.types]
        self.row_bytes = [[[ceil_div(b, 8) for b in row] for row in group] for group in bits]
        self.present = sum(any(row[s] for group in bits for row in group) for s in range(4))
        self.segments = segments_of(self.k_blocks, machine)
        config = {
            "array_rows": machine.array.rows,
            "occ": occupancies(machine),
            "skip_window": machine.front_end.skip_window,
            "queue_depth": machine.front_end.queue_depth,
            "banks": machine.operand_store.banks,
        }
        self.counters = [
            [
                run_pass([group[row] for row in self.block_rows(g, tile)], self.segments, **config)
                for tile in self.tiles
            ]
            for g, group in enumerate(self.types)
        ]
        self.weight_residence = self._weight_residence()
        self.input_is_whole = self._input_is_whole()
        self.units = self._units()

    # -- sizes

    def block_rows(self, group: int, tile: int) -> list[int]:
        rows = self.machine.array.rows
        return self.order[group][tile * rows : (tile + 1) * rows]

    def channels_of_row(self, block_row: int) -> int:
        return min((block_row + 1) * self.g_o, self.geometry.m) - block_row * self.g_o

    def channels(self, group: int, tiles: Sequence[int]) -> int:
        """Real output channels of row tiles."""
        return sum(self.channels_of_row(row) for tile in tiles for row in self.block_rows(group, tile))

    def fullest_tile(self) -> int:
        """Output channels of the fullest row tile of the layer."""
        return max(self.channels(g, [tile]) for g in range(self.geometry.groups) for tile in self.tiles)

    def activation_bits(self, count: int) -> int:
        return count * self.machine.precision.activation_bits

    def need_bits(self, need: Need) -> int:
        columns = sum(last - first for first, last in need.values())
        return self.activation_bits(columns * self.geometry.row_channels)

    def fits_half_activations(self, bits: int) -> bool:
        return bits <= Fraction(self.machine.activation_buffer.size_kib) * 8192 / 2

    def fits_half_output(self, channels: int, positions: int) -> bool:
        return self.activation_bits(channels * positions) <= Fraction(self.machine.output.size_kib) * 8192 / 2

    # -- what is held

    def _shares(self) -> list[int]:
        weights = self.machine.weights
        sizes = (weights.type_kib, weights.sign_kib, weights.magnitude_kib, weights.dense_kib)
        return [int(Fraction(size) * 1024 / self.machine.array.rows) for size in sizes]

    def _use(self, group: int, tile: int) -> list[list[int]]:
        """Bytes per row of the array and stream."""
        return [self.row_bytes[group][row] for row in self.block_rows(group, tile)]

    def _weights_fit(self, tiles: Sequence[tuple[int, int]], limits: Sequence[int]) -> bool:
        total = [[0] * 4 for _ in range(self.machine.array.rows)]
        for group, tile in tiles:
            for row, use in enumerate(self._use(group, tile)):
                for stream in range(4):
                    total[row][stream] += use[stream]
        return all(used <= limit for row in total for used, limit in zip(row, limits, strict=True))

    def _half_shares(self) -> list[int]:
        return [share // 2 for share in self._shares()]

    def _weight_residence(self) -> str:
        everything = [(g, tile) for g in range(self.geometry.groups) for tile in self.tiles]
        if self._weights_fit(everything, self._shares()):
            return "whole"
        if all(self._weights_fit([one], self._half_shares()) for one in everything):
            return "grouped"
        return "streamed"

    def need(self, units: Sequence[Unit], *, whole_rows: bool | None = None) -> Need:
        geo = self.geometry
        whole_rows = self.units_are_rows if whole_rows is None else whole_rows
        need: Need = {}
        first = units[0].first - units[0].row * geo.width
        last = units[-1].last - units[-1].row * geo.width
        if whole_rows:
            reach = [at for taps in geo.taps for at in taps]
            span = (0, geo.row_columns)
        else:
            reach = [at for taps in geo.taps[first:last] for at in taps]
            span = (min(reach), max(reach) + 1) if reach else (0, 0)
        if reach:
            for unit in units:
                for row in geo.reached[unit.row]:
                    need[row] = span
        return need

    def _row_units(self) -> list[Unit]:
        width = self.geometry.width
        return [Unit(row, row * width, (row + 1) * width) for row in range(len(self.geometry.reached))]

    def _input_is_whole(self) -> bool:
        need = self.need(self._row_units(), whole_rows=True)
        bits = self.need_bits(need) * self.geometry.groups
        return bits <= Fraction(self.machine.activation_buffer.size_kib) * 8192

    def _units(self) -> list[Unit]:
        columns, channels = self.machine.array.columns, self.fullest_tile()

        def fits(unit: Unit, whole_rows: bool) -> bool:
            inputs = self.input_is_whole or self.fits_half_activations(
                self.need_bits(self.need([unit], whole_rows=whole_rows))
            )
            return inputs and self.fits_half_output(channels, unit.last - unit.first)

        units = self._row_units()
        # "If not even one output row fits": the one that needs most decides, or a group could be without members.
        self.units_are_rows = all(fits(unit, True) for unit in units)
        if not self.units_are_rows:
            units = [
                Unit(unit.row, first, min(first + columns, unit.last))
                for unit in units
                for first in range(unit.first, unit.last, columns)
            ]
            if not all(fits(unit, False) for unit in units):
                raise DoesNotFit
        return units

    # -- grouping

    def _column_groups(self, channels: int) -> Iterator[list[Unit]]:
        """Greedy runs of units to meet so many output channels."""

        def fits(run: list[Unit]) -> bool:
            if not self.units_are_rows and run[0].row != run[-1].row:
                return False
            inputs = self.input_is_whole or self.fits_half_activations(self.need_bits(self.need(run)))
            return inputs and self.fits_half_output(channels, run[-1].last - run[0].first)

        return _greedy(self.units, fits)

    def _row_groups(self, group: int, positions: int) -> Iterator[list[int]]:
        """Greedy runs of row tiles to meet so many positions."""

        def fits(run: list[int]) -> bool:
            weights = self.weight_residence != "grouped" or self._weights_fit(
                [(group, tile) for tile in run], self._half_shares()
            )
            return weights and self.fits_half_output(self.channels(group, run), positions)

        return _greedy(list(self.tiles), fits)

    def _plan(self, loop_order: str) -> Iterator[tuple[int, list[int], list[Unit]]]:
        widest = max(unit.last - unit.first for unit in self.units)
        for group in range(self.geometry.groups):
            # "the row tile with the most output channels": of this group of the layer.
            fullest = max(self.channels(group, [tile]) for tile in self.tiles)
            if loop_order == "weights outer":
                for tiles in self._row_groups(group, widest):
                    for units in self._column_groups(self.channels(group, tiles)):
                        yield group, tiles, units
            else:
                for units in self._column_groups(fullest):
                    for tiles in self._row_groups(group, units[-1].last - units[0].first):
                        yield group, tiles, units

    # -- transfers

    def transfer(self, size_bytes: int) -> tuple[int, int]:
        """Cycles and bytes (whole bursts) of one contiguous range."""
        burst = self.machine.dram.burst_bytes
        moved = ceil_div(size_bytes, burst) * burst
        clock = Fraction(str(self.machine.clock_mhz))
        rate = Fraction(str(self.machine.dram.gb_per_s)) * 1000
        return math.ceil(moved * clock / rate), moved

    def transfers(self, sizes: Sequence[int]) -> tuple[int, int]:
        each = [self.transfer(size) for size in sizes]
        return sum(cycles for cycles, _ in each), sum(moved for _, moved in each)

    def weight_ranges(self, group: int, tiles: Sequence[int]) -> list[int]:
        """Bytes of each range that a row group's weights are loaded in."""
        rows = sorted(row for tile in tiles for row in self.block_rows(group, tile))
        sizes = [2 * len(rows)] if self.machine.features.row_balance == "sorted" else []
        for run in _runs(rows):
            sizes.append(4 * self.present * len(run))
            sizes.append(7 * sum(self.channels_of_row(row) for row in run))
            sizes += [sum(self.row_bytes[group][row][stream] for row in run) for stream in range(4)]
        return sizes

    def whole_weight_ranges(self) -> list[int]:
        block_rows = self.geometry.groups * self.m_blocks
        sizes = [2 * block_rows] if self.machine.features.row_balance == "sorted" else []
        sizes += [4 * self.present * block_rows, 7 * self.geometry.groups * self.geometry.m]
        return sizes + [sum(row[stream] for group in self.row_bytes for row in group) for stream in range(4)]

    def input_ranges(self, need: Need, resident: Need) -> list[int]:
        """Bytes of each range of ``need`` without what is resident."""
        whole_rows, sizes = [], []
        for row in sorted(need):
            missing = _without(need[row], resident.get(row, (0, 0)))
            for first, last in missing:
                if (first, last) == (0, self.geometry.row_columns):
                    whole_rows.append(row)
                else:
                    sizes.append(self._input_bytes(last - first))
        return sizes + [self._input_bytes(len(run) * self.geometry.row_columns) for run in _runs(whole_rows)]

    def whole_input_ranges(self) -> list[int]:
        need = self.need(self._row_units(), whole_rows=True)
        rows = [
            g * self.geometry.input_rows + row for g in range(self.geometry.groups) for row in sorted(need)
        ]
        return [self._input_bytes(len(run) * self.geometry.row_columns) for run in _runs(rows)]

    def _input_bytes(self, columns: int) -> int:
        return ceil_div(self.activation_bits(columns * self.geometry.row_channels), 8)

    # -- steps

    def schedule(self, loop_order: str) -> Schedule:
        steps: list[Step] = []
        before: tuple[int, list[int], list[Unit]] | None = None
        for group, tiles, units in self._plan(loop_order):
            step = Step(group, tuple(tiles), (units[0].first, units[-1].last))
            self._load(step, tiles, units, before)
            outputs = self.activation_bits(self.channels(group, tiles) * (units[-1].last - units[0].first))
            step.store_cycles, step.store_bytes = self.transfer(ceil_div(outputs, 8))
            steps.append(step)
            before = (group, tiles, units)
        self._run_chain(steps)
        for index, step in enumerate(steps):
            channel = step.stream_cycles
            if index + 1 < len(steps):
                channel += steps[index + 1].load_weight_cycles + steps[index + 1].load_input_cycles
            if index:
                channel += steps[index - 1].store_cycles
            step.step_cycles = max(step.busy_cycles, channel)
        return Schedule(
            loop_order=loop_order,
            weight_residence=self.weight_residence,
            input_residence="whole" if self.input_is_whole else "grouped",
            units_are_rows=self.units_are_rows,
            segments=len(self.segments),
            steps=steps,
        )

    def _load(
        self,
        step: Step,
        tiles: list[int],
        units: list[Unit],
        before: tuple[int, list[int], list[Unit]] | None,
    ) -> None:
        weights: list[int] = []
        inputs: list[int] = []
        if self.weight_residence == "grouped" and (
            before is None or (before[0], before[1]) != (step.group, tiles)
        ):
            weights = self.weight_ranges(step.group, tiles)
        if not self.input_is_whole:
            resident = self.need(before[2]) if before is not None and before[0] == step.group else {}
            inputs = self.input_ranges(self.need(units), resident)
        if before is None and self.weight_residence == "whole":
            weights = self.whole_weight_ranges()
        if before is None and self.input_is_whole:
            inputs = self.whole_input_ranges()
        step.load_weight_cycles, step.load_weight_bytes = self.transfers(weights)
        step.load_input_cycles, step.load_input_bytes = self.transfers(inputs)

    def _run_chain(self, steps: list[Step]) -> None:
        """Times of all segments of the layer, one after the other."""
        columns = self.machine.array.columns
        passes = [
            (step, tile, (first, min(first + columns, step.positions[1])))
            for step in steps
            for first in range(*step.positions, columns)
            for tile in step.row_tiles
        ]
        rate = self.machine.operand_store.fill_words_per_cycle
        fills = []
        for index, (step, _, column_tile) in enumerate(passes):
            before = passes[index - 1] if index else None
            held = (
                before is not None
                and len(self.segments) == 1
                and (before[0].group, before[2]) == (step.group, column_tile)
            )
            for first, last in self.segments:
                fills.append(0 if held else ceil_div(last - first, rate))
                step.filled_words += 0 if held else last - first
        steps[0].fill_stall_cycles += fills[0]
        next_fill = iter([*fills[1:], 0])
        drain = 0
        for step, tile, (first, last) in passes:
            pass_time = 0
            if self.weight_residence == "streamed":
                cycles, moved = self.transfers(self.weight_ranges(step.group, [tile]))
                step.stream_cycles += cycles
                step.stream_bytes += moved
            for segment in self.counters[step.group][tile]:
                time = max(segment["cycles"], next(next_fill))
                step.pass_cycles += segment["cycles"]
                step.fill_stall_cycles += time - segment["cycles"]
                pass_time += time
            step.drain_stall_cycles += max(drain - pass_time, 0)
            live = self.channels(step.group, [tile]) * (last - first)
            drain = ceil_div(live, self.machine.output.words_per_cycle)
        steps[-1].drain_stall_cycles += drain

    def schedules(self) -> list[Schedule]:
        return [self.schedule("weights outer"), self.schedule("columns outer")]

    def best(self) -> Schedule:
        """Lower latency, then lower traffic, then weights outer (the first)."""
        return min(self.schedules(), key=lambda one: (one.latency_cycles, one.traffic_bytes))


def _greedy(items: list[Any], fits: Callable[[list[Any]], bool]) -> Iterator[list[Any]]:
    at = 0
    while at < len(items):
        size = 1
        while at + size < len(items) and fits(items[at : at + size + 1]):
            size += 1
        yield items[at : at + size]
        at += size


def _runs(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Maximal runs of consecutive numbers of a rising sequence."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _without(span: tuple[int, int], other: tuple[int, int]) -> list[tuple[int, int]]:
    """The parts of a span outside another: none, one, or two (one on each side)."""
    if other[0] >= other[1]:
        return [span]
    parts = [(span[0], min(span[1], other[0])), (max(span[0], other[1]), span[1])]
    return [(first, last) for first, last in parts if first < last]


# ---------------------------------------------------------------- section 5: reading a memory image


@dataclass
class Decoded:
    """What an image holds: types ``[G][Mb][Kb]``, weights ``[G][M][K]``, channel parameters, row order ``[G][Mb]``."""

    types: list[list[list[int]]]
    weights: list[list[list[int]]]
    bias: list[int]
    scale: list[int]
    shift: list[int]
    order: list[list[int]] | None
    padding_is_zero: bool
    size_bytes: int


class _Bits:
    """Fields of a byte string from an offset, least significant bit first."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data, self.at = data, 8 * offset

    def take(self, bits: int) -> int:
        value = 0
        for place in range(bits):
            byte, bit = divmod(self.at + place, 8)
            value |= (self.data[byte] >> bit & 1) << place
        self.at += bits
        return value

    def take_signed(self, bits: int) -> int:
        value = self.take(bits)
        return value - (1 << bits) if value >> (bits - 1) else value

    def finish(self) -> tuple[int, bool]:
        """The next whole byte, and whether the bits before it are 0."""
        rest = -self.at % 8
        clean = self.take(rest) == 0
        return self.at // 8, clean


def read_image(image: bytes, shape: Any, machine: Any, present: Sequence[str], code_bits: int) -> Decoded:
    """Read an image. ``present`` names the streams that the layer has; a type code has ``code_bits`` bits."""
    geo = geometry(shape)
    g_o, g_k = machine.array.block
    m_blocks, k_blocks = ceil_div(geo.m, g_o), ceil_div(geo.k, g_k)
    block_rows = geo.groups * m_blocks
    at = 0

    def number(size: int, *, signed: bool = False) -> int:
        nonlocal at
        at += size
        return int.from_bytes(image[at - size : at], "little", signed=signed)

    offsets = [{name: number(4) for name in present} for _ in range(block_rows)]
    order = None
    if machine.features.row_balance == "sorted":
        order = [[number(2) for _ in range(m_blocks)] for _ in range(geo.groups)]
    channels = [
        (number(4, signed=True), number(2, signed=True), number(1)) for _ in range(geo.groups * geo.m)
    ]
    types, clean, end = [], True, at
    weights = [[[0] * geo.k for _ in range(geo.m)] for _ in range(geo.groups)]
    for block_row, offset in enumerate(offsets):
        group, m_block = divmod(block_row, m_blocks)
        readers = {name: _Bits(image, offset[name]) for name in present}
        codes = [readers["type"].take(code_bits) if code_bits else DENSE for _ in range(k_blocks)]
        types.append(codes)
        for k_block, code in enumerate(codes):
            if code == PRUNED:
                continue
            magnitude = 0
            if code == UNIFIED:
                magnitude = readers["magnitude"].take(machine.precision.magnitude_bits)
            for o in range(g_o):
                for k in range(g_k):
                    if code == UNIFIED:
                        sign = readers["sign"].take(1)
                        value = -magnitude if sign else magnitude
                    else:
                        sign = value = readers["dense"].take_signed(machine.precision.weight_bits)
                    row, column = m_block * g_o + o, k_block * g_k + k
                    if row < geo.m and column < geo.k:
                        weights[group][row][column] = value
                    else:
                        clean &= sign == 0
        for reader in readers.values():
            stop, padding = reader.finish()
            clean &= padding
            end = max(end, stop)
    return Decoded(
        types=[types[g * m_blocks : (g + 1) * m_blocks] for g in range(geo.groups)],
        weights=weights,
        bias=[bias for bias, _, _ in channels],
        scale=[scale for _, scale, _ in channels],
        shift=[shift for _, _, shift in channels],
        order=order,
        padding_is_zero=clean,
        size_bytes=end,
    )
