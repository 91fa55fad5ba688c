"""Many machines at once: what a result costs depends on what changed since the last one.

`hwsim.simulator.simulate` works through four stages, and so does `Evaluator`, which keeps what each of them found under exactly
what it depends on:

1. **passes**: counters of the passes <- block types, array, front end, banks, number formats, features;
2. **plans**: loop orders, steps and transfers in bytes <- the passes, buffers, weight memories, fill and drain ports;
3. **times**: latency, traffic and events <- the plans and the DRAM channel in cycles of the clock, for all channels in one go;
4. **energy** <- the events, technology and clock, for all results in one go.

Layers that are alike are one layer, the dense baselines are machines like any other whose passes have a closed form, and a
layer that changes leaves what is known of the others. Every figure equals that of `simulate` to the last bit.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwsim.area import dense_at_equal_area, machine_area
from hwsim.energy import CYCLES, DRAM_BITS, EVENTS, INPUT_BITS, StaticEnergy, leakage_pj, static_energy
from hwsim.errors import FitError
from hwsim.image import image_sizes
from hwsim.kept import Kept
from hwsim.kernels.passes import Executed, list_executed, run_executed
from hwsim.kernels.steps import StepConfig, StepPlan
from hwsim.kernels.totals import (
    Demand,
    Schedule,
    energy_of,
    layer_schedule,
    layer_totals,
    network_totals,
    plan_memories,
)
from hwsim.layer import Layer
from hwsim.lowering import (
    LoweredMachine,
    check_length,
    dram_channels,
    effective_counts,
    effective_types,
    execution_order,
    lower_machine,
    occupancy,
)
from hwsim.machine import Machine
from hwsim.mapping import (
    StoredLayer,
    does_not_fit,
    layer_demand,
    memories,
    plan_inputs,
    row_tiles,
    stored_layer,
)
from hwsim.report import derived_figures
from hwsim.simulator import (
    check_formats,
    check_layers,
    dense_layer,
    event_weights,
    layer_accumulator_bits,
    no_baseline,
    overflow_warning,
    pass_counters,
)
from hwsim.technology import Technology, load_technology, remembered

__all__ = ["Evaluator", "Rates", "Results"]

_KEPT_LAYERS = 1024
_KEPT_PASSES = 64
_KEPT_PLANS = 4096
_KEPT_MACHINES = 8192
_WIDTH = len(EVENTS) + 1  # the events and the cycles of the passes
_NO_RESULT = -1


class Rates(NamedTuple):
    """What of a machine can change without touching passes or plans; arrays ``[points]``.

    ``clock_mhz``, ``gb_per_s``, ``pj_per_bit``: float64; ``burst_bytes``: int64.
    """

    clock_mhz: NDArray[np.float64]
    gb_per_s: NDArray[np.float64]
    burst_bytes: NDArray[np.int64]
    pj_per_bit: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Results:
    """Figures of many points, as columns.

    Attributes
    ----------
    columns : dict of arrays ``[points]``
        Names and values of the summary of `hwsim.report.Report`; NaN where a baseline does not fit, 0 or NaN where the
        point itself has an error.
    error, warnings : object arrays ``[points]``
        Why a point has no result, and what `simulate` would warn of ("; " between them); None where there is nothing to say.
    """

    columns: dict[str, NDArray[Any]]
    error: NDArray[np.object_]
    warnings: NDArray[np.object_]


class _Plan(NamedTuple):
    """Layers on machines that hold them alike: arrays of `hwsim.kernels.totals.network_totals`."""

    fixed: NDArray[np.int64]
    busy: NDArray[np.int64]
    counts: NDArray[np.int64]
    classes: NDArray[np.int64]
    transfers: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Held:
    """A layer as the features, formats and shape of an array let it see, before any pass; and the schedules made of it.

    ``executed`` is None on a dense machine, whose passes have a closed form.
    """

    layer: Layer
    types: NDArray[np.uint8]
    executed: Executed | None
    stored: StoredLayer
    demand: Demand
    weights: NDArray[np.int64]
    constant: NDArray[np.int64]
    image_bytes: int
    schedules: Kept

    def schedule(self, row: NDArray[np.int64], config: StepConfig) -> Schedule:
        """The steps of a row of `hwsim.kernels.totals.plan_memories`."""
        units, whole_weights, whole_inputs = plan_inputs(self.layer.shape, self.stored, row, config)
        plan = StepPlan(1, *row[:4].tolist())
        config = config._replace(output_half_bits=int(row[8]))
        tiles = row_tiles(self.stored, row[4:8])
        return Schedule(*layer_schedule(tiles, units, plan, whole_weights, whole_inputs, config))


@dataclass(frozen=True, eq=False)
class _Passes:
    """A layer whose passes are counted, and the plans that were made of it."""

    held: _Held
    counters: NDArray[np.int64]
    plans: Kept

    def plans_of(self, rows: NDArray[np.int64], configs: Sequence[StepConfig]) -> list[_Plan | None]:
        """The plan of each row of `hwsim.kernels.totals.plan_memories`, None where the layer does not fit."""
        width, raw = rows.itemsize * rows.shape[1], rows.tobytes()
        found: dict[Hashable, _Plan | None] = {}
        plans = []
        for index, config in enumerate(configs):
            key = (raw[index * width : (index + 1) * width], config.fill_words, config.drain_words)
            if key not in found:
                found[key] = self._plan(key, rows[index], config) if rows[index, 0] >= 0 else None
            plans.append(found[key])
        return plans

    def _plan(self, key: tuple[bytes, int, int], row: NDArray[np.int64], config: StepConfig) -> _Plan:
        def make() -> _Plan:
            held = self.held
            schedule = held.schedules.find(key[0], lambda: held.schedule(row, config))
            return _Plan(
                *layer_totals(
                    schedule,
                    self.counters,
                    held.stored.channels,
                    held.types.shape[2],
                    held.weights,
                    held.constant,
                    config,
                )
            )

        return self.plans.find(key, make)


@contextmanager
def _without_collector() -> Iterator[None]:
    """No search for reference cycles: a batch makes none, but many small objects that stay, and each search visits them all."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _KnownLayer:
    """What is known of one layer; it is the same object for layers that are alike."""

    def __init__(self) -> None:
        self._held = Kept(_KEPT_PASSES)
        self._passes = Kept(_KEPT_PASSES)

    def find(self, layer: Layer, design: _Design) -> _Passes:
        """The passes of the layer on a machine.

        Raises
        ------
        FitError
            The layer is beyond what can be counted or stored.
        """
        machine, config = design.machine, design.lowered.pass_config

        def count() -> _Passes:
            check_length(layer.shape.blocks(machine.array.block)[1], machine)
            held = self._held.find(design.held, lambda: _hold(layer, machine))
            if held.executed is None:
                counters = pass_counters(held.types, held.stored.order, config, uniform=True)
            else:
                counters = run_executed(held.executed, held.stored.order, config)
            return _Passes(held, counters, Kept(_KEPT_PLANS))

        return self._passes.find((design.held, config), count)


