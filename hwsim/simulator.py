"""Simulate the layers of a network on a machine: cycles, traffic, energy, storage and area, with the dense baselines.

A reader can follow one layer: native blocks and effective types, counters of its passes, its steps, its events, its energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwsim.area import dense_at_equal_area, machine_area
from hwsim.energy import (
    CYCLES,
    DRAM_BITS,
    ENERGY_COMPONENTS,
    EVENTS,
    INPUT_BITS,
    EventCounts,
    layer_energy,
    network_energy,
)
from hwsim.errors import FitError, InputError, Problem
from hwsim.image import PARTS, ImageSizes, image_sizes, type_code_bits
from hwsim.kernels.counts import count_types
from hwsim.kernels.passes import PassConfig, run_passes
from hwsim.layer import DENSE, PRUNED, STREAMS, UNIFIED, Layer, LayerShape, accumulator_bits_needed
from hwsim.lowering import (
    LoweredMachine,
    effective_counts,
    effective_types,
    execution_order,
    lower_machine,
)
from hwsim.machine import Machine, load_machine
from hwsim.mapping import Mapping, map_layer
from hwsim.oracle import COUNTERS
from hwsim.report import Report
from hwsim.technology import load_technology

__all__ = [
    "LayerRun",
    "check_formats",
    "check_layers",
    "dense_layer",
    "event_weights",
    "latency_parts",
    "layer_accumulator_bits",
    "layer_events",
    "no_baseline",
    "overflow_warning",
    "pass_counters",
    "run_layer",
    "simulate",
    "uniform_counters",
]


@dataclass(frozen=True, eq=False)
class LayerRun:
    """One layer on one machine.

    Attributes
    ----------
    layer : Layer
        At the native block.
    blocks : int64 array ``[G, Mb, 3]``
        PRUNED, UNIFIED and DENSE blocks of each block row, after feature conversion.
    order : int64 array ``[G, Mb]``
        Block rows in execution order.
    rows : int
        Rows of the array.
    counters : int64 array ``[G, T, segments, 13]``
        Of one pass of each row tile, in the order of `hwsim.oracle.COUNTERS`.
    mapping : Mapping
    sizes : ImageSizes
    """

    layer: Layer
    blocks: NDArray[np.int64]
    order: NDArray[np.int64]
    rows: int
    counters: NDArray[np.int64]
    mapping: Mapping
    sizes: ImageSizes

    @cached_property
    def totals(self) -> dict[str, int]:
        """Every counter, summed over all passes of the layer."""
        per_tile = self.counters.sum(axis=2)
        sums = (per_tile * self.mapping.passes[:, :, None]).sum(axis=(0, 1))
        return dict(zip(COUNTERS, sums.tolist(), strict=True))


def run_layer(layer: Layer, machine: Machine) -> LayerRun:
    """Counters, steps and image sizes of one layer on one machine.

    Raises
    ------
    InputError
        The layer's blocks cannot run on the machine's native block, or its weights are wider than the machine's formats.
    FitError
        The layer's finest step does not fit the machine's memories.
    """
    return _run_layer(layer, machine, lower_machine(machine))


def _run_layer(layer: Layer, machine: Machine, lowered: LoweredMachine) -> LayerRun:
    check_formats(layer, machine)
    native = layer.at_native_block(machine.array.block)
    types = effective_types(native.types, machine)
    blocks = effective_counts(native.types, machine)
    order = execution_order(blocks, machine)
    counters = pass_counters(types, order, lowered.pass_config, uniform=machine.is_dense)
    sizes = image_sizes(blocks, native.shape.m, machine)
    mapping = map_layer(
        native.shape, counters[:, :, :, 0], types.shape[2], order, sizes, lowered, machine.name
    )
    return LayerRun(native, blocks, order, machine.array.rows, counters, mapping, sizes)


def check_formats(layer: Layer, machine: Machine) -> None:
    """Refuse weights that are wider than the machine's formats: times and sizes would be those of other weights."""
    if layer.weights is None:
        return
    problems = [
        Problem(
            name,
            f"the layer has {found}, the machine {its}",
            "compress with the machine's formats, or widen them",
        )
        for name in ("weight_bits", "magnitude_bits")
        if (found := getattr(layer.weights, name)) > (its := getattr(machine.precision, name))
    ]
    if problems:
        raise InputError(f"layer {layer.name} on machine {machine.name}", problems)


