"""Reports on disk and side by side: what was saved is read back, damage is refused, every difference is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwsim.diff import MEASURES, diff_machines, diff_reports
from hwsim.errors import FormatError, InputError
from hwsim.layer import Layer, LayerShape, random_types
from hwsim.machine import load_machine
from hwsim.report import Report, load_report
from hwsim.simulator import simulate
from hwsim.version import MODEL_VERSION

SHAPES = (
    LayerShape("conv", "conv", 4, 8, (6, 6), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    LayerShape("fc", "linear", in_channels=64, out_channels=32),
)


def layers(pruned: float = 0.5) -> list[Layer]:
    rng = np.random.default_rng(0)
    return [Layer(shape, (4, 4), random_types(shape, (4, 4), pruned, 0.25, rng)) for shape in SHAPES]


@pytest.fixture(scope="module")
def report() -> Report:
    origin = {"kind": "random", "pruned": 0.5, "block": "4x4"}
    return replace(simulate("msa-8x8", layers(), network="small"), origin=origin)


@pytest.fixture
def saved(report: Report, tmp_path: Path) -> Path:
    report.save(tmp_path / "report.json")
    return tmp_path / "report.json"


def test_what_was_saved_is_read_back(report: Report, saved: Path) -> None:
    loaded = load_report(saved)
    assert loaded.to_dict() == report.to_dict()
    assert loaded.machine == report.machine
    assert loaded.equal_area_machine == report.equal_area_machine
    assert loaded.versions["model"] == MODEL_VERSION
    assert str(loaded) == str(report)
    assert diff_reports(report, loaded).is_same


def test_a_report_without_a_baseline_is_read_back(tmp_path: Path) -> None:
    found = simulate("msa-8x8", layers())
    nothing = {name: float("nan") for name in found.summary if name.startswith("speedup")}
    broken = replace(
        found, summary=found.summary | nothing, layers=found.layers.assign(dense_latency_cycles=float("nan"))
    )
    broken.save(tmp_path / "report.json")
    loaded = load_report(tmp_path / "report.json")
    assert loaded.layers["dense_latency_cycles"].isna().all()
    assert np.isnan(loaded.summary["speedup_with_memory"])


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(values)


def less_latency(data: dict[str, Any]) -> None:
    data["layers"][0]["latency_cycles"] -= 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change(format="something"), "not a report"),
        (change(format_version=99), "found 99, this program reads 1"),
        (change(layers=[]), "empty table"),
        (change(layers=7), "damaged"),
        (change(summary={}), "latency_cycles"),
        (change(provenance={"network": "x"}), "machine"),
        (lambda data: data["provenance"]["machine"].update(clock_mhz=-1), "clock_mhz"),
        (less_latency, "the file was changed"),
        (
            lambda data: data["layers"][0].update(energy_pj="much"),
            r"layers\.energy_pj: missing, or not a number",
        ),
        (lambda data: [row.pop("bound") for row in data["layers"]], r"layers\.bound"),
        (lambda data: data["summary"].pop("dram_bytes"), r"summary\.dram_bytes"),
        (lambda data: data.pop("warnings"), "warnings"),
    ],
)
def test_damage_is_refused(saved: Path, damage: Callable[[dict[str, Any]], None], words: str) -> None:
    data = json.loads(saved.read_text())
    damage(data)
    saved.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=words):
        load_report(saved)


def test_no_file_and_no_json(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read"):
        load_report(tmp_path / "nowhere.json")
    saved.write_bytes(saved.read_bytes()[:-50])
    with pytest.raises(FormatError, match="not a JSON file"):
        load_report(saved)
    saved.write_text("[1]")
    with pytest.raises(FormatError, match="not a report"):
        load_report(saved)


# ------------------------------------------------------------------------------------------------ side by side


def test_configuration_comes_first_and_figures_are_differences(report: Report) -> None:
    machine = report.machine.with_fields({"dram.gb_per_s": 12.8})
    after = replace(simulate(machine, layers(0.75), network="small"), origin=report.origin | {"pruned": 0.75})
    found = diff_reports(report, after)
    assert not found.is_same
    assert found.configuration["field"].tolist() == ["pruned", "machine.dram.gb_per_s"]
    assert found.configuration.iloc[1].tolist() == ["machine.dram.gb_per_s", 6.4, 12.8]
    for name in MEASURES:
        a, b = report.layers[name], after.layers[name]
        assert found.layers[f"{name}_before"].tolist() == a.tolist()
        assert found.layers[f"{name}_change"].tolist() == pytest.approx((b - a).tolist())
    total = found.totals.set_index("quantity").loc["latency_cycles"]
    assert total["ratio"] == after.summary["latency_cycles"] / report.summary["latency_cycles"]
    text = str(found)
    assert text.index("machine.dram.gb_per_s") < text.index("latency_cycles") < text.index("DRAM B")
    assert "machine.dram.gb_per_s" in found._repr_html_()


def test_another_version_is_a_difference(report: Report) -> None:
    old = replace(report, versions=dict(report.versions) | {"model": "0"})
    assert diff_reports(old, report).configuration["field"].tolist() == ["version.model"]


def test_a_layer_that_one_lacks_has_no_figures_there(report: Report) -> None:
    fewer = simulate("msa-8x8", layers()[1:], network="small")
    found = diff_reports(report, fewer)
    assert found.layers["layer"].tolist() == ["conv", "fc"]
    assert np.isnan(found.layers.loc[0, "latency_cycles_after"])
    assert found.layers.loc[0, "bound_after"] == "–"
    assert "→ –" in str(found)
    assert "1 of 2 layers are the same." in str(found)
    assert diff_reports(fewer, report).layers["layer"].tolist() == ["fc", "conv"]


def test_the_same_says_so(report: Report) -> None:
    assert str(diff_reports(report, report)).endswith("Nothing differs.")


def test_machines_differ_in_fields_and_area() -> None:
    small, large = load_machine("msa-8x8"), load_machine("msa-16x16")
    found = diff_machines(small, large)
    fields = found.configuration.set_index("field")
    assert fields.loc["machine.array.rows"].tolist() == [8, 16]
    assert "machine.clock_mhz" not in fields.index
    areas = found.totals.set_index("quantity")
    parts = areas.drop(index="area_mm2")
    assert areas.loc["area_mm2", "after"] - areas.loc["area_mm2", "before"] == pytest.approx(
        (parts["after"] - parts["before"]).sum()
    )
    assert "area_mm2" in str(found)
    assert diff_machines(small, small).is_same
