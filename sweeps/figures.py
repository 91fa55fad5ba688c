"""The paper's figures, each from the tidy tables of a result store, each with the data that it shows.

Every function returns a `Plot`; `save_plot` writes it as PNG, PDF and CSV.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.files import write_atomically
from sweeps.pareto import knee_point, pareto_front
from sweeps.style import COLUMN_INCHES, NEUTRAL, PAGE_INCHES, PALETTE, marker_and_color, new_figure, style
from sweeps.summary import configuration_means, identity_columns

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

__all__ = [
    "Plot",
    "accuracy_plot",
    "bandwidth_plot",
    "energy_plot",
    "pareto_plot",
    "roofline_plot",
    "save_plot",
    "speedup_plot",
    "storage_plot",
    "to_svg",
]

_WEIGHTS = ["block", "block_rows", "block_columns", "pruned", "unified"]  # on which compressed weights depend
_CONFIGURATION = [*_WEIGHTS, "hold"]
_HOLD_TEXT = {"lanes": "lanes fixed", "area": "area fixed"}
_STREAM_TEXT = {
    "type": "block types",
    "sign": "signs",
    "magnitude": "magnitudes",
    "dense": "dense weights",
    "other": "offsets and other",
}
_DOT: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.3}
_MOST_BARS = 20
_MOST_DOTS_ABREAST = 36
_MOST_COMPONENTS = 8
_RASTER_ABOVE = 5000  # markers; above it a vector file would be slow to open


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure with what belongs to it.

    Attributes
    ----------
    name : str
        Of its files.
    title, caption : str
        What it shows, in a few words and in a sentence or two.
    figure : matplotlib Figure
    data : DataFrame
        The numbers that are drawn, tidy, units in the column names.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame


def save_plot(plot: Plot, folder: str | Path) -> dict[str, Path]:
    """Write ``<name>.png`` (300 dpi), ``<name>.pdf`` (vector, text stays text) and ``<name>.csv``.

    Returns
    -------
    dict
        Paths by ``"png"``, ``"pdf"``, ``"csv"``.

    Raises
    ------
    HwsimError
        The disk is full or the folder cannot be written.
    """
    content = {
        "png": _rendered(plot, "png", {"Software": None}),
        "pdf": _rendered(plot, "pdf", {"CreationDate": None, "ModDate": None}),
        "csv": plot.data.to_csv(index=False).encode(),
    }
    paths = {suffix: Path(folder) / f"{plot.name}.{suffix}" for suffix in content}
    for suffix, path in paths.items():
        write_atomically(path, content[suffix])
    return paths


def to_svg(plot: Plot) -> bytes:
    """The figure as SVG, the same bytes for the same figure."""
    return _rendered(plot, "svg", {"Date": None, "Creator": None})


def _rendered(plot: Plot, kind: str, metadata: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    with style():
        plot.figure.savefig(sink, format=kind, metadata=metadata)
    return sink.getvalue()


# Speed-up and bandwidth -----------------------------------------------------------------------------------


def speedup_plot(points: pd.DataFrame) -> Plot:
    """Speed-up against block shape and ratio, the three ways side by side; a row per way to hold the machine.

    Parameters
    ----------
    points : DataFrame
        The ``points`` of one network on one machine; of several seeds the mean, and a bar from least to most.

    Raises
    ------
    InputError
        A column or value is missing, there are no points, or several points share configuration and seed.
    """
    panels = {
        "speedup_compute_only": "Compute only",
        "speedup_with_memory": "With memory",
        "speedup_equal_area": "At equal area",
    }
    data = _over_seeds(points, _CONFIGURATION, list(panels), may_miss=True)
    figure = _dot_grid(data, panels, "Speed-up over dense (×)", reference=1.0)
    caption = (
        "Speed-up over the dense machine by block shape: cycles of the passes only, latency with memory on the "
        "same array, and latency against a dense machine of the same area. p and u are the shares of pruned and "
        "of unified blocks; the dashed line is the dense machine. Nothing is drawn where that does not fit."
    )
    return Plot("speedup", "Speed-up against block shape and ratio", caption, figure, data)


def bandwidth_plot(points: pd.DataFrame) -> Plot:
    """Average, peak and demanded DRAM bandwidth against block shape and ratio. Input and errors as `speedup_plot`."""
    panels = {
        "average_bandwidth_gb_per_s": "Average",
        "peak_bandwidth_gb_per_s": "Peak",
        "peak_demand_gb_per_s": "Demand",
    }
    data = _over_seeds(points, _CONFIGURATION, list(panels))
    figure = _dot_grid(data, panels, "DRAM bandwidth (GB/s)")
    caption = (
        "DRAM bandwidth by block shape: the average over the network's latency, the highest flow of any step, and "
        "what the most demanding layer would need so that no pass waits. p and u are the shares of pruned and of "
        "unified blocks."
    )
    return Plot("bandwidth", "DRAM bandwidth against block shape and ratio", caption, figure, data)


def _dot_grid(
    data: pd.DataFrame, panels: Mapping[str, str], quantity: str, reference: float | None = None
) -> Figure:
    """Block shapes along x, ratios as markers beside each other; a panel per column of ``panels`` and per hold."""
    holds = [hold for hold in _HOLD_TEXT if hold in set(data["hold"])]
    blocks = [block for block, _ in _by_block(data)]
    ratios = sorted(set(zip(data["pruned"], data["unified"], strict=True)))
    cells = [(hold, column) for hold in holds for column in panels]
    abreast = len(panels) if len(blocks) * len(ratios) <= _MOST_DOTS_ABREAST else 1
    rows = len(cells) // abreast
    with style():
        figure = new_figure(PAGE_INCHES, 0.6 + 1.75 * rows)
        grid = figure.subplots(rows, abreast, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (hold, column) in zip(grid, cells, strict=True):
            _dots(axes, data[data["hold"] == hold], column, blocks, ratios)
            if reference is not None:
                axes.axhline(reference, color="black", linestyle="--", linewidth=0.8, zorder=1)
            axes.set_title(f"{panels[column]}, {_HOLD_TEXT[hold]}")
            axes.set_xticks(range(len(blocks)), [_block_text(block) for block in blocks])
            axes.grid(True, axis="y")
        highest = max(reference or 0.0, float(np.nanmax(data[[f"{column}_max" for column in panels]])))
        grid[0].set_ylim(0, 1.08 * highest)  # the panels share their axes
        figure.supylabel(quantity, fontsize=8)
        figure.supxlabel("Block shape (output channels × reduction positions)", fontsize=8)
        handles = [_marker(i, f"p {pruned:g}, u {unified:g}") for i, (pruned, unified) in enumerate(ratios)]
        _legend(figure, "outside upper center", handles, columns=6)
    return figure


def _dots(
    axes: Axes, data: pd.DataFrame, column: str, blocks: Sequence[str], ratios: Sequence[tuple[float, float]]
) -> None:
    places = {block: place for place, block in enumerate(blocks)}
    for i, (pruned, unified) in enumerate(ratios):
        marker, color = marker_and_color(i)
        part = data[(data["pruned"] == pruned) & (data["unified"] == unified)]
        x = part["block"].map(places) + 0.75 * ((i + 0.5) / len(ratios) - 0.5)
        axes.vlines(x, part[f"{column}_min"], part[f"{column}_max"], color=color, linewidth=1.2)
        axes.plot(x, part[column], marker=marker, color=color, **_DOT)
    for edge in np.arange(len(blocks) - 1) + 0.5:
        axes.axvline(edge, color="#D9D9D9", linewidth=0.5)
    axes.set_xlim(-0.5, len(blocks) - 0.5)


# Accuracy ---------------------------------------------------------------------------------------------------


def accuracy_plot(points: pd.DataFrame) -> Plot:
    """Accuracy against compression, of the float and of the 8-bit integer model.

    Input and errors as `speedup_plot`.
    """
    accuracies = ["accuracy_float", "accuracy_integer", "accuracy_dense_float"]
    data = _over_seeds(points, _WEIGHTS, ["compression_vs_fp32", *accuracies])
    _check_fractions(data, accuracies)
    with style():
        figure = new_figure(COLUMN_INCHES, 2.9)
        axes = figure.subplots()
        axes.axhline(100 * data["accuracy_dense_float"].mean(), color=NEUTRAL, linestyle=":", zorder=1)
        handles = [_accuracy_lines(axes, i, block, group) for i, (block, group) in enumerate(_by_block(data))]
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis)
        axes.set_xlabel("Compression against fp32 (×)")
        axes.set_ylabel("Top-1 accuracy (%)")
        axes.grid(True)
        _legend(figure, "outside upper center", handles, columns=5)
        models = [
            _line("float", color="black", marker="o"),
            _line("8-bit integer", color="black", marker="o", linestyle="--", markerfacecolor="white"),
            _line("dense, float", color=NEUTRAL, linestyle=":"),
        ]
        _legend(figure, "outside lower center", models, columns=3)
    caption = (
        "Top-1 accuracy on the test images against the size of the memory image relative to fp32 weights; a line "
        "per block shape. Filled: the float model. Hollow: the integer model, as the machine computes it."
    )
    return Plot("accuracy", "Accuracy against compression", caption, figure, data)


def _accuracy_lines(axes: Axes, index: int, block: str, group: pd.DataFrame) -> Artist:
    marker, color = marker_and_color(index)
    group = group.sort_values("compression_vs_fp32")
    x = group["compression_vs_fp32"]
    looks: dict[str, dict[str, Any]] = {
        "accuracy_float": {},
        "accuracy_integer": {"linestyle": "--", "markerfacecolor": "white"},
    }
    for column, look in looks.items():
        axes.plot(x, 100 * group[column], marker=marker, color=color, **look)
        axes.vlines(x, 100 * group[f"{column}_min"], 100 * group[f"{column}_max"], color=color, linewidth=0.8)
    return _line(_block_text(block), color=color, marker=marker)


# Storage and energy: a bar per configuration --------------------------------------------------------------------


def storage_plot(points: pd.DataFrame, storage: pd.DataFrame) -> Plot:
    """The memory image by stream, a bar per configuration, beside what int8 and fp32 weights take.

    Parameters
    ----------
    points, storage : DataFrame
        The two tables of one network on one machine; the mean over seeds.

    Raises
    ------
    InputError
        As `speedup_plot`.
    """
    references = ["image_bytes", "int8_bytes", "fp32_bytes", "bits_per_weight"]
    totals = _over_seeds(points, _WEIGHTS, references)
    _need(storage, ["key", "stream", "size_bits"], "storage")
    stream = storage["stream"].where(storage["stream"].isin(list(_STREAM_TEXT)), "other")
    bits = storage.assign(stream=stream, size_bytes=storage["size_bits"] / 8)
    data = _parts_of(bits, points, _WEIGHTS, "stream", ["size_bytes"])
    data = data.merge(totals[[*_WEIGHTS, *references]], on=_WEIGHTS)
    shown = _few(totals)
    scale, unit = _unit(totals["image_bytes"].max(), {2**20: "MiB", 2**10: "KiB", 1: "bytes"})
    used = set(data.loc[data["size_bytes"] > 0, "stream"])
    streams = [name for name in _STREAM_TEXT if name in used]
    colors = dict(zip(_STREAM_TEXT, PALETTE, strict=False))
    with style():
        figure, axes = _bar_figure(shown, inches_per_bar=0.24)
        widths = _widths(data, shown, _WEIGHTS, "stream", streams, "size_bytes") / scale
        _stack(axes, np.arange(len(shown)), widths, [colors[name] for name in streams], height=0.7)
        axes.set_xlabel(f"Memory image ({unit})")
        _text_column(axes, 0, "bits per\nweight", [f"{value:.2f}" for value in shown["bits_per_weight"]])
        for i, name in enumerate(("int8", "fp32")):
            ratio = shown[f"{name}_bytes"] / shown["image_bytes"]
            _text_column(axes, i + 1, f"smaller\nthan {name}", [f"{value:.1f}×" for value in ratio])
        _legend(
            figure,
            "outside upper center",
            [_patch(_STREAM_TEXT[name], colors[name]) for name in streams],
            columns=5,
        )
    caption = (
        "Size of the memory image by stream, offsets and byte padding included; at the right bits per weight, and "
        f"how many times smaller it is than int8 and fp32 weights.{_shown_of(shown, totals)}"
    )
    return Plot("storage", "Storage by stream", caption, figure, data)


def energy_plot(points: pd.DataFrame, energy: pd.DataFrame) -> Plot:
    """Energy of one inference by component, the dense baseline on the same array beside it.

    Parameters
    ----------
    points, energy : DataFrame
        The two tables of one network on one machine; the mean over seeds. Without ``dense_energy_pj`` in
        ``energy`` the baseline is drawn in one piece, from ``points``.

    Raises
    ------
    InputError
        As `speedup_plot`.
    """
    both = ["energy_pj", "dense_energy_pj"]
    totals = _over_seeds(points, _CONFIGURATION, both)
    _need(energy, ["key", "component", "energy_pj"], "energy")
    if "dense_energy_pj" not in energy or energy["dense_energy_pj"].isna().any():
        whole = points[["key", "dense_energy_pj"]].assign(component="dense, total", energy_pj=0.0)
        energy = pd.concat([energy.assign(dense_energy_pj=0.0), whole])
    data = _parts_of(energy, points, _CONFIGURATION, "component", both)
    components = data.groupby("component")[both].max().max(axis=1).sort_values(ascending=False).index.tolist()
    if len(components) > _MOST_COMPONENTS:
        components = [*components[: _MOST_COMPONENTS - 1], "other"]
    drawn = data.assign(component=data["component"].where(data["component"].isin(components), "other"))
    shown = _few(totals)
    scale, unit = _unit(totals[both].to_numpy().max(), {1e9: "mJ", 1e6: "µJ", 1e3: "nJ", 1: "pJ"})
    colors = [NEUTRAL if name == "other" else color for name, color in zip(components, PALETTE, strict=False)]
    with style():
        figure, axes = _bar_figure(shown, inches_per_bar=0.34)
        for column, offset, hatch in (("energy_pj", -0.19, ""), ("dense_energy_pj", 0.19, "//////")):
            widths = _widths(drawn, shown, _CONFIGURATION, "component", components, column) / scale
            _stack(axes, np.arange(len(shown)) + offset, widths, colors, height=0.34, hatch=hatch)
        axes.set_xlabel(f"Energy per inference ({unit})")
        ratio = shown["dense_energy_pj"] / shown["energy_pj"]
        _text_column(axes, 0, "less than\ndense", [f"{value:.1f}×" for value in ratio])
        handles = [
            _patch(_component_text(name), color) for name, color in zip(components, colors, strict=True)
        ]
        _legend(
            figure,
            "outside upper center",
            [*handles, _patch("hatched: dense machine", "white", "//////")],
            columns=5,
        )
    caption = (
        "Energy of one inference by component. Upper bar: the compressed network. Lower, hatched bar: the dense "
        f"network on the same array without its compression features.{_shown_of(shown, totals)}"
    )
    return Plot("energy", "Energy by component", caption, figure, data)


def _component_text(name: str) -> str:
    return "DRAM" if name == "dram" else name.replace("_", " ")


def _parts_of(
    details: pd.DataFrame, points: pd.DataFrame, by: list[str], part: str, columns: list[str]
) -> pd.DataFrame:
    """Detail rows summed over layers and averaged over seeds: a row per configuration and part."""
    keys = _valid(points, ["key", "seed", *_CONFIGURATION]).drop_duplicates([*by, "seed"])
    missing = ~keys["key"].isin(details["key"])
    if missing.any():
        problem = Problem("key", f"{int(missing.sum())} of {len(keys)} points have no rows by {part}")
        raise InputError("details", problem)
    joined = details.merge(keys[["key", "seed", *by]], on="key")
    sums = joined.groupby([*by, "seed", part], as_index=False)[columns].sum()
    return sums.groupby([*by, part], as_index=False)[columns].mean()


def _widths(
    data: pd.DataFrame, shown: pd.DataFrame, by: list[str], part: str, names: Sequence[str], column: str
) -> NDArray[np.float64]:
    """``float64[bars, parts]``, zero where a configuration has no such part."""
    table = data.pivot_table(index=by, columns=part, values=column, aggfunc="sum")
    table = table.reindex(index=pd.MultiIndex.from_frame(shown[by]), columns=list(names))
    return table.fillna(0.0).to_numpy()


def _bar_figure(shown: pd.DataFrame, inches_per_bar: float) -> tuple[Figure, Axes]:
    figure = new_figure(PAGE_INCHES, 0.95 + inches_per_bar * len(shown))
    axes = figure.subplots()
    axes.set_ylim(len(shown) - 0.4, -0.6)
    holds = "hold" in shown and shown["hold"].nunique() > 1
    labels = [
        f"{_block_text(row.block)}, p {row.pruned:g}, u {row.unified:g}"
        + (f", {_HOLD_TEXT[str(row.hold)]}" if holds else "")
        for row in shown.itertuples()
    ]
    axes.set_yticks(range(len(shown)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    return figure, axes


def _stack(
    axes: Axes,
    places: NDArray[Any],
    widths: NDArray[np.float64],
    colors: Sequence[str],
    height: float,
    hatch: str = "",
) -> None:
    left = np.zeros(len(places))
    for width, color in zip(widths.T, colors, strict=True):
        axes.barh(places, width, height, left, color=color, edgecolor="white", linewidth=0.4, hatch=hatch)
        left = left + width


def _text_column(axes: Axes, index: int, head: str, texts: Sequence[str]) -> None:
    """The index-th column of figures at the right of the bars, under a head."""
    look: dict[str, Any] = {
        "ha": "center",
        "fontsize": 7,
        "textcoords": "offset points",
        "annotation_clip": False,
    }
    offset = 24 + 44 * index  # points, not shares of the axes: the layout settles the width of the axes last
    axes.annotate(head, (1, 1), (offset, 2), xycoords="axes fraction", va="bottom", **look)
    for row, text in enumerate(texts):
        axes.annotate(text, (1, row), (offset, 0), xycoords=("axes fraction", "data"), va="center", **look)


def _few(totals: pd.DataFrame) -> pd.DataFrame:
    """As many configurations as a page has room for: of one hold only if need be, evenly over the whole list."""
    if len(totals) > _MOST_BARS and "hold" in totals:
        totals = totals[totals["hold"] == totals["hold"].max()]  # "lanes", where there is one
    if len(totals) > _MOST_BARS:
        totals = totals.iloc[np.linspace(0, len(totals) - 1, _MOST_BARS).round().astype(int)]
    return totals


def _shown_of(shown: pd.DataFrame, totals: pd.DataFrame) -> str:
    return "" if len(shown) == len(totals) else f" {len(shown)} of {len(totals)} configurations are shown."


def _unit(largest: float, units: Mapping[float, str]) -> tuple[float, str]:
    """The greatest unit of which ``largest`` has at least two (units in falling order)."""
    scale = next((scale for scale in units if largest >= 2 * scale), list(units)[-1])
    return scale, units[scale]


# Roofline and front ---------------------------------------------------------------------------------------------


def roofline_plot(
    layers: pd.DataFrame, *, clock_mhz: float, peak_gmac_per_s: Mapping[str, float], dram_gb_per_s: float
) -> Plot:
    """A point per layer under the roofs of the machine.

    Parameters
    ----------
    layers : DataFrame
        The ``layers`` rows of one point.
    clock_mhz : float
    peak_gmac_per_s : mapping
        Label of a roof -> its height in 10⁹ multiply-accumulates per second. MACs count as in the uncompressed
        layer, so skipped blocks may lift a layer above every roof.
    dram_gb_per_s : float

    Raises
    ------
    InputError
        A column is missing, the rows belong to several points, or no layer has MACs and DRAM traffic.
    """
    columns = ["key", "layer", "macs", "latency_cycles", "dram_bytes", "bound"]
    _need(layers, columns, "layers")
    if layers["key"].nunique() != 1:
        problem = Problem("key", f"rows of {layers['key'].nunique()} points", 'layers[layers["key"] == key]')
        raise InputError("layers", problem)
    data = layers.loc[(layers[["macs", "dram_bytes", "latency_cycles"]] > 0).all(axis=1), columns[1:]]
    if data.empty:
        raise InputError("layers", Problem("", "no layer has MACs and DRAM traffic"))
    data = data.assign(
        macs_per_dram_byte=data["macs"] / data["dram_bytes"],
        effective_gmac_per_s=data["macs"] * clock_mhz / data["latency_cycles"] / 1e3,
    )
    x, y = data["macs_per_dram_byte"].to_numpy(), data["effective_gmac_per_s"].to_numpy()
    with style():
        figure = new_figure(COLUMN_INCHES, 2.9)
        axes = figure.subplots()
        roofs = _draw_roofs(axes, x, y, peak_gmac_per_s, dram_gb_per_s)
        for i, (bound, group) in enumerate(data.groupby("bound")):
            place = group["macs_per_dram_byte"], group["effective_gmac_per_s"]
            marker, color = marker_and_color(i)
            axes.plot(*place, marker=marker, color=color, label=f"{bound} bound", **_DOT)
        axes.set_xlabel("MACs per DRAM byte")
        axes.set_ylabel("Effective throughput (GMAC/s)")
        axes.grid(True)
        _legend(figure, "outside upper center", axes.get_legend_handles_labels()[0], columns=2)
        _label_points(axes, x, y, data["layer"].tolist(), avoid=roofs)
    caption = (
        "Roofline with a point per layer. MACs are those of the uncompressed layer; the slope is the DRAM's "
        f"{dram_gb_per_s:g} GB/s."
    )
    return Plot("roofline", "Roofline", caption, figure, data)


def _draw_roofs(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    peak_gmac_per_s: Mapping[str, float],
    dram_gb_per_s: float,
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    peaks = list(peak_gmac_per_s.values())
    left = min(x.min(), min(peaks) / dram_gb_per_s) / 3
    right = max(x.max(), max(peaks) / dram_gb_per_s) * 3
    intensity = np.geomspace(left, right, 300)
    roofs = []
    for (label, peak), linestyle in zip(peak_gmac_per_s.items(), ("-", "--", "-.", ":"), strict=False):
        roofs.append((intensity, np.minimum(peak, intensity * dram_gb_per_s)))
        axes.plot(*roofs[-1], color="black", linestyle=linestyle, label=label, zorder=1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(min(y.min(), left * dram_gb_per_s) / 1.5, max(y.max(), *peaks) * 3)
    return roofs


def pareto_plot(points: pd.DataFrame) -> Plot:
    """Accuracy of the integer model against latency, with the Pareto front and its knee; means over seeds.

    Parameters
    ----------
    points : DataFrame
        The ``points`` of one network, on any machines.

    Raises
    ------
    InputError
        A column or value is missing, there are no points, or they are of several networks.
    """
    objectives = ["latency_ms", "accuracy_integer"]
    valid = _valid(points, ["network", "machine", "seed", *_CONFIGURATION, *objectives])
    _check_fractions(valid, ["accuracy_integer"])
    _check_one(valid, ["network"])
    data = configuration_means(points.loc[valid.index], objectives)
    front = pareto_front(data, minimise=["latency_ms"], maximise=["accuracy_integer"]).sort_values(
        "latency_ms"
    )
    knee = knee_point(data, minimise=["latency_ms"], maximise=["accuracy_integer"])
    data = data.assign(on_front=data.index.isin(front.index), is_knee=data.index == knee.name)
    scale, unit = _unit(data["latency_ms"].max(), {1e3: "s", 1: "ms", 1e-3: "µs"})
    x, y = front["latency_ms"].to_numpy() / scale, 100 * front["accuracy_integer"].to_numpy()
    with style():
        figure = new_figure(COLUMN_INCHES, 2.9)
        axes = figure.subplots()
        for i, (block, group) in enumerate(_by_block(data)):
            marker, color = marker_and_color(i)
            place = group["latency_ms"] / scale, 100 * group["accuracy_integer"]
            raster = len(data) > _RASTER_ABOVE
            axes.plot(*place, marker=marker, color=color, label=_block_text(block), rasterized=raster, **_DOT)
        axes.step(x, y, where="post", color="black", linewidth=0.8, zorder=1.5, label="front")
        ring: dict[str, Any] = {
            "markerfacecolor": "none",
            "markeredgecolor": "black",
            "markersize": 9,
            "linestyle": "none",
        }
        axes.plot(
            knee["latency_ms"] / scale, 100 * knee["accuracy_integer"], marker="o", label="knee", **ring
        )
        if data["latency_ms"].max() > 5 * data["latency_ms"].min():
            axes.set_xscale("log")
            _plain_log_ticks(axes.xaxis)
        axes.margins(0.1)
        axes.set_xlabel(f"Latency ({unit})")
        axes.set_ylabel("Top-1 accuracy, 8-bit integer (%)")
        axes.grid(True)
        _legend(figure, "outside upper center", axes.get_legend_handles_labels()[0], columns=4)
        labels = [f"p {row.pruned:g}, u {row.unified:g}" for row in front.itertuples()]
        cloud = data["latency_ms"].to_numpy() / scale, 100 * data["accuracy_integer"].to_numpy()
        steps = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
        _label_points(axes, x, y, labels, avoid=[cloud, _filled(*steps)])
    caption = (
        "Accuracy of the integer model against latency. No point is both faster and more accurate than one on the "
        "front; its knee is circled."
    )
    return Plot("pareto", "Accuracy against latency", caption, figure, data)


def _filled(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points along a line, close enough that no label slips between them."""
    places = np.linspace(0, len(x) - 1, 40 * len(x))
    return np.interp(places, np.arange(len(x)), x), np.interp(places, np.arange(len(y)), y)


