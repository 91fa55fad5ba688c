"""Many machines at once give what `simulate` gives one by one, to the last bit; and nothing is computed twice."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hwsim.evaluate
from hwsim.area import _cells_um2, _logic, _logic_mm2, array_geometry, built_memories, machine_area
from hwsim.energy import _energy_without_memories, _energy_without_rates
from hwsim.errors import FitError, InputError
from hwsim.evaluate import Evaluator, Rates, Results
from hwsim.layer import Layer, LayerShape, random_layers, random_types
from hwsim.lowering import dram_channel, dram_channels
from hwsim.machine import Machine, load_machine
from hwsim.report import Report
from hwsim.simulator import simulate
from hwsim.technology import load_technology

BASE = load_machine("msa-8x8").with_fields(
    {"array.rows": 3, "array.columns": 4, "operand_store.banks": 4, "operand_store.size_kib": 2.0}
)
AXES: dict[str, list[object]] = {
    "dram.gb_per_s": [0.7, 3.2, 12.8],
    "dram.burst_bytes": [1, 24, 64],
    "dram.pj_per_bit": [0.0, 7.3],
    "clock_mhz": [250.0, 999.9],
    "technology.table": ["45nm-horowitz", "22nm-aladdin"],
    "activation_buffer.size_kib": [0.25, 1.0, 64.0],
    "output.size_kib": [0.125, 0.5, 64.0],
    "output.words_per_cycle": [1, 16],
    "operand_store.fill_words_per_cycle": [1, 3],
    "operand_store.size_kib": [0.25, 2.0],
    "operand_store.banks": [1, 3],
    "weights.dense_kib": [0.25, 4.0, 64.0],
    "weights.type_kib": [0.03125, 4.0],
    "weights.sign_port_bits": [8, 64],
    "array.rows": [1, 3, 5],
    "array.columns": [2, 5],
    "array.multipliers": [1, 4],
    "front_end.skip_window": [1, 6],
    "front_end.queue_depth": [1, 4],
    "features.skip_pruned": [True, False],
    "features.unified_path": [True, False],
    "features.row_balance": ["none", "sorted"],
    "precision.weight_bits": [4, 8],
}


def shapes() -> list[LayerShape]:
    """A strided convolution, two that are alike but for the name, a depthwise one, and a linear layer with ragged blocks."""
    conv = LayerShape("a", "conv", 3, 18, (9, 11), (3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1))
    same = LayerShape("b", "conv", 18, 18, (5, 11), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    depthwise = replace(same, name="d", in_channels=6, out_channels=6, groups=6)
    return [conv, same, replace(same, name="c"), depthwise, LayerShape("fc", "linear", 45, 10)]


LAYERS = random_layers(shapes(), (4, 4), 0.5, 0.3, seed=1, exempt_first_last=False)


def simulated(machine: Machine, layers: list[Layer]) -> tuple[Report | None, str | None]:
    try:
        return simulate(machine, layers), None
    except FitError as error:
        return None, str(error)


def assert_equal_to_simulate(layers: list[Layer], machines: list[Machine], found: Results) -> int:
    """Every column that the report has, bit for bit; returns how many points have a result."""
    fits = 0
    for index, machine in enumerate(machines):
        report, reason = simulated(machine, layers)
        assert found.error[index] == reason
        if report is None:
            continue
        fits += 1
        assert found.warnings[index] == ("; ".join(report.warnings) or None)
        for name in found.columns.keys() & report.summary.keys():
            value, expected = found.columns[name][index], report.summary[name]
            assert value == expected or (value != value and expected != expected), name
        assert len(found.columns.keys() & report.summary.keys()) > 25
    return fits


@st.composite
def machine_batches(draw: st.DrawFn) -> list[Machine]:
    names = draw(st.lists(st.sampled_from(sorted(AXES)), min_size=1, max_size=3, unique=True))
    product = itertools.product(*(AXES[name] for name in names))
    machines = []
    for values in product:
        try:
            machines.append(BASE.with_fields(dict(zip(names, values, strict=True))))
        except InputError:
            continue
    return draw(st.permutations(machines))[:6]


KEPT = Evaluator()
"""One for all examples: what it keeps from one must not change another."""


@settings(deadline=None, max_examples=25)
@given(machine_batches())
def test_batches_equal_simulate_to_the_last_bit(machines: list[Machine]) -> None:
    if machines:
        assert_equal_to_simulate(LAYERS, machines, KEPT.evaluate(LAYERS, machines))


def test_every_axis_by_itself() -> None:
    fits = 0
    for name, values in AXES.items():
        machines = [BASE.with_fields({name: value}) for value in values]
        fits += assert_equal_to_simulate(LAYERS, machines, KEPT.evaluate(LAYERS, machines))
    assert fits > 30


def test_rates_replace_those_of_the_machine() -> None:
    other = BASE.with_fields({"array.rows": 5})
    rates = Rates(
        clock_mhz=np.array([500.0, 800.0, 500.0, 1000.0]),
        gb_per_s=np.array([1.6, 12.8, 3.2, 0.1]),
        burst_bytes=np.array([64, 32, 64, 7]),
        pj_per_bit=np.array([1.0, 2.5, 0.0, 12.0]),
    )
    machine_of = np.array([0, 1, 1, 0])
    machines = [
        (BASE, other)[which].with_fields(
            {
                "clock_mhz": float(rates.clock_mhz[i]),
                "dram.gb_per_s": float(rates.gb_per_s[i]),
                "dram.burst_bytes": int(rates.burst_bytes[i]),
                "dram.pj_per_bit": float(rates.pj_per_bit[i]),
            }
        )
        for i, which in enumerate(machine_of)
    ]
    found = Evaluator().evaluate(LAYERS, [BASE, other], machine_of, rates)
    assert assert_equal_to_simulate(LAYERS, machines, found) == 4


@pytest.fixture
def passes_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers whose passes are counted from here on, those of dense machines left out."""
    names: list[str] = []
    hold = hwsim.evaluate._hold

    def noted(layer: Layer, machine: Machine) -> object:
        if not machine.is_dense:
            names.append(layer.name)
        return hold(layer, machine)

    monkeypatch.setattr(hwsim.evaluate, "_hold", noted)
    return names


