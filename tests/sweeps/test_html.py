"""The report page: everything is in it, nothing comes from elsewhere, and no text of a result becomes markup."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from hwsim.errors import HwsimError, InputError
from sweeps.figures import accuracy_plot, speedup_plot
from sweeps.html import MOST_ROWS, render_report, write_report
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


def render(points, plots=(), **changes):
    content = {"title": "First light", "manifest": MANIFEST, "assumptions": "No bank timing."} | changes
    return render_report(points=points, plots=plots, **content)


@pytest.fixture(scope="module")
def page_text(tables) -> str:
    return render(tables["points"], [speedup_plot(tables["points"]), accuracy_plot(tables["points"])])


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
    assert len([row for row in page.rows if row]) == len(tables["points"])
    assert {"block", "p", "u", "fixed", "seed", "latency (ms)", "speed-up, equal area"} <= set(page.heads)
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


def test_front_comes_first_and_is_marked(page_text):
    classes = [
        name for row, name in zip(Page(page_text).rows, Page(page_text).row_classes, strict=True) if row
    ]
    order = {"knee": 0, "front": 1, None: 2}
    assert sorted(classes, key=order.__getitem__) == classes
    assert classes.count("knee") == 2, "both seeds of the configuration"
    assert classes.count("front") > 0


def test_texts_of_results_are_escaped(tables):
    points = tables["points"].assign(network='<script>alert("x")</script>', machine="a & b")
    points.loc[0, "error"] = "layer <fc1> does not fit"
    text = render(points, title="<i>title</i>", assumptions="a < b")
    for bad in ("<script>alert", "<i>title", "<fc1>", "a < b"):
        assert bad not in text
    assert "layer &lt;fc1&gt; does not fit" in text


def test_values_to_sort_by_are_exact(tables):
    page = Page(render(tables["points"]))
    values = [attributes["data-v"] for tag, attributes in page.tags if tag == "td"]
    latency = page.heads.index("latency (ms)")
    found = sorted(float(values[i]) for i in range(latency, len(values), len(page.heads)))
    assert found == sorted(tables["points"]["latency_ms"])


def test_missing_values_show_as_a_dash(tables):
    points = tables["points"].copy()
    points.loc[3, "file_bytes"] = math.nan
    assert [cell for row in Page(render(points)).rows for cell in row].count("–") == 1


def test_large_sweeps_show_the_best_rows_and_say_so(make_tables):
    tables = make_tables(blocks=["4x4", "8x1"], ratios=[(i / 1000, 0.1) for i in range(600)], seeds=[0])
    text = render(tables["points"])
    assert len(tables["points"]) == 2400
    assert len([row for row in Page(text).rows if row]) == MOST_ROWS
    assert "2000 of 2400 points" in text
    assert len(text) < 5_000_000


def test_written_in_one_piece(tables, tmp_path):
    content = {"title": "t", "points": tables["points"], "plots": [], "manifest": MANIFEST, "assumptions": ""}
    path = write_report(tmp_path / "report.html", **content)
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(HwsimError, match="cannot be written"):
        write_report(tmp_path / "report.html" / "report.html", **content)


def test_nothing_to_report(tables):
    with pytest.raises(InputError, match="no points"):
        render(tables["points"].iloc[:0])
    text = render(tables["points"].assign(error="does not fit"))
    assert "No point has a result yet" in text or "80 of 80 points have no result" in text
    with pytest.raises(InputError, match="no such column"):
        render(tables["points"].drop(columns="latency_ms"))


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
