"""The comparison as a whole: rows that are the simulator's own, what is equal, sums, bounds, views, and wrong input."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

from compress.zoo_shapes import zoo_shapes
from hwsim.comparison import BASELINES, Comparison, compare
from hwsim.comparison.bitmap import bitmap_array
from hwsim.comparison.structured import structured_array
from hwsim.errors import FitError, InputError
from hwsim.layer import Layer, LayerShape, random_layers
from hwsim.machine import Machine, load_machine
from hwsim.simulator import simulate
from hwsim.technology import load_technology
from tests.hwsim.strategies import layers_on_machines

MACHINE = load_machine("msa-16x16")
TECHNOLOGY = load_technology("45nm-horowitz")
SYSTOLIC = ["ws", "ws-overlap", "os", "os-overlap"]


def network(name: str, pruned: float, unified: float, seed: int = 0) -> list[Layer]:
    return random_layers(zoo_shapes(name), (4, 4), pruned, unified, seed)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(MACHINE, network("resnet20", 0.75, 0.25), network="resnet20")


def row(found: Comparison, machine: str, sizing: str = "equal area") -> pd.Series:
    table = found.machines.set_index(["sizing", "machine"])
    return table.loc[(sizing, machine)]


def test_every_machine_is_there_at_both_sizes(found: Comparison) -> None:
    for sizing in ("equal multipliers", "equal area"):
        names = found.machines.loc[found.machines["sizing"] == sizing, "machine"].tolist()
        assert names == ["block-skip", *BASELINES]
    assert found.warnings == ()


def test_block_machines_are_what_simulate_reports(found: Comparison) -> None:
    report = simulate(MACHINE, network("resnet20", 0.75, 0.25))
    ours = row(found, "block-skip")
    for mine, its in {
        "compute_cycles": "compute_cycles",
        "latency_cycles": "latency_cycles",
        "latency_ms": "latency_ms",
        "dram_bytes": "dram_bytes",
        "storage_bytes": "image_bytes",
        "area_mm2": "area_mm2",
    }.items():
        assert ours[mine] == pytest.approx(report.summary[its], rel=1e-12)
    assert ours["energy_pj"] == pytest.approx(report.summary["energy_pj"])
    assert row(found, "dense")["latency_cycles"] == report.summary["equal_area_latency_cycles"]
    assert row(found, "dense")["area_mm2"] == pytest.approx(report.summary["equal_area_dense_area_mm2"])


def test_what_is_said_to_be_equal_is(found: Comparison) -> None:
    same = found.machines.query("sizing == 'equal multipliers'")
    assert (same["multipliers"] == 1024).all()
    area = row(found, "block-skip")["area_mm2"]
    within = found.machines.query("sizing == 'equal area'")
    assert (within["area_mm2"] <= area).all()
    assert (within["area_mm2"] > 0.9 * area).all()
    kept = found.machines.set_index("machine")["kept_share"]
    assert (kept["bitmap"] == kept["block-skip"].iloc[0]).all()
    assert kept["channels"].to_numpy() == pytest.approx(kept["block-skip"].iloc[0], rel=0.02)
    assert (kept[["dense", *SYSTOLIC]] == 1).all()
    assert kept[["2:4", "2:4-ws"]].to_numpy() == pytest.approx(0.5, abs=0.01)


def test_one_more_row_or_cluster_has_no_room(found: Comparison) -> None:
    budget = row(found, "block-skip")["area_mm2"]
    rows = int(row(found, "2:4")["array"].split("x")[0])
    assert structured_array(MACHINE, TECHNOLOGY, rows + 1).area_mm2(TECHNOLOGY) > budget
    kept = row(found, "block-skip")["kept_share"]
    clusters = int(row(found, "bitmap")["array"].split("x")[1])
    areas = [
        bitmap_array(MACHINE, TECHNOLOGY, clusters + 1, kept, chunk=chunk).area_mm2(TECHNOLOGY)
        for chunk in (32, 64, 128)
    ]
    assert max(areas) > budget


def test_layers_and_parts_sum_to_the_network(found: Comparison) -> None:
    names = ["products", "compute_cycles", "latency_cycles", "overlap_bound_cycles", "dram_bytes"]
    names += ["storage_bytes", "energy_pj"]
    sums = found.layers.groupby(["sizing", "machine"])[names].sum()
    totals = found.machines.set_index(["sizing", "machine"])[names]
    pd.testing.assert_frame_equal(sums.sort_index(), totals.sort_index(), check_dtype=False)
    for table in (found.layers, found.machines):
        parts = [name for name in table if name.endswith("_pj") and name != "energy_pj"]
        assert len(parts) == 6
        assert table[parts].sum(axis=1).to_numpy() == pytest.approx(table["energy_pj"].to_numpy())
        assert (table[parts] >= 0).all().all()


def test_every_latency_lies_between_its_bounds(found: Comparison) -> None:
    table = found.layers
    assert (table["latency_cycles"] >= table["overlap_bound_cycles"]).all()
    assert (table["overlap_bound_cycles"] >= table["compute_cycles"]).all()
    channel = np.ceil(table["dram_bytes"] / 12.8)
    assert (table["latency_cycles"] <= table["compute_cycles"] * 1.5 + channel + 10_000).all()


def test_no_array_does_more_products_than_its_multipliers_can(found: Comparison) -> None:
    table = found.layers.merge(found.machines[["sizing", "machine", "multipliers"]])
    others = table[
        table["machine"] != "block-skip"
    ]  # its sign adders do a product's work without a multiplier
    assert (others["compute_cycles"] * others["multipliers"] >= others["products"]).all()


def test_a_network_that_is_not_pruned_is_dense_everywhere() -> None:
    found = compare(MACHINE, network("lenet5", 0.0, 0.0), baselines=["dense", "2:4", "channels", "bitmap"])
    assert (found.machines["kept_share"] == 1).all()
    for sizing in ("equal multipliers", "equal area"):
        dense, channels = row(found, "dense", sizing), row(found, "channels", sizing)
        assert dense["latency_cycles"] == channels["latency_cycles"]
    assert (
        row(found, "2:4", "equal multipliers")["compute_cycles"]
        == row(found, "dense", "equal multipliers")["compute_cycles"]
    )


def test_more_pruning_never_costs_a_machine_more() -> None:
    names = ["channels", "channels-ws", "bitmap"]
    tables = [
        compare(MACHINE, network("resnet20", p, round(1 - p, 1)), baselines=names).machines
        for p in (0.3, 0.6, 0.9)
    ]
    for column in ("latency_cycles", "dram_bytes", "storage_bytes", "energy_pj"):
        by_machine = np.stack([table[column].to_numpy() for table in tables])[:, 1:]
        of_pruned = by_machine[:, [name != "block-skip" for name in tables[0]["machine"][1:]]]
        assert (np.diff(of_pruned, axis=0) < 0).all()


def test_the_same_seed_gives_the_same_numbers_and_the_source_is_named() -> None:
    layers = network("lenet5", 0.5, 0.5)
    first, again = (compare(MACHINE, layers, baselines=["bitmap"], seed=3) for _ in "ab")
    pd.testing.assert_frame_equal(first.machines, again.machines)
    assert "at random (seed 3)" in str(first)
    weights = {
        layer.name: np.random.default_rng(0).standard_normal(
            (layer.shape.groups, layer.shape.m, layer.shape.k)
        )
        for layer in layers
    }
    by_magnitude = compare(MACHINE, layers, baselines=["bitmap"], weights=weights)
    assert "by magnitude of the dense weights" in str(by_magnitude)
    assert by_magnitude.machines["kept_share"].tolist() == first.machines["kept_share"].tolist()


def test_views(found: Comparison) -> None:
    text = str(found)
    assert "not accuracy" in text
    for name in BASELINES:
        assert f"\n{name} " in text
    assert max(len(line) for line in text.splitlines() if line[:1].islower()) <= 100
    assert found._repr_html_().count("<tr") == 1 + 2 * (1 + len(BASELINES))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["machines"][0]["machine"] == "block-skip"
    assert data["provenance"]["machine"]["name"] == "msa-16x16"
    assert len(data["layers"]) == len(found.layers)


def test_progress_is_told_before_each_machine() -> None:
    told: list[tuple[str, int, int]] = []
    compare(
        MACHINE,
        network("lenet5", 0.5, 0.5),
        baselines=["dense", "2:4"],
        progress=lambda *now: told.append(now),
    )
    assert [now[1:] for now in told] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert told[1][0] == "2:4 at equal multipliers"


def test_memories_of_one_byte_have_no_half() -> None:
    byte = 1 / 1024
    sizes = ("activation_buffer.size_kib", "operand_store.size_kib", "output.size_kib", "weights.dense_kib")
    fields = {"array.rows": 1, "array.columns": 1, "array.block": [1, 1], "precision.activation_bits": 2}
    fields |= {"precision.weight_bits": 2, "operand_store.banks": 1, **dict.fromkeys(sizes, byte)}
    machine = load_machine("msa-8x8").with_fields(fields)
    shape = LayerShape("layer", "conv", 4, 2, (1,), (1,), (1,), ((0, 0),), (1,), groups=2, batch=2)
    found = compare(machine, [Layer(shape, (1, 1), np.full((2, 1, 2), 2, np.uint8), None)])
    assert {"ws", "os"} <= set(found.machines["machine"])


@settings(deadline=None, max_examples=15)
@given(layers_on_machines())
def test_any_layer_on_any_machine(case: tuple[Layer, Machine]) -> None:
    """Machines whose memories hold next to nothing: a baseline runs within its bounds, or is left out with a reason."""
    layer, machine = case
    try:
        found = compare(machine, [layer])
    except FitError:
        return
    assert (found.layers["latency_cycles"] >= found.layers["overlap_bound_cycles"]).all()
    assert len(found.machines) + len(found.warnings) >= 2 * (1 + len(BASELINES))
    same_area = found.machines[found.machines["sizing"] == "equal area"]
    assert (same_area["area_mm2"] <= row(found, "block-skip")["area_mm2"] * (1 + 1e-9)).all()
    energies = [name for name in found.machines if name.endswith("_pj")]
    assert (found.machines[energies] >= 0).all().all()


def test_another_machine_and_technology() -> None:
    machine = load_machine("msa-8x8").with_fields({"technology.table": "22nm-aladdin"})
    found = compare(machine, network("lenet5", 0.5, 0.5))
    assert (found.machines.query("sizing == 'equal multipliers'")["multipliers"] == 256).all()
    assert found.warnings == ()


def test_a_machine_that_cannot_run_the_network_is_left_out_with_a_reason() -> None:
    """Half the output buffer holds 64 channels of 16 positions, a column tile, but not 64 of 32, one of 32 clusters."""
    machine = MACHINE.with_fields({"output.size_kib": 2, "output.words_per_cycle": 16})
    shape = LayerShape("conv", "conv", 64, 64, (1, 32), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    layers = random_layers([shape], (4, 4), 0.5, 0.5, 0, exempt_first_last=False)
    found = compare(machine, layers, baselines=["bitmap", "ws"])
    assert "bitmap" not in found.machines["machine"].tolist()
    assert any("output.size_kib" in text and text.startswith("bitmap") for text in found.warnings)
    assert "warning: bitmap" in str(found)


def test_no_room_for_the_smallest_array_is_a_warning() -> None:
    """On a machine of one PE the buffers alone are the area; a systolic array's ports make them larger."""
    machine = MACHINE.with_fields({"array.rows": 1, "array.columns": 1, "operand_store.banks": 1})
    machine = machine.with_fields({"operand_store.size_kib": 1, "weights.sign_kib": 1, "weights.type_kib": 1})
    machine = machine.with_fields({"weights.magnitude_kib": 1})
    layers = random_layers([LayerShape("fc", "linear", 64, 64)], (4, 4), 0.5, 0.5, 0, exempt_first_last=False)
    found = compare(machine, layers, baselines=["bitmap"])
    assert found.machines.query("sizing == 'equal area'")["machine"].tolist() == ["block-skip"]
    assert found.warnings == ("bitmap at equal area: not even the smallest array has room",)


