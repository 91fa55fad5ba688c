"""The report page: everything is in it, nothing comes from elsewhere, and no text of a result becomes markup."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from hwsim.errors import HwsimError, InputError
from sweeps.figures import accuracy_plot, speedup_plot
from sweeps.html import MOST_DETAILS, PAGE_ROWS, render_report, write_report
from sweeps.summary import summarise

MANIFEST = {
    "runs": [
        {
            "started": "2026-01-02T03:04:05Z",
            "configuration": {"networks": ["lenet-5"], "seeds": [0, 1], "note": "<b>bold</b>"},
            "versions": {"hwsim": "0.1.0", "model": "1"},
        }
    ]
}


class Page(HTMLParser):
    """Tags, their balance, and the rows of the table."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.row_classes: list[str | None] = []
        self.heads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.row_classes.append(dict(attrs).get("class"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["td"]:
            self.rows[-1].append(data)
        if self.open[-2:] == ["th", "button"]:
            self.heads.append(data)


def render(tables, plots=(), **changes):
    content = {"title": "First light", "manifest": MANIFEST, "assumptions": "No bank timing."} | changes
    return render_report(tables=tables, plots=plots, **content)


def data_of(text: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def page_text(tables) -> str:
    return render(tables, [speedup_plot(tables["points"]), accuracy_plot(tables["points"])])


def test_page_is_whole_and_self_contained(page_text):
    page = Page(page_text)
    assert page.open == [], "every tag is closed"
    addresses = [
        value or ""
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page_text).replace("http-equiv", "")
    assert [tag for tag, _ in page.tags].count("img") == 2
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}


def test_page_holds_summary_table_configuration_assumptions_and_versions(tables, page_text):
    page = Page(page_text)
    assert {"block", "p", "u", "fixed", "seed", "latency (µs)", "speed-up, equal area"} <= set(page.heads)
    assert "network" not in page.heads, "what is the same everywhere is told once"
    for text in (
        "Fastest",
        "lenet-5",
        "hwsim 0.1.0",
        "2026-01-02T03:04:05Z",
        "No bank timing.",
        "First light",
    ):
        assert text in page_text
    assert "&lt;b&gt;bold" in page_text


def test_the_script_gets_every_point_and_value(tables, page_text):
    data = data_of(page_text)
    points = tables["points"]
    columns = {column["name"]: column for column in data["columns"]}
    assert len(data["keys"]) == len(set(data["keys"])) == len(points)
    assert sorted(columns["latency_ms"]["values"]) == pytest.approx(
        sorted(1e3 * points["latency_ms"]), rel=1e-6
    )
    assert sorted(columns["accuracy_integer"]["values"]) == pytest.approx(
        sorted(100 * points["accuracy_integer"]), rel=1e-6
    )
    assert set(columns["block"]["levels"]) == {"4×4", "1×16", "8×1", "2×2", "16×16"}


def test_front_comes_first_and_is_marked(page_text):
    marks = data_of(page_text)["marks"]
    assert sorted(marks) == marks
    assert marks.count(0) == 2, "both seeds of the knee"
    assert marks.count(1) > 0


def test_every_point_of_the_front_has_its_layers(tables, page_text):
    data = data_of(page_text)
    ids = {attributes.get("id") for _, attributes in Page(page_text).tags}
    for mark, link in zip(data["marks"], data["links"], strict=True):
        assert (link[1:] in ids) if link else mark == 2
        assert link or mark == 2
    chosen = tables["points"]["key"].iloc[-1]
    assert f'id="point-{chosen}"' not in page_text
    assert f'id="point-{chosen}"' in render(tables, selected=[chosen])
    with pytest.raises(InputError, match="no such point"):
        render(tables, selected=["nothing"])


def test_texts_of_results_are_escaped(tables):
    points = tables["points"].assign(network='<script>alert("x")</script>', machine="a & b")
    points["training_settings"] = ["</script><b>" if i % 2 else "b" for i in range(len(points))]
    points.loc[0, "error"] = "layer <fc1> does not fit"
    text = render(tables | {"points": points}, title="<i>title</i>", assumptions="a < b")
    for bad in ("<script>alert", "<i>title", "<fc1>", "a < b", "</script><b>"):
        assert bad not in text
    assert "layer &lt;fc1&gt; does not fit" in text


def test_missing_values_show_as_a_dash(tables):
    points = tables["points"].copy()
    points.loc[3, "file_bytes"] = math.nan
    text = render(tables | {"points": points})
    column = next(column for column in data_of(text)["columns"] if column["name"] == "file_bytes")
    assert column["values"].count(None) == 1
    rows = [
        row for row in Page(text).rows if row and row[0].startswith(("4x4", "1x16", "8x1", "2x2", "16x16"))
    ]
    assert len(rows) == len(points)
    assert [cell for row in rows for cell in row].count("–") == 1


def test_ten_thousand_points_stay_below_five_megabytes(many_page):
    text = many_page.read_text("utf-8")
    assert len(data_of(text)["keys"]) == 10_000
    # The other figures draw means per configuration of one machine: they add what `tables` draw, about 1 MB.
    assert len(text.encode()) < 4_000_000
    assert text.count('<details class="point"') <= MOST_DETAILS + 5
    rows = [row for row in Page(text).rows if row and re.match(r"\d{3}-", row[0])]
    assert len(rows) == PAGE_ROWS, "without scripts the first page"


def test_untrained_points_have_a_front_of_energy(tables):
    points = tables["points"].assign(accuracy_integer=None, accuracy_float=None, accuracy_dense_float=None)
    text = render(tables | {"points": points})
    assert "on the front of energy against latency" in text
    assert data_of(text)["marks"].count(0) >= 1


def test_an_explanation_is_shown_where_there_is_one(tables):
    from hwsim.explain import explain
    from hwsim.layer import Layer, LayerShape, random_types
    from hwsim.machine import load_machine

    shape = LayerShape("fc", "linear", in_channels=64, out_channels=64)
    layer = Layer(shape, (4, 4), random_types(shape, (4, 4), 0.5, 0.5, np.random.default_rng(0)))
    found = explain(load_machine("msa-16x16"), [layer])
    asked = []

    def explain_row(row):
        asked.append(row["key"])
        return found if len(asked) == 1 else None

    text = render(tables, explain=explain_row)
    assert text.count("Where the cycles went") == 1
    assert found.sentences()[1] in html.unescape(text)
    assert len(asked) == len(set(asked)) <= 12


def test_progress_tells_of_every_point_and_figure(tables):
    told = []
    text = render(tables, [speedup_plot(tables["points"])], progress=lambda *now: told.append(now))
    total = text.count('<details class="point"') + 1
    assert told == [(done, total) for done in range(1, total + 1)]


def test_pages_beside_the_report(make_tables, tmp_path):
    tables = make_tables(blocks=["4x4", "8x1"], seeds=[0])
    content = {"title": "t", "tables": tables, "plots": [], "manifest": MANIFEST, "assumptions": ""}
    path = write_report(tmp_path / "report.html", with_pages=True, **content)
    links = data_of(path.read_text("utf-8"))["links"]
    assert all(link.startswith(("#point-", "report-points/")) for link in links)
    pages = [link for link in links if not link.startswith("#")]
    assert pages
    for link in pages:
        text = (tmp_path / link).read_text("utf-8")
        assert Page(text).open == []
        assert 'href="../report.html"' in text
        assert "conv2" in text
    assert len(list((tmp_path / "report-points").iterdir())) == len(tables["points"])


def test_written_in_one_piece(tables, tmp_path):
    content = {"title": "t", "tables": tables, "plots": [], "manifest": MANIFEST, "assumptions": ""}
    path = write_report(tmp_path / "report.html", **content)
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(HwsimError, match="cannot be written"):
        write_report(tmp_path / "report.html" / "report.html", **content)


def test_nothing_to_report(tables):
    with pytest.raises(InputError, match="no points"):
        render(tables | {"points": tables["points"].iloc[:0]})
    text = render(tables | {"points": tables["points"].assign(error="does not fit")})
    assert "80 of 80 points have no result" in text
    assert "and 30 more" in text
    with pytest.raises(InputError, match="no such column"):
        render(tables | {"points": tables["points"].drop(columns="latency_ms")})


# ------------------------------------------------------------------------------------------------ in plain words


def test_summary_names_the_best_configurations(tables):
    points = tables["points"].copy()
    best = (points["block"] == "8x1") & (points["pruned"] == 0.5) & (points["unified"] == 0.5)
    points.loc[best & (points["hold"] == "area"), ["latency_ms", "accuracy_integer", "accuracy_float"]] = [
        0.001,
        0.9088,
        0.9089,
    ]
    sentences = summarise(points)
    assert (
        sentences[0]
        == "lenet-5: 40 configurations (5 block shapes, 4 ratios) on msa-16x16, means of 2 seeds."
    )
    assert "90.90 %" in sentences[1]
    (fastest,) = [text for text in sentences if text.startswith("Fastest")]
    assert "blocks 8×1, p 0.5, u 0.5, area fixed" in fastest
    assert "90.88 % (8-bit integer), 1 µs" in fastest
    assert "(compute only)" in fastest
    assert "(with memory)" in fastest
    assert "(equal area)" in fastest


def test_summary_does_not_reward_one_lucky_seed(tables):
    points = tables["points"].copy()
    lucky = points.index[(points["block"] == "16x16") & (points["pruned"] == 0.75) & (points["seed"] == 0)]
    points.loc[lucky, "accuracy_integer"] = 0.909
    points.loc[lucky + 1, "accuracy_integer"] = 0.5
    assert not any("16×16, p 0.75" in text for text in summarise(points) if text.startswith("Fastest"))


def test_summary_where_nothing_is_close_or_nothing_was_trained(tables):
    far = tables["points"].assign(accuracy_integer=0.5)
    assert any(text.startswith("No configuration comes within 1 point") for text in summarise(far))
    untrained = tables["points"].assign(accuracy_integer=None, accuracy_dense_float=None)
    sentences = summarise(untrained)
    assert any("nothing was trained" in text for text in sentences)
    assert not any("%" in text for text in sentences)


def test_summary_counts_failures_and_names_what_varies(tables):
    points = tables["points"].assign(**{"dram.gb_per_s": 6.4, "clock_mhz": 1000.0})
    faster = points.assign(key=points["key"] + "+", clock_mhz=2000.0, latency_ms=points["latency_ms"] / 2)
    points = pd.concat([points, faster], ignore_index=True)
    points.loc[:4, "error"] = "does not fit"
    sentences = summarise(points)
    assert sentences[-1] == "5 of 160 points have no result: they do not fit their machine."
    assert "clock_mhz 2000.0" in next(text for text in sentences if text.startswith("Fastest"))
    assert not any("dram.gb_per_s" in text for text in sentences), "it is the same everywhere"
    assert summarise(points.assign(error="x"))[0].startswith("160 of 160")


def test_summary_without_a_dense_baseline(tables):
    sentences = summarise(tables["points"].assign(speedup_equal_area=math.nan))
    assert any("– (equal area)" in text for text in sentences)
    assert not any("nan" in text for text in sentences)


def test_summary_does_not_average_what_is_not_a_seed(tables):
    points = tables["points"]
    with pytest.raises(InputError, match="80 points share configuration and seed"):
        summarise(pd.concat([points, points], ignore_index=True))
