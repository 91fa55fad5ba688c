"""When the steps of a layer end in hardware that cannot use what has not arrived: plain Python, beside the contract's formula.

``step_i = max(Σ time, stream_i + load_{i+1} + store_{i−1})`` lets the first fill of a step run while its inputs still arrive
and a store run while the last drain of its step still does. `causal_timeline` waits for both, as the RTL does, and says what
each wait costs; without the waits it is the formula. Source: docs/microarchitecture.md, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwsim.lowering import lower_machine
from hwsim.machine import Machine
from hwsim.program import Program, Step, Transfer, layer_program
from hwsim.simulator import LayerRun

__all__ = ["NO_STALLS", "Stalls", "StepTiming", "Timeline", "causal_timeline", "stalls", "step_timing"]


@dataclass(frozen=True)
class Stalls:
    """Share of cycles, in 256ths, in which a port stalls; `stalls` says in which.

    Attributes
    ----------
    load, fill, drain, seed : int
    """

    load: int = 0
    fill: int = 0
    drain: int = 0
    seed: int = 0


NO_STALLS = Stalls()
"""Every port is ready in every cycle."""


def stalls(seed: int, port: int, cycles: NDArray[np.int64], share: int) -> NDArray[np.bool_]:
    """Whether a port (0 load, 1 fill, 2 drain) stalls in each of some cycles; the harness has the same function."""
    x = (seed + 0x9E3779B9 * port + 0x85EBCA6B * cycles).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return ((x ^ (x >> np.uint32(16))) & np.uint32(255)) < share


class _Port:
    """When a port that stalls has served a number of cycles."""

    CHUNK = 1 << 12

    def __init__(self, seed: int, port: int, share: int) -> None:
        self.seed, self.port, self.share = seed, port, share
        self.served = np.zeros(1, np.int64)  # cycles served before each cycle

    def end(self, start: int, cycles: int) -> int:
        """One past the last of ``cycles`` served cycles from ``start`` on."""
        if self.share == 0 or cycles == 0:
            return start + cycles
        while self.served.size <= start or self.served[-1] < self.served[start] + cycles:
            now = np.arange(self.served.size - 1, self.served.size - 1 + self.CHUNK, dtype=np.int64)
            ready = ~stalls(self.seed, self.port, now, self.share)
            self.served = np.concatenate([self.served, self.served[-1] + np.cumsum(ready)])
        return int(np.searchsorted(self.served, self.served[start] + cycles))


@dataclass(frozen=True)
class Timeline:
    """When things end, in cycles from the first of the layer.

    Attributes
    ----------
    ends : tuple of int
        Of ``load_0``, of every step, of the last store.
    input_waits, store_waits : tuple of int
        Per step: cycles from the start of the last segment until the inputs of the next step had arrived, and cycles that the
        channel stood still because outputs had not drained. Not all of them lengthen the step; `step_timing` says what does.
    """

    ends: tuple[int, ...]
    input_waits: tuple[int, ...]
    store_waits: tuple[int, ...]


def causal_timeline(
    run: LayerRun,
    machine: Machine,
    program: Program,
    with_stalls: Stalls = NO_STALLS,
    *,
    wait_for_inputs: bool = True,
    wait_for_drains: bool = True,
) -> Timeline:
    """The ends of a layer's steps.

    Parameters
    ----------
    run : LayerRun
        Its weights are not streamed.
    machine : Machine
    program : Program
        Of `hwsim.program.layer_program`.
    with_stalls : Stalls
    wait_for_inputs, wait_for_drains : bool
        Without both it is the contract's formula.
    """
    return _Layer(run, machine, program, with_stalls, wait_for_inputs, wait_for_drains).timeline()


class _Layer:
    def __init__(
        self,
        run: LayerRun,
        machine: Machine,
        program: Program,
        with_stalls: Stalls,
        wait_for_inputs: bool,
        wait_for_drains: bool,
    ) -> None:
        self.run, self.program = run, program
        self.wait_for_inputs, self.wait_for_drains = wait_for_inputs, wait_for_drains
        self.config = lower_machine(machine).step_config
        shares = (with_stalls.load, with_stalls.fill, with_stalls.drain)
        self.dram, self.fill_port, self.drain_port = (
            _Port(with_stalls.seed, port, share) for port, share in enumerate(shares)
        )
        size, k_blocks = self.config.segment_words, run.layer.types.shape[2]
        self.words = [min(size, k_blocks - begin) for begin in range(0, k_blocks, size)]
        self.outputs = 0  # of the pass that drains

    def timeline(self) -> Timeline:
        steps = self.program.steps
        ends = [self._carried(self._carried(0, steps[0].weights), steps[0].inputs)]
        input_waits, store_waits = [], []
        for index, step in enumerate(steps):
            following = steps[index + 1] if index + 1 < len(steps) else None
            begin = ends[-1]
            loaded = arrived = begin
            if following:
                loaded = arrived = self._carried(self._carried(begin, following.weights), following.inputs)
                if not (following.inputs and self.wait_for_inputs):
                    arrived = begin
            end, drained, waited = self._passes(step, following, begin, arrived, first=index == 0)
            stored = loaded
            if index:
                stored = max(loaded, drained) if self.wait_for_drains else loaded
                store_waits.append(stored - loaded)
                stored = self._carried(stored, [steps[index - 1].store])
            else:
                store_waits.append(0)
            input_waits.append(waited)
            if following is None:
                end = self._drained(end)
            ends.append(max(end, stored))
        ends.append(self._carried(ends[-1], [steps[-1].store]))
        return Timeline(tuple(ends), tuple(input_waits), tuple(store_waits))

    def _passes(
        self, step: Step, following: Step | None, begin: int, arrived: int, *, first: bool
    ) -> tuple[int, int, int]:
        """The end of a step's passes, of the drain that they began with, and how long the next step's fill held up the last."""
        columns, counters = self.config.columns, self.run.counters
        now = self._filled(begin, 0) if first else begin
        first_drained, waited = now, 0
        tiles = [(start, tile) for start in self._starts(step) for tile in range(step.tiles)]
        for index, (start, tile) in enumerate(tiles):
            width = min(columns, step.start + step.positions - start)
            drained = self._drained(now)
            if index == 0:
                first_drained = drained
            for segment in range(len(self.words)):
                end = now + int(counters[step.group, step.first_tile + tile, segment, 0])
                if segment + 1 < len(self.words):
                    end = max(end, self._filled(now, segment + 1))
                elif index + 1 < len(tiles):
                    if len(self.words) > 1 or tiles[index + 1][0] != start:
                        end = max(end, self._filled(now, 0))
                elif following and (
                    len(self.words) > 1
                    or (following.group, following.start) != (step.group, start)
                    or min(columns, following.positions) != width
                ):
                    waited = max(arrived - now, 0)
                    end = max(end, self._filled(max(now, arrived), 0))
                now = end
            now = max(now, drained)
            slots = self.run.order[step.group, (step.first_tile + tile) * self.run.rows :][: self.run.rows]
            self.outputs = int(self.run.sizes.channel_rows[slots].sum()) * width
        return now, first_drained, waited

    def _starts(self, step: Step) -> range:
        return range(step.start, step.start + step.positions, self.config.columns)

    def _carried(self, start: int, transfers: Iterable[Transfer]) -> int:
        return self.dram.end(start, self.program.cycles(transfers))

    def _filled(self, start: int, segment: int) -> int:
        return self.fill_port.end(start, -(-self.words[segment] // self.config.fill_words))

    def _drained(self, start: int) -> int:
        return self.drain_port.end(start, -(-self.outputs // self.config.drain_words))


@dataclass(frozen=True)
class StepTiming:
    """A layer's time by the formula, and what hardware takes more.

    Attributes
    ----------
    steps : int
    formula_cycles, causal_cycles : int
        ``load_0 + Σ step_i + store_last``.
    input_wait_cycles, drain_wait_cycles : int
        What waiting for inputs, and then for drains, adds; their sum is the difference.
    """

    steps: int
    formula_cycles: int
    causal_cycles: int
    input_wait_cycles: int
    drain_wait_cycles: int


def step_timing(run: LayerRun, machine: Machine) -> StepTiming:
    """A layer's formula beside the causal time, with the difference explained."""
    program = layer_program(run, machine)
    causal = causal_timeline(run, machine, program).ends[-1]
    without_drains = causal_timeline(run, machine, program, wait_for_drains=False).ends[-1]
    formula = run.mapping.latency_cycles
    return StepTiming(len(program.steps), formula, causal, without_drains - formula, causal - without_drains)
