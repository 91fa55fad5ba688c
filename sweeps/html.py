"""One self-contained HTML page on a sweep: no network, no script or font from elsewhere, readable on paper."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hwsim.errors import InputError, Problem
from hwsim.files import write_atomically
from sweeps.figures import Plot, to_svg
from sweeps.pareto import knee_point, pareto_front
from sweeps.summary import configuration_means, identity_columns, summarise

__all__ = ["MOST_ROWS", "render_report", "write_report"]

MOST_ROWS = 2000
"""Rows of the table; beyond it the page gets slow, and the Parquet files are the better place to look."""


@dataclass(frozen=True)
class _Column:
    """A column of the page's table: source, head, and what a value is multiplied by and formatted with."""

    name: str
    head: str
    scale: float = 1.0
    format: str = "{:.3g}"


_NAMED = (
    _Column("network", "network"),
    _Column("machine", "machine"),
    _Column("block", "block"),
    _Column("pruned", "p", format="{:g}"),
    _Column("unified", "u", format="{:g}"),
    _Column("hold", "fixed"),
    _Column("seed", "seed", format="{:.0f}"),
)
_MEASURED = (
    _Column("accuracy_float", "accuracy, float (%)", 100, "{:.2f}"),
    _Column("accuracy_integer", "accuracy, integer (%)", 100, "{:.2f}"),
    _Column("latency_ms", "latency (ms)", format="{:.4g}"),
    _Column("speedup_compute_only", "speed-up, compute only", format="{:.2f}"),
    _Column("speedup_with_memory", "speed-up, with memory", format="{:.2f}"),
    _Column("speedup_equal_area", "speed-up, equal area", format="{:.2f}"),
    _Column("energy_pj", "energy (µJ)", 1e-6, "{:.4g}"),
    _Column("image_bytes", "image (KiB)", 1 / 1024, "{:.1f}"),
    _Column("file_bytes", "file (KiB)", 1 / 1024, "{:.1f}"),
    _Column("bits_per_weight", "bits per weight", format="{:.3f}"),
    _Column("compression_vs_fp32", "smaller than fp32 (×)", format="{:.1f}"),
    _Column("average_bandwidth_gb_per_s", "DRAM, average (GB/s)"),
    _Column("peak_bandwidth_gb_per_s", "DRAM, peak (GB/s)"),
    _Column("peak_demand_gb_per_s", "DRAM, demand (GB/s)"),
    _Column("area_mm2", "area (mm²)"),
)


def render_report(
    *,
    title: str,
    points: pd.DataFrame,
    plots: Sequence[Plot],
    manifest: Mapping[str, Any],
    assumptions: str,
) -> str:
    """The page as HTML.

    Parameters
    ----------
    title : str
    points : DataFrame
        The ``points`` table of a result store.
    plots : sequence of Plot
    manifest : mapping
        Of the result store: its runs with resolved configuration and versions.
    assumptions : str
        The text on what the model takes for granted.

    Raises
    ------
    InputError
        A column is missing, or there are no points.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if points.empty:
        raise InputError("points", Problem("", "no points, there is nothing to report"))
    sentences = summarise(points)
    failed = points[points["error"].notna()] if "error" in points else points.iloc[:0]
    done = points.drop(failed.index)
    environment = Environment(
        loader=PackageLoader("sweeps"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=title,
        sentences=sentences,
        constants=_constants(done),
        table=_table(done),
        point_count=len(done),
        failed=[(_name(row), row["error"]) for _, row in failed.iterrows()],
        figures=[(plot, base64.b64encode(to_svg(plot)).decode()) for plot in plots],
        runs=[
            (run["started"], json.dumps(run["configuration"], indent=2, ensure_ascii=False), run["versions"])
            for run in manifest["runs"]
        ],
        assumptions=assumptions,
    )


def write_report(path: str | Path, **content: Any) -> Path:
    """Write the page of `render_report` (same arguments); a crash leaves the old page or the whole new one.

    Raises
    ------
    InputError
        As `render_report`.
    HwsimError
        The disk is full or the folder cannot be written.
    """
    write_atomically(Path(path), render_report(**content).encode())
    return Path(path)


def _columns(points: pd.DataFrame) -> list[_Column]:
    named = {column.name for column in _NAMED} | {"block_rows", "block_columns"}
    others = [_Column(name, name, format="{:g}") for name in identity_columns(points) if name not in named]
    return [column for column in (*_NAMED, *others, *_MEASURED) if column.name in points]


def _is_constant(points: pd.DataFrame, column: _Column) -> bool:
    return column not in _MEASURED and points[column.name].nunique(dropna=False) == 1


def _constants(points: pd.DataFrame) -> list[tuple[str, str]]:
    """What is the same in every row: told once, above the table."""
    constant = [column for column in _columns(points) if _is_constant(points, column)]
    return [(column.head, _text(points[column.name].iloc[0], column)) for column in constant]


def _table(points: pd.DataFrame) -> dict[str, Any]:
    """Heads, and rows of a mark (on the front, or its knee) and of ``(text, value to sort by)``."""
    columns = [
        column
        for column in _columns(points)
        if not _is_constant(points, column) and points[column.name].notna().any()
    ]
    marked = points.assign(mark=_marks(points)).sort_values(["mark", "latency_ms"], kind="stable")
    rows = [
        (
            _MARKS[row["mark"]],
            [(_text(row[column.name], column), _sort_value(row[column.name])) for column in columns],
        )
        for _, row in marked.head(MOST_ROWS).iterrows()
    ]
    return {"heads": [column.head for column in columns], "rows": rows}


_MARKS = ("knee", "front", "")


def _marks(points: pd.DataFrame) -> pd.Series:
    """Per point the index in `_MARKS` of its configuration, among those of its network."""
    configuration = points.groupby(identity_columns(points), dropna=False, sort=False).ngroup()
    marks = pd.Series(_MARKS.index(""), index=points.index)
    if "accuracy_integer" not in points or points["accuracy_integer"].isna().any():
        return marks
    means = configuration_means(
        points, ["latency_ms", "accuracy_integer"]
    )  # in the order of the group numbers
    for _, group in means.groupby("network"):
        front = pareto_front(group, minimise=["latency_ms"], maximise=["accuracy_integer"])
        knee = knee_point(group, minimise=["latency_ms"], maximise=["accuracy_integer"])
        marks[configuration.isin(front.index)] = _MARKS.index("front")
        marks[configuration == knee.name] = _MARKS.index("knee")
    return marks


def _text(value: Any, column: _Column) -> str:
    if pd.isna(value):
        return "–"
    if isinstance(value, str | bool):
        return str(value).replace("x", "×") if column.name == "block" else str(value)
    return column.format.format(value * column.scale)


def _sort_value(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _name(row: pd.Series) -> str:
    ratios = f"p {row['pruned']:g}, u {row['unified']:g}"
    return f"{row['network']}, {row['block']}, {ratios}, {row['hold']} fixed, seed {row['seed']}"
