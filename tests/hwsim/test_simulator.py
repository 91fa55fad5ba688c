"""`simulate`: sums of a report, baselines, refinement, warnings, refusals, and golden numbers of a small network.

``python tests/hwsim/test_simulator.py --regenerate`` computes the golden numbers anew, writes them beside this file and
prints what has changed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hwsim import Layer, LayerShape, Machine, Report, load_machine, simulate
from hwsim.area import machine_area
from hwsim.energy import ENERGY_COMPONENTS
from hwsim.errors import FitError, InputError
from hwsim.image import PARTS, memory_image
from hwsim.layer import DENSE, PRUNED, UNIFIED, QuantizedWeights, random_types
from hwsim.simulator import layer_accumulator_bits, run_layer
from hwsim.technology import load_technology
from hwsim.version import MODEL_VERSION

GOLDEN = Path(__file__).with_name("golden_small_network.json")
COMMAND = "python tests/hwsim/test_simulator.py --regenerate"


def linear(name: str, outputs: int, inputs: int, *leading: int) -> LayerShape:
    return LayerShape(name, "linear", in_channels=inputs, out_channels=outputs, input_size=leading)


def conv(
    name: str, c_in: int, c_out: int, size: int, kernel: int, stride: int = 1, groups: int = 1
) -> LayerShape:
    half = kernel // 2
    return LayerShape(
        name,
        "conv",
        in_channels=c_in,
        out_channels=c_out,
        input_size=(size, size),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=((half, half), (half, half)),
        dilation=(1, 1),
        groups=groups,
    )


def small_network(block: tuple[int, int] = (4, 4), seed: int = 2024) -> list[Layer]:
    """Four layers: a strided and a grouped convolution, two linear ones with ragged edges; the first is all DENSE."""
    shapes = [
        (conv("conv1", 3, 18, 28, 5, stride=2), (0.0, 0.0)),
        (conv("conv2", 18, 32, 14, 3, groups=2), (0.5, 0.3)),
        (linear("fc1", 150, 1568, 2), (0.75, 0.25)),
        (linear("fc2", 10, 150, 2), (0.0, 1.0)),
    ]
    rng = np.random.default_rng(seed)
    return [Layer(shape, block, random_types(shape, block, p, u, rng)) for shape, (p, u) in shapes]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return load_machine("msa-16x16")


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return small_network()


@pytest.fixture(scope="module")
def report(machine: Machine, layers: list[Layer]) -> Report:
    return simulate(machine, layers, network="small")


# ---------------------------------------------------------------- sums


def test_summary_is_the_sum_of_the_layers(report: Report, layers: list[Layer]) -> None:
    table, summary = report.layers, report.summary
    assert table["layer"].tolist() == [layer.name for layer in layers]
    for name in (
        "macs",
        "weight_count",
        "passes",
        "compute_cycles",
        "latency_cycles",
        "dram_bytes",
        "image_bytes",
    ):
        assert summary[name] == table[name].sum()
    assert summary["macs"] == sum(layer.shape.macs for layer in layers)
    assert summary["weight_count"] == sum(layer.shape.weight_count for layer in layers)
    assert summary["energy_pj"] == pytest.approx(table["energy_pj"].sum())
    for way, slow, fast in (
        ("compute_only", "dense_compute_cycles", "compute_cycles"),
        ("with_memory", "dense_latency_cycles", "latency_cycles"),
        ("equal_area", "equal_area_latency_cycles", "latency_cycles"),
    ):
        assert summary[f"speedup_{way}"] == pytest.approx(table[slow].sum() / table[fast].sum())
        np.testing.assert_allclose(table[f"speedup_{way}"], table[slow] / table[fast])
    assert summary["latency_ms"] == pytest.approx(summary["latency_cycles"] / 1e6)  # 1 GHz
    assert summary["bits_per_weight"] == pytest.approx(8 * summary["image_bytes"] / summary["weight_count"])
    assert summary["fp32_bytes"] == 4 * summary["int8_bytes"] == 4 * summary["weight_count"]


def test_row_cycles_add_up(report: Report) -> None:
    table = report.layers
    classes = [name for name in table if str(name).endswith("_row_cycles")]
    assert len(classes) == 6
    assert (table[classes].sum(axis=1) == 16 * table["compute_cycles"]).all()
    np.testing.assert_allclose(
        table["pe_utilization"], table["busy_row_cycles"] / (16 * table["compute_cycles"])
    )
    bounds = [name for name in table if str(name).endswith("_bound_cycles")]
    assert (table[bounds].sum(axis=1) == table["latency_cycles"]).all()


def test_traffic_adds_up(report: Report) -> None:
    table = report.layers
    parts = table["dram_weight_bytes"] + table["dram_input_bytes"] + table["dram_output_bytes"]
    assert (parts == table["dram_bytes"]).all()
    assert (table["dram_bytes"] % 64 == 0).all()


def test_energy_and_storage_tables_add_up(report: Report, machine: Machine) -> None:
    energy = report.energy.groupby("layer", sort=False)["energy_pj"].sum()
    np.testing.assert_allclose(energy, report.layers["energy_pj"])
    assert report.energy["component"].tolist() == list(ENERGY_COMPONENTS) * 4
    dram = report.energy[report.energy["component"] == "dram"]["energy_pj"].to_numpy()
    np.testing.assert_allclose(dram, report.layers["dram_bytes"] * 8 * machine.dram.pj_per_bit)
    storage = report.storage.groupby("layer", sort=False)["size_bits"].sum()
    assert storage.tolist() == (8 * report.layers["image_bytes"]).tolist()
    assert report.storage["stream"].tolist() == list(PARTS) * 4
    area = machine_area(machine, load_technology(machine.technology.table))
    assert dict(report.area.itertuples(index=False)) == area
    assert report.summary["area_mm2"] == pytest.approx(sum(area.values()))
    assert report.summary["equal_area_dense_area_mm2"] <= report.summary["area_mm2"]


def test_blocks_are_counted_as_the_layer_has_them(report: Report, layers: list[Layer]) -> None:
    for row, layer in zip(report.layers.to_dict("records"), layers, strict=True):
        for name, code in (("pruned", PRUNED), ("unified", UNIFIED), ("dense", DENSE)):
            assert row[f"{name}_blocks"] == (layer.types == code).sum()


def test_a_layer_is_the_same_in_any_company(report: Report, machine: Machine, layers: list[Layer]) -> None:
    backwards = simulate(machine, layers[::-1]).layers.iloc[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(backwards, report.layers)
    for index, layer in enumerate(layers):
        alone = simulate(machine, [layer]).layers
        pd.testing.assert_frame_equal(alone, report.layers.iloc[[index]].reset_index(drop=True))


def test_a_preset_a_file_and_a_machine_are_the_same(
    report: Report, machine: Machine, layers: list[Layer]
) -> None:
    again = simulate("msa-16x16", layers, network="small")
    assert again.to_dict() == report.to_dict()


def test_report_as_json_and_text(report: Report) -> None:
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["provenance"]["versions"]["model"] == MODEL_VERSION
    assert data["provenance"]["machine"]["array"]["rows"] == 16
    assert len(data["layers"]) == 4
    text = str(report)
    assert text.startswith("small on msa-16x16: ")
    for way in ("compute only", "with memory", "at equal area"):
        assert way in text
    assert "fc1" in report._repr_html_()


# ---------------------------------------------------------------- baselines


def all_dense(layer: Layer) -> Layer:
    return replace(layer, types=np.full_like(layer.types, DENSE))


def test_dense_baseline_is_the_dense_machine_run_in_full(report: Report, layers: list[Layer]) -> None:
    """Baselines take a short cut (one row for all); here all-DENSE types go through the machine with its features on.

    Passes are the same; latency and traffic are not, because a machine with features loads type codes.
    """
    off = {"features.skip_pruned": False, "features.unified_path": False}
    for index, layer in enumerate(layers):
        machine = report.machine
        explicit = run_layer(all_dense(layer), machine)
        row = report.layers.iloc[index]
        assert row["dense_compute_cycles"] == explicit.totals["cycles"]
        features_off = run_layer(layer, machine.with_fields(off))
        assert features_off.totals == explicit.totals | {
            name: features_off.totals[name] for name in ("scanned", "examined")
        }
        assert row["dense_latency_cycles"] == features_off.mapping.latency_cycles
        assert row["dense_dram_bytes"] == features_off.mapping.traffic_bytes


def test_a_dense_machine_is_its_own_baseline(machine: Machine, layers: list[Layer]) -> None:
    off = machine.with_fields({"features.skip_pruned": False, "features.unified_path": False})
    summary = simulate(off, layers).summary
    for way in ("compute_only", "with_memory", "equal_area"):
        assert summary[f"speedup_{way}"] == 1
    assert summary["energy_saving"] == 1
    assert summary["equal_area_dense_rows"] == 16


def test_equal_area_machine_is_dense_taller_and_no_larger(report: Report, layers: list[Layer]) -> None:
    dense = report.equal_area_machine
    assert dense.is_dense
    assert dense.array.rows > report.machine.array.rows
    assert (dense.array.columns, dense.array.block) == (16, (4, 4))
    technology = load_technology(dense.technology.table)
    assert sum(machine_area(dense, technology).values()) <= report.summary["area_mm2"]
    rows = [run_layer(layer, dense).mapping.latency_cycles for layer in layers]
    assert report.layers["equal_area_latency_cycles"].tolist() == rows


def test_the_dense_baselines_of_a_sorted_machine_keep_no_row_order(
    machine: Machine, layers: list[Layer]
) -> None:
    """Dense rows are all alike: there is nothing to sort, and no order to load."""
    plain = simulate(machine, layers).layers
    balanced = simulate(machine.with_fields({"features.row_balance": "sorted"}), layers).layers
    for name in ("dense_latency_cycles", "dense_dram_bytes", "equal_area_latency_cycles"):
        assert balanced[name].tolist() == plain[name].tolist()


def test_a_dense_baseline_that_does_not_fit_leaves_no_number(machine: Machine) -> None:
    """64 channels x 16 positions just fit half of 2 KiB; the equal-area machine's taller row tiles do not."""
    tight = machine.with_fields({"output.size_kib": 2})
    shape = conv("conv", 8, 128, 16, 1)
    report = simulate(tight, [Layer(shape, (4, 4), np.ones((1, *shape.blocks((4, 4))), np.uint8))])
    [warning] = report.warnings
    assert "the dense baseline cannot run this network" in warning
    assert math.isnan(report.summary["speedup_equal_area"])
    assert report.to_dict()["summary"]["speedup_equal_area"] is None
    assert report.summary["speedup_with_memory"] > 1


