"""The whole set of figures of a sweep, network by network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from hwsim.errors import InputError, Problem
from sweeps.figures.bars import energy_plot, storage_plot
from sweeps.figures.base import CONFIGURATION, Plot
from sweeps.figures.dots import accuracy_plot, bandwidth_plot, ratio_plot, speedup_plot
from sweeps.figures.fronts import pareto_plot, roofline_plot
from sweeps.points import choose_point
from sweeps.summary import identity_columns

__all__ = ["drawn_points", "paper_figures"]


def paper_figures(
    tables: Mapping[str, pd.DataFrame], progress: Callable[[int, int], None] | None = None
) -> list[Plot]:
    """Every figure that the results have the columns for.

    Where machines or settings vary, figures of block shapes and ratios show them as at the best point (the fastest within a
    point of the dense accuracy, else the fastest); their captions say which. Fronts show all points.

    Parameters
    ----------
    tables : mapping
        ``points``, ``layers``, ``energy`` and ``storage`` of a result store.
    progress : callable, optional
        Called with the figures that are done and those that there will be.

    Raises
    ------
    InputError
        No point has a result.
    """
    points = tables["points"]
    done = points[points["error"].isna()]
    if done.empty:
        raise InputError("points", Problem("", "no point with a result, nothing to draw"))
    groups = list(done.groupby("network", sort=False))
    drawings = [(str(network), draw) for network, group in groups for draw in _drawings(group, tables)]
    plots = []
    for network, draw in drawings:
        plot = draw()
        if len(groups) > 1:
            plot = replace(plot, name=f"{plot.name}-{network}", title=f"{plot.title}, {network}")
        plots.append(plot)
        if progress is not None:
            progress(len(plots), len(drawings))
    return plots


def drawn_points(points: pd.DataFrame) -> pd.DataFrame:
    """The points whose layers, energy and storage the figures show: those at the setting of the best of each network."""
    done = points[points["error"].isna()]
    groups = [group for _, group in done.groupby("network", sort=False)]
    return pd.concat([done.iloc[:0], *(_at_setting_of(choose_point(g, "best"), g)[0] for g in groups)])


def _drawings(points: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> list[Callable[[], Plot]]:
    """What draws the figures of one network, one by one."""
    best = choose_point(points, "best")
    shown, setting = _at_setting_of(best, points)
    trained = shown[shown["accuracy_integer"].notna()]
    all_trained = points[points["accuracy_integer"].notna()]
    layers = tables["layers"]

    def roofline() -> Plot:
        return roofline_plot(
            layers[layers["key"] == best["key"]],
            clock_mhz=float(best["clock_mhz"]),
            peak_gmac_per_s={"dense": float(best["peak_gmac_per_s"])},
            dram_gb_per_s=float(best["dram_gb_per_s"]),
        )

    at_setting: list[Callable[[], Plot]] = [partial(speedup_plot, shown), partial(bandwidth_plot, shown)]
    if len(trained):
        at_setting += [partial(ratio_plot, trained), partial(accuracy_plot, trained)]
    detailed = shown[shown["key"].isin(tables["storage"]["key"].unique())]
    if len(detailed):  # a store of very many points has totals only
        at_setting += [
            partial(storage_plot, detailed, tables["storage"]),
            partial(energy_plot, detailed, tables["energy"]),
        ]
    if (layers["key"] == best["key"]).any():
        at_setting.append(roofline)
    fronts: list[Callable[[], Plot]] = [partial(pareto_plot, all_trained)] if len(all_trained) else []
    fronts.append(partial(pareto_plot, points, "energy_pj"))
    if points["area_mm2"].nunique() > 1:
        fronts.append(partial(pareto_plot, points, "area_mm2"))
    return [*(partial(_with_setting, draw, setting) for draw in at_setting), *fronts]


def _with_setting(draw: Callable[[], Plot], setting: str) -> Plot:
    plot = draw()
    return replace(plot, caption=plot.caption + setting)


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
