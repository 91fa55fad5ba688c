"""Figures: every value is drawn where it belongs and inside its axes, texts keep off each other, bad tables are refused."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from hwsim.errors import HwsimError, InputError
from sweeps.figures import (
    Plot,
    accuracy_plot,
    bandwidth_plot,
    energy_plot,
    paper_figures,
    pareto_plot,
    ratio_plot,
    roofline_plot,
    save_plot,
    speedup_plot,
    storage_plot,
    to_svg,
)
from sweeps.style import PALETTE, marker_and_color

MACHINE = {
    "clock_mhz": 1000.0,
    "peak_gmac_per_s": {"dense": 1024.0, "unified": 4096.0},
    "dram_gb_per_s": 12.8,
}


def roofline_of_first(tables: dict[str, pd.DataFrame]) -> Plot:
    layers = tables["layers"]
    return roofline_plot(layers[layers["key"] == layers["key"].iloc[0]], **MACHINE)


PLOTS: dict[str, Callable[[dict[str, pd.DataFrame]], Plot]] = {
    "speedup": lambda tables: speedup_plot(tables["points"]),
    "bandwidth": lambda tables: bandwidth_plot(tables["points"]),
    "ratio": lambda tables: ratio_plot(tables["points"]),
    "accuracy": lambda tables: accuracy_plot(tables["points"]),
    "storage": lambda tables: storage_plot(tables["points"], tables["storage"]),
    "energy": lambda tables: energy_plot(tables["points"], tables["energy"]),
    "roofline": roofline_of_first,
    "pareto": lambda tables: pareto_plot(tables["points"]),
    "pareto-energy": lambda tables: pareto_plot(tables["points"], "energy_pj"),
}
SPACES = {
    "one": {"blocks": ["4x4"], "ratios": [(0.5, 0.5)], "holds": ["area"], "seeds": [0]},
    "usual": {},
    "crowded": {
        "blocks": [f"{g_o}x{g_k}" for g_o in (1, 4, 16) for g_k in (1, 4, 16)],
        "ratios": [(round(0.1 * i, 1), round(1 - 0.1 * i, 1)) for i in range(10)],
        "seeds": [0],
    },
}


def drawn_texts(plot: Plot) -> list[Text]:
    """The texts that really reach the page: ticks outside the limits exist, but are not drawn."""
    drawn: list[Text] = []
    draw = Text.draw

    def record(text: Text, *args: object, **kwargs: object) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)
        draw(text, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        plot.figure.canvas.draw()
    return drawn


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure after it was drawn once, and the texts on it."""

    plot: Plot
    texts: list[Text]

    @property
    def figure(self) -> Figure:
        return self.plot.figure


@pytest.fixture(scope="module", params=[(name, space) for space in SPACES for name in PLOTS], ids="-".join)
def drawn(request, make_tables) -> Drawn:
    name, space = request.param
    plot = PLOTS[name](make_tables(**SPACES[space]))
    return Drawn(plot, drawn_texts(plot))


def test_texts_are_readable_on_the_page_and_apart(drawn):
    renderer = drawn.figure.canvas.get_renderer()
    page = drawn.figure.bbox.padded(1)
    boxes = []
    for text in drawn.texts:
        box = text.get_window_extent(renderer)
        assert text.get_fontsize() >= 7
        assert (box.min >= page.min).all(), f"{text} leaves the page"
        assert (box.max <= page.max).all(), f"{text} leaves the page"
        boxes.append((text.get_text(), box.padded(-0.5)))
    assert len(boxes) > 5
    for (name, box), (other_name, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), f"{name!r} runs into {other_name!r}"


def test_every_marker_and_bar_is_inside_its_axes(drawn):
    for axes in drawn.figure.axes:
        for line in axes.get_lines():
            if line.get_marker() not in ("None", None, "none", ""):
                xy = axes.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]))
                assert ((xy >= axes.bbox.min) & (xy <= axes.bbox.max)).all()
        for bar in axes.patches:
            box = bar.get_window_extent()
            assert (box.min >= axes.bbox.min - 0.5).all()
            assert (box.max <= axes.bbox.max).all()


def test_legends_keep_off_the_data(drawn):
    renderer = drawn.figure.canvas.get_renderer()
    for legend in drawn.figure.legends:
        box = legend.get_window_extent(renderer)
        assert not any(box.overlaps(axes.bbox) for axes in drawn.figure.axes)