@pytest.mark.parametrize("feature", ["skip_pruned", "unified_path"])
def test_a_feature_that_is_off_costs_time(machine: Machine, layers: list[Layer], feature: str) -> None:
    layer = layers[1]
    with_it = run_layer(layer, machine)
    without = run_layer(layer, machine.with_fields({f"features.{feature}": False}))
    code = PRUNED if feature == "skip_pruned" else UNIFIED
    converted = replace(layer, types=np.where(layer.types == code, DENSE, layer.types).astype(np.uint8))
    assert without.totals == run_layer(converted, machine).totals
    assert without.totals["cycles"] > with_it.totals["cycles"]


# ---------------------------------------------------------------- refinement


def test_coarse_blocks_run_as_native_ones(machine: Machine) -> None:
    """8 x 8 blocks on the 4 x 4 array equal the refined types given directly, ragged edges included."""
    shape = linear("fc", 90, 107, 3)
    coarse = Layer(shape, (8, 8), random_types(shape, (8, 8), 0.4, 0.4, np.random.default_rng(1)))
    types = np.kron(coarse.types[0], np.ones((2, 2), np.uint8))[None, :23, :27]
    fine = Layer(shape, (4, 4), np.ascontiguousarray(types))
    first, second = simulate(machine, [coarse]), simulate(machine, [fine])
    pd.testing.assert_frame_equal(first.layers, second.layers)
    pd.testing.assert_frame_equal(first.energy, second.energy)
    pd.testing.assert_frame_equal(first.storage, second.storage)


