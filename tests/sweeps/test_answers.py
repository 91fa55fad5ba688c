"""`hwsim explain`, `diff`, `figures` and `report` on results, files, networks and saved reports, from the outside."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from hwsim.cli import cli
from hwsim.errors import InputError
from sweeps.figures import paper_figures
from sweeps.html import render_report
from sweeps.points import add_details, choose_point, point_subject, split_choice
from sweeps.runner import run_sweep
from sweeps.space import Space, Training
from sweeps.store import TABLES, ResultStore

TINY = Training(
    dataset="digits", train_images=300, test_images=100, dense_epochs=1, admm_epochs=1, retrain_epochs=1
)
AXES = {"base": "msa-16x16", "axes": {"dram.gb_per_s": [6.4, 12.8], "operand_store.banks": [8, 16]}}


def space(**changes: object) -> Space:
    content: dict[str, object] = {
        "networks": ["lenet5"],
        "blocks": ["4x4"],
        "ratios": [[0.5, 0.5]],
        "machine": AXES,
    }
    return Space(**{**content, **changes})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of random block types, in two runs, with a point that does not fit its machine."""
    folder = tmp_path_factory.mktemp("drawn")
    run_sweep(space(blocks=["4x4", "8x8"], hold=["lanes", "area"], random={}), folder)
    small = {"base": "msa-16x16", "axes": {"output.size_kib": [0.125]}}
    run_sweep(space(machine=small, random={"exempt": "none"}), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_sweep(space(ratios=[[0.5, 0.5], [0.75, 0.25]], training=TINY), folder, workers=1)
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(part) for part in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def explained(*arguments: object) -> dict:
    return json.loads(run("explain", *arguments, "--json"))


@pytest.mark.parametrize("folder", ["drawn", "trained"])
def test_every_point_can_be_built_anew(folder: str, request: pytest.FixtureRequest) -> None:
    store = ResultStore(request.getfixturevalue(folder))
    points = store.to_frame()
    done = points[points["error"].isna()]
    assert len(done) in (8, 16)
    for _, row in done.iterrows():
        subject = point_subject(store, row)
        report = subject.simulate()
        assert report.origin["key"] == row["key"]
        for name in ("latency_cycles", "dram_bytes", "image_bytes"):
            assert report.summary[name] == row[name]
        assert report.summary["energy_pj"] == pytest.approx(row["energy_pj"])


def test_explain_accounts_for_a_point_of_a_sweep(drawn: Path) -> None:
    points = ResultStore(drawn).to_frame().dropna(subset=["latency_ms"])
    for choice, column in (("fastest", "latency_ms"), ("smallest", "image_bytes")):
        found = explained(f"{drawn}@{choice}")
        row = points[points["key"] == found["origin"]["key"]].iloc[0]
        assert row[column] == points[column].min()
        assert sum(layer["latency_cycles"] for layer in found["layers"]) == row["latency_cycles"]
        assert sum(part["cycles"] for part in found["parts"]) == pytest.approx(row["latency_cycles"])
    assert explained(drawn) == explained(f"{drawn}@best")
    key = points["key"].iloc[3]
    assert explained(f"{drawn}@{key[:16]}", "fc1")["origin"]["key"] == key


def test_explain_takes_a_network_a_file_and_a_report(trained: Path, tmp_path: Path) -> None:
    text = run("explain", "lenet5", "conv2", "--machine", "msa-8x8")
    assert text.startswith("conv2 on msa-8x8: ")
    assert "twice the DRAM bandwidth" in text
    artifact = next((trained / "artifacts").iterdir())
    of_file = explained(artifact, "--batch", 2)
    assert of_file["origin"]["batch"] == 2
    for name, model in (("network", "lenet5"), ("file", artifact)):
        run("simulate", model, "--pruned", 0.25, "--batch", 2, "--out", tmp_path / name)
        of_report = explained(tmp_path / name / "report.json")
        assert of_report == explained(model, "--pruned", 0.25, "--batch", 2)


def test_a_report_whose_file_has_changed_is_not_explained(trained: Path, tmp_path: Path) -> None:
    first, second = sorted((trained / "artifacts").iterdir())
    copy = tmp_path / "model.hws.safetensors"
    copy.write_bytes(first.read_bytes())
    run("simulate", copy, "--out", tmp_path)
    copy.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match="has changed since"):
        run("explain", tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    random = {"kind": "random", "unified": 0.5, "all_layers": False, "seed": 0, "batch": 1}
    for origin, words in (
        ({}, "found None"),
        ({"kind": "random"}, "origin.seed: missing"),
        (random | {"block": "4by4", "pruned": 0.5}, "origin: damaged"),
        (random | {"block": "4x4", "pruned": "half"}, "origin: damaged"),
    ):
        data["provenance"]["origin"] = origin
        (tmp_path / "report.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match=words):
            run("explain", tmp_path / "report.json")


def test_diff_of_points_reports_files_and_machines(drawn: Path, trained: Path, tmp_path: Path) -> None:
    points = ResultStore(drawn).to_frame()
    pair = points[
        (points["block"] == "4x4") & (points["hold"] == "lanes") & (points["operand_store.banks"] == 8)
    ]
    slow, fast = pair.sort_values("dram.gb_per_s")["key"]
    text = run("diff", f"{drawn}@{slow}", f"{drawn}@{fast}")
    assert re.search(r"machine\.dram\.gb_per_s +6\.4 +12\.8", text)
    assert "operand_store.banks" not in text
    run("simulate", "lenet5", "--out", tmp_path)
    assert "Nothing differs." in run("diff", tmp_path / "report.json", "lenet5")
    a, b = sorted((trained / "artifacts").iterdir())
    assert re.search(r"pruned +0\.\d+ +0\.\d+", run("diff", a, b))
    assert "machine.array.rows" in run("diff", "msa-8x8", "msa-16x16")
    both = run("diff", "msa-8x8", "msa-16x16", "--on", "lenet5")
    assert "machine.array.rows" in both
    assert "fc1" in both
    with pytest.raises(InputError, match="one is a machine and the other is not"):
        run("diff", "msa-8x8", "lenet5")


def test_wrong_points_are_named(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such point.*best, fastest, smallest, knee"):
        run("explain", f"{drawn}@nothing")
    with pytest.raises(InputError, match="nothing was trained"):
        run("explain", f"{drawn}@knee")
    with pytest.raises(InputError, match="no results here"):
        run("explain", tmp_path)
    with pytest.raises(InputError, match="no results here"):
        run("explain", f"{tmp_path}/nowhere@best")
    points = ResultStore(drawn).to_frame()
    with pytest.raises(InputError, match="17 points begin with it"):
        choose_point(points.assign(key="a" + points["key"]), "a")
    failed = points.loc[points["error"].notna(), "key"].item()
    with pytest.raises(InputError, match=r"the point has no result.*output\.size_kib"):
        run("explain", f"{drawn}@{failed}")


def test_a_point_whose_weights_or_version_are_gone(trained: Path, drawn: Path, tmp_path: Path) -> None:
    store = ResultStore(trained)
    row = store.to_frame().iloc[0]
    artifact = trained / "artifacts" / f"{row['training_key']}.hws.safetensors"
    moved = artifact.rename(tmp_path / "moved")
    try:
        with pytest.raises(InputError, match="its weights are gone"):
            point_subject(store, row)
        run("report", trained, "--out", tmp_path / "report.html", "--point", row["key"])
    finally:
        moved.rename(artifact)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "cannot be simulated again" in page
    assert "its weights are gone" in page
    other = ResultStore(drawn).to_frame().iloc[0].copy()
    other["key"] = "0" * 64
    with pytest.raises(InputError, match="no run of the manifest leads to it"):
        point_subject(ResultStore(drawn), other)


def test_a_path_with_an_at_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert split_choice(f"{tmp_path}/a@b") == (tmp_path / "a@b", "best")
    assert split_choice(f"{tmp_path}/a@b@knee") == (tmp_path / "a@b", "knee")
    assert split_choice("results/demo") == (Path("results/demo"), "best")


def test_figures_and_report_of_a_sweep_with_axes(trained: Path, tmp_path: Path) -> None:
    printed = run("figures", trained, "--out", tmp_path / "figures").split()
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert sorted(Path(line).name for line in printed) == files
    for kind in ("speedup", "ratio", "accuracy", "storage", "energy", "roofline", "pareto"):
        assert {f"{kind}.png", f"{kind}.pdf", f"{kind}.csv"} <= set(files)
    assert len(pd.read_csv(tmp_path / "figures" / "pareto.csv")) == 8
    key = ResultStore(trained).to_frame().sort_values("latency_ms")["key"].iloc[-1]
    run("report", trained, "--out", tmp_path / "report.html", "--point", key)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert f'id="point-{key[:10]}"' in page
    assert page.count("Where the cycles went") >= 2
    assert "What would help" in page


def test_a_store_with_totals_only_is_simulated_again(drawn: Path, tmp_path: Path) -> None:
    store = ResultStore(drawn)
    tables = {name: store.to_frame(name) for name in TABLES}
    empty = {name: tables[name].iloc[:0] for name in ("layers", "energy", "storage")}
    points = tables["points"]
    filled = add_details(store, tables | empty, points)
    for name in empty:
        columns = [column for column in tables[name] if column in filled[name]]
        expected, found = (
            frame.sort_values(columns[:3], ignore_index=True)[columns]
            for frame in (tables[name], filled[name])
        )
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert add_details(store, tables, points)["layers"].shape == tables["layers"].shape
    names = [plot.name for plot in paper_figures(tables | empty)]
    assert "speedup" in names
    assert "energy" not in names
    text = render_report(title="t", tables=tables | empty, plots=[], manifest={"runs": []}, assumptions="")
    assert '<details class="point"' in text
    with_totals = tmp_path / "totals"
    shutil.copytree(drawn, with_totals)
    for name in empty:
        shutil.rmtree(with_totals / name)
    run("report", with_totals)
    assert "fc1" in (with_totals / "report.html").read_text("utf-8")


def test_results_show_themselves(drawn: Path, trained: Path) -> None:
    for folder in (drawn, trained):
        page = ResultStore(folder)._repr_html_()
        assert "lenet5" in page
        assert "<svg" in page
        assert page.count("<tr") > 2
    assert "no result store" in ResultStore(drawn / "nowhere")._repr_html_()