def test_labels_name_their_units(drawn):
    plot = drawn.plot
    labels = [plot.figure.get_supxlabel(), plot.figure.get_supylabel()]
    labels += [label for axes in plot.figure.axes for label in (axes.get_xlabel(), axes.get_ylabel())]
    labels = [label for label in labels if label]
    assert labels
    units = r"\((×|%|GB/s|GMAC/s|ms|µs|KiB|bytes|µJ|nJ|output channels .*)\)|MACs per DRAM byte"
    assert all(re.search(units, label) for label in labels), labels


def test_width_is_one_or_two_columns(drawn):
    plot = drawn.plot
    assert plot.figure.get_figwidth() in (3.5, 7.0)
    assert plot.figure.get_figheight() <= 9.5 or len(plot.figure.axes) == 6


# ------------------------------------------------------------------------------------------------ the numbers


def test_speedup_draws_the_means_and_their_spread(tables):
    plot = speedup_plot(tables["points"])
    points = tables["points"]
    row = plot.data[
        (plot.data["block"] == "4x4") & (plot.data["pruned"] == 0.75) & (plot.data["hold"] == "area")
    ]
    of_row = points[(points["block"] == "4x4") & (points["pruned"] == 0.75) & (points["hold"] == "area")]
    values = of_row["speedup_with_memory"]
    assert row["speedup_with_memory"].item() == pytest.approx(values.mean())
    assert row["speedup_with_memory_min"].item() == values.min()
    assert row["speedup_with_memory_max"].item() == values.max()
    assert row["seeds"].item() == 2
    drawn = [
        y for axes in plot.figure.axes for line in axes.get_lines() for y in np.atleast_1d(line.get_ydata())
    ]
    for column in ("speedup_compute_only", "speedup_with_memory", "speedup_equal_area"):
        assert set(plot.data[column]) <= set(drawn)


def test_blocks_stand_by_size(tables):
    labels = [text.get_text() for text in speedup_plot(tables["points"]).figure.axes[-1].get_xticklabels()]
    assert labels == ["2×2", "8×1", "1×16", "4×4", "16×16"]


def test_bars_of_storage_add_up_to_the_image(tables):
    plot = storage_plot(tables["points"], tables["storage"])
    (axes,) = plot.figure.axes
    ends: dict[float, float] = {}
    for bar in axes.patches:
        place = round(bar.get_y(), 6)
        ends[place] = max(ends.get(place, 0.0), bar.get_x() + bar.get_width())
    images = plot.data.drop_duplicates(["block", "pruned", "unified"])["image_bytes"]
    assert sorted(ends.values()) == pytest.approx(sorted(images / 1024), rel=1e-3)
    assert set(plot.data["stream"]) == {"type", "sign", "magnitude", "dense", "other"}


def test_bars_of_energy_add_up_to_both_machines(tables):
    plot = energy_plot(tables["points"], tables["energy"])
    sums = plot.data.groupby(["block", "pruned", "unified", "hold"])[["energy_pj", "dense_energy_pj"]].sum()
    points = (
        tables["points"]
        .groupby(["block", "pruned", "unified", "hold"])[["energy_pj", "dense_energy_pj"]]
        .mean()
    )
    pd.testing.assert_frame_equal(sums, points)
    assert set(plot.data["component"]) == set(tables["energy"]["component"]), (
        "the data names what the figure sums up"
    )


def test_energy_without_the_parts_of_the_baseline_shows_its_total(tables):
    plot = energy_plot(tables["points"], tables["energy"].drop(columns="dense_energy_pj"))
    dense = plot.data[plot.data["component"] == "dense, total"]
    assert dense["dense_energy_pj"].tolist() == pytest.approx([9.1e6] * len(dense))
    assert dense["energy_pj"].eq(0).all()


def test_roofline_places_a_layer(tables):
    data = roofline_of_first(tables).data.set_index("layer")
    row = data.loc["conv2"]
    seconds = row["latency_cycles"] / 1e9
    assert row["effective_gmac_per_s"] == pytest.approx(1_600_000 / seconds / 1e9)
    assert row["macs_per_dram_byte"] == pytest.approx(1_600_000 / row["dram_bytes"])


def test_pareto_front_is_of_means_over_seeds(make_tables):
    tables = make_tables(seeds=range(4))
    plot = pareto_plot(tables["points"])
    assert len(plot.data) == len(tables["points"]) / 4
    assert plot.data["is_knee"].sum() == 1
    assert plot.data.loc[plot.data["is_knee"], "on_front"].all()


def test_points_without_a_result_are_left_out(tables):
    points = tables["points"].copy()
    broken = points.index[:3]
    points.loc[broken, "error"] = "does not fit"
    points.loc[broken, "latency_ms"] = math.nan
    assert len(speedup_plot(points).data) == 39, "both seeds of one configuration and one of another"
    assert len(pareto_plot(points).data) == 39