def pass_counters(
    types: NDArray[np.uint8], order: NDArray[np.int64], config: PassConfig, *, uniform: bool = False
) -> NDArray[np.int64]:
    """``int64[G, T, segments, 13]``: counters of one pass of each row tile.

    With ``uniform`` (all blocks have one type and none is pruned, as in a dense machine) nothing is simulated: rows that are
    alike do the same in every cycle, a multicast serves them together, and one row has a closed form (`uniform_counters`).
    """
    if not uniform:
        return run_passes(np.require(types, np.uint8, ("C", "W")), order, config)
    groups, m_blocks, k_blocks = types.shape
    occupancy = config.dense_cycles if types[0, 0, 0] == DENSE else config.unified_cycles
    begins = range(0, k_blocks, config.segment_words)
    segments = [
        uniform_counters(min(config.segment_words, k_blocks - begin), occupancy, config) for begin in begins
    ]
    one = np.array(segments, np.int64)
    one[:, COUNTERS.index("dense" if types[0, 0, 0] == DENSE else "unified")] = one[:, _LATCHES]
    n_tiles = -(-m_blocks // config.rows)
    live = np.full(n_tiles, config.rows, np.int64)
    live[-1] = m_blocks - (n_tiles - 1) * config.rows
    tiles = one * live[:, None, None]
    tiles[:, :, _PER_PASS] = one[:, _PER_PASS]
    tiles[:, :, COUNTERS.index("imbalance")] += (config.rows - live)[:, None] * one[:, 0]
    return np.repeat(tiles[None], groups, axis=0)


_PER_PASS = [COUNTERS.index(name) for name in ("cycles", "words")]
_LATCHES = COUNTERS.index("latches")


def uniform_counters(words: int, occupancy: int, config: PassConfig) -> list[int]:
    """Counters of one row and one segment of ``words`` block columns, none pruned, each of the same occupancy; in closed form.

    The front end pushes one block per cycle, and with a queue of one entry one every other cycle, since a push waits for the
    grant before it; the PE takes one every ``occupancy`` cycles. Three cycles go before the first block: scan, fetch, accept.
    Block types (``unified``, ``dense``) are left 0.

    Examples
    --------
    >>> from hwsim.kernels.passes import PassConfig
    >>> uniform_counters(5, 2, PassConfig(1, 8, 4, 16, 2, 4, 100))[0]
    13
    """
    apart = occupancy if config.queue_depth > 1 else max(occupancy, 2)
    cycles = 3 + (words - 1) * apart + occupancy
    short = min(words, config.skip_window)
    counts = dict.fromkeys(COUNTERS, 0) | {
        "cycles": cycles,
        "words": words,
        "latches": words,
        "scanned": words,
        "examined": (words - short) * config.skip_window + short * (short + 1) // 2,
        "busy": words * occupancy,
        "accept": cycles - words * occupancy - 2,
        "fetch": 1,
        "starved": 1,
    }
    return list(counts.values())


def simulate(machine: Machine | str, layers: Sequence[Layer], *, network: str = "network") -> Report:
    """Simulate layers on a machine, beside the dense machine with the same array and the one of the same area.

    Parameters
    ----------
    machine : Machine or str
        A machine, the name of a preset, or the path of a machine file.
    layers : sequence of Layer
        In execution order; names must differ.
    network : str
        Named in the report.

    Returns
    -------
    Report

    Raises
    ------
    InputError
        No layers, two of one name, or blocks that the machine cannot run.
    FitError
        A layer does not fit the machine.

    Examples
    --------
    >>> import numpy as np
    >>> from hwsim.layer import Layer, LayerShape, random_types
    >>> shape = LayerShape("fc", "linear", in_channels=800, out_channels=500)
    >>> types = random_types(shape, (4, 4), 0.5, 0.5, np.random.default_rng(0))
    >>> report = simulate("msa-16x16", [Layer(shape, (4, 4), types)])
    >>> report.summary["macs"]
    400000
    """
    if isinstance(machine, str):
        machine = load_machine(machine)
    check_layers(layers, "simulate")
    technology = load_technology(machine.technology.table)
    dense_machine, equal_machine = machine.without_features(), dense_at_equal_area(machine, technology)
    lowered = lower_machine(machine)
    runs = [_run_layer(layer, machine, lowered) for layer in layers]
    rows = [_layer_row(run, machine) for run in runs]
    warnings = _overflow_warnings(rows, machine)
    shapes = tuple(layer.shape for layer in layers)
    dense_runs, problem = _dense_runs(shapes, dense_machine)
    warnings += problem
    equal_runs, problem = _dense_runs(shapes, equal_machine)
    warnings += problem
    events, dense_events = _events(runs, machine), _events(dense_runs, dense_machine)
    energy = layer_energy(EventCounts(*events.T), machine, technology)
    dense_energy = None
    if dense_runs:
        dense_energy = layer_energy(EventCounts(*dense_events.T), dense_machine, technology)
    _add_baselines(rows, dense_runs, equal_runs)
    for index, row in enumerate(rows):
        row["energy_pj"] = float(energy[index].sum())
        row["dense_energy_pj"] = (
            float(dense_energy[index].sum()) if dense_energy is not None else float("nan")
        )
    names = [run.layer.name for run in runs]
    return Report.build(
        network=network,
        machine=machine,
        equal_area_machine=equal_machine,
        layer_rows=rows,
        energy_pj=network_energy(events, machine, technology),
        dense_energy_pj=network_energy(dense_events, dense_machine, technology)
        if dense_runs
        else float("nan"),
        energy=_long_energy(names, energy, dense_energy),
        storage=_long_storage(names, runs),
        area_mm2=machine_area(machine, technology),
        equal_area_mm2=sum(machine_area(equal_machine, technology).values()),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def check_layers(layers: Sequence[Layer], source: str) -> None:
    """Refuse no layers, and two of one name; ``source`` is named in the message."""
    if not layers:
        raise InputError(source, Problem("layers", "none given", "a network needs at least one layer"))
    names = [layer.name for layer in layers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            source, Problem("layers", f"names used twice: {', '.join(twice)}", "give each its own")
        )


@lru_cache(maxsize=64)
def _dense_runs(shapes: tuple[LayerShape, ...], machine: Machine) -> tuple[list[LayerRun], list[str]]:
    """Uncompressed layers on a dense machine; none and a warning where they do not fit it.

    They depend on geometry alone, so networks that differ in their blocks share them, and layers of one shape are run once.
    """
    lowered = lower_machine(machine)
    known: dict[LayerShape, LayerRun] = {}
    runs = []
    for shape in shapes:
        unnamed = replace(shape, name="")
        try:
            if unnamed not in known:
                known[unnamed] = _run_layer(dense_layer(shape, machine.array.block), machine, lowered)
        except FitError as error:
            return [], [no_baseline(str(error))]
        runs.append(known[unnamed])
    return runs, []


def dense_layer(shape: LayerShape, block: tuple[int, int]) -> Layer:
    """The uncompressed layer."""
    types = np.broadcast_to(np.uint8(DENSE), (shape.groups, *shape.blocks(block)))
    return Layer(shape, block, types)


def _overflow_warnings(rows: list[dict[str, Any]], machine: Machine) -> list[str]:
    has = machine.precision.accumulator_bits
    return [
        overflow_warning(row["layer"], row["accumulator_bits_needed"], has)
        for row in rows
        if row["accumulator_bits_needed"] is not None and row["accumulator_bits_needed"] > has
    ]


def overflow_warning(layer: str, needed_bits: int, accumulator_bits: int) -> str:
    """What is said of a layer whose sums can be wider than the accumulators."""
    return (
        f"layer {layer} can overflow: its worst sum needs {needed_bits} accumulator bits, the machine has "
        f"{accumulator_bits}; sums wrap"
    )


def no_baseline(reason: str) -> str:
    """What is said where the dense baseline does not fit its machine."""
    return f"the dense baseline cannot run this network, its speed-up is not a number: {reason}"


def _events(runs: list[LayerRun], machine: Machine) -> NDArray[np.int64]:
    """``int64[layers, events]``, in the order of `hwsim.energy.EVENTS`."""
    return np.array([list(layer_events(run, machine).values()) for run in runs], np.int64)


def layer_events(run: LayerRun, machine: Machine) -> dict[str, int]:
    """What one layer does, by the names of `hwsim.energy.EventCounts`."""
    totals = run.mapping.totals
    per_unit, constant = event_weights(run.blocks, run.layer.shape, machine)
    events = (
        np.array([*run.totals.values(), totals["filled_words"], *_loaded_bytes(run)]) @ per_unit + constant
    )
    events[INPUT_BITS] = totals["load_input_bytes"] * 8
    events[DRAM_BITS] = run.mapping.traffic_bytes * 8
    events[CYCLES] = run.mapping.latency_cycles
    return dict(zip(EVENTS, events.tolist(), strict=True))


_LOADED = tuple(f"{name}_bytes_loaded" for name in STREAMS)
_COUNTED = (*COUNTERS, "filled_words", *_LOADED)
"""What the events of a layer follow from, besides what its DRAM channel decides."""


def event_weights(
    blocks: NDArray[np.int64], shape: LayerShape, machine: Machine
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(int64[counted, events], int64[events])``: the events of a layer are linear in what was counted of it.

    ``events = counted @ weights + constant``, with the counters of all passes, the words filled and the bytes loaded into the
    four weight memories. Cycles, DRAM bits and bits written to the activation buffer depend on the channel and are left 0.

    Parameters
    ----------
    blocks : int64 array ``[G, Mb, 3]``
        Of `hwsim.lowering.effective_counts`.
    shape : LayerShape
    machine : Machine
    """
    precision = machine.precision
    n = machine.array.block[0] * machine.array.block[1]
    _, unified, dense = blocks.sum(axis=(0, 1)).tolist()
    outputs = shape.out_channels * shape.n
    per_unit: dict[str, tuple[str, int]] = {
        "latches": ("latches", 1),
        "words_read": ("words", 1),
        "words_filled": ("filled_words", 1),
        "codes_examined": ("examined", 0 if machine.is_dense else 1),
        "type_bits_read": ("scanned", type_code_bits(blocks, machine)),
        "sign_bits_read": ("unified", n),
        "magnitude_bits_read": ("unified", precision.magnitude_bits),
        "dense_bits_read": ("dense", n * precision.weight_bits),
        **{f"{name}_bits_written": (loaded, 8) for name, loaded in zip(STREAMS, _LOADED, strict=True)},
        "activation_bits_read": ("filled_words", machine.word_bits),
    }
    constant = {
        "dense_column_blocks": dense * shape.n,
        "unified_column_blocks": unified * shape.n,
        "output_bits_written": outputs * precision.activation_bits,
        "output_bits_read": outputs * precision.activation_bits,
        "outputs_requantised": outputs,
    }
    weights = np.zeros((len(_COUNTED), len(EVENTS)), np.int64)
    for event, (counted, weight) in per_unit.items():
        weights[_COUNTED.index(counted), EVENTS.index(event)] = weight
    return weights, np.array([constant.get(event, 0) for event in EVENTS], np.int64)


def _loaded_bytes(run: LayerRun) -> list[int]:
    """Bytes that each weight memory was loaded with over the layer."""
    loads = run.mapping.loads
    groups, m_blocks = run.order.shape
    per_slot = np.repeat(loads, run.rows, axis=1)[:, :m_blocks]
    executed = run.sizes.stream_bytes[np.arange(groups)[:, None], run.order]
    return (executed * per_slot[:, :, None]).sum(axis=(0, 1)).tolist()


def _layer_row(run: LayerRun, machine: Machine) -> dict[str, Any]:
    shape, mapping = run.layer.shape, run.mapping
    pass_cycles = run.totals["cycles"]
    latency = mapping.latency_cycles
    codes = count_types(np.require(run.layer.types, np.uint8, ("C", "W"))).sum(axis=(0, 1)).tolist()
    parts = run.sizes.part_bytes
    image_bytes = sum(parts.values())
    stalls = latency_parts(mapping)
    seconds = latency / (machine.clock_mhz * 1e6)
    classes = {f"{name}_row_cycles": run.totals[name] for name in COUNTERS[7:]}
    peak, demand = _peak_bandwidth(mapping, machine)
    return {
        "layer": run.layer.name,
        "kind": shape.kind,
        "m": shape.m,
        "k": shape.k,
        "n": shape.n,
        "groups": shape.groups,
        "macs": shape.macs,
        "weight_count": shape.weight_count,
        "pruned_blocks": codes[PRUNED],
        "unified_blocks": codes[UNIFIED],
        "dense_blocks": codes[DENSE],
        "loop_order": mapping.loop_order,
        "weight_residence": mapping.weight_residence,
        "input_residence": mapping.input_residence,
        "steps": len(mapping.steps),
        "passes": int(mapping.passes.sum()),
        "compute_cycles": pass_cycles,
        "latency_cycles": latency,
        "bound": max(stalls, key=lambda name: stalls[name]),
        **{f"{name}_bound_cycles": cycles for name, cycles in stalls.items()},
        "pe_utilization": run.totals["busy"] / (machine.array.rows * pass_cycles),
        **classes,
        "dram_weight_bytes": mapping.totals["load_weight_bytes"] + mapping.totals["stream_bytes"],
        "dram_input_bytes": mapping.totals["load_input_bytes"],
        "dram_output_bytes": mapping.totals["store_bytes"],
        "dram_bytes": mapping.traffic_bytes,
        "average_bandwidth_gb_per_s": mapping.traffic_bytes / seconds / 1e9,
        "peak_bandwidth_gb_per_s": peak,
        "peak_demand_gb_per_s": demand,
        "image_bytes": image_bytes,
        "bits_per_weight": image_bytes * 8 / shape.weight_count,
        "accumulator_bits_needed": layer_accumulator_bits(run.layer, machine.precision.activation_bits),
    }


def layer_accumulator_bits(layer: Layer, activation_bits: int) -> int | None:
    """Bits of an accumulator that no input can overflow; None where the weights are not at hand.

    The bias is added behind the accumulator, in the requantiser.
    """
    if layer.weights is None:
        return None
    rows = layer.integer_matrix().reshape(-1, layer.shape.k)
    return accumulator_bits_needed(rows, activation_bits)


def latency_parts(mapping: Mapping) -> dict[str, int]:
    """Cycles of the latency by what bounds them; they sum to the latency.

    A step in which the channel takes longer than the passes gives the difference to the class that it spends most cycles on.
    """
    busy = sum(mapping.column(name) for name in ("pass_cycles", "fill_stall_cycles", "drain_stall_cycles"))
    stall = mapping.column("step_cycles") - busy
    load_weights, load_inputs = mapping.column("load_weight_cycles"), mapping.column("load_input_cycles")
    store = mapping.column("store_cycles")
    weights = mapping.column("stream_cycles") + np.append(load_weights[1:], 0)
    inputs = np.append(load_inputs[1:], 0)
    outputs = np.insert(store[:-1], 0, 0)
    most = np.argmax(np.stack([weights, inputs, outputs]), axis=0)
    return {
        "compute": mapping.totals["pass_cycles"],
        "fill": mapping.totals["fill_stall_cycles"],
        "drain": mapping.totals["drain_stall_cycles"],
        "weights": int(stall[most == 0].sum() + load_weights[0]),
        "activations": int(stall[most == 1].sum() + load_inputs[0]),
        "outputs": int(stall[most == 2].sum() + store[-1]),
    }


def _peak_bandwidth(mapping: Mapping, machine: Machine) -> tuple[float, float]:
    """``(peak, demand)`` in GB/s: the highest flow of any phase, and the flow at which no pass would wait.

    Phases are ``load_0``, the steps and the last store. The demand is the layer's traffic over the time of its passes.
    """
    loads = mapping.column("load_weight_bytes") + mapping.column("load_input_bytes")
    stores = mapping.column("store_bytes")
    moved = np.empty(len(loads) + 2, np.int64)
    moved[0], moved[-1] = loads[0], stores[-1]
    moved[1:-1] = mapping.column("stream_bytes")
    moved[1:-2] += loads[1:]
    moved[2:-1] += stores[:-1]
    cycles = np.empty(len(moved), np.int64)
    load_cycles = mapping.column("load_weight_cycles")[0] + mapping.column("load_input_cycles")[0]
    cycles[0], cycles[-1] = max(load_cycles, 1), max(mapping.column("store_cycles")[-1], 1)
    cycles[1:-1] = mapping.column("step_cycles")
    gb_per_s_per_byte_per_cycle = machine.clock_mhz / 1e3
    totals = mapping.totals
    busy = totals["pass_cycles"] + totals["fill_stall_cycles"] + totals["drain_stall_cycles"]
    peak = float((moved / cycles).max()) * gb_per_s_per_byte_per_cycle
    return peak, mapping.traffic_bytes / busy * gb_per_s_per_byte_per_cycle


def _add_baselines(rows: list[dict[str, Any]], dense: list[LayerRun], equal: list[LayerRun]) -> None:
    nothing = float("nan")
    for index, row in enumerate(rows):
        same = dense[index] if dense else None
        larger = equal[index] if equal else None
        row["dense_compute_cycles"] = same.totals["cycles"] if same else nothing
        row["dense_latency_cycles"] = same.mapping.latency_cycles if same else nothing
        row["dense_dram_bytes"] = same.mapping.traffic_bytes if same else nothing
        row["equal_area_latency_cycles"] = larger.mapping.latency_cycles if larger else nothing
        row["speedup_compute_only"] = row["dense_compute_cycles"] / row["compute_cycles"]
        row["speedup_with_memory"] = row["dense_latency_cycles"] / row["latency_cycles"]
        row["speedup_equal_area"] = row["equal_area_latency_cycles"] / row["latency_cycles"]


def _long_energy(
    names: list[str], energy: NDArray[np.float64], dense_energy: NDArray[np.float64] | None
) -> pd.DataFrame:
    layers, components = energy.shape
    return pd.DataFrame(
        {
            "layer": np.repeat(np.array(names, object), components),
            "component": np.tile(np.array(ENERGY_COMPONENTS, object), layers),
            "energy_pj": energy.reshape(-1),
            "dense_energy_pj": np.nan if dense_energy is None else dense_energy.reshape(-1),
        }
    )


def _long_storage(names: list[str], runs: list[LayerRun]) -> pd.DataFrame:
    parts = [run.sizes.part_bytes for run in runs]
    return pd.DataFrame(
        {
            "layer": np.repeat(np.array(names, object), len(PARTS)),
            "stream": np.tile(np.array(PARTS, object), len(runs)),
            "size_bits": [8 * sizes[part] for sizes in parts for part in PARTS],
        }
    )
