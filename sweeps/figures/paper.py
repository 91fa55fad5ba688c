"""The whole set of figures of a sweep, network by network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from hwsim.errors import InputError, Problem
from sweeps.figures.bars import energy_plot, storage_plot
from sweeps.figures.base import CONFIGURATION, Plot
from sweeps.figures.dots import accuracy_plot, bandwidth_plot, ratio_plot, speedup_plot
from sweeps.figures.fronts import pareto_plot, roofline_plot
from sweeps.points import choose_point
from sweeps.summary import identity_columns

__all__ = ["paper_figures"]


def paper_figures(tables: Mapping[str, pd.DataFrame]) -> list[Plot]:
    """Every figure that the results have the columns for.

    Where machines or settings vary, figures of block shapes and ratios show them as at the best point (the fastest within a
    point of the dense accuracy, else the fastest); their captions say which. Fronts show all points.

    Parameters
    ----------
    tables : mapping
        ``points``, ``layers``, ``energy`` and ``storage`` of a result store.

    Raises
    ------
    InputError
        No point has a result.
    """
    points = tables["points"]
    done = points[points["error"].isna()]
    if done.empty:
        raise InputError("points", Problem("", "no point with a result, nothing to draw"))
    plots = []
    for network, group in done.groupby("network", sort=False):
        drawn = _of_network(group, tables)
        if done["network"].nunique() > 1:
            drawn = [
                replace(plot, name=f"{plot.name}-{network}", title=f"{plot.title}, {network}")
                for plot in drawn
            ]
        plots += drawn
    return plots


def _of_network(points: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> list[Plot]:
    best = choose_point(points, "best")
    slice_, setting = _at_setting_of(best, points)
    trained = slice_[slice_["accuracy_integer"].notna()]
    plots = [speedup_plot(slice_), bandwidth_plot(slice_)]
    if len(trained):
        plots += [ratio_plot(trained), accuracy_plot(trained)]
    plots.append(storage_plot(slice_, tables["storage"]))
    plots.append(energy_plot(slice_, tables["energy"]))
    layers = tables["layers"]
    plots.append(
        roofline_plot(
            layers[layers["key"] == best["key"]],
            clock_mhz=float(best["clock_mhz"]),
            peak_gmac_per_s={"dense": float(best["peak_gmac_per_s"])},
            dram_gb_per_s=float(best["dram_gb_per_s"]),
        )
    )
    plots = [replace(plot, caption=plot.caption + setting) for plot in plots]
    all_trained = points[points["accuracy_integer"].notna()]
    if len(all_trained):
        plots.append(pareto_plot(all_trained))
    plots.append(pareto_plot(points, "energy_pj"))
    if points["area_mm2"].nunique() > 1:
        plots.append(pareto_plot(points, "area_mm2"))
    return plots


def _at_setting_of(best: pd.Series, points: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The points that share the machine and the settings of one, and what to say of it."""
    names = [name for name in identity_columns(points) if name not in (*CONFIGURATION, "network")]
    varied = [name for name in names if points[name].nunique(dropna=False) > 1]
    for name in varied:
        same = points[name].isna() if pd.isna(best[name]) else points[name] == best[name]
        points = points[same]
    shown = ", ".join(f"{name} {_plain(best[name])}" for name in varied)
    return points, f" At {shown}." if shown else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