class _Network(NamedTuple):
    """The plans of all layers of a network, and the bytes of their images."""

    copies: NDArray[np.int64]
    plan: _Plan
    image_bytes: int


class _Design(NamedTuple):
    """Machines that run the same layers alike, DRAM aside; ``machine`` is one of them."""

    machine: Machine
    lowered: LoweredMachine
    held: tuple[Hashable, ...]
    memories: tuple[Hashable, ...]


class _MachineFacts(NamedTuple):
    """What follows from a machine alone: of itself, of the dense one with its array, and of the dense one of its area."""

    designs: tuple[_Design, _Design, _Design]
    energies: tuple[StaticEnergy, StaticEnergy]
    area_mm2: float
    equal_area_mm2: float


_OWN, _DENSE, _EQUAL = range(3)


class Evaluator:
    """Evaluates layers on many machines, and computes nothing twice.

    Keep one for as long as layers or machines repeat: passes and plans of the layers that it has met are reused in later calls.
    One object belongs to one thread.

    Examples
    --------
    >>> from hwsim.layer import LayerShape, random_layers
    >>> from hwsim.machine import load_machine
    >>> layers = random_layers([LayerShape("fc", "linear", 800, 500)], (4, 4), 0.5, 0.5, seed=0, exempt_first_last=False)
    >>> machine = load_machine("msa-16x16")
    >>> faster = machine.with_fields({"dram.gb_per_s": 25.6})
    >>> Evaluator().evaluate(layers, [machine, faster]).columns["latency_cycles"].tolist()
    [4805, 2967]
    """

    def __init__(self) -> None:
        self._layers = Kept(_KEPT_LAYERS)
        self._technologies = Kept(_KEPT_PASSES)
        self._machines = Kept(_KEPT_MACHINES)
        self._networks = Kept(_KEPT_MACHINES)

    def evaluate(
        self,
        layers: Sequence[Layer],
        machines: Sequence[Machine],
        machine_of: NDArray[np.int64] | None = None,
        rates: Rates | None = None,
    ) -> Results:
        """Figures of every point.

        Parameters
        ----------
        layers : sequence of Layer
        machines : sequence of Machine
        machine_of : int64 array ``[points]``, optional
            The machine of each point; without it every machine is a point.
        rates : Rates, optional
            Clock and DRAM of each point in place of its machine's; without it those of its machine.

        Raises
        ------
        InputError
            No layers, two of one name, or blocks or weights that a machine cannot run. (A layer that does not fit a machine is
            told in ``error``.)
        """
        check_layers(layers, "evaluate")
        if machine_of is None:
            machine_of = np.arange(len(machines))
        if rates is None:
            rates = _own_rates(machines, machine_of)
        with _without_collector():
            return self._evaluate(layers, machines, machine_of, rates)

    def _evaluate(
        self,
        layers: Sequence[Layer],
        machines: Sequence[Machine],
        machine_of: NDArray[np.int64],
        rates: Rates,
    ) -> Results:
        facts = [self._facts(machine) for machine in machines]
        own = [self._layer(layer.key) for layer in layers]
        dense = [self._layer(replace(layer.shape, name="")) for layer in layers]
        channels, channel_of = _channels(rates)
        timed = []
        errors = []
        for which in (_OWN, _DENSE, _EQUAL):
            designs = [fact.designs[which] for fact in facts]
            networks, problems = self._plans(layers, own if which == _OWN else dense, designs)
            errors.append(problems)
            timed.append(_times(networks, machine_of, channels, channel_of))
            if which == _OWN:
                image_bytes = np.array([network.image_bytes if network else 0 for network in networks])
        columns = _columns(layers, facts, machine_of, rates, timed)
        columns["image_bytes"] = image_bytes[machine_of]
        multipliers = columns["machine_rows"] * columns["machine_columns"] * columns["multipliers"]
        with np.errstate(divide="ignore", invalid="ignore"):  # points that do not fit
            columns |= derived_figures(columns, rates.clock_mhz, multipliers)
        overflow = _warnings(layers, machines)
        texts = [_text(*parts) for parts in zip(overflow, errors[_DENSE], errors[_EQUAL], strict=True)]
        return Results(columns, _objects(errors[_OWN])[machine_of], _objects(texts)[machine_of])

    def _facts(self, machine: Machine) -> _MachineFacts:
        table = machine.technology.table

        def find() -> _MachineFacts:
            technology = self._technologies.find(table, lambda: remembered(load_technology(table)))
            return _machine_facts(machine, technology)

        return self._machines.find(machine, find)

    def _layer(self, key: Hashable) -> _KnownLayer:
        return self._layers.find(key, _KnownLayer)

    def _plans(
        self, layers: Sequence[Layer], known: list[_KnownLayer], designs: Sequence[_Design]
    ) -> tuple[list[_Network | None], list[str | None]]:
        """The plans of a network on each design, or why it does not fit."""
        network = tuple(known)
        keys: list[tuple[Hashable, ...]] = [
            (network, design.held, design.lowered.pass_config, design.memories) for design in designs
        ]
        found: dict[Hashable, _Network | str] = {}
        missing: dict[Hashable, dict[tuple[Hashable, ...], _Design]] = {}
        for key, design in zip(keys, designs, strict=True):
            if key in self._networks:
                found[key] = self._networks[key]
            else:
                missing.setdefault(key[:3], {})[key] = design
        for group in missing.values():
            planned = self._planned(layers, known, list(group.values()))
            for key, plan in zip(group, planned, strict=True):
                found[key] = plan
                if not isinstance(plan, str):  # the text of an error names layer and machine
                    self._networks.keep(key, plan)
        results = [found[key] for key in keys]
        return (
            [None if isinstance(result, str) else result for result in results],
            [result if isinstance(result, str) else None for result in results],
        )

    def _planned(
        self, layers: Sequence[Layer], known: list[_KnownLayer], designs: list[_Design]
    ) -> list[_Network | str]:
        """Plans on designs whose passes are the same."""
        first, sizes = designs[0], memories([design.lowered for design in designs])
        configs = [design.lowered.step_config for design in designs]
        copies: dict[_KnownLayer, int] = {}
        plans: list[list[_Plan | None]] = []
        errors: dict[int, str] = {}
        image_bytes = 0
        for layer, key in zip(layers, known, strict=True):
            try:
                passes = key.find(layer, first)
            except FitError as error:
                return [errors.get(index, str(error)) for index in range(len(designs))]
            image_bytes += passes.held.image_bytes
            if key in copies:
                copies[key] += 1
                continue
            copies[key] = 1
            demand = passes.held.demand
            rows = plan_memories(demand, sizes)
            plans.append(passes.plans_of(rows, configs))
            for index in np.flatnonzero(rows[:, 0] < 0).tolist():
                if index not in errors:
                    design = designs[index]
                    problem = does_not_fit(layer.shape, demand, design.lowered, design.machine.name)
                    errors[index] = str(problem)
        counts = np.array(list(copies.values()), np.int64)
        together: dict[tuple[int, ...], _Network] = {}
        results: list[_Network | str] = []
        for index, plan in enumerate(zip(*plans, strict=True)):
            if index in errors:
                results.append(errors[index])
                continue
            same = tuple(map(id, plan))
            if same not in together:
                together[same] = _Network(
                    counts, _Plan(*map(np.concatenate, zip(*plan, strict=True))), image_bytes
                )
            results.append(together[same])
        return results


