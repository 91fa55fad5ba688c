"""Clouds of points with what bounds them: roofline, Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from sweeps.figures.base import (
    CONFIGURATION,
    DOT,
    RASTER_ABOVE,
    Plot,
    add_legend,
    best_unit,
    block_text,
    by_block,
    check_fractions,
    check_one,
    need_columns,
    plain_log_ticks,
    with_result,
)
from sweeps.figures.labels import label_points
from sweeps.pareto import knee_point, pareto_front
from sweeps.style import COLUMN_INCHES, marker_and_color, new_figure, style
from sweeps.summary import configuration_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["pareto_plot", "roofline_plot"]


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
    need_columns(layers, columns, "layers")
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
            axes.plot(*place, marker=marker, color=color, label=f"{bound} bound", **DOT)
        axes.set_xlabel("MACs per DRAM byte")
        axes.set_ylabel("Effective throughput (GMAC/s)")
        axes.grid(True)
        add_legend(figure, "outside upper center", axes.get_legend_handles_labels()[0], columns=2)
        label_points(axes, x, y, data["layer"].tolist(), avoid=roofs)
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


@dataclass(frozen=True)
class _Objective:
    """What a front may weigh latency against: its axis, its factor, and whether more is better."""

    label: str
    scale: float
    more_is_better: bool
    title: str


_OBJECTIVES = {
    "accuracy_integer": _Objective("Top-1 accuracy, 8-bit integer (%)", 100, True, "Accuracy"),
    "energy_pj": _Objective("Energy per inference (µJ)", 1e-6, False, "Energy"),
    "area_mm2": _Objective("Area (mm²)", 1, False, "Area"),
}


def pareto_plot(
    points: pd.DataFrame, against: Literal["accuracy_integer", "energy_pj", "area_mm2"] = "accuracy_integer"
) -> Plot:
    """Accuracy of the integer model (or energy, or area) against latency, with the Pareto front and its knee.

    Parameters
    ----------
    points : DataFrame
        The ``points`` of one network, on any machines; of several seeds the mean.
    against : {"accuracy_integer", "energy_pj", "area_mm2"}

    Raises
    ------
    InputError
        A column or value is missing, there are no points, or they are of several networks.
    """
    objective = _OBJECTIVES[against]
    valid = with_result(points, ["network", "machine", "seed", *CONFIGURATION, "latency_ms", against])
    if against == "accuracy_integer":
        check_fractions(valid, [against])
    check_one(valid, ["network"])
    data = configuration_means(points.loc[valid.index], ["latency_ms", against])
    goals: dict[str, list[str]] = (
        {"minimise": ["latency_ms"], "maximise": [against]}
        if objective.more_is_better
        else {"minimise": ["latency_ms", against]}
    )
    front = pareto_front(data, **goals).sort_values("latency_ms")
    knee = knee_point(data, **goals)
    data = data.assign(on_front=data.index.isin(front.index), is_knee=data.index == knee.name)
    scale, unit = best_unit(data["latency_ms"].max(), {1e3: "s", 1: "ms", 1e-3: "µs"})
    x, y = front["latency_ms"].to_numpy() / scale, objective.scale * front[against].to_numpy()
    with style():
        figure = new_figure(COLUMN_INCHES, 2.9)
        axes = figure.subplots()
        for i, (block, group) in enumerate(by_block(data)):
            marker, color = marker_and_color(i)
            place = group["latency_ms"] / scale, objective.scale * group[against]
            raster = len(data) > RASTER_ABOVE
            axes.plot(*place, marker=marker, color=color, label=block_text(block), rasterized=raster, **DOT)
        axes.step(x, y, where="post", color="black", linewidth=0.8, zorder=1.5, label="front")
        ring: dict[str, Any] = {
            "markerfacecolor": "none",
            "markeredgecolor": "black",
            "markersize": 9,
            "linestyle": "none",
        }
        axes.plot(
            knee["latency_ms"] / scale, objective.scale * knee[against], marker="o", label="knee", **ring
        )
        if data["latency_ms"].max() > 5 * data["latency_ms"].min():
            axes.set_xscale("log")
            plain_log_ticks(axes.xaxis)
        axes.margins(0.1)
        axes.set_xlabel(f"Latency ({unit})")
        axes.set_ylabel(objective.label)
        axes.grid(True)
        add_legend(figure, "outside upper center", axes.get_legend_handles_labels()[0], columns=4)
        labels = [f"p {row.pruned:g}, u {row.unified:g}" for row in front.itertuples()]
        if len(set(labels)) > 1 or len(front) == 1:  # else it is the machine that moves along the front
            cloud = data["latency_ms"].to_numpy() / scale, objective.scale * data[against].to_numpy()
            steps = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
            label_points(axes, x, y, labels, avoid=[cloud, _filled(*steps)])
    what, better = (
        ("Accuracy of the integer model", "more accurate")
        if objective.more_is_better
        else (objective.title, "lower")
    )
    caption = f"{what} against latency. No point is both faster and {better} than one on the front; its knee is circled."
    name = "pareto" if against == "accuracy_integer" else f"pareto-{objective.title.lower()}"
    return Plot(name, f"{objective.title} against latency", caption, figure, data)


def _filled(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points along a line, close enough that no label slips between them."""
    places = np.linspace(0, len(x) - 1, 40 * len(x))
    return np.interp(places, np.arange(len(x)), x), np.interp(places, np.arange(len(y)), y)
