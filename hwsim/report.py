"""What a simulation found: tidy tables with units in their column names, a summary, and views for people."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hwsim.errors import FormatError, InputError, Problem
from hwsim.files import write_atomically
from hwsim.machine import Machine, parse_machine
from hwsim.tables import time_text
from hwsim.version import MODEL_VERSION

__all__ = ["Report", "derived_figures", "load_report", "package_versions", "plain_records"]

FORMAT = "hwsim-report"
FORMAT_VERSION = 1
_TABLES = ("layers", "energy", "storage", "area")

_SUMMED = (
    "macs",
    "weight_count",
    "pruned_blocks",
    "unified_blocks",
    "dense_blocks",
    "passes",
    "compute_cycles",
    "latency_cycles",
    "dense_compute_cycles",
    "dense_latency_cycles",
    "equal_area_latency_cycles",
    "dram_bytes",
    "dense_dram_bytes",
    "image_bytes",
)


def package_versions() -> dict[str, Any]:
    """Versions of Python and of the packages that make the numbers."""
    packages = ("hwsim", "numpy", "numba", "pandas")
    return {"python": platform.python_version(), "packages": {name: version(name) for name in packages}}


@cache
def _versions() -> dict[str, str]:
    versions = package_versions()
    return {"model": MODEL_VERSION, "python": versions["python"], **versions["packages"]}


@dataclass(frozen=True, eq=False)
class Report:
    """The result of `hwsim.simulate`.

    Attributes
    ----------
    network : str
    machine, equal_area_machine : Machine
        The machine, and the dense one of the same area that it is compared with.
    summary : dict
        Totals of the network; names carry units. Speed-ups are quoted three ways: ``speedup_compute_only`` and
        ``speedup_with_memory`` against the dense machine with the same array, ``speedup_equal_area`` against the dense
        machine of the same area.
    layers : DataFrame
        One row per layer.
    energy : DataFrame
        Columns ``layer, component, energy_pj, dense_energy_pj``.
    storage : DataFrame
        Columns ``layer, stream, size_bits``: the memory image.
    area : DataFrame
        Columns ``component, area_mm2``.
    warnings : tuple of str
    versions : mapping
        Of the model, of Python and of the packages that made the numbers.
    origin : mapping
        Where the layers came from, as JSON values by dotted name, if whoever made them has told: a file and its digest,
        or a network with ratios and seed. `hwsim explain` builds the layers anew from it, `hwsim diff` compares it.
    """

    network: str
    machine: Machine
    equal_area_machine: Machine
    summary: dict[str, Any]
    layers: pd.DataFrame
    energy: pd.DataFrame
    storage: pd.DataFrame
    area: pd.DataFrame
    warnings: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=lambda: dict(_versions()))
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        *,
        network: str,
        machine: Machine,
        equal_area_machine: Machine,
        layer_rows: Sequence[dict[str, Any]],
        energy_pj: float,
        dense_energy_pj: float,
        energy: pd.DataFrame,
        storage: pd.DataFrame,
        area_mm2: dict[str, float],
        equal_area_mm2: float,
        warnings: tuple[str, ...],
    ) -> Report:
        """Assemble the tables and sum up."""
        total: dict[str, Any] = {name: sum(row[name] for row in layer_rows) for name in _SUMMED}
        total |= {
            "energy_pj": energy_pj,
            "dense_energy_pj": dense_energy_pj,
            "peak_bandwidth_gb_per_s": max(row["peak_bandwidth_gb_per_s"] for row in layer_rows),
            "peak_demand_gb_per_s": max(row["peak_demand_gb_per_s"] for row in layer_rows),
            "area_mm2": sum(area_mm2.values()),
        }
        array = machine.array
        summary = total | derived_figures(
            total, machine.clock_mhz, array.rows * array.columns * array.multipliers
        )
        summary["equal_area_dense_area_mm2"] = equal_area_mm2
        summary["equal_area_dense_rows"] = equal_area_machine.array.rows
        area = pd.DataFrame({"component": list(area_mm2), "area_mm2": list(area_mm2.values())})
        return cls(
            network=network,
            machine=machine,
            equal_area_machine=equal_area_machine,
            summary=summary,
            layers=pd.DataFrame(list(layer_rows)),
            energy=energy,
            storage=storage,
            area=area,
            warnings=warnings,
        )

    def provenance(self) -> dict[str, Any]:
        """The resolved configuration and the versions that made the numbers."""
        return {
            "network": self.network,
            "origin": dict(self.origin),
            "machine": json.loads(self.machine.to_json()),
            "equal_area_machine": json.loads(self.equal_area_machine.to_json()),
            "versions": dict(self.versions),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able values."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "provenance": self.provenance(),
            "summary": {name: _plain(value) for name, value in self.summary.items()},
            **{name: plain_records(getattr(self, name)) for name in _TABLES},
            "warnings": list(self.warnings),
        }

    def save(self, path: str | Path) -> None:
        """Write everything as one JSON file, which `load_report` reads.

        Raises
        ------
        InputError
            The disk is full, or the folder cannot be written; nothing is left behind.
        """
        write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())

    def __str__(self) -> str:
        s = self.summary
        lines = [
            f"{self.network} on {self.machine.name}: {s['latency_cycles']:,} cycles, {time_text(s['latency_ms'])}, "
            f"{s['energy_pj'] / 1e6:.4g} µJ",
            f"  speed-up against dense: {s['speedup_compute_only']:.2f}x compute only, "
            f"{s['speedup_with_memory']:.2f}x with memory, {s['speedup_equal_area']:.2f}x at equal area",
            f"  memory image: {s['image_bytes']:,} bytes, {s['bits_per_weight']:.3f} bits per weight "
            f"({s['fp32_bytes'] / s['image_bytes']:.1f}x smaller than fp32)",
            f"  DRAM: {s['dram_bytes']:,} bytes, {s['average_bandwidth_gb_per_s']:.3g} GB/s on average, "
            f"{s['peak_bandwidth_gb_per_s']:.3g} GB/s at most; area {s['area_mm2']:.3g} mm²",
        ]
        return "\n".join(lines + [f"  warning: {text}" for text in self.warnings])

    def _repr_html_(self) -> str:
        columns = [
            "layer",
            "macs",
            "latency_cycles",
            "bound",
            "speedup_with_memory",
            "dram_bytes",
            "bits_per_weight",
            "energy_pj",
        ]
        table = self.layers[columns].to_html(index=False, border=0, float_format="{:.4g}".format)
        return f"<pre>{html.escape(str(self))}</pre>{table}"


def load_report(path: str | Path) -> Report:
    """A report that `Report.save` (or `hwsim simulate --out`) wrote.

    Raises
    ------
    InputError
        There is no such file.
    FormatError
        It is not a report, is damaged, or is of a version that this program does not read.
    """
    source = str(path)
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(source, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise FormatError(source, f"not a JSON file: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        hint = "`hwsim simulate --out FOLDER` writes report.json"
        raise FormatError(source, Problem("format", f'not a report, must be "{FORMAT}"', hint))
    if data.get("format_version") != FORMAT_VERSION:
        found = f"found {data.get('format_version')!r}, this program reads {FORMAT_VERSION}"
        raise FormatError(source, Problem("format_version", found, "simulate again"))
    try:
        provenance = data["provenance"]
        report = Report(
            network=str(provenance["network"]),
            machine=parse_machine(provenance["machine"], source),
            equal_area_machine=parse_machine(provenance["equal_area_machine"], source),
            summary={name: _number(value) for name, value in data["summary"].items()},
            layers=_frame(data["layers"]),
            energy=_frame(data["energy"]),
            storage=_frame(data["storage"]),
            area=_frame(data["area"]),
            warnings=tuple(map(str, data["warnings"])),
            versions=dict(provenance["versions"]),
            origin=dict(provenance["origin"]),
        )
        total, of_layers = report.summary["latency_cycles"], report.layers["latency_cycles"].sum()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise FormatError(source, error.problems) from None
        raise FormatError(source, Problem("", f"damaged: {error!r}", "simulate again")) from None
    if missing := _missing(report):
        raise FormatError(
            source, [Problem(name, "missing, or not a number", "simulate again") for name in missing]
        )
    if total != of_layers:
        damage = f"{total} in the summary, the layers have {of_layers}"
        raise FormatError(source, Problem("latency_cycles", damage, "the file was changed; simulate again"))
    return report


def _missing(report: Report) -> list[str]:
    """What later readers count on and a file that somebody changed may lack."""
    numbers = ("latency_cycles", "energy_pj", "dram_bytes", "image_bytes")
    problems = [f"layers.{name}" for name in ("layer", "bound") if name not in report.layers]
    problems += [
        f"layers.{name}"
        for name in numbers
        if name not in report.layers or report.layers[name].dtype.kind not in "iuf"
    ]
    return problems + [
        f"summary.{name}"
        for name in (*numbers, "latency_ms")
        if not isinstance(report.summary.get(name), int | float)
    ]


def _number(value: Any) -> Any:
    return float("nan") if value is None else value


def _frame(records: Any) -> pd.DataFrame:
    """A table as it was: what JSON cannot hold came as null."""
    frame = pd.DataFrame([{name: _number(value) for name, value in record.items()} for record in records])
    if frame.empty:
        raise ValueError("an empty table")
    return frame


def derived_figures(total: Mapping[str, Any], clock_mhz: Any, multipliers: Any) -> dict[str, Any]:
    """What follows from the totals of a network: times, speed-ups, power, bandwidth, storage.

    Parameters
    ----------
    total : mapping
        Totals by name: numbers, or arrays of one length for many machines at once.
    clock_mhz : float or float64 array
    multipliers : int or int64 array
        Of the whole array of PEs.
    """
    seconds = total["latency_cycles"] / (clock_mhz * 1e6)
    return {
        "latency_ms": seconds * 1e3,
        "inferences_per_s": 1 / seconds,
        "speedup_compute_only": total["dense_compute_cycles"] / total["compute_cycles"],
        "speedup_with_memory": total["dense_latency_cycles"] / total["latency_cycles"],
        "speedup_equal_area": total["equal_area_latency_cycles"] / total["latency_cycles"],
        "energy_saving": total["dense_energy_pj"] / total["energy_pj"],
        "average_power_mw": total["energy_pj"] * 1e-9 / seconds,
        "average_bandwidth_gb_per_s": total["dram_bytes"] / seconds / 1e9,
        "bits_per_weight": total["image_bytes"] * 8 / total["weight_count"],
        "fp32_bytes": total["weight_count"] * 4,
        "int8_bytes": total["weight_count"],
        "peak_gmac_per_s": multipliers * clock_mhz / 1e3,
    }


def _plain(value: Any) -> Any:
    """JSON has neither NumPy scalars nor not-a-number."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def plain_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON-able values; not-a-number becomes null."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