def _hold(layer: Layer, machine: Machine) -> _Held:
    check_formats(layer, machine)
    block = machine.array.block
    native = dense_layer(layer.shape, block) if machine.is_dense else layer.at_native_block(block)
    blocks = effective_counts(native.types, machine)
    types = effective_types(native.types, machine)
    order = execution_order(blocks, machine)
    sizes = image_sizes(blocks, native.shape.m, machine)
    stored = stored_layer(native.shape, order, sizes, machine.array.rows)
    weights, constant = event_weights(blocks, native.shape, machine)
    return _Held(
        layer=native,
        types=types,
        executed=None if machine.is_dense else list_executed(np.require(types, requirements=("C", "W"))),
        stored=stored,
        demand=layer_demand(native.shape, stored, machine.array.columns, machine.precision.activation_bits),
        weights=weights,
        constant=constant,
        image_bytes=sizes.total_bytes,
        schedules=Kept(_KEPT_PLANS),
    )


def _machine_facts(machine: Machine, technology: Technology) -> _MachineFacts:
    dense, equal = machine.without_features(), dense_at_equal_area(machine, technology)
    return _MachineFacts(
        designs=(_design(machine), _design(dense), _design(equal)),
        energies=(static_energy(machine, technology), static_energy(dense, technology)),
        area_mm2=sum(machine_area(machine, technology).values()),
        equal_area_mm2=sum(machine_area(equal, technology).values()),
    )


