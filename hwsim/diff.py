"""What changed between two reports: the configuration first, then the totals, then layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hwsim.machine import Machine
from hwsim.report import Report
from hwsim.tables import format_table, short_number

__all__ = ["Difference", "diff_machines", "diff_reports"]

MEASURES = ("latency_cycles", "energy_pj", "dram_bytes", "image_bytes")
"""What is compared of each layer, beside what bounds it."""

_TOTALS = (
    *MEASURES,
    "latency_ms",
    "compute_cycles",
    "average_power_mw",
    "average_bandwidth_gb_per_s",
    "bits_per_weight",
    "area_mm2",
    "speedup_compute_only",
    "speedup_with_memory",
    "speedup_equal_area",
)
_HEADS = {"latency_cycles": "cycles", "energy_pj": "pJ", "dram_bytes": "DRAM B", "image_bytes": "image B"}


@dataclass(frozen=True, eq=False)
class Difference:
    """What changed from one report to another.

    Attributes
    ----------
    before, after : str
        What the two are.
    configuration : DataFrame
        ``field, before, after``: what differs of network, origin of the layers, machine and versions.
    totals : DataFrame
        ``quantity, before, after, ratio``.
    layers : DataFrame
        Per layer, in the order of the first: ``layer``, for each of `MEASURES` ``NAME_before, NAME_after, NAME_change``, and
        ``bound_before, bound_after``. A layer that one of them lacks has not-a-number there.
    """

    before: str
    after: str
    configuration: pd.DataFrame
    totals: pd.DataFrame
    layers: pd.DataFrame

    @property
    def is_same(self) -> bool:
        """Whether neither the configuration nor any figure differs."""
        changes = self.layers[[f"{name}_change" for name in MEASURES]]
        same_bounds = (self.layers["bound_before"] == self.layers["bound_after"]).all()
        return self.configuration.empty and bool((changes == 0).all(axis=None)) and bool(same_bounds)

    def __str__(self) -> str:
        blocks = [f"A  {self.before}\nB  {self.after}"]
        if self.is_same:
            return "\n\n".join([*blocks, "Nothing differs."])
        if self.configuration.empty:
            blocks.append("The configuration is the same.")
        else:
            rows = self.configuration.to_dict("records")
            blocks.append(
                format_table([{str(name): _cell(value) for name, value in row.items()} for row in rows])
            )
        if len(self.totals):
            blocks.append(format_table(self._total_rows()))
        changed = self._layer_rows()
        if changed:
            blocks.append(format_table(changed))
        if len(changed) < len(self.layers):
            blocks.append(f"{len(self.layers) - len(changed)} of {len(self.layers)} layers are the same.")
        return "\n\n".join(blocks)

    def _total_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "total": row["quantity"],
                "A": _text(row["before"]),
                "B": _text(row["after"]),
                "B / A": "–" if row["ratio"] != row["ratio"] else f"{row['ratio']:.4g}",
            }
            for row in self.totals.to_dict("records")
        ]

    def _layer_rows(self) -> list[dict[str, Any]]:
        rows = []
        for row in self.layers.to_dict("records"):
            bounds = row["bound_before"], row["bound_after"]
            if bounds[0] == bounds[1] and all(row[f"{name}_change"] == 0 for name in MEASURES):
                continue
            texts: dict[str, Any] = {"layer": row["layer"]}
            for name, head in _HEADS.items():
                before, after = row[f"{name}_before"], row[f"{name}_after"]
                texts[head] = f"{_text(before)} → {_text(after)}" if before != after else _text(before)
            texts["bound"] = bounds[0] if bounds[0] == bounds[1] else f"{bounds[0]} → {bounds[1]}"
            rows.append(texts)
        return rows

    def _repr_html_(self) -> str:
        rows = (self.configuration.to_dict("records"), self._total_rows(), self._layer_rows())
        tables = [pd.DataFrame(table).to_html(index=False, border=0) for table in rows if table]
        return "".join(tables) or "<p>the same</p>"


def diff_reports(before: Report, after: Report) -> Difference:
    """Compare two reports. Layers are matched by their names."""
    return Difference(
        before=_name(before),
        after=_name(after),
        configuration=_changes(_configuration(before), _configuration(after)),
        totals=_totals(before.summary, after.summary),
        layers=_layers(before.layers, after.layers),
    )


def diff_machines(before: Machine, after: Machine) -> Difference:
    """Compare two machines: their fields, and the area that follows from them."""
    from hwsim.area import machine_area
    from hwsim.technology import load_technology

    areas = [machine_area(machine, load_technology(machine.technology.table)) for machine in (before, after)]
    totals = [{name: area[name] for name in area} | {"area_mm2": sum(area.values())} for area in areas]
    names = dict.fromkeys([*totals[0], *totals[1]])
    changed = [name for name in names if totals[0].get(name) != totals[1].get(name)]
    nothing = pd.DataFrame(columns=["layer", *_layer_columns()])
    return Difference(
        before=f"machine {before.name}",
        after=f"machine {after.name}",
        configuration=_changes(_machine_fields(before), _machine_fields(after)),
        totals=_totals(*({name: total.get(name, 0.0) for name in changed} for total in totals)),
        layers=nothing,
    )


def _name(report: Report) -> str:
    return f"{report.network} on {report.machine.name}"


def _machine_fields(machine: Machine) -> dict[str, Any]:
    return {
        f"machine.{name}": _field(machine.model_dump(mode="json"), name) for name in Machine.field_names()
    }


def _field(data: Mapping[str, Any], dotted: str) -> Any:
    value: Any = data
    for name in dotted.split("."):
        value = value[name]
    return value


def _configuration(report: Report) -> dict[str, Any]:
    return {
        "network": report.network,
        **{str(name): value for name, value in report.origin.items()},
        **_machine_fields(report.machine),
        **{f"version.{name}": value for name, value in report.versions.items()},
    }


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> pd.DataFrame:
    names = dict.fromkeys([*before, *after])
    rows = [
        {"field": name, "before": before.get(name, "–"), "after": after.get(name, "–")}
        for name in names
        if before.get(name) != after.get(name)
    ]
    return pd.DataFrame(rows, columns=["field", "before", "after"], dtype=object)


def _totals(before: Mapping[str, Any], after: Mapping[str, Any]) -> pd.DataFrame:
    asked = _TOTALS if "latency_cycles" in before else tuple(before)
    names = [name for name in asked if name in before and name in after]
    rows = [
        {
            "quantity": name,
            "before": before[name],
            "after": after[name],
            "ratio": after[name] / before[name] if before[name] else float("nan"),
        }
        for name in names
    ]
    return pd.DataFrame(rows, columns=["quantity", "before", "after", "ratio"])


def _layer_columns() -> list[str]:
    ends = ("before", "after", "change")
    return [f"{name}_{end}" for name in MEASURES for end in ends] + ["bound_before", "bound_after"]


def _layers(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    a, b = (frame.set_index("layer")[[*MEASURES, "bound"]] for frame in (before, after))
    names = [*a.index, *(name for name in b.index if name not in a.index)]
    a, b = a.reindex(names), b.reindex(names)
    columns: dict[str, Any] = {"layer": names}
    for name in MEASURES:
        columns[f"{name}_before"], columns[f"{name}_after"] = a[name].to_numpy(), b[name].to_numpy()
        columns[f"{name}_change"] = (b[name] - a[name]).to_numpy()
    columns["bound_before"] = a["bound"].fillna("–").to_numpy()
    columns["bound_after"] = b["bound"].fillna("–").to_numpy()
    return pd.DataFrame(columns)


def _cell(value: Any) -> str:
    """A value in at most 32 characters: of a digest or a path the two ends tell most."""
    text = str(value)
    return text if len(text) <= 32 else f"{text[:12]}…{text[-19:]}"


def _text(value: Any) -> str:
    if value != value:
        return "–"
    return short_number(value) if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"