def test_a_missing_baseline_leaves_a_gap_in_the_speedups(tables):
    points = tables["points"].copy()
    points.loc[points["block"] == "2x2", "speedup_equal_area"] = math.nan
    data = speedup_plot(points).data
    assert data.loc[data["block"] == "2x2", "speedup_equal_area"].isna().all()
    assert data.loc[data["block"] != "2x2", "speedup_equal_area"].notna().all()
    speedups = [name for name in points if name.startswith("speedup_")]
    with pytest.raises(InputError, match="every value is missing"):
        speedup_plot(points.assign(**dict.fromkeys(speedups, math.nan)))


def test_too_many_bars_are_thinned_and_said(make_tables):
    tables = make_tables(**SPACES["crowded"])
    plot = storage_plot(tables["points"], tables["storage"])
    assert "20 of 90 configurations are shown" in plot.caption
    assert len(plot.figure.axes[0].get_yticklabels()) == 20
    assert plot.data.groupby(["block", "pruned"]).ngroups == 90, "the data has them all"


def test_a_cloud_of_points_is_rastered():
    number = 20_000
    rng = np.random.default_rng(0)
    points = pd.DataFrame(
        {
            "network": "lenet-5",
            "machine": "m",
            "block": "4x4",
            "block_rows": 4,
            "block_columns": 4,
            "pruned": rng.random(number),
            "unified": 0.1,
            "hold": "lanes",
            "seed": 0,
            "latency_ms": rng.random(number) + 0.1,
            "accuracy_integer": rng.random(number),
        }
    )
    assert len(to_svg(pareto_plot(points))) < 600_000


# ------------------------------------------------------------------------------------------------ the whole set