def _design(machine: Machine) -> _Design:
    lowered = lower_machine(machine)
    passes = lowered.pass_config
    if machine.is_dense:
        # Nothing is scanned for and nobody competes for a bank (`hwsim.simulator.uniform_counters`).
        depth = min(passes.queue_depth, 2)
        lowered = replace(lowered, pass_config=passes._replace(skip_window=1, queue_depth=depth, banks=1))
    array, features = machine.array, machine.features
    order = occupancy(machine) if features.row_balance == "sorted" else None
    return _Design(
        machine,
        lowered,
        (array.block, array.rows, array.columns, features.identity, machine.precision.identity, order),
        (lowered.step_config, lowered.row_share_bytes, lowered.activation_bits_capacity),
    )


def _own_rates(machines: Sequence[Machine], machine_of: NDArray[np.int64]) -> Rates:
    columns = (
        [machine.clock_mhz for machine in machines],
        [machine.dram.gb_per_s for machine in machines],
        [machine.dram.burst_bytes for machine in machines],
        [machine.dram.pj_per_bit for machine in machines],
    )
    return Rates(*(np.array(column)[machine_of] for column in columns))


def _channels(rates: Rates) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(int64[channels, 3], int64[points])``: the different channels, and that of each point."""
    first, combination = _distinct((rates.burst_bytes, rates.clock_mhz, rates.gb_per_s))
    found = dram_channels(rates.clock_mhz[first], rates.gb_per_s[first], rates.burst_bytes[first])
    second, channel = _distinct((found[:, 0], found[:, 1], found[:, 2]))
    return found[second], channel[combination]


def _distinct(columns: tuple[NDArray[Any], ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of rows made of these columns: where each different one stands first, and which of those each row is."""
    codes = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        unique, code = np.unique(column, return_inverse=True)
        codes = codes * len(unique) + code
    _, first, which = np.unique(codes, return_index=True, return_inverse=True)
    return first, which


