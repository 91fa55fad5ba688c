"""Totals of layers over many machines and DRAM channels: the steps of `hwsim.kernels.steps`, without a table per step.

What a step takes is ``max(what its passes take, what its transfers take)``, and most steps of a layer are alike. So the steps
of one plan are kept as *classes* (`classes_of_phases`): cycles of the passes, transfers, and how many steps are so. A channel
then costs one comparison per class.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hwsim.kernels.steps import (
    INPUT_LOAD,
    Channel,
    StepPlan,
    bus_bytes,
    moves_of_steps,
    plan_steps,
    transfer_cycles,
    work_of_passes,
)

__all__ = [
    "TOTALS",
    "Demand",
    "Memories",
    "Schedule",
    "energy_of",
    "layer_schedule",
    "layer_totals",
    "network_totals",
    "plan_memories",
]

N_COUNTERS = 13
TOTALS = N_COUNTERS + 5
"""Length of a row of totals: the counters of all passes, words filled, bytes loaded into the four weight memories."""


class Demand(NamedTuple):
    """What a layer demands of the memories.

    ``row_bytes``, ``tile_bytes``: int64 ``[4]``, the most that a row of the array holds of each weight stream over the whole
    layer and in one row tile. ``input_bits``: the whole input. ``unit_input_bits``, ``unit_output_bits``: int64 ``[2]``, input
    of one unit of columns and outputs of one step of one row tile and one unit, where units are output rows and where they are
    column tiles. ``can_split``: 0 where both are the same. ``output_bits``: all outputs of one group.
    """

    row_bytes: np.ndarray
    tile_bytes: np.ndarray
    input_bits: int
    unit_input_bits: np.ndarray
    unit_output_bits: np.ndarray
    can_split: int
    output_bits: int


class Memories(NamedTuple):
    """``row_share_bytes``: int64 ``[machines, 4]``; ``activation_bits``, ``output_half_bits``: int64 ``[machines]``."""

    row_share_bytes: np.ndarray
    activation_bits: np.ndarray
    output_half_bits: np.ndarray


@njit(cache=True, nogil=True)
def plan_memories(demand, memories):  # type: ignore[no-untyped-def]
    """How each machine's memories hold a layer.

    Returns
    -------
    int64 ``[machines, 9]``
        ``split, streamed, weight_limited, input_half_bits`` as in `hwsim.kernels.steps.StepPlan`, four shares of a row's weight
        memories that a group of row tiles may use (0 unless ``weight_limited``), and the limit of a step's outputs in bits.
        ``split`` is -1 where the finest step does not fit.
    """
    n = memories.activation_bits.size
    plans = np.zeros((n, 9), np.int64)
    for i in range(n):
        whole, streamed = True, False
        for stream in range(4):
            share = memories.row_share_bytes[i, stream]
            whole &= demand.row_bytes[stream] <= share
            streamed |= demand.tile_bytes[stream] > share // 2
        if not whole:
            plans[i, 1] = streamed
            plans[i, 2] = not streamed
        if plans[i, 2]:
            for stream in range(4):
                plans[i, 4 + stream] = memories.row_share_bytes[i, stream] // 2
        half_bits = memories.activation_bits[i] // 2
        input_whole = demand.input_bits <= memories.activation_bits[i]
        plans[i, 3] = -1 if input_whole else half_bits
        # more room than all outputs of a group take changes nothing
        plans[i, 8] = min(memories.output_half_bits[i], demand.output_bits)
        plans[i, 0] = -1
        for split in range(1 + demand.can_split):
            fits = demand.unit_output_bits[split] <= memories.output_half_bits[i]
            fits &= input_whole or demand.unit_input_bits[split] <= half_bits
            if fits:
                plans[i, 0] = split
                break
    return plans


@njit(cache=True, nogil=True)
def _phase_bounds(moved, phases):  # type: ignore[no-untyped-def]
    """Transfers by phase: their order, and where each phase begins in it."""
    begin = np.zeros(phases + 1, np.int64)
    for i in range(moved.shape[0]):
        begin[moved[i, 0] + 1] += 1
    for phase in range(phases):
        begin[phase + 1] += begin[phase]
    at = begin.copy()
    order = np.empty(moved.shape[0], np.int64)
    for i in range(moved.shape[0]):
        order[at[moved[i, 0]]] = i
        at[moved[i, 0]] += 1
    return order, begin


@njit(cache=True, nogil=True)
def _alike(moved, order, begin, phase, other):  # type: ignore[no-untyped-def]
    length = begin[phase + 1] - begin[phase]
    if begin[other + 1] - begin[other] != length:
        return False
    for i in range(length):
        a, b = order[begin[phase] + i], order[begin[other] + i]
        if moved[a, 1] != moved[b, 1] or moved[a, 2] != moved[b, 2] or moved[a, 3] != moved[b, 3]:
            return False
    return True


@njit(cache=True, nogil=True)
def classes_of_phases(work, moved):  # type: ignore[no-untyped-def]
    """Phases that are alike, as `network_totals` takes them.

    Parameters
    ----------
    work, moved
        Of `hwsim.kernels.steps.work_of_passes` and `hwsim.kernels.steps.moves_of_steps`.

    Returns
    -------
    int64 ``[classes, 3]``
        How many phases are so, cycles of their passes, and how many transfers of a phase follow below.
    int64 ``[transfers, 3]``
        Bytes, how many of them, and 1 where they load inputs; class after class.
    """
    phases = work.shape[0] + 2
    order, begin = _phase_bounds(moved, phases)
    classes = np.empty((phases, 3), np.int64)
    example = np.empty(phases, np.int64)
    transfers = np.empty((moved.shape[0], 3), np.int64)
    n_classes, n_transfers = 0, 0
    for phase in range(phases):
        busy = np.int64(0)
        if 0 < phase < phases - 1:
            busy = work[phase - 1, 0] + work[phase - 1, 1] + work[phase - 1, 2]
        known = n_classes
        for c in range(n_classes):
            if classes[c, 1] == busy and _alike(moved, order, begin, phase, example[c]):
                known = c
                break
        if known < n_classes:
            classes[known, 0] += 1
            continue
        classes[known, 0], classes[known, 1] = 1, busy
        classes[known, 2] = begin[phase + 1] - begin[phase]
        example[known] = phase
        n_classes += 1
        for at in range(begin[phase], begin[phase + 1]):
            i = order[at]
            transfers[n_transfers, 0], transfers[n_transfers, 1] = moved[i, 2], moved[i, 3]
            transfers[n_transfers, 2] = moved[i, 1] == INPUT_LOAD
            n_transfers += 1
    return classes[:n_classes], transfers[:n_transfers]


class Schedule(NamedTuple):
    """Steps and transfers of a layer in both loop orders, weights outer first, one behind the other.

    ``counts``: int64 ``[2, 2]`` steps and transfers of each. ``spans``, ``moved``: as `hwsim.kernels.steps.moves_of_steps`
    gives them. ``passes``: int64 ``[2, G, T]``. ``loaded_bytes``: int64 ``[2, 4]`` into each weight memory.
    """

    counts: np.ndarray
    spans: np.ndarray
    moved: np.ndarray
    passes: np.ndarray
    loaded_bytes: np.ndarray


@njit(cache=True, nogil=True)
def layer_schedule(tiles, units, plan, whole_weights, whole_inputs, config):  # type: ignore[no-untyped-def]
    """The fields of a `Schedule`: all that a layer's memories decide, however long its passes take.

    Parameters
    ----------
    tiles : Tiles
    units : ColumnUnits
    plan : StepPlan
    whole_weights, whole_inputs : int64 ``[any]``
        As for `hwsim.kernels.steps.moves_of_steps`.
    config : StepConfig
    """
    groups, n_tiles = tiles.channels.shape
    counts = np.empty((2, 2), np.int64)
    all_spans = np.empty((0, 5), np.int64)
    all_moved = np.empty((0, 4), np.int64)
    all_passes = np.empty((2, groups, n_tiles), np.int64)
    loaded_bytes = np.zeros((2, 4), np.int64)
    for loop_order in range(2):
        ordered = StepPlan(
            1 - loop_order, plan.split, plan.streamed, plan.weight_limited, plan.input_half_bits
        )
        steps = plan_steps(tiles, units, ordered, config)
        spans, moved, passes, loads = moves_of_steps(
            tiles, units, steps, ordered, whole_weights, whole_inputs, config
        )
        counts[loop_order, 0], counts[loop_order, 1] = spans.shape[0], moved.shape[0]
        all_spans = np.concatenate((all_spans, spans))
        all_moved = np.concatenate((all_moved, moved))
        all_passes[loop_order] = passes
        for group in range(groups):
            for t in range(n_tiles):
                for r in range(tiles.rows):
                    for stream in range(4):
                        loaded_bytes[loop_order, stream] += loads[group, t] * tiles.usage[group, t, r, stream]
    return counts, all_spans, all_moved, all_passes, loaded_bytes


@njit(cache=True, nogil=True)
def layer_totals(schedule, counters, channels, k_blocks, weights, constant, config):  # type: ignore[no-untyped-def]
    """Both loop orders of a layer on one machine, whatever its DRAM.

    Parameters
    ----------
    schedule : Schedule
    counters : int64 ``[G, T, segments, 13]``
        Of one pass of each row tile.
    channels, k_blocks
        As for `hwsim.kernels.steps.work_of_passes`.
    weights : int64 ``[TOTALS, E]``
    constant : int64 ``[E]``
        What the totals add to the events, and what is added whatever they are.
    config : StepConfig

    Returns
    -------
    int64 ``[1, 2, E + 1]``
        Weights outer, columns outer: events and cycles of the passes.
    int64 ``[1, 2]``
        Cycles of the passes with their stalls.
    int64 ``[1, 2]``
        Classes of each order.
    int64 ``[classes, 3]``, int64 ``[transfers, 3]``
        Of `classes_of_phases`, one order behind the other.
    """
    groups, n_tiles, segments, _ = counters.shape
    n_events = constant.size
    fixed = np.empty((1, 2, n_events + 1), np.int64)
    busy = np.empty((1, 2), np.int64)
    counts = np.empty((1, 2), np.int64)
    cycles = counters[:, :, :, 0]
    totals = np.empty(TOTALS, np.int64)
    step, transfer = 0, 0
    all_classes = np.empty((schedule.spans.shape[0] + 4, 3), np.int64)
    all_transfers = np.empty((schedule.moved.shape[0], 3), np.int64)
    n_classes, n_transfers = 0, 0
    for order in range(2):
        last_step, last_transfer = step + schedule.counts[order, 0], transfer + schedule.counts[order, 1]
        work = work_of_passes(cycles, channels, k_blocks, schedule.spans[step:last_step], config)
        classes, transfers = classes_of_phases(work, schedule.moved[transfer:last_transfer])
        step, transfer = last_step, last_transfer
        all_classes[n_classes : n_classes + len(classes)] = classes
        all_transfers[n_transfers : n_transfers + len(transfers)] = transfers
        n_classes += len(classes)
        n_transfers += len(transfers)
        counts[0, order] = len(classes)
        busy[0, order] = work[:, :3].sum()
        totals[:] = 0
        for group in range(groups):
            for t in range(n_tiles):
                for segment in range(segments):
                    for c in range(N_COUNTERS):
                        totals[c] += schedule.passes[order, group, t] * counters[group, t, segment, c]
        totals[N_COUNTERS] = work[:, 3].sum()
        totals[N_COUNTERS + 1 :] = schedule.loaded_bytes[order]
        fixed[0, order, :n_events] = constant
        for counted in range(TOTALS):
            for event in range(n_events):
                fixed[0, order, event] += totals[counted] * weights[counted, event]
        fixed[0, order, n_events] = totals[0]
    return fixed, busy, counts, all_classes[:n_classes].copy(), all_transfers[:n_transfers].copy()


@njit(cache=True, nogil=True, error_model="numpy")
def _one_order(classes, transfers, first, last, at, bus, channel):  # type: ignore[no-untyped-def]
    """Latency, traffic, bytes of inputs loaded, and the highest bytes per cycle of a phase; and where the next order begins."""
    latency, traffic, inputs, peak = np.int64(0), np.int64(0), np.int64(0), 0.0
    for c in range(first, last):
        memory, moved = np.int64(0), np.int64(0)
        for i in range(at, at + classes[c, 2]):
            size = transfers[i, 1] * bus[i]
            memory += transfers[i, 1] * transfer_cycles(bus[i], channel)
            moved += size
            inputs += classes[c, 0] * transfers[i, 2] * size
        at += classes[c, 2]
        cycles = max(classes[c, 1], memory)
        latency += classes[c, 0] * cycles
        traffic += classes[c, 0] * moved
        peak = max(peak, moved / max(cycles, 1))
    return latency, traffic, inputs, peak, at


@njit(cache=True, nogil=True, error_model="numpy")
def network_totals(copies, fixed, busy, counts, classes, transfers, channels):  # type: ignore[no-untyped-def]
    """Totals of a network on one machine, over some DRAM channels.

    Of the two loop orders of a layer the one with the lower latency counts, then the lower traffic, then weights outer.

    Parameters
    ----------
    copies : int64 ``[layers]``
        How often each layer is there.
    fixed : int64 ``[layers, 2, E]``
        What a layer in each loop order adds to the sums, whatever the channel.
    busy : int64 ``[layers, 2]``
        Cycles of the passes with their stalls.
    counts, classes, transfers
        Of `layer_totals`, the layers one behind the other.
    channels : int64 ``[channels, 3]``
        Fields of `hwsim.kernels.steps.Channel`; the sorted are faster.

    Returns
    -------
    int64 ``[channels, E + 3]``
        The sums, then latency in cycles, traffic in bytes, and bytes of inputs loaded.
    float64 ``[channels, 2]``
        Of all layers the highest bytes per cycle of a phase, and the highest traffic per cycle of the passes.
    """
    layers, _, width = fixed.shape
    sums = np.zeros((channels.shape[0], width + 3), np.int64)
    most = np.zeros((channels.shape[0], 2))
    bus = np.empty(transfers.shape[0], np.int64)
    burst = -1
    for c in range(channels.shape[0]):
        channel = Channel(channels[c, 0], channels[c, 1], channels[c, 2])
        if burst != channel.burst_bytes:
            burst = channel.burst_bytes
            for i in range(transfers.shape[0]):
                bus[i] = bus_bytes(transfers[i, 0], channel)
        first, at = 0, 0
        for layer in range(layers):
            middle = first + counts[layer, 0]
            last = middle + counts[layer, 1]
            latency, traffic, inputs, peak, at = _one_order(
                classes, transfers, first, middle, at, bus, channel
            )
            chosen = np.int64(0)
            other, more, loaded, high, at = _one_order(classes, transfers, middle, last, at, bus, channel)
            if other < latency or (other == latency and more < traffic):
                chosen, latency, traffic, inputs, peak = np.int64(1), other, more, loaded, high
            first = last
            for column in range(width):
                sums[c, column] += copies[layer] * fixed[layer, chosen, column]
            sums[c, width] += copies[layer] * latency
            sums[c, width + 1] += copies[layer] * traffic
            sums[c, width + 2] += copies[layer] * inputs
            most[c, 0] = max(most[c, 0], peak)
            most[c, 1] = max(most[c, 1], traffic / busy[layer, chosen])
    return sums, most


@njit(cache=True, nogil=True)
def energy_of(sums, rows, pj, energies, dram, pj_per_bit, cycle, cycle_pj):  # type: ignore[no-untyped-def]
    """``float64[n]``: events × pJ, summed in the order of the events.

    Parameters
    ----------
    sums : int64 ``[any, events or more]``
    rows : int64 ``[n]``
        The row of ``sums`` of each result.
    pj : float64 ``[any, events]``
        pJ per event in all components; the entries of ``dram`` and ``cycle`` do not count.
    energies : int64 ``[n]``
        The row of ``pj`` of each result.
    dram, cycle : int
        Events whose energy differs from result to result: ``pj_per_bit``, ``cycle_pj``: float64 ``[n]``.
    """
    result = np.empty(rows.size)
    for i in range(rows.size):
        total = 0.0
        for event in range(pj.shape[1]):
            per_event = pj[energies[i], event]
            if event == dram:
                per_event = pj_per_bit[i]
            elif event == cycle:
                per_event = cycle_pj[i]
            total += sums[rows[i], event] * per_event
        result[i] = total
    return result
