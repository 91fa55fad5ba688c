"""What a comparison found: tidy tables with units in their column names, and views for people."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd

from hwsim.comparison.cost import LayerCost, MachineCost
from hwsim.lowering import lower_machine
from hwsim.machine import Machine
from hwsim.report import package_versions, plain_records
from hwsim.tables import format_table
from hwsim.version import MODEL_VERSION

__all__ = ["Comparison"]

_SUMMED = (
    "products",
    "compute_cycles",
    "latency_cycles",
    "overlap_bound_cycles",
    "dram_bytes",
    "storage_bytes",
)
_SHOWN = {
    "machine": "machine",
    "array": "array",
    "area_mm2": "mm²",
    "kept_share": "kept",
    "compute_cycles": "pass cyc",
    "overlap_bound_cycles": "bound cyc",
    "latency_cycles": "cycles",
    "latency_ratio": "×time",
    "energy_pj": "pJ",
    "energy_ratio": "×pJ",
    "dram_bytes": "DRAM B",
    "storage_bytes": "stored B",
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """The result of `hwsim.comparison.compare`.

    Attributes
    ----------
    network : str
    machine : Machine
        The block-skip machine, which the others are equal to in multipliers or in area.
    machines : DataFrame
        One row per machine and sizing: ``sizing, machine, pattern, array, multipliers, area_mm2, kept_share``; totals of the
        network, ``products, compute_cycles, overlap_bound_cycles, latency_cycles, latency_ms, dram_bytes, storage_bytes,
        energy_pj``; its energy by part, ``array_pj`` … ``static_pj``; and ``latency_ratio, energy_ratio`` to the block-skip
        machine (above 1: worse). ``overlap_bound_cycles`` is what perfect overlap would leave of the latency: per layer the
        longer of the array's cycles and the channel's.
    layers : DataFrame
        The same per layer.
    patterns : {"random", "magnitude"}
        How single weights were chosen for the machine that skips them.
    seed : int
    warnings : tuple of str
    """

    network: str
    machine: Machine
    machines: pd.DataFrame
    layers: pd.DataFrame
    patterns: Literal["random", "magnitude"]
    seed: int
    warnings: tuple[str, ...]

    @classmethod
    def build(
        cls,
        *,
        network: str,
        machine: Machine,
        rows: Sequence[tuple[str, str, str, MachineCost]],
        patterns: Literal["random", "magnitude"],
        seed: int,
        warnings: tuple[str, ...],
    ) -> Comparison:
        """Assemble the tables from ``(sizing, name, pattern, cost)``; the first is the block-skip machine."""
        layers = [
            {"sizing": sizing, "machine": name} | _layer_row(layer, machine)
            for sizing, name, _, cost in rows
            for layer in cost.layers
        ]
        total_weights = sum(layer.weight_count for layer in rows[0][3].layers)
        machines = [
            {"sizing": sizing, "machine": name, "pattern": pattern}
            | _machine_row(cost, total_weights, machine)
            for sizing, name, pattern, cost in rows
        ]
        table = pd.DataFrame(machines)
        for name in ("latency", "energy"):
            column = f"{name}_cycles" if name == "latency" else f"{name}_pj"
            table[f"{name}_ratio"] = table[column] / table[column].iloc[0]
        return cls(network, machine, table, pd.DataFrame(layers), patterns, seed, warnings)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the numbers hold of, in sentences."""
        how = {
            "random": f"at random (seed {self.seed})",
            "magnitude": "by magnitude of the dense weights",
        }[self.patterns]
        return (
            f"Only cost is compared, not accuracy: no pattern but the blocks' was trained. Elements were pruned {how}.",
            '"kept" is the share of the weights that are worked on and stored; blocks, elements and channels are set equal '
            "(channels as nearly as whole channels allow), 2:4 can only be half of each pruned layer.",
            "Equal multipliers favours block-skip, whose PEs have sign adders besides; equal area counts those.",
            '"pass cyc" is the array alone, "bound cyc" what perfect overlap with DRAM would leave, "cycles" the latency.',
            "Technology table, clock, buffers and DRAM channel are the same for all, kept weights have weight_bits on all but "
            "block-skip; what each machine is granted: docs/comparison.md.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able values."""
        return {
            "provenance": {
                "network": self.network,
                "machine": json.loads(self.machine.to_json()),
                "model_version": MODEL_VERSION,
                "patterns": self.patterns,
                "seed": self.seed,
                **package_versions(),
            },
            "machines": plain_records(self.machines),
            "layers": plain_records(self.layers),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        lines = []
        for sizing, group in self.machines.groupby("sizing", sort=False):
            lines.append(f"{self.network} beside {self.machine.name} at {sizing}:")
            lines.append(format_table(group[list(_SHOWN)].rename(columns=_SHOWN).to_dict("records")))
            lines.append("")
        return "\n".join([*lines, *self.notes, *(f"warning: {text}" for text in self.warnings)])

    def _repr_html_(self) -> str:
        columns = ["sizing", "pattern", *_SHOWN]
        table = self.machines[columns].to_html(index=False, border=0, float_format="{:.4g}".format)
        notes = "".join(f"<p>{html.escape(text)}</p>" for text in (*self.notes, *self.warnings))
        return f"<h4>{html.escape(self.network)}</h4>{table}{notes}"


def _layer_row(layer: LayerCost, machine: Machine) -> dict[str, Any]:
    row = asdict(layer)
    parts = row.pop("energy_pj")
    channel = lower_machine(machine).channel
    channel_cycles = -(-layer.dram_bytes * channel.dram_cycles // channel.dram_bytes)
    row["overlap_bound_cycles"] = max(layer.compute_cycles, channel_cycles)
    return row | {"energy_pj": sum(parts.values())} | {f"{name}_pj": value for name, value in parts.items()}


def _machine_row(cost: MachineCost, total_weights: int, machine: Machine) -> dict[str, Any]:
    rows = [_layer_row(layer, machine) for layer in cost.layers]
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in _SUMMED}
    energy = {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith("_pj")}
    kept = sum(row["kept_weights"] for row in rows)
    return {
        "array": cost.array,
        "multipliers": cost.multipliers,
        "area_mm2": cost.area_mm2,
        "kept_share": kept / total_weights,
        **total,
        "latency_ms": total["latency_cycles"] / (machine.clock_mhz * 1e3),
        **energy,
    }