class _Times(NamedTuple):
    """Totals of `network_totals`, and which of them are each point's.

    ``row``: int64 ``[points]``, -1 where the network does not fit. ``sums``: int64 ``[rows, _WIDTH + 3]``. ``most``: float64
    ``[rows, 2]``. Points that share plans and channel share a row.
    """

    row: NDArray[np.int64]
    sums: NDArray[np.int64]
    most: NDArray[np.float64]


def _times(
    networks: list[_Network | None],
    machine_of: NDArray[np.int64],
    channels: NDArray[np.int64],
    channel_of: NDArray[np.int64],
) -> _Times:
    distinct: dict[int, int] = {}
    one_of = np.array([distinct.setdefault(id(network), len(distinct)) for network in networks])
    different = list({id(network): network for network in networks}.values())
    used, row = np.unique(one_of[machine_of] * len(channels) + channel_of, return_inverse=True)
    sums = np.zeros((len(used), _WIDTH + 3), np.int64)
    most = np.zeros((len(used), 2))
    network_of, channel = np.divmod(used, len(channels))
    bounds = np.searchsorted(network_of, np.arange(len(different) + 1))
    for index, network in enumerate(different):
        part = slice(bounds[index], bounds[index + 1])
        if network is not None and part.start < part.stop:
            sums[part], most[part] = network_totals(network.copies, *network.plan, channels[channel[part]])
    fits = np.array([network is not None for network in networks])
    row[~fits[machine_of]] = _NO_RESULT
    return _Times(row, sums, most)


