"""One pass cycle by cycle: the state of every row, from the plain-Python oracle or from the waveforms of the RTL.

`trace_pass` and `trace_pass_rtl` give the same `PassTrace`; the tests hold them together state by state. `trace_text` draws
one in characters, `sweeps.trace_figure` as a figure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import FormatError, InputError, Problem
from hwsim.layer import DENSE, UNIFIED, Layer, LayerShape, QuantizedWeights
from hwsim.lowering import effective_counts, effective_types, execution_order, lower_machine, pass_config
from hwsim.machine import Machine
from hwsim.oracle import COUNTERS, RowState, oracle_pass

__all__ = [
    "STATE_FIELDS",
    "PassTrace",
    "TracedPass",
    "pick_pass",
    "trace_pass",
    "trace_pass_rtl",
    "trace_text",
    "vcd_samples",
]

STATE_FIELDS = RowState._fields
"""Names of the last axis of `PassTrace.states`."""


@dataclass(frozen=True, eq=False)
class TracedPass:
    """Which pass is looked at.

    Attributes
    ----------
    machine : Machine
    types : uint8 array ``[live rows, Kb]``
        Block types of its rows as stored, before feature conversion.
    block_rows : int64 array ``[live rows]``
        Which block row each row of the array holds.
    segment, begin, end : int
        The segment of the pass, and its block columns ``begin … end - 1``.
    """

    machine: Machine
    types: NDArray[np.uint8]
    block_rows: NDArray[np.int64]
    segment: int
    begin: int
    end: int

    @property
    def executed_types(self) -> NDArray[np.uint8]:
        """``uint8[live rows, Kb]``: types after feature conversion."""
        return effective_types(self.types[None], self.machine)[0]


@dataclass(frozen=True, eq=False)
class PassTrace:
    """The states of a pass.

    Attributes
    ----------
    of : TracedPass
    source : str
        ``"oracle"`` or ``"RTL"``.
    states : int64 array ``[cycles, live rows, 8]``
        `hwsim.oracle.RowState` in integers, see `STATE_FIELDS`.
    """

    of: TracedPass
    source: str
    states: NDArray[np.int64]

    @property
    def cycles(self) -> int:
        """Length of the segment."""
        return self.states.shape[0]

    def field(self, name: str) -> NDArray[np.int64]:
        """``int64[cycles, live rows]``: one of `STATE_FIELDS`."""
        return self.states[:, :, STATE_FIELDS.index(name)]

    def executing_column(self) -> NDArray[np.int64]:
        """``int64[cycles, live rows]``: block column that the PEs of a row work on, -1 where they are idle."""
        busy, operand = self.field("busy"), self.field("operand")
        columns = np.full(busy.shape, -1, np.int64)
        for c in range(1, self.cycles):
            accepted = (operand[c - 1] >= 0) & (busy[c - 1] <= 1)
            columns[c] = np.where(accepted, operand[c - 1], np.where(busy[c] > 0, columns[c - 1], -1))
        return columns


def pick_pass(
    machine: Machine, types: NDArray[np.uint8], row_tile: int, segment: int, source: str
) -> TracedPass:
    """A pass of one group of a layer.

    Parameters
    ----------
    machine : Machine
    types : uint8 array ``[Mb, Kb]``
    row_tile, segment : int
    source : str
        What the types are of, for messages.

    Raises
    ------
    InputError
        No such row tile or segment.
    """
    rows, words = machine.array.rows, lower_machine(machine).pass_config.segment_words
    m_blocks, k_blocks = types.shape
    problems = [
        Problem(name, f"{value}, the layer has {count}: 0 … {count - 1}")
        for name, value, count in (
            ("row tile", row_tile, -(-m_blocks // rows)),
            ("segment", segment, -(-k_blocks // words)),
        )
        if not 0 <= value < count
    ]
    if problems:
        raise InputError(source, problems)
    order = execution_order(effective_counts(types[None], machine), machine)[0]
    block_rows = order[row_tile * rows : (row_tile + 1) * rows]
    begin = segment * words
    return TracedPass(machine, types[block_rows], block_rows, segment, begin, min(begin + words, k_blocks))


def trace_pass(of: TracedPass) -> PassTrace:
    """The pass by the plain-Python oracle."""
    config = pass_config(of.machine)
    states: list[list[RowState]] = []
    oracle_pass(
        of.executed_types.tolist(),
        rows=config.rows,
        skip_window=config.skip_window,
        queue_depth=config.queue_depth,
        banks=config.banks,
        unified_cycles=config.unified_cycles,
        dense_cycles=config.dense_cycles,
        begin=of.begin,
        end=of.end,
        observe=states.append,
    )
    return PassTrace(of, "oracle", np.array(states, np.int64))


# --- From the RTL -----------------------------------------------------------------------------------------------------------

_TOP = "TOP.block_skip_array"
_ROW_SIGNALS = (
    "scan",
    "skip.count",
    "operand_full",
    "busy",
    "active_dense",
    "request",
    "request_column",
    "grant",
    "row_class",
)
_FIRST_CLASS = COUNTERS.index("busy")


def trace_pass_rtl(of: TracedPass) -> PassTrace:
    """The pass by the verilated design: its block types as a layer of one pass, read back from the waveforms.

    Raises
    ------
    InputError, FitError
        The design cannot be this machine, or the pass does not fit its memories.
    BuildError
        Verilator or the C++ compiler refused the design.
    Mismatch
        The design did not end, or its waveforms are not of the cycles that it counted.
    """
    from hwsim.rtl_simulator import Mismatch, RtlSimulator
    from hwsim.simulator import run_layer

    layer = _layer_of_one_pass(of)
    run = run_layer(layer, of.machine)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "waves.vcd"
        with RtlSimulator(of.machine, trace=path) as simulator:
            result = simulator.run(run, np.zeros((1, layer.shape.k, layer.shape.n), np.int64))
        states = _states_of_waves(of, path)
    cycles = int(result.counters[of.segment, COUNTERS.index("cycles")])
    if len(states) != cycles:
        raise Mismatch(
            f"{len(states)} cycles of segment {of.segment} in the waveforms, the design counted {cycles}"
        )
    return PassTrace(of, "RTL", states)


def _layer_of_one_pass(of: TracedPass) -> Layer:
    """A linear layer of one input vector. Its weights are 0: no time depends on a value."""
    rows, k_blocks = of.types.shape
    g_o, g_k = of.machine.array.block
    shape = LayerShape("traced pass", "linear", in_channels=k_blocks * g_k, out_channels=rows * g_o)
    precision = of.machine.precision
    weights = QuantizedWeights(
        dense=np.zeros((1, shape.m, shape.k), np.int16),
        signs=np.zeros((1, shape.m, shape.k), np.uint8),
        magnitudes=np.zeros((1, rows, k_blocks), np.uint16),
        weight_bits=precision.weight_bits,
        magnitude_bits=precision.magnitude_bits,
        step_size=1.0,
        requantizer=None,
    )
    return Layer(shape, (g_o, g_k), of.types[None], weights)


def _states_of_waves(of: TracedPass, path: Path) -> NDArray[np.int64]:
    live = of.types.shape[0]
    names = [f"{_TOP}.counting", f"{_TOP}.segment_load"]
    names += [f"{_TOP}.g_row[{r}].row.{signal}" for r in range(live) for signal in _ROW_SIGNALS]
    samples = vcd_samples(path, f"{_TOP}.clock", names)
    counting, load = samples[:, 0] == 1, samples[:, 1] == 1
    # A segment counts from the cycle after its load on; before the reset, registers hold anything.
    begins = counting & np.append(False, load[:-1])
    chosen = samples[counting & (np.cumsum(begins) - 1 == of.segment)]
    cycles = chosen.shape[0]
    signals = chosen[:, 2:].reshape(cycles, live, len(_ROW_SIGNALS))
    at = {name: signals[:, :, index] for index, name in enumerate(_ROW_SIGNALS)}
    requested = np.where(at["request"] == 1, at["request_column"], -1)
    # The operand register holds activations, not the block column that they are of: it is the last one granted.
    operand = np.full((cycles, live), -1, np.int64)
    for c in range(1, cycles):
        operand[c] = np.where(at["grant"][c - 1] == 1, requested[c - 1], operand[c - 1])
    states = {
        "scan": at["scan"],
        "queue": at["skip.count"],
        "operand": np.where(at["operand_full"] == 1, operand, -1),
        "busy": at["busy"],
        "executing": np.where(at["busy"] > 0, np.where(at["active_dense"] == 1, DENSE, UNIFIED), 0),
        "request": requested,
        "granted": at["grant"],
        # One bit per class.
        "row_class": np.round(np.log2(np.maximum(at["row_class"], 1))).astype(np.int64) + _FIRST_CLASS,
    }
    return np.stack([states[name] for name in STATE_FIELDS], axis=2)


def vcd_samples(path: Path, clock: str, names: Sequence[str]) -> NDArray[np.int64]:
    """``int64[cycles, names]``: values of signals while the clock is low, once per cycle, of a two-state VCD file.

    Parameters
    ----------
    path : Path
    clock : str
        A signal's full name, scopes separated by dots.
    names : sequence of str

    Raises
    ------
    FormatError
        A signal is not in the file.
    """
    with path.open(encoding="ascii") as file:
        codes = _vcd_codes(file)
        missing = [Problem(name, "no such signal") for name in (clock, *names) if name not in codes]
        if missing:
            raise FormatError(str(path), missing)
        values = {codes[name]: 0 for name in (clock, *names)}
        samples: list[list[int]] = []
        begun = False
        for line in file:
            if line[0] == "#":
                # The changes of a time follow its mark: what was before this one is complete.
                if begun and values[codes[clock]] == 0:
                    samples.append([values[codes[name]] for name in names])
                begun = True
                continue
            binary = line[0] == "b"
            digits, code = line[1:].split() if binary else (line[0], line[1:].strip())
            if code in values:
                values[code] = int(digits, 2)
    return np.array(samples, np.int64).reshape(len(samples), len(names))


def _vcd_codes(file: Iterable[str]) -> dict[str, str]:
    """The short code of every signal of a VCD file's header, by its full name."""
    scopes: list[str] = []
    codes = {}
    for line in file:
        words = line.split()
        if not words:
            continue
        if words[0] == "$scope":
            scopes.append(words[2])
        elif words[0] == "$upscope":
            scopes.pop()
        elif words[0] == "$var":
            codes[".".join([*scopes, words[4]])] = words[3]
        elif words[0] == "$enddefinitions":
            break
    return codes


