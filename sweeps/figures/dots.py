"""Figures with a dot or a line per configuration: speed-up, bandwidth and accuracy against block shape and ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sweeps.figures.base import (
    CONFIGURATION,
    DOT,
    HOLD_TEXT,
    WEIGHTS,
    Plot,
    add_legend,
    block_text,
    by_block,
    check_fractions,
    line_handle,
    marker_handle,
    over_seeds,
    plain_log_ticks,
)
from sweeps.style import COLUMN_INCHES, NEUTRAL, PAGE_INCHES, marker_and_color, new_figure, style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_plot", "bandwidth_plot", "ratio_plot", "speedup_plot"]

_MOST_DOTS_ABREAST = 36
_DASHES = ("-", "--", "-.", (0, (1, 1)))


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
    data = over_seeds(points, CONFIGURATION, list(panels), may_miss=True)
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
    data = over_seeds(points, CONFIGURATION, list(panels))
    figure = _dot_grid(data, panels, "DRAM bandwidth (GB/s)")
    caption = (
        "DRAM bandwidth by block shape: the average over the network's latency, the highest flow of any step, and "
        "what the most demanding layer would need so that no pass waits. p and u are the shares of pruned and of "
        "unified blocks."
    )
    return Plot("bandwidth", "DRAM bandwidth against block shape and ratio", caption, figure, data)


def accuracy_plot(points: pd.DataFrame) -> Plot:
    """Accuracy against compression, of the float and of the 8-bit integer model.

    Input and errors as `speedup_plot`.
    """
    accuracies = ["accuracy_float", "accuracy_integer", "accuracy_dense_float"]
    data = over_seeds(points, WEIGHTS, ["compression_vs_fp32", *accuracies])
    check_fractions(data, accuracies)
    with style():
        figure = new_figure(COLUMN_INCHES, 2.9)
        axes = figure.subplots()
        axes.axhline(100 * data["accuracy_dense_float"].mean(), color=NEUTRAL, linestyle=":", zorder=1)
        handles = [_accuracy_lines(axes, i, block, group) for i, (block, group) in enumerate(by_block(data))]
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.set_xlabel("Compression against fp32 (×)")
        axes.set_ylabel("Top-1 accuracy (%)")
        axes.grid(True)
        add_legend(figure, "outside upper center", handles, columns=5)
        models = [
            line_handle("float", color="black", marker="o"),
            line_handle("8-bit integer", color="black", marker="o", linestyle="--", markerfacecolor="white"),
            line_handle("dense, float", color=NEUTRAL, linestyle=":"),
        ]
        add_legend(figure, "outside lower center", models, columns=3)
    caption = (
        "Top-1 accuracy on the test images against the size of the memory image relative to fp32 weights; a line "
        "per block shape. Filled: the float model. Hollow: the integer model, as the machine computes it."
    )
    return Plot("accuracy", "Accuracy against compression", caption, figure, data)


def ratio_plot(points: pd.DataFrame) -> Plot:
    """Accuracy of the integer model against the ratios: a line per block shape, a dash per share left dense.

    Input and errors as `speedup_plot`.
    """
    accuracies = ["accuracy_integer", "accuracy_dense_float"]
    data = over_seeds(points, WEIGHTS, accuracies)
    check_fractions(data, accuracies)
    data = data.assign(dense=(1 - data["pruned"] - data["unified"]).round(9))
    shares = sorted(data["dense"].unique())
    dashes = {share: _DASHES[i % len(_DASHES)] for i, share in enumerate(shares)}
    with style():
        figure = new_figure(COLUMN_INCHES, 2.9)
        axes = figure.subplots()
        axes.axhline(100 * data["accuracy_dense_float"].mean(), color=NEUTRAL, linestyle=":", zorder=1)
        handles = []
        for i, (block, group) in enumerate(by_block(data)):
            marker, color = marker_and_color(i)
            handles.append(line_handle(block_text(block), color=color, marker=marker))
            for share, part in group.groupby("dense"):
                x, y = 100 * part["pruned"], 100 * part["accuracy_integer"]
                axes.plot(x, y, marker=marker, color=color, linestyle=dashes[share])
                low, high = 100 * part["accuracy_integer_min"], 100 * part["accuracy_integer_max"]
                axes.vlines(x, low, high, color=color, linewidth=0.8)
        axes.set_xlabel("Share of the blocks that is pruned, p (%)")
        axes.set_ylabel("Top-1 accuracy, 8-bit integer (%)")
        axes.grid(True)
        add_legend(figure, "outside upper center", handles, columns=5)
        below = [
            line_handle(f"{100 * share:g} % left dense", color="black", linestyle=dashes[share])
            for share in shares[: len(_DASHES)]
        ]
        below.append(line_handle("uncompressed, float", color=NEUTRAL, linestyle=":"))
        add_legend(figure, "outside lower center", below, columns=2)
    caption = (
        "Top-1 accuracy of the 8-bit integer model against the share of pruned blocks; what is neither pruned nor left "
        "dense is unified. A line per block shape."
    )
    return Plot("ratio", "Accuracy against ratio", caption, figure, data)


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
    return line_handle(block_text(block), color=color, marker=marker)


def _dot_grid(
    data: pd.DataFrame, panels: Mapping[str, str], quantity: str, reference: float | None = None
) -> Figure:
    """Block shapes along x, ratios as markers beside each other; a panel per column of ``panels`` and per hold."""
    holds = [hold for hold in HOLD_TEXT if hold in set(data["hold"])]
    blocks = [block for block, _ in by_block(data)]
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
            axes.set_title(f"{panels[column]}, {HOLD_TEXT[hold]}")
            axes.set_xticks(range(len(blocks)), [block_text(block) for block in blocks])
            axes.grid(True, axis="y")
        highest = max(reference or 0.0, float(np.nanmax(data[[f"{column}_max" for column in panels]])))
        grid[0].set_ylim(0, 1.08 * highest)  # the panels share their axes
        figure.supylabel(quantity, fontsize=8)
        figure.supxlabel("Block shape (output channels × reduction positions)", fontsize=8)
        handles = [
            marker_handle(i, f"p {pruned:g}, u {unified:g}") for i, (pruned, unified) in enumerate(ratios)
        ]
        add_legend(figure, "outside upper center", handles, columns=6)
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
        axes.plot(x, part[column], marker=marker, color=color, **DOT)
    for edge in np.arange(len(blocks) - 1) + 0.5:
        axes.axvline(edge, color="#D9D9D9", linewidth=0.5)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