@pytest.mark.parametrize("block", [(2, 4), (4, 6), (1, 16), (6, 8)])
def test_blocks_that_do_not_divide_are_refused(machine: Machine, block: tuple[int, int]) -> None:
    shape = linear("fc", 48, 48)
    layer = Layer(shape, block, random_types(shape, block, 0.5, 0.5, np.random.default_rng(0)))
    with pytest.raises(InputError, match=f"layer fc: block: compressed with blocks {block[0]}x{block[1]}"):
        simulate(machine, [layer])


# ---------------------------------------------------------------- refusals and warnings


def test_no_layers_and_layers_of_one_name_are_refused(machine: Machine, layers: list[Layer]) -> None:
    with pytest.raises(InputError, match="none given"):
        simulate(machine, [])
    with pytest.raises(InputError, match="names used twice: conv1, fc2"):
        simulate(machine, [layers[0], layers[3], layers[0], layers[3], layers[1]])


def test_unknown_machines_and_tables_are_refused(machine: Machine, layers: list[Layer]) -> None:
    with pytest.raises(InputError, match="msa-16x16"):
        simulate("msa-16x17", layers)
    with pytest.raises(InputError, match="45nm-horowitz"):
        simulate(machine.with_fields({"technology.table": "45nm-horrowitz"}), layers)


