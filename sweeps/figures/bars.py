"""Figures with a bar per configuration: storage by stream, energy by component."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from sweeps.figures.base import (
    CONFIGURATION,
    HOLD_TEXT,
    WEIGHTS,
    Plot,
    add_legend,
    best_unit,
    block_text,
    need_columns,
    over_seeds,
    patch_handle,
    with_result,
)
from sweeps.style import NEUTRAL, PAGE_INCHES, PALETTE, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["energy_plot", "storage_plot"]

_STREAM_TEXT = {
    "type": "block types",
    "sign": "signs",
    "magnitude": "magnitudes",
    "dense": "dense weights",
    "other": "offsets and other",
}
_MOST_BARS = 20
_MOST_COMPONENTS = 8


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
    totals = over_seeds(points, WEIGHTS, references)
    need_columns(storage, ["key", "stream", "size_bits"], "storage")
    stream = storage["stream"].where(storage["stream"].isin(list(_STREAM_TEXT)), "other")
    bits = storage.assign(stream=stream, size_bytes=storage["size_bits"] / 8)
    data = _parts_of(bits, points, WEIGHTS, "stream", ["size_bytes"])
    data = data.merge(totals[[*WEIGHTS, *references]], on=WEIGHTS)
    shown = _few(totals)
    scale, unit = best_unit(totals["image_bytes"].max(), {2**20: "MiB", 2**10: "KiB", 1: "bytes"})
    used = set(data.loc[data["size_bytes"] > 0, "stream"])
    streams = [name for name in _STREAM_TEXT if name in used]
    colors = dict(zip(_STREAM_TEXT, PALETTE, strict=False))
    with style():
        figure, axes = _bar_figure(shown, inches_per_bar=0.24)
        widths = _widths(data, shown, WEIGHTS, "stream", streams, "size_bytes") / scale
        _stack(axes, np.arange(len(shown)), widths, [colors[name] for name in streams], height=0.7)
        axes.set_xlabel(f"Memory image ({unit})")
        _text_column(axes, 0, "bits per\nweight", [f"{value:.2f}" for value in shown["bits_per_weight"]])
        for i, name in enumerate(("int8", "fp32")):
            ratio = shown[f"{name}_bytes"] / shown["image_bytes"]
            _text_column(axes, i + 1, f"smaller\nthan {name}", [f"{value:.1f}×" for value in ratio])
        add_legend(
            figure,
            "outside upper center",
            [patch_handle(_STREAM_TEXT[name], colors[name]) for name in streams],
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
    totals = over_seeds(points, CONFIGURATION, both)
    need_columns(energy, ["key", "component", "energy_pj"], "energy")
    if "dense_energy_pj" not in energy or energy["dense_energy_pj"].isna().any():
        whole = points[["key", "dense_energy_pj"]].assign(component="dense, total", energy_pj=0.0)
        energy = pd.concat([energy.assign(dense_energy_pj=0.0), whole])
    data = _parts_of(energy, points, CONFIGURATION, "component", both)
    components = data.groupby("component")[both].max().max(axis=1).sort_values(ascending=False).index.tolist()
    if len(components) > _MOST_COMPONENTS:
        components = [*components[: _MOST_COMPONENTS - 1], "other"]
    drawn = data.assign(component=data["component"].where(data["component"].isin(components), "other"))
    shown = _few(totals)
    scale, unit = best_unit(totals[both].to_numpy().max(), {1e9: "mJ", 1e6: "µJ", 1e3: "nJ", 1: "pJ"})
    colors = [NEUTRAL if name == "other" else color for name, color in zip(components, PALETTE, strict=False)]
    with style():
        figure, axes = _bar_figure(shown, inches_per_bar=0.34)
        for column, offset, hatch in (("energy_pj", -0.19, ""), ("dense_energy_pj", 0.19, "//////")):
            widths = _widths(drawn, shown, CONFIGURATION, "component", components, column) / scale
            _stack(axes, np.arange(len(shown)) + offset, widths, colors, height=0.34, hatch=hatch)
        axes.set_xlabel(f"Energy per inference ({unit})")
        ratio = shown["dense_energy_pj"] / shown["energy_pj"]
        _text_column(axes, 0, "less than\ndense", [f"{value:.1f}×" for value in ratio])
        handles = [
            patch_handle(_component_text(name), color) for name, color in zip(components, colors, strict=True)
        ]
        add_legend(
            figure,
            "outside upper center",
            [*handles, patch_handle("hatched: dense machine", "white", "//////")],
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
    keys = with_result(points, ["key", "seed", *CONFIGURATION]).drop_duplicates([*by, "seed"])
    missing = ~keys["key"].isin(details["key"].unique())
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
        f"{block_text(row.block)}, p {row.pruned:g}, u {row.unified:g}"
        + (f", {HOLD_TEXT[str(row.hold)]}" if holds else "")
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