# --- wrong input


def test_unknown_names_are_all_reported_with_the_nearest() -> None:
    with pytest.raises(InputError) as error:
        compare(MACHINE, network("lenet5", 0.5, 0.5), baselines=["bitmaps", "ws", "2:5"])
    assert len(error.value.problems) == 2
    assert 'did you mean "bitmap"' in str(error.value)
    assert 'did you mean "2:4"' in str(error.value)


def test_wrong_layers_and_weights_are_refused() -> None:
    layers = network("lenet5", 0.5, 0.5)
    with pytest.raises(InputError, match="none given"):
        compare(MACHINE, [])
    with pytest.raises(InputError, match="names used twice"):
        compare(MACHINE, [layers[0], layers[0]])
    with pytest.raises(InputError) as error:
        compare(MACHINE, layers, weights={layers[0].name: np.zeros((1, 20, 25))})
    assert len(error.value.problems) == len(layers) - 1
    with pytest.raises(InputError, match="no such preset"):
        compare("msa-16x61", layers)


def test_a_network_that_does_not_fit_the_block_machine_is_an_error() -> None:
    machine = MACHINE.with_fields({"activation_buffer.size_kib": 0.125})
    with pytest.raises(FitError, match="activation_buffer"):
        compare(machine, random_layers([LayerShape("fc", "linear", 800, 64)], (4, 4), 0.5, 0.5, 0))