def test_only_what_changed_is_computed(passes_run: list[str]) -> None:
    evaluator = Evaluator()
    evaluator.evaluate(LAYERS, [BASE])
    assert sorted(passes_run) == ["a", "b", "c", "d", "fc"], "their maps differ"
    del passes_run[:]
    rates = [
        BASE.with_fields({name: AXES[name][0]}) for name in ("dram.gb_per_s", "clock_mhz", "technology.table")
    ]
    buffers = [
        BASE.with_fields({name: AXES[name][2]}) for name in ("activation_buffer.size_kib", "output.size_kib")
    ]
    evaluator.evaluate(LAYERS, rates + buffers)
    assert passes_run == []
    # another ratio in one layer
    changed = list(LAYERS)
    types = random_types(LAYERS[3].shape, (4, 4), 0.2, 0.3, np.random.default_rng(5))
    changed[3] = Layer(LAYERS[3].shape, (4, 4), types)
    found = evaluator.evaluate(changed, [BASE])
    assert passes_run == ["d"]
    assert assert_equal_to_simulate(changed, [BASE], found) == 1


def test_steps_do_not_depend_on_pass_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    schedule = hwsim.evaluate._Held.schedule

    def noted(self: hwsim.evaluate._Held, *arguments: Any) -> object:
        if self.executed is not None:
            made.append(self.layer.name)
        return schedule(self, *arguments)

    monkeypatch.setattr(hwsim.evaluate._Held, "schedule", noted)
    evaluator = Evaluator()
    evaluator.evaluate(LAYERS, [BASE])
    assert sorted(made) == ["a", "b", "c", "d", "fc"]
    names = (
        "front_end.skip_window",
        "front_end.queue_depth",
        "operand_store.banks",
        "weights.sign_port_bits",
    )
    machines = [BASE.with_fields({name: AXES[name][0]}) for name in names]
    found = evaluator.evaluate(LAYERS, machines)
    assert len(made) == 5
    assert assert_equal_to_simulate(LAYERS, machines, found) == 4


def test_layers_that_are_alike_are_one(passes_run: list[str]) -> None:
    twin = Layer(LAYERS[2].shape, (4, 4), LAYERS[1].types.copy())
    layers = [LAYERS[0], LAYERS[1], twin]
    found = Evaluator().evaluate(layers, [BASE])
    assert passes_run == ["a", "b"]
    assert assert_equal_to_simulate(layers, [BASE], found) == 1


def test_what_cannot_run_is_refused_as_by_simulate() -> None:
    with pytest.raises(InputError, match="none given"):
        Evaluator().evaluate([], [BASE])
    with pytest.raises(InputError, match="names used twice"):
        Evaluator().evaluate([LAYERS[0], LAYERS[0]], [BASE])
    with pytest.raises(InputError, match="does not divide"):
        Evaluator().evaluate(LAYERS, [BASE.with_fields({"array.block": [8, 8]})])


# Caches by a part of the machine: what they leave out must not matter.
RATES = {
    "name": "other",
    "clock_mhz": 123.0,
    "dram.gb_per_s": 1.0,
    "dram.burst_bytes": 8,
    "dram.pj_per_bit": 3.0,
}
SIZES = {
    "activation_buffer.size_kib": 1.0,
    "operand_store.size_kib": 7.0,
    "output.size_kib": 3.0,
    "weights.type_kib": 9.0,
    "weights.sign_kib": 9.0,
    "weights.magnitude_kib": 9.0,
    "weights.dense_kib": 9.0,
}


@pytest.mark.parametrize(
    "fields", [{}, {"features.unified_path": False}, {"array.rows": 5}, {"output.words_per_cycle": 7}]
)
@pytest.mark.parametrize("table", ["45nm-horowitz", "22nm-aladdin"])
def test_what_is_kept_depends_on_nothing_else(fields: dict[str, object], table: str) -> None:
    technology = load_technology(table)
    machine = BASE.with_fields(fields)
    rates, sizes = machine.with_fields(RATES), machine.with_fields(RATES | SIZES)
    for function in (_logic, _logic_mm2, _cells_um2, array_geometry, _energy_without_memories):
        mine, its = (function.__wrapped__(each, technology) for each in (machine, sizes))  # type: ignore[attr-defined]
        np.testing.assert_equal(mine, its)
    for function in (built_memories, _energy_without_rates, machine_area):
        plain = getattr(function, "__wrapped__", function)
        np.testing.assert_equal(plain(machine, technology), plain(rates, technology))


RATE = st.one_of(
    st.integers(1, 10**12).map(lambda millionths: millionths / 1e6),
    st.sampled_from([2.0**-19, 0.000001, 1e6, 0.1, 1 + 2.0**-12]),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(RATE, RATE, st.integers(1, 65536)), min_size=1, max_size=8))
def test_channels_at_once_are_those_one_by_one(rates: list[tuple[float, float, int]]) -> None:
    clock, bandwidth, burst = (np.array(column) for column in zip(*rates, strict=True))
    found = dram_channels(clock, bandwidth, burst)
    assert found.tolist() == [list(dram_channel(*each)) for each in rates]