def _columns(
    layers: Sequence[Layer],
    facts: list[_MachineFacts],
    machine_of: NDArray[np.int64],
    rates: Rates,
    timed: list[_Times],
) -> dict[str, NDArray[Any]]:
    """What the derived figures follow from."""
    points = len(machine_of)
    columns: dict[str, NDArray[Any]] = {
        "macs": np.full(points, sum(layer.shape.macs for layer in layers)),
        "weight_count": np.full(points, sum(layer.shape.weight_count for layer in layers)),
        "clock_mhz": rates.clock_mhz,
        "dram_gb_per_s": rates.gb_per_s,
    }
    for which, prefix in ((_OWN, ""), (_DENSE, "dense_")):
        columns[f"{prefix}latency_cycles"] = _sums(timed[which], _WIDTH, which)
        columns[f"{prefix}compute_cycles"] = _sums(timed[which], _WIDTH - 1, which)
        columns[f"{prefix}dram_bytes"] = _sums(timed[which], _WIDTH + 1, which)
        energies = [fact.energies[which] for fact in facts]
        columns[f"{prefix}energy_pj"] = _energy(energies, machine_of, rates, timed[which])
    columns["equal_area_latency_cycles"] = _sums(timed[_EQUAL], _WIDTH, _EQUAL)
    for index, name in enumerate(("peak_bandwidth_gb_per_s", "peak_demand_gb_per_s")):
        # bytes per cycle × MHz / 1000 = GB/s
        columns[name] = timed[_OWN].most[timed[_OWN].row, index] * (rates.clock_mhz / 1e3)
    for name, values in (
        ("area_mm2", [fact.area_mm2 for fact in facts]),
        ("equal_area_dense_area_mm2", [fact.equal_area_mm2 for fact in facts]),
        ("equal_area_dense_rows", [fact.designs[_EQUAL].machine.array.rows for fact in facts]),
        ("machine_rows", [fact.designs[_OWN].machine.array.rows for fact in facts]),
        ("machine_columns", [fact.designs[_OWN].machine.array.columns for fact in facts]),
        ("multipliers", [fact.designs[_OWN].machine.array.multipliers for fact in facts]),
    ):
        columns[name] = np.array(values)[machine_of]
    return columns


def _sums(timed: _Times, column: int, which: int) -> NDArray[Any]:
    values = timed.sums[:, column][timed.row]
    if which == _OWN or (timed.row >= 0).all():
        return values
    return np.where(timed.row >= 0, values, np.nan)


def _energy(
    models: list[StaticEnergy], machine_of: NDArray[np.int64], rates: Rates, timed: _Times
) -> NDArray[np.float64]:
    events = timed.sums[:, : len(EVENTS)].copy()
    events[:, CYCLES] = timed.sums[:, _WIDTH]
    events[:, DRAM_BITS] = timed.sums[:, _WIDTH + 1] * 8
    events[:, INPUT_BITS] = timed.sums[:, _WIDTH + 2] * 8
    per_event_pj = np.stack([model.per_event_pj for model in models])
    leakage_mw = np.array([model.leakage_mw for model in models])
    cycle_pj = per_event_pj[machine_of, CYCLES] + leakage_pj(leakage_mw[machine_of], rates.clock_mhz)
    energy_pj = energy_of(
        events, timed.row, per_event_pj, machine_of, DRAM_BITS, rates.pj_per_bit, CYCLES, cycle_pj
    )
    energy_pj[timed.row < 0] = np.nan
    return energy_pj


def _objects(values: Sequence[str | None]) -> NDArray[np.object_]:
    return np.array(values, object)


def _warnings(layers: Sequence[Layer], machines: Sequence[Machine]) -> list[tuple[str, ...]]:
    """What `simulate` says of accumulators that can overflow, for each machine."""
    known: dict[tuple[int, int], tuple[str, ...]] = {}
    for machine in machines:
        precision = machine.precision
        key = precision.activation_bits, precision.accumulator_bits
        if key not in known:
            needed = [(layer.name, layer_accumulator_bits(layer, key[0])) for layer in layers]
            known[key] = tuple(
                overflow_warning(name, bits, key[1])
                for name, bits in needed
                if bits is not None and bits > key[1]
            )
    return [known[m.precision.activation_bits, m.precision.accumulator_bits] for m in machines]


def _text(overflow: tuple[str, ...], dense: str | None, equal: str | None) -> str | None:
    parts = [*overflow, *(no_baseline(error) for error in (dense, equal) if error is not None)]
    return "; ".join(dict.fromkeys(parts)) or None