_LABEL_PLACES = [
    (dx * reach, dy * reach, ha, va)
    for reach in (6, 10)
    for dx, dy, ha, va in (
        (1, 0, "left", "center"),
        (-1, 0, "right", "center"),
        (0, 1, "center", "bottom"),
        (0, -1, "center", "top"),
        (0.7, 0.7, "left", "bottom"),
        (0.7, -0.7, "left", "top"),
        (-0.7, 0.7, "right", "bottom"),
        (-0.7, -0.7, "right", "top"),
    )
]


def _label_points(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    texts: Sequence[str],
    avoid: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> None:
    """Write a text beside each point where there is room: off all points, lines and other texts, inside the axes.

    A point without room gets none; the figure's data names them all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = axes.get_figure(root=True)
    assert figure is not None
    assert isinstance(figure.canvas, FigureCanvasAgg)
    figure.draw_without_rendering()  # settles the layout, so that places on the page are final
    renderer = figure.canvas.get_renderer()
    obstacles = np.concatenate(
        [axes.transData.transform(np.column_stack([xs, ys])) for xs, ys in [(x, y), *avoid]]
    )
    margin = 2.5 / 72 * figure.dpi
    taken: list[Bbox] = []
    seen: set[tuple[float, float, str]] = set()
    for px, py, text in zip(x, y, texts, strict=True):
        if (px, py, text) in seen:
            continue
        seen.add((px, py, text))
        label = axes.annotate(text, (px, py), (0, 0), textcoords="offset points", fontsize=7)
        for dx, dy, ha, va in _LABEL_PLACES:
            label.set(position=(dx, dy), ha=ha, va=va)
            box = label.get_window_extent(renderer)
            padded = box.padded(margin)
            inside = np.all(padded.min >= axes.bbox.min) and np.all(padded.max <= axes.bbox.max)
            if inside and not box.count_overlaps(taken) and not _holds_any(padded, obstacles):
                taken.append(box)
                break
        else:
            label.remove()


def _holds_any(box: Bbox, places: NDArray[np.float64]) -> bool:
    return bool(((places > box.min) & (places < box.max)).all(axis=1).any())


# Checks and small parts -----------------------------------------------------------------------------------------


def _valid(points: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The columns of the points that have a result."""
    _need(points, columns, "points")
    if "error" in points:
        points = points[points["error"].isna()]
    if points.empty:
        raise InputError("points", Problem("", "no point with a result, nothing to draw"))
    missing = points[columns].isna().sum()
    problems = [
        Problem(str(column), f"{count} of {len(points)} values are missing", "leave those points out")
        for column, count in missing[missing > 0].items()
    ]
    if problems:
        raise InputError("points", problems)
    return points[columns]


def _need(frame: pd.DataFrame, columns: list[str], source: str) -> None:
    names = [str(name) for name in frame.columns]
    problems = [
        Problem(name, "no such column", nearest_name(name, names)) for name in columns if name not in names
    ]
    if problems:
        raise InputError(source, problems)


def _check_one(points: pd.DataFrame, columns: list[str]) -> None:
    """Refuse to draw several networks or machines as if they were one."""
    problems = [
        Problem(name, f"{points[name].nunique()} values", f'choose one: points[points["{name}"] == ...]')
        for name in columns
        if points[name].nunique(dropna=False) > 1
    ]
    if problems:
        raise InputError("points", problems)


def _check_fractions(points: pd.DataFrame, columns: list[str]) -> None:
    problems = [
        Problem(name, f"{points[name].max():g}; an accuracy is a share between 0 and 1")
        for name in columns
        if not points[name].between(0, 1).all()
    ]
    if problems:
        raise InputError("points", problems)


def _over_seeds(
    points: pd.DataFrame, by: list[str], columns: list[str], *, may_miss: bool = False
) -> pd.DataFrame:
    """Mean (under the column's own name), least and most over the seeds of each configuration, blocks by size.

    With ``may_miss`` single values may be missing; a configuration without any stays so.
    """
    identity = ["key", "network", "machine", "seed", *_CONFIGURATION]
    _need(points, columns, "points")
    valid = points.loc[_valid(points, identity if may_miss else [*identity, *columns]).index]
    if valid[columns].isna().all(axis=None):
        raise InputError("points", Problem(", ".join(columns), "every value is missing, nothing to draw"))
    _check_one(valid, [name for name in identity_columns(points) if name not in _CONFIGURATION])
    repeated = int(valid.duplicated([*_CONFIGURATION, "seed"]).sum())
    if repeated:
        found = f"{repeated} points share block, ratios, hold and seed with another"
        raise InputError("points", Problem("", found, "every point once"))
    one_each = valid.drop_duplicates([*by, "seed"])  # weights are the same for every way to hold the machine
    named = {f"{name}{end}": (name, how) for name in columns for end, how in _SPREAD.items()}
    frame = one_each.groupby(by, as_index=False).agg(seeds=("seed", "nunique"), **named)
    frame = frame.assign(block_size=frame["block_rows"] * frame["block_columns"])
    order = ["block_size", "block_rows", "pruned", "unified", *(["hold"] if "hold" in by else [])]
    return frame.sort_values(order, ignore_index=True).drop(columns="block_size")


_SPREAD = {"": "mean", "_min": "min", "_max": "max"}


def _by_block(data: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """``(block, rows)`` by size of the block, then by its rows."""
    shapes = data[["block", "block_rows", "block_columns"]].drop_duplicates()
    shapes = shapes.assign(size=shapes["block_rows"] * shapes["block_columns"])
    blocks = shapes.sort_values(["size", "block_rows"])["block"]
    return [(block, data[data["block"] == block]) for block in blocks]


def _block_text(block: object) -> str:
    return str(block).replace("x", "×")


def _plain_log_ticks(axis: Any) -> None:
    """Ticks at 1, 2, 5 of each decade, written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _line(label: str, **look: Any) -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def _marker(index: int, label: str) -> Artist:
    marker, color = marker_and_color(index)
    return _line(label, marker=marker, color=color, linestyle="none")


def _patch(label: str, color: str, hatch: str = "") -> Artist:
    from matplotlib.patches import Patch

    return Patch(
        facecolor=color, edgecolor="black" if hatch else color, label=label, hatch=hatch, linewidth=0.4
    )


def _legend(
    figure: Figure,
    place: Literal["outside upper center", "outside lower center"],
    handles: Sequence[Artist],
    columns: int,
) -> None:
    figure.legend(handles=list(handles), loc=place, ncols=min(columns, len(handles)))