# --- In characters ----------------------------------------------------------------------------------------------------------

_LEGEND = (
    "scan: codes passed over or pushed   queue: entries   fetch: G granted, x another block column was first",
    "operand: o waits   PE: U unified, D dense; idle: f fetches, a accepts, c conflict, s starved, . finished",
    "bank: rows that the word went to",
)
_IDLE = {"imbalance": ".", "accept": "a", "fetch": "f", "conflict": "c", "starved": "s"}


def trace_text(trace: PassTrace, first: int, last: int) -> str:
    """Cycles ``first … last`` (from 1, both included) of a pass in characters, one per cycle."""
    window = slice(first - 1, last)
    cycles = range(first, last + 1)
    margin = 16
    tens = "".join(f"{c:<10}" for c in cycles if c % 10 == 1) if first % 10 == 1 else ""
    lines = [*_LEGEND, "", " " * margin + tens.rstrip()] if tens else [*_LEGEND, ""]
    scanned = np.diff(trace.field("scan"), axis=0, append=np.full((1, trace.states.shape[1]), trace.of.end))
    for row, block_row in enumerate(trace.of.block_rows.tolist()):
        state = {name: trace.field(name)[window, row].tolist() for name in STATE_FIELDS}
        parts = {
            "scan": _digits(scanned[window, row].tolist()),
            "queue": _digits(state["queue"]),
            "fetch": "".join(
                "." if request < 0 else "G" if granted else "x"
                for request, granted in zip(state["request"], state["granted"], strict=True)
            ),
            "operand": "".join("o" if operand >= 0 else "." for operand in state["operand"]),
            "PE": "".join(map(_pe_character, state["executing"], state["row_class"])),
        }
        for index, (name, text) in enumerate(parts.items()):
            label = f"row {row}" if index == 0 else f"({block_row})" if index == 1 else ""
            lines.append(f"{label:7} {name:>7} {text}")
    for bank in range(trace.of.machine.operand_store.banks):
        request, granted = trace.field("request")[window], trace.field("granted")[window]
        served = ((granted == 1) & (request % trace.of.machine.operand_store.banks == bank)).sum(axis=1)
        if served.any():
            lines.append(f"{f'bank {bank}':>15} {_digits(served.tolist())}")
    return "\n".join(lines)


def _digits(values: Iterable[int]) -> str:
    return "".join("." if value == 0 else str(value) if value < 10 else "+" for value in values)


def _pe_character(executing: int, row_class: int) -> str:
    if executing:
        return "D" if executing == DENSE else "U"
    return _IDLE[COUNTERS[row_class]]
