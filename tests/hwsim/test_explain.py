"""Where the cycles went: the parts add up exactly, the bounds are bounds, and every piece of advice was simulated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from hwsim.errors import FitError, InputError
from hwsim.explain import (
    BOUNDS,
    PARTS,
    Explanation,
    Lever,
    explain,
    layer_bounds,
    layer_parts,
    machine_levers,
)
from hwsim.layer import DENSE, PRUNED, UNIFIED, Layer, LayerShape, random_types
from hwsim.lowering import occupancy
from hwsim.machine import Machine, load_machine, preset_names
from hwsim.simulator import run_layer, simulate
from tests.hwsim.strategies import layers_on_machines

FC = LayerShape("fc", "linear", in_channels=96, out_channels=70, input_size=(5,))
CONV = LayerShape("conv", "conv", 6, 10, (9, 7), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.fixture(scope="module")
def machine() -> Machine:
    return load_machine("msa-8x8")


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    rng = np.random.default_rng(1)
    return [Layer(shape, (4, 4), random_types(shape, (4, 4), 0.4, 0.4, rng)) for shape in (CONV, FC)]


@pytest.fixture(scope="module")
def found(machine: Machine, layers: list[Layer]) -> Explanation:
    return explain(machine, layers, network="two")


def work_by_loops(layer: Layer, machine: Machine) -> tuple[int, int]:
    """``(PE-cycles, PE-cycles × real weights)`` of a layer at the native block, block by block, column by column."""
    shape, (g_o, g_k) = layer.shape, machine.array.block
    unified, dense = occupancy(machine)
    features = machine.features
    occupied = real = 0
    for group in layer.types:
        for i, row in enumerate(group):
            for j, code in enumerate(row):
                if code == PRUNED and features.skip_pruned:
                    continue
                cycles = unified if code == UNIFIED and features.unified_path else dense
                weights = min(g_o, shape.m - i * g_o) * min(g_k, shape.k - j * g_k)
                occupied += cycles * shape.n
                real += cycles * weights * shape.n
    return occupied, real


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(layers_on_machines())
def test_parts_sum_to_the_latency_and_bounds_hold(case: tuple[Layer, Machine]) -> None:
    layer, machine = case
    try:
        run = run_layer(layer, machine)
    except FitError:
        assume(False)
    parts, bounds = layer_parts(run, machine), layer_bounds(run, machine)
    array = machine.array
    lanes = array.rows * array.columns * array.block[0] * array.block[1]
    latency = run.mapping.latency_cycles
    assert list(parts) == list(PARTS)
    assert all(isinstance(count, int) for count in parts.values())
    assert sum(parts.values()) == latency * lanes
    assert min(parts.values()) >= 0
    assert list(bounds) == list(BOUNDS)
    assert max(bounds.values()) <= latency
    assert parts["work"] <= bounds["array"] * lanes
    occupied, real = work_by_loops(run.layer, machine)
    assert parts["work"] == real
    assert parts["work"] + parts["padding"] == occupied * array.block[0] * array.block[1]


@pytest.mark.parametrize("name", preset_names())
def test_a_perfect_layer_loses_only_what_the_contract_says(name: str) -> None:
    """Full tiles of equal dense rows: Kb·occ + 3 cycles a pass, three of them to fetch and hand over."""
    machine = load_machine(name)
    array = machine.array
    shape = LayerShape("fc", "linear", array.block[1] * 12, array.block[0] * array.rows, (array.columns,))
    layer = Layer(shape, array.block, np.full((1, array.rows, 12), DENSE, np.uint8))
    parts = layer_parts(run_layer(layer, machine), machine)
    lanes = array.rows * array.columns * array.block[0] * array.block[1]
    _, dense = occupancy(machine)
    assert parts["work"] == 12 * dense * lanes
    assert parts["padding"] == parts["idle_columns"] == parts["missing_rows"] == parts["imbalance"] == 0
    assert parts["starved"] + parts["conflict"] + parts["handover"] == 3 * lanes


def test_rows_and_columns_that_the_layer_lacks_are_named() -> None:
    machine = load_machine("msa-16x16")
    types = np.full((1, 1, 12), DENSE, np.uint8)
    one = Layer(LayerShape("one", "linear", 48, 4), (4, 4), types)
    parts = layer_parts(run_layer(one, machine), machine)
    lanes_of_a_row = 16 * 16
    cycles = run_layer(one, machine).totals["cycles"]
    assert parts["missing_rows"] == 15 * cycles * lanes_of_a_row
    assert parts["idle_columns"] == 15 * parts["work"]
    assert parts["padding"] == 0
    ragged = Layer(LayerShape("ragged", "linear", 45, 3), (4, 4), types)
    parts = layer_parts(run_layer(ragged, machine), machine)
    assert parts["work"] + parts["padding"] == 12 * occupancy(machine)[1] * 16
    assert parts["work"] == occupancy(machine)[1] * (11 * 12 + 3)


def test_tables_agree_with_the_report(machine: Machine, layers: list[Layer], found: Explanation) -> None:
    report = simulate(machine, layers)
    assert found.layers["latency_cycles"].tolist() == report.layers["latency_cycles"].tolist()
    assert found.totals["cycles"].sum() == pytest.approx(report.summary["latency_cycles"], rel=1e-12)
    assert found.totals["share"].sum() == pytest.approx(1)
    for bound, parts in {"fill": "fill", "drain": "drain", "weights": "dram_weights"}.items():
        assert found.layers[parts].tolist() == report.layers[f"{bound}_bound_cycles"].tolist()


def test_advice_is_what_the_changed_machine_takes(
    machine: Machine, layers: list[Layer], found: Explanation
) -> None:
    before = simulate(machine, layers).summary
    rows = found.levers.set_index("lever")
    assert set(rows.index) == {lever.name for lever in machine_levers(machine)}
    assert found.levers["saved_cycles"].is_monotonic_decreasing
    for lever in machine_levers(machine):
        if lever.batch == 1:
            after = simulate(machine.with_fields(dict(lever.changes)), layers).summary
            assert rows.loc[lever.name, "latency_cycles"] == after["latency_cycles"]
            assert rows.loc[lever.name, "saved_cycles"] == before["latency_cycles"] - after["latency_cycles"]
            assert rows.loc[lever.name, "area_mm2_added"] == pytest.approx(
                after["area_mm2"] - before["area_mm2"]
            )
    batched = [replace(layer, shape=replace(layer.shape, batch=8)) for layer in layers]
    assert rows.loc["inputs in batches, per input", "latency_cycles"] == (
        simulate(machine, batched).summary["latency_cycles"] / 8
    )
    assert rows.loc["twice the DRAM bandwidth", "change"] == "gb_per_s 6.4 → 12.8"


def test_one_layer_by_its_name(machine: Machine, layers: list[Layer]) -> None:
    alone = explain(machine, layers, network="two", layer="fc")
    assert alone.layers["layer"].tolist() == ["fc"]
    assert alone.sentences()[0].startswith("fc on msa-8x8: ")
    with pytest.raises(InputError, match='did you mean "conv"'):
        explain(machine, layers, layer="cnv")


def test_a_change_that_is_not_possible_says_why(machine: Machine, layers: list[Layer]) -> None:
    levers = [
        Lever("too many banks", {"operand_store.banks": 5000}),
        Lever("a tiny output buffer", {"output.size_kib": 0.001953125}),
        Lever("the same", {"operand_store.banks": machine.operand_store.banks}),
    ]
    found = explain(machine, layers, levers=levers)
    rows = found.levers.set_index("lever")
    assert "operand_store.banks" in rows.loc["too many banks", "note"]
    assert "output.size_kib" in rows.loc["a tiny output buffer", "note"]
    assert rows.loc["the same", "saved_cycles"] == 0
    assert "Not possible: too many banks." in str(found)
    assert found.sentences()[-1] == "None of the changes of the machine that were simulated saves a cycle."
    assert "nan" not in str(found)


def test_the_advice_in_words_is_of_the_machine_and_batches_stand_apart(found: Explanation) -> None:
    changes = found.levers[found.levers["batch"] == 1]
    *_, advice, batch = found.sentences()
    assert advice.startswith(f"What helps most: {changes.iloc[0]['lever']} (")
    assert f"saves {changes.iloc[0]['saved_cycles']:,.0f} cycles" in advice
    assert batch.startswith("8 inputs at a time take ")


def test_shown_as_text_and_html(found: Explanation) -> None:
    text, page = str(found), found._repr_html_()
    for name in ("conv", "fc", "work on real weights", "twice the DRAM bandwidth", "lower bound"):
        assert name in text
        assert name in page
    assert max(len(line) for line in text.splitlines()[6:]) <= 110
