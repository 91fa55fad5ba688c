"""What a simulation found: tidy tables with units in their column names, a summary, and views for people."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

from hwsim.machine import Machine
from hwsim.tables import time_text
from hwsim.version import MODEL_VERSION

__all__ = ["Report", "package_versions", "plain_records"]

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
    "energy_pj",
    "dense_energy_pj",
)


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

    @classmethod
    def build(
        cls,
        *,
        network: str,
        machine: Machine,
        equal_area_machine: Machine,
        layer_rows: Sequence[dict[str, Any]],
        energy: pd.DataFrame,
        storage: pd.DataFrame,
        area_mm2: dict[str, float],
        equal_area_mm2: float,
        warnings: tuple[str, ...],
    ) -> Report:
        """Assemble the tables and sum up."""
        total: dict[str, Any] = {name: sum(row[name] for row in layer_rows) for name in _SUMMED}
        seconds = total["latency_cycles"] / (machine.clock_mhz * 1e6)
        lanes = machine.array.rows * machine.array.columns * machine.array.multipliers
        summary = total | {
            "latency_ms": seconds * 1e3,
            "inferences_per_s": 1 / seconds,
            "speedup_compute_only": total["dense_compute_cycles"] / total["compute_cycles"],
            "speedup_with_memory": total["dense_latency_cycles"] / total["latency_cycles"],
            "speedup_equal_area": total["equal_area_latency_cycles"] / total["latency_cycles"],
            "energy_saving": total["dense_energy_pj"] / total["energy_pj"],
            "average_power_mw": total["energy_pj"] * 1e-9 / seconds,
            "average_bandwidth_gb_per_s": total["dram_bytes"] / seconds / 1e9,
            "peak_bandwidth_gb_per_s": max(row["peak_bandwidth_gb_per_s"] for row in layer_rows),
            "peak_demand_gb_per_s": max(row["peak_demand_gb_per_s"] for row in layer_rows),
            "bits_per_weight": total["image_bytes"] * 8 / total["weight_count"],
            "fp32_bytes": total["weight_count"] * 4,
            "int8_bytes": total["weight_count"],
            "area_mm2": sum(area_mm2.values()),
            "equal_area_dense_area_mm2": equal_area_mm2,
            "equal_area_dense_rows": equal_area_machine.array.rows,
            "peak_gmac_per_s": lanes * machine.clock_mhz / 1e3,
        }
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
            "machine": json.loads(self.machine.to_json()),
            "model_version": MODEL_VERSION,
            **package_versions(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able values."""
        return {
            "provenance": self.provenance(),
            "summary": {name: _plain(value) for name, value in self.summary.items()},
            "layers": plain_records(self.layers),
            "energy": plain_records(self.energy),
            "storage": plain_records(self.storage),
            "area": plain_records(self.area),
            "warnings": list(self.warnings),
        }

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


def package_versions() -> dict[str, Any]:
    """Versions of Python and of the packages that make the numbers."""
    packages = ("hwsim", "numpy", "numba", "pandas")
    return {"python": platform.python_version(), "packages": {name: version(name) for name in packages}}


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