def of_two_networks(make_tables) -> dict[str, pd.DataFrame]:
    """Two networks, two DRAM bandwidths, one of the points without a result."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for network in ("lenet-5", "resnet"):
        for bandwidth in (6.4, 12.8):
            tables = make_tables(blocks=["4x4", "8x1"], seeds=[0])
            prefix = f"{network}-{bandwidth}-"
            for name, table in tables.items():
                parts.setdefault(name, []).append(table.assign(key=prefix + table["key"]))
            changes = {"network": network, "dram.gb_per_s": bandwidth, "dram_gb_per_s": bandwidth}
            points = parts["points"][-1].assign(**changes, clock_mhz=1000.0, peak_gmac_per_s=1024.0)
            points["latency_ms"] *= 12.8 / bandwidth
            parts["points"][-1] = points
    whole = {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}
    whole["points"].loc[0, ["error", "latency_ms"]] = ["does not fit", math.nan]
    return whole


def test_a_set_per_network_at_one_setting(make_tables):
    plots = {plot.name: plot for plot in paper_figures(of_two_networks(make_tables))}
    kinds = ("speedup", "bandwidth", "ratio", "accuracy", "storage", "energy", "roofline", "pareto")
    expected = {
        f"{kind}-{network}" for kind in (*kinds, "pareto-energy") for network in ("lenet-5", "resnet")
    }
    assert set(plots) == expected, "the area is the same everywhere, no front of it"
    assert plots["speedup-resnet"].caption.endswith("At dram.gb_per_s 12.8.")
    assert len(plots["speedup-resnet"].data) == 16
    assert len(plots["pareto-resnet"].data) == 32, "the front is of all machines"


def test_an_untrained_set_has_no_accuracies(tables):
    untrained = {"accuracy_integer": math.nan, "accuracy_float": math.nan, "accuracy_dense_float": math.nan}
    points = tables["points"].assign(
        **untrained, clock_mhz=1000.0, dram_gb_per_s=12.8, peak_gmac_per_s=1024.0
    )
    names = [plot.name for plot in paper_figures(tables | {"points": points})]
    assert names == ["speedup", "bandwidth", "storage", "energy", "roofline", "pareto-energy"]
    with pytest.raises(InputError, match="nothing to draw"):
        paper_figures(tables | {"points": points.assign(error="does not fit")})


def test_a_front_of_energy_minimises_both(tables):
    data = pareto_plot(tables["points"], "energy_pj").data
    front = data[data["on_front"]].sort_values("latency_ms")
    assert front["energy_pj"].is_monotonic_decreasing
    assert data["latency_ms"].idxmin() in front.index
    assert data["energy_pj"].idxmin() in front.index


def test_ratio_draws_every_configuration(tables):
    plot = ratio_plot(tables["points"])
    drawn = [y for line in plot.figure.axes[0].get_lines() for y in np.atleast_1d(line.get_ydata())]
    assert set(100 * plot.data["accuracy_integer"]) <= set(drawn)
    assert set(plot.data["dense"]) == {0.0, 0.25}


# ------------------------------------------------------------------------------------------------ files


def test_saved_as_png_pdf_and_csv(tables, tmp_path):
    plot = accuracy_plot(tables["points"])
    paths = save_plot(plot, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.png", "accuracy.pdf", "accuracy.csv"}
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    pdf = paths["pdf"].read_bytes()
    assert b"/Type3" not in pdf, "TrueType fonts: text stays text"
    assert b"/FontFile2" in pdf
    assert b"CreationDate" not in pdf, "the same figure gives the same file"
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), plot.data, check_dtype=False)


def test_the_same_figure_gives_the_same_file(tables):
    first, second = (to_svg(accuracy_plot(tables["points"])) for _ in range(2))
    assert first == second


def test_saving_where_nothing_can_be_written(tables, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HwsimError, match="cannot be written"):
        save_plot(accuracy_plot(tables["points"]), tmp_path / "file" / "figures")


def test_settings_of_the_user_are_left_alone(tables):
    before = dict(matplotlib.rcParams)
    to_svg(accuracy_plot(tables["points"]))
    assert dict(matplotlib.rcParams) == before


def test_series_differ_in_color_or_marker():
    looks = [marker_and_color(i) for i in range(64)]
    assert len(set(looks)) == 64
    assert len({marker for marker, _ in looks[:8]}) == len({color for _, color in looks[:8]}) == len(PALETTE)


# ------------------------------------------------------------------------------------------------ bad tables


@pytest.mark.parametrize("name", [name for name in PLOTS if name != "roofline"])
def test_bad_tables_are_refused(tables, name):
    def with_points(points: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return tables | {"points": points}

    draw, points = PLOTS[name], tables["points"]
    with pytest.raises(InputError, match='did you mean "hold_"'):
        draw(with_points(points.rename(columns={"hold": "hold_"})))
    with pytest.raises(InputError, match="no point with a result"):
        draw(with_points(points.assign(error="does not fit")))
    with pytest.raises(InputError, match=r"network: 2 values.*choose one"):
        draw(with_points(points.assign(network=["a", "b"] * (len(points) // 2))))
    with pytest.raises(InputError, match=r"of 80 values are missing"):
        draw(with_points(points.assign(pruned=points["pruned"].where(points["pruned"] > 0))))


@pytest.mark.parametrize("name", ["speedup", "bandwidth", "accuracy", "storage", "energy"])
def test_several_machines_are_not_drawn_as_one(tables, name):
    points = tables["points"]
    with pytest.raises(InputError, match=r"dram\.gb_per_s: 2 values"):
        PLOTS[name](tables | {"points": points.assign(**{"dram.gb_per_s": [6.4, 12.8] * (len(points) // 2)})})
    for column in ("clock_mhz", "batch", "training_settings", "model_version"):
        with pytest.raises(InputError, match=f"{column}: 2 values"):
            PLOTS[name](tables | {"points": points.assign(**{column: [1, 2] * (len(points) // 2)})})
    with pytest.raises(InputError, match="80 points share block, ratios, hold and seed"):
        PLOTS[name](tables | {"points": pd.concat([points, points], ignore_index=True)})


@pytest.mark.parametrize(("name", "column"), [("accuracy", "accuracy_float"), ("pareto", "accuracy_integer")])
def test_accuracies_in_percent_are_refused(tables, name, column):
    points = tables["points"]
    with pytest.raises(InputError, match="an accuracy is a share between 0 and 1"):
        PLOTS[name](tables | {"points": points.assign(**{column: 90.5})})


@pytest.mark.parametrize("name", ["storage", "energy"])
def test_points_without_detail_rows_are_refused(tables, name):
    details = tables[name]
    with pytest.raises(InputError, match=r"1 of \d+ points have no rows"):
        PLOTS[name](tables | {name: details[details["key"] != details["key"].iloc[0]]})


def test_roofline_is_of_one_point(tables):
    layers = tables["layers"]
    with pytest.raises(InputError, match="rows of 80 points"):
        roofline_plot(layers, **MACHINE)
    one = layers[layers["key"] == layers["key"].iloc[0]]
    with pytest.raises(InputError, match="no layer has MACs and DRAM traffic"):
        roofline_plot(one.assign(dram_bytes=0), **MACHINE)
    with pytest.raises(InputError, match='did you mean "macs_"'):
        roofline_plot(one.rename(columns={"macs": "macs_"}), **MACHINE)
