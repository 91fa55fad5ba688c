"""The part of the report page on single points: results, per-layer table, energy, storage, where the cycles went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from hwsim.tables import short_number
from sweeps.html.data import Column, text_of

if TYPE_CHECKING:
    from hwsim.explain import Explanation

__all__ = ["Detail", "Table", "point_detail"]

_LEAST_SHARE = 0.01
"""What is smaller than this share of a sum is shown together."""
_LAYER_HEADS = {
    "macs": "MACs",
    "latency_cycles": "cycles",
    "share": "% of all",
    "compute_cycles": "cycles of passes",
    "utilization": "rows busy in passes (%)",
    "bound": "bound by",
    "dram_bytes": "DRAM (bytes)",
    "bits_per_weight": "bits per weight",
    "energy_nj": "energy (nJ)",
}


@dataclass(frozen=True)
class Table:
    """A small table of the page: heads, and rows of ``(text, value to sort by)``."""

    caption: str
    heads: list[str]
    rows: list[list[tuple[str, str]]]


@dataclass(frozen=True)
class Detail:
    """One point at length.

    Attributes
    ----------
    key : str
        Short, unique in the page.
    name : str
        Its configuration in a line.
    mark : str
        One of `sweeps.html.data.MARKS`.
    results : list of (str, str)
    sentences : list of str
        What the explanation says, if there is one.
    tables : list of Table
    """

    key: str
    name: str
    mark: str
    results: list[tuple[str, str]]
    sentences: list[str]
    tables: list[Table]


def point_detail(
    row: pd.Series,
    tables: Mapping[str, pd.DataFrame],
    columns: list[Column],
    *,
    key: str,
    mark: str,
    explanation: Explanation | str | None = None,
) -> Detail:
    """The page's part on one point.

    Parameters
    ----------
    row : Series
        Of the ``points`` table.
    tables : mapping
        The rows of this point in ``layers``, ``energy`` and ``storage``.
    columns : list of Column
        What tells points apart, and their results.
    key, mark : str
    explanation : Explanation or str, optional
        Where the cycles went, or why that cannot be told.
    """
    named = [column for column in columns if not column.measured]
    name = ", ".join(f"{column.head} {text_of(row[column.name], column)}" for column in named)
    shown = [_layer_table(tables["layers"], tables["energy"])]
    sentences = []
    if isinstance(explanation, str):
        sentences = [explanation]
    elif explanation is not None:
        sentences = explanation.sentences()
        shown += [_parts_table(explanation), _levers_table(explanation)]
    shown += [
        _sums_table("Energy by component", "component", tables["energy"], "energy_pj", 1e-3, "nJ"),
        _sums_table("Memory image by stream", "stream", tables["storage"], "size_bits", 1 / 8, "bytes"),
    ]
    return Detail(
        key=key,
        name=name or "the only point",
        mark=mark,
        results=[
            (column.head, text_of(row[column.name], column))
            for column in columns
            if column.measured and pd.notna(row[column.name])
        ],
        sentences=sentences,
        tables=[table for table in shown if table.rows],
    )


def _layer_table(layers: pd.DataFrame, energy: pd.DataFrame) -> Table:
    energies = energy.groupby("layer")["energy_pj"].sum() / 1e3
    frame = layers.assign(
        share=100 * layers["latency_cycles"] / layers["latency_cycles"].sum(),
        energy_nj=layers["layer"].map(energies),
    )
    if "utilization" in frame:
        frame["utilization"] = 100 * frame["utilization"]
    names = [name for name in _LAYER_HEADS if name in frame and frame[name].notna().any()]
    rows = [
        [(str(row["layer"]), str(row["layer"])), *(_cell(row[name]) for name in names)]
        for row in frame.to_dict("records")
    ]
    return Table("Layers", ["layer", *(_LAYER_HEADS[name] for name in names)], rows)


def _parts_table(explanation: Explanation) -> Table:
    rows = [
        [_cell(row["text"]), _cell(row["cycles"]), _cell(100 * row["share"])]
        for row in explanation.totals.to_dict("records")
    ]
    return Table("Where the cycles went", ["part", "cycles", "%"], rows)


def _levers_table(explanation: Explanation) -> Table:
    helpful = explanation.levers[explanation.levers["saved_cycles"] > 0].head(6)
    rows = [
        [
            _cell(row["lever"]),
            _cell(row["change"]),
            _cell(row["saved_cycles"]),
            _cell(100 * row["saved_share"]),
            _cell(row["area_mm2_added"]),
        ]
        for row in helpful.to_dict("records")
    ]
    heads = ["simulated again with", "change", "saves cycles", "%", "mm² more"]
    return Table("What would help", heads, rows)


def _sums_table(caption: str, part: str, frame: pd.DataFrame, column: str, scale: float, unit: str) -> Table:
    sums = frame.groupby(part, sort=False)[column].sum() * scale
    sums = sums[sums > 0].sort_values(ascending=False, kind="stable")
    small = sums < _LEAST_SHARE * sums.sum()
    if small.sum() > 1:
        sums = pd.concat([sums[~small], pd.Series({"other": sums[small].sum()})])
    rows = [
        [_cell(str(name).replace("_", " ")), _cell(float(value)), _cell(100 * float(value) / sums.sum())]
        for name, value in sums.items()
    ]
    return Table(caption, [part, unit, "%"], rows)


def _cell(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return value, value
    if pd.isna(value):
        return "–", ""
    whole = float(value).is_integer()
    text = f"{int(value):,}" if whole and abs(value) < 1e6 else short_number(float(value))
    return text, f"{float(value):.9g}"