def test_a_layer_that_does_not_fit_is_refused_by_name(machine: Machine, layers: list[Layer]) -> None:
    with pytest.raises(FitError, match="layer conv1 does not fit machine msa-16x16"):
        simulate(machine.with_fields({"output.size_kib": 0.25}), layers)


def test_a_pass_beyond_the_counters_is_refused(machine: Machine) -> None:
    shape = linear("fc", 1, 4 * 2**18 + 1)
    layer = Layer(shape, (4, 4), np.zeros((1, 1, 2**18 + 1), np.uint8))
    with pytest.raises(FitError, match="262,145 block columns"):
        simulate(machine, [layer])


def with_sum(total: int, shape: LayerShape) -> Layer:
    """One output channel whose weights' absolute values sum to ``total``."""
    count = -(-total // 127)
    values = np.full(shape.k, 0, np.int16)
    values[:count] = -127
    values[count - 1] = -(total - 127 * (count - 1))
    dense = np.zeros((1, shape.m, shape.k), np.int16)
    dense[0, -1] = values
    types = np.full((1, *shape.blocks((4, 4))), DENSE, np.uint8)
    empty = np.zeros((1, *shape.blocks((4, 4))), np.uint16)
    weights = QuantizedWeights(dense, np.zeros((1, shape.m, shape.k), np.uint8), empty, 8, 8, 1.0)
    return Layer(shape, (4, 4), types, weights)


@pytest.mark.parametrize("bits", [16, 18])
def test_overflow_is_warned_of_exactly_from_the_boundary(machine: Machine, bits: int) -> None:
    """With activations down to -128, Σ|w| · 128 may reach 2^(bits−1) − 1 but not 2^(bits−1)."""
    narrow = machine.with_fields({"precision.accumulator_bits": bits})
    shape = linear("fc", 6, 1200)
    limit = 2 ** (bits - 1) // 128
    below, at = with_sum(limit - 1, shape), with_sum(limit, shape)
    assert layer_accumulator_bits(below, 8) == bits
    assert layer_accumulator_bits(at, 8) == bits + 1
    assert simulate(narrow, [below]).warnings == ()
    [warning] = simulate(narrow, [at]).warnings
    assert f"layer fc can overflow: its worst sum needs {bits + 1} accumulator bits" in warning
    assert simulate(narrow, [at]).layers["accumulator_bits_needed"].tolist() == [bits + 1]


@pytest.mark.parametrize("field", ["weight_bits", "magnitude_bits"])
def test_weights_wider_than_the_machine_are_refused(machine: Machine, field: str) -> None:
    layer = with_sum(100, linear("fc", 4, 8))
    assert layer.weights is not None
    bits = getattr(layer.weights, field)
    simulate(machine.with_fields({f"precision.{field}": bits}), [layer])
    with pytest.raises(InputError, match=rf"{field}: the layer has {bits}, the machine {bits - 1}"):
        simulate(machine.with_fields({f"precision.{field}": bits - 1}), [layer])


def test_overflow_counts_unified_blocks_by_their_magnitude() -> None:
    shape = linear("fc", 4, 8)
    weights = QuantizedWeights(
        np.zeros((1, 4, 8), np.int16),
        np.ones((1, 4, 8), np.uint8),
        np.array([[[255, 255]]], np.uint16),
        8,
        8,
        1.0,
    )
    layer = Layer(shape, (4, 4), np.array([[[UNIFIED, UNIFIED]]], np.uint8), weights)
    assert layer_accumulator_bits(layer, 8) == (8 * 255 * 128).bit_length() + 1


def test_a_layer_of_types_only_is_not_warned_of(report: Report, layers: list[Layer]) -> None:
    assert report.warnings == ()
    assert layer_accumulator_bits(layers[0], 8) is None


def test_image_bytes_are_those_of_the_image(machine: Machine) -> None:
    layer = with_sum(5000, linear("fc", 10, 300))
    assert simulate(machine, [layer]).summary["image_bytes"] == len(memory_image(layer, machine))


# ---------------------------------------------------------------- golden numbers


def golden_values() -> dict[str, Any]:
    """What is recorded: each layer's integers, the network's energies and ratios, on three machines."""
    values: dict[str, Any] = {}
    base = load_machine("msa-16x16")
    small = {
        "array.rows": 4,
        "array.columns": 8,
        "activation_buffer.size_kib": 4,
        "operand_store.size_kib": 16,
        "weights.dense_kib": 8,
        "weights.sign_kib": 4,
        "output.size_kib": 1,
        "dram.gb_per_s": 3.2,
        "features.row_balance": "sorted",
        "front_end.queue_depth": 2,
        "operand_store.banks": 4,
    }
    machines = {
        "msa-16x16": base,
        "small-sorted": base.with_fields(small),
        "22nm": base.with_fields({"technology.table": "22nm-aladdin"}),
    }
    for name, machine in machines.items():
        report = simulate(machine, small_network())
        record: dict[str, Any] = {}
        for row in report.to_dict()["layers"]:
            record |= {f"{row['layer']}.{key}": row[key] for key in row if key != "layer"}
        record |= {f"summary.{key}": value for key, value in report.to_dict()["summary"].items()}
        values[name] = record
    return values


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each value that is new, gone or changed."""
    lines = []
    for machine in sorted(old.keys() | new.keys()):
        before, after = old.get(machine, {}), new.get(machine, {})
        for key in sorted(before.keys() | after.keys()):
            a, b = before.get(key), after.get(key)
            same = a == b
            if isinstance(a, float) and isinstance(b, float):
                same = math.isclose(a, b, rel_tol=1e-9)
            if not same:
                numbers = isinstance(a, int | float) and isinstance(b, int | float) and a
                change = f" ({100 * (b - a) / a:+.2f} %)" if numbers else ""
                lines.append(f"{machine}: {key}: {a} -> {b}{change}")
    return lines


def test_golden_numbers() -> None:
    recorded = json.loads(GOLDEN.read_text("utf-8"))
    assert recorded["provenance"]["command"] == COMMAND
    changed = differences(recorded["values"], golden_values())
    text = "\n".join(changed[:40])
    assert not changed, f"{len(changed)} values changed; if that is meant, run `{COMMAND}`:\n{text}"
    assert recorded["provenance"]["model_version"] == MODEL_VERSION


def test_golden_comparison_sees_changes() -> None:
    old = {"m": {"a": 100, "b": 1.0, "c": "x", "d": 5}}
    assert differences(old, {"m": {"a": 101, "b": 1.0 + 1e-12, "c": "y", "e": 6}}) == [
        "m: a: 100 -> 101 (+1.00 %)",
        "m: c: x -> y",
        "m: d: 5 -> None",
        "m: e: None -> 6",
    ]
    assert differences(old, {"m": {"a": 100, "b": 1.001, "c": "x", "d": 5}}) == [
        "m: b: 1.0 -> 1.001 (+0.10 %)"
    ]


def regenerate() -> list[str]:
    """Write the golden numbers anew; returns the differences from the recorded ones."""
    values = golden_values()
    old = json.loads(GOLDEN.read_text("utf-8"))["values"] if GOLDEN.exists() else {}
    provenance = {
        "command": COMMAND,
        "what": "small_network() of test_simulator.py (seed 2024) on msa-16x16, a small machine with sorted rows, and 22 nm",
        "model_version": MODEL_VERSION,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("numpy", "numba", "pandas")},
    }
    content = {"provenance": provenance, "values": values}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return differences(old, values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--regenerate", action="store_true", required=True, help="write the golden numbers anew"
    )
    parser.parse_args()
    changes = regenerate()
    print("\n".join(changes) or "nothing changed", f"{len(changes)} values changed", sep="\n")  # noqa: T201
