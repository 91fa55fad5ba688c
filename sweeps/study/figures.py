"""Accuracy against bytes, one point per method, block shape and compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from sweeps.figures.base import Plot
from sweeps.study.rows import Row
from sweeps.study.runs import METHODS
from sweeps.style import NEUTRAL, PAGE_INCHES, marker_and_color, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["tradeoff_plot"]

_DROPPED = ("dense", "start")


def tradeoff_plot(rows: Sequence[Row], name: str, title: str) -> Plot | None:
    """Accuracy against bytes of the file with 95 % intervals; None where no compressed network is there yet.

    Parameters
    ----------
    rows : sequence of Row
        Of one task.
    name, title : str
    """
    records = [
        {
            "method": METHODS[row.run.method].label,
            "block": row.run.shape,
            "point": row.run.point,
            "file_kilobytes": row.mean_bytes / 1000,
            "accuracy_percent": row.quality.mean,
            "half_interval_points": row.quality.half_width,
            "n": row.quality.n,
        }
        for row in rows
        if row.quality is not None and row.run.method not in _DROPPED
    ]
    if not records:
        return None
    data = pd.DataFrame(records)
    dense = next((row.quality for row in rows if row.run.method == "dense" and row.quality is not None), None)
    first = [row.run.shape for row in rows if row.run.shape][:1] or [""]
    of_methods = data[data["block"].isin(["", *first])]
    of_shapes = data[data["method"].isin([METHODS[name].label for name in ("joint", "budget")])]
    blocks = f", {first[0].replace('x', '×')} blocks" if first[0] else ""
    panels = [(f"methods{blocks}", of_methods)]
    if of_shapes["block"].nunique() > 1:
        panels.append(("block shapes", of_shapes))
    with style():
        figure = new_figure(PAGE_INCHES, 4.0)
        for axes, (about, part) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw(axes, part)
            if dense is not None:
                label = f"dense, fp32 (n = {dense.n})"
                axes.axhline(dense.mean, color=NEUTRAL, linestyle="--", label=label)
            axes.set_title(about)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        figure.axes[0].set_ylabel("accuracy (%)")
    counts = sorted(set(data["n"]))
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = f"Bars: 95 % intervals of the mean where there are 3 seeds or more; {seeds} seeds."
    return Plot(name, title, caption, figure, data)


def _draw(axes: Axes, data: pd.DataFrame) -> None:
    axes.grid(True)
    for index, ((method, block), group) in enumerate(data.groupby(["method", "block"], sort=False)):
        marker, color = marker_and_color(index)
        group = group.sort_values("file_kilobytes")
        # Two seeds give intervals ten times as wide as the figure.
        bars = group["half_interval_points"].astype(float).where(group["n"] > 2, 0.0).fillna(0.0)
        axes.errorbar(
            group["file_kilobytes"],
            group["accuracy_percent"],
            yerr=bars,
            marker=marker,
            color=color,
            linestyle="-" if len(group) > 1 else "none",
            linewidth=0.8,
            capsize=2,
            label=f"{method} {str(block).replace('x', '×')}".strip(),
        )
    axes.set_xscale("log")
    ticks = [tick for tick in (10, 20, 50, 100, 200, 500) if _within(tick, data["file_kilobytes"])]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes of the file (kB)")


def _within(tick: float, values: pd.Series) -> bool:
    return bool(values.min() / 1.5 <= tick <= values.max() * 1.5)
