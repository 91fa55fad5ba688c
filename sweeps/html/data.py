"""What the report page shows of the points: columns with heads, units and formats, marks of the front, values for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from sweeps.pareto import knee_point, pareto_front
from sweeps.summary import configuration_means, identity_columns

__all__ = ["MARKS", "Column", "front_goals", "front_marks", "payload", "shown_columns", "text_of", "varying"]

MARKS = ("knee", "front", "")
"""A point is the knee of its network's front, on the front, or neither."""
_MOST_FILTER_VALUES = 40


@dataclass(frozen=True)
class Column:
    """A column of the page: source, head, the factor of its values, their digits, and which way is better.

    Attributes
    ----------
    name, head : str
    scale : float
    digits : int
        Decimals if ``fixed``, else significant digits.
    fixed : bool
    better : {"low", "high", ""}
    measured : bool
        A result; else it belongs to what identifies a point.
    """

    name: str
    head: str
    scale: float = 1.0
    digits: int = 4
    fixed: bool = False
    better: Literal["low", "high", ""] = ""
    measured: bool = False


def _measured(
    name: str,
    head: str,
    better: Literal["low", "high", ""],
    digits: int,
    *,
    fixed: bool = False,
    scale: float = 1,
) -> Column:
    return Column(name, head, scale, digits, fixed, better, measured=True)


_NAMED = (
    Column("network", "network"),
    Column("machine", "machine"),
    Column("block", "block"),
    Column("pruned", "p"),
    Column("unified", "u"),
    Column("hold", "fixed"),
    Column("seed", "seed"),
)
_MEASURED = (
    _measured("latency_ms", "latency (ms)", "low", 4),
    _measured("accuracy_integer", "accuracy, integer (%)", "high", 2, fixed=True, scale=100),
    _measured("accuracy_float", "accuracy, float (%)", "high", 2, fixed=True, scale=100),
    _measured("energy_pj", "energy (µJ)", "low", 4, scale=1e-6),
    _measured("speedup_compute_only", "speed-up, compute only", "high", 2, fixed=True),
    _measured("speedup_with_memory", "speed-up, with memory", "high", 2, fixed=True),
    _measured("speedup_equal_area", "speed-up, equal area", "high", 2, fixed=True),
    _measured("image_bytes", "image (KiB)", "low", 1, fixed=True, scale=1 / 1024),
    _measured("file_bytes", "file (KiB)", "low", 1, fixed=True, scale=1 / 1024),
    _measured("bits_per_weight", "bits per weight", "low", 3, fixed=True),
    _measured("compression_vs_fp32", "smaller than fp32 (×)", "high", 1, fixed=True),
    _measured("average_bandwidth_gb_per_s", "DRAM, average (GB/s)", "low", 3),
    _measured("peak_bandwidth_gb_per_s", "DRAM, peak (GB/s)", "low", 3),
    _measured("peak_demand_gb_per_s", "DRAM, demand (GB/s)", "low", 3),
    _measured("area_mm2", "area (mm²)", "low", 3),
)


def shown_columns(points: pd.DataFrame) -> list[Column]:
    """The columns that a table of points may show."""
    named = {column.name for column in _NAMED} | {"block_rows", "block_columns"}
    others = [Column(name, name) for name in identity_columns(points) if name not in named]
    columns = [column for column in (*_NAMED, *others, *_MEASURED) if column.name in points]
    if points["latency_ms"].max() < 1:
        place = next(i for i, column in enumerate(columns) if column.name == "latency_ms")
        columns[place] = replace(columns[place], head="latency (µs)", scale=1e3)
    return columns


def varying(points: pd.DataFrame) -> tuple[list[Column], list[Column]]:
    """Columns that differ from point to point or are results, and those that are the same in all points."""
    columns = [column for column in shown_columns(points) if points[column.name].notna().any()]
    same = [
        column for column in columns if not column.measured and points[column.name].nunique(dropna=False) == 1
    ]
    return [column for column in columns if column not in same], same


def text_of(value: Any, column: Column) -> str:
    """A cell as people read it; the script of the page formats alike."""
    if pd.isna(value):
        return "–"
    if isinstance(value, str):
        return value.replace("x", "×") if column.name == "block" else value
    if isinstance(value, bool):
        return str(value)
    scaled = value * column.scale
    if column.fixed:
        return f"{scaled:.{column.digits}f}"
    return f"{float(f'{scaled:.{column.digits}g}'):.15g}"


def front_goals(points: pd.DataFrame) -> tuple[dict[str, list[str]], str]:
    """What the front of the page weighs, and the words for it: without accuracies energy takes their place."""
    if "accuracy_integer" in points and points["accuracy_integer"].notna().all():
        goals = {"minimise": ["latency_ms"], "maximise": ["accuracy_integer"]}
        return goals, "accuracy (8-bit integer) against latency"
    return {"minimise": ["latency_ms", "energy_pj"]}, "energy against latency"


def front_marks(points: pd.DataFrame) -> pd.Series:
    """Per point the index in `MARKS` of its configuration, among those of its network; means over seeds count."""
    goals, _ = front_goals(points)
    names = [name for columns in goals.values() for name in columns]
    configuration = points.groupby(identity_columns(points), dropna=False, sort=False).ngroup()
    marks = pd.Series(MARKS.index(""), index=points.index)
    means = configuration_means(points, names)  # in the order of the group numbers
    for _, group in means.groupby("network"):
        marks[configuration.isin(pareto_front(group, **goals).index)] = MARKS.index("front")
        marks[configuration == knee_point(group, **goals).name] = MARKS.index("knee")
    return marks


def payload(
    points: pd.DataFrame, columns: Sequence[Column], keys: Sequence[str], links: Sequence[str]
) -> str:
    """The points as JSON for the page's script, column by column; no ``<`` in it, so that no text ends the script.

    Parameters
    ----------
    points : DataFrame
        With a column ``mark`` (index in `MARKS`).
    columns : sequence of Column
    keys, links : sequence of str
        Per point its short key, and the address of its page ("" for none).
    """
    data = {
        "keys": list(keys),
        "links": list(links),
        "marks": points["mark"].tolist(),
        "columns": [_column_data(points[column.name], column) for column in columns],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _column_data(values: pd.Series, column: Column) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": column.name,
        "head": column.head,
        "digits": column.digits,
        "fixed": column.fixed,
        "better": column.better,
        "measured": column.measured,
        "filter": not column.measured and values.nunique() <= _MOST_FILTER_VALUES,
    }
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        scaled = values.astype(float) * column.scale
        numbers = [None if value != value else _short(value) for value in scaled.tolist()]
        return about | {"values": numbers}
    texts = [text_of(value, column) for value in values]
    levels = list(dict.fromkeys(texts))
    place = {text: index for index, text in enumerate(levels)}
    return about | {"levels": levels, "values": [place[text] for text in texts]}


def _short(value: float) -> float | int:
    """Seven digits: more than the table shows, and less than half the bytes of all of them."""
    rounded = float(f"{value:.7g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 2**53 else rounded
