"""Where the cycles of a layer went, and what would bring some back, measured by simulating again.

Every part is counted in shares of a PE-cycle, in integers, so the parts of a layer add up to its latency exactly.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwsim.area import machine_area
from hwsim.errors import FitError, InputError, Problem, nearest_name
from hwsim.layer import Layer
from hwsim.lowering import effective_types, occupancy
from hwsim.machine import Machine
from hwsim.simulator import LayerRun, latency_parts, run_layer
from hwsim.tables import format_table
from hwsim.technology import load_technology

__all__ = ["PARTS", "Explanation", "Lever", "explain", "layer_bounds", "layer_parts", "machine_levers"]

PARTS = {
    "work": "work on real weights and outputs",
    "padding": "work on the padding of ragged blocks",
    "idle_columns": "PEs without an output column",
    "missing_rows": "PE rows without a block row",
    "imbalance": "rows that wait for the slowest one",
    "starved": "rows that search for the next block",
    "conflict": "rows that wait for an operand bank",
    "handover": "fetch and hand-over of operands",
    "fill": "filling the operand store",
    "drain": "draining outputs",
    "dram_weights": "waiting for weights from DRAM",
    "dram_activations": "waiting for inputs from DRAM",
    "dram_outputs": "writing outputs to DRAM",
}
"""What the cycles of a layer go to, in the order in which a report shows it."""

BOUNDS = {
    "array": "the busiest row of every pass",
    "fill": "operand words over the fill port",
    "drain": "outputs over the drain port",
    "dram": "bytes over the DRAM channel",
}
"""Roofs of a layer: none can be undercut with this machine, this mapping and these blocks."""


@dataclass(frozen=True)
class Lever:
    """A change of the machine (or of the batch) that may help.

    Attributes
    ----------
    name : str
    changes : mapping
        Dotted machine fields and their new values.
    batch : int
        Inputs at a time, as a multiple of what is simulated; cycles are then quoted per input.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where the cycles went.

    Attributes
    ----------
    network, layer : str
        ``layer`` is empty for the whole network.
    machine : Machine
    layers : DataFrame
        Per layer ``layer, ideal_cycles, lower_bound_cycles, lower_bound, latency_cycles`` and a column of cycles per name in
        `PARTS`. ``ideal_cycles``: every PE busy with real weights all the time. ``lower_bound``: the highest of `BOUNDS`.
    parts : DataFrame
        ``layer, part, lane_cycles, cycles``. ``lane_cycles`` (int64) counts in units of ``cycles / lanes``, where ``lanes`` is
        rows × columns × g_o × g_k of the machine: of a layer they sum to ``latency_cycles · lanes`` exactly.
    levers : DataFrame
        ``lever, change, batch, latency_cycles, saved_cycles, saved_share, area_mm2_added, note``, the most helpful first: each
        was simulated. With a ``batch`` above 1 cycles are per input; ``note`` says why a change is not possible.
    """

    network: str
    layer: str
    machine: Machine
    layers: pd.DataFrame
    parts: pd.DataFrame
    levers: pd.DataFrame

    @property
    def totals(self) -> pd.DataFrame:
        """``part, text, cycles, share``: the parts of all layers together, those that are 0 left out."""
        cycles = self.parts.groupby("part", sort=False)["cycles"].sum().reindex(list(PARTS))
        frame = pd.DataFrame({"part": list(PARTS), "text": list(PARTS.values()), "cycles": cycles.to_numpy()})
        frame["share"] = frame["cycles"] / self.layers["latency_cycles"].sum()
        return frame[frame["cycles"] > 0].reset_index(drop=True)

    def sentences(self) -> list[str]:
        """The answer in plain words."""
        latency = int(self.layers["latency_cycles"].sum())
        ideal, bound = self.layers["ideal_cycles"].sum(), int(self.layers["lower_bound_cycles"].sum())
        losses = self.totals[self.totals["part"] != "work"].sort_values("cycles", ascending=False)
        by = ", ".join(
            f"{BOUNDS[str(name)]} ({cycles / bound:.0%})"
            for name, cycles in self.layers.groupby("lower_bound")["lower_bound_cycles"]
            .sum()
            .sort_values(ascending=False)
            .items()
        )
        text = [
            f"{self.layer or self.network} on {self.machine.name}: {latency:,} cycles.",
            f"Ideal, every PE busy with real weights: {ideal:,.0f} cycles ({ideal / latency:.1%} of them).",
            f"Lower bound with these blocks on this machine: {bound:,} cycles ({bound / latency:.1%}), set by {by}.",
        ]
        if len(losses):
            most = [f"{row['text']} ({row['share']:.1%})" for row in losses.head(3).to_dict("records")]
            text.append(f"The difference went mostly to: {'; '.join(most)}.")
        helpful = self.levers[self.levers["saved_cycles"] > 0]
        changes, batches = helpful[helpful["batch"] == 1], helpful[helpful["batch"] > 1]
        if changes.empty:
            text.append("None of the changes of the machine that were simulated saves a cycle.")
        else:
            best = changes.iloc[0]
            text.append(
                f"What helps most: {best['lever']} ({best['change']}) saves {best['saved_cycles']:,.0f} cycles "
                f"({best['saved_share']:.1%}) for {best['area_mm2_added']:+.3g} mm² on chip."
            )
        for row in batches.to_dict("records"):
            saved = f"{row['saved_cycles']:,.0f} cycles ({row['saved_share']:.1%}) less per input"
            text.append(f"{row['batch']} inputs at a time take {saved}, each of them longer.")
        return text

    def __str__(self) -> str:
        parts = [
            {
                "where the cycles went": row["text"],
                "cycles": round(row["cycles"]),
                "share %": 100 * row["share"],
            }
            for row in self.totals.to_dict("records")
        ]
        blocks = ["\n".join(self.sentences()), format_table(parts)]
        if len(self.layers) > 1:
            blocks.append(format_table(self._layer_rows()))
        if levers := self._lever_rows():
            blocks.append(format_table(levers))
        return "\n\n".join(blocks + self._impossible())

    def _layer_rows(self) -> list[dict[str, Any]]:
        rows = []
        for row in self.layers.to_dict("records"):
            lost = max((name for name in PARTS if name != "work"), key=lambda name: row[name])
            rows.append(
                {
                    "layer": row["layer"],
                    "ideal": round(row["ideal_cycles"]),
                    "lower bound": row["lower_bound_cycles"],
                    "set by": row["lower_bound"],
                    "cycles": row["latency_cycles"],
                    "most lost to": lost,
                    "lost %": 100 * row[lost] / row["latency_cycles"],
                }
            )
        return rows

    def _lever_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "simulated again with": row["lever"],
                "change": row["change"],
                "saves cycles": round(row["saved_cycles"]),
                "saves %": 100 * row["saved_share"],
                "mm² more": row["area_mm2_added"],
            }
            for row in self.levers[self.levers["note"] == ""].to_dict("records")
        ]

    def _impossible(self) -> list[str]:
        return [
            f"Not possible: {row['lever']}. {row['note']}"
            for row in self.levers[self.levers["note"] != ""].to_dict("records")
        ]

    def _repr_html_(self) -> str:
        tables = [pd.DataFrame(self._layer_rows()), pd.DataFrame(self._lever_rows())]
        bars = "".join(
            f"<tr><td>{html.escape(row['text'])}</td><td style='text-align:right'>{row['cycles']:,.0f}</td><td>"
            f"<div style='background:#0072b2;height:.8em;width:{12 * row['share']:.3f}em'></div></td></tr>"
            for row in self.totals.to_dict("records")
        )
        shown = "".join(
            table.to_html(index=False, border=0, float_format="{:.4g}".format) for table in tables
        )
        return f"<p>{html.escape(' '.join(self.sentences()))}</p><table>{bars}</table>{shown}"


def explain(
    machine: Machine,
    layers: Sequence[Layer],
    *,
    network: str = "network",
    layer: str | None = None,
    levers: Sequence[Lever] | None = None,
) -> Explanation:
    """Account for every cycle of a network or of one of its layers, and simulate what would help.

    Parameters
    ----------
    machine : Machine
    layers : sequence of Layer
    network : str
    layer : str, optional
        Only this one.
    levers : sequence of Lever, optional
        What to try; by default `machine_levers`. Empty: nothing.

    Raises
    ------
    InputError
        There is no such layer, or the machine cannot run the blocks.
    FitError
        A layer does not fit the machine.
    """
    names = [item.name for item in layers]
    if layer is not None:
        if layer not in names:
            raise InputError(network, Problem("layer", f'no layer "{layer}"', nearest_name(layer, names)))
        layers = [layers[names.index(layer)]]
    runs = [run_layer(item, machine) for item in layers]
    rows, parts = [], []
    for item, run in zip(layers, runs, strict=True):
        bounds = layer_bounds(run, machine)
        limit = max(bounds, key=lambda name: bounds[name])
        counted = layer_parts(run, machine)
        cycles = {name: count / _lanes(machine) for name, count in counted.items()}
        rows.append(
            {
                "layer": item.name,
                "ideal_cycles": cycles["work"],
                "lower_bound_cycles": bounds[limit],
                "lower_bound": limit,
                "latency_cycles": run.mapping.latency_cycles,
                **cycles,
            }
        )
        parts += [
            {"layer": item.name, "part": name, "lane_cycles": counted[name], "cycles": cycles[name]}
            for name in PARTS
        ]
    latency = sum(run.mapping.latency_cycles for run in runs)
    tried = machine_levers(machine) if levers is None else levers
    return Explanation(
        network=network,
        layer=layer or "",
        machine=machine,
        layers=pd.DataFrame(rows),
        parts=pd.DataFrame(parts),
        levers=_try_levers(machine, layers, latency, tried),
    )


def _lanes(machine: Machine) -> int:
    g_o, g_k = machine.array.block
    return machine.array.rows * machine.array.columns * g_o * g_k


def layer_parts(run: LayerRun, machine: Machine) -> dict[str, int]:
    """Lane-cycles by `PARTS`; they sum to the latency times rows × columns × g_o × g_k.

    The classes of the row-cycles are those of docs/microarchitecture.md, section "A pass", the bounds those of the steps.
    """
    g_o, g_k = machine.array.block
    columns, lanes = machine.array.columns, _lanes(machine)
    totals, per_row = run.totals, columns * g_o * g_k
    occupied, real = _occupied(run, machine)
    per_tile = run.counters[:, :, :, 0].sum(axis=2) * run.mapping.passes
    missing = int((per_tile * (run.rows - _live_rows(run))).sum())
    waits = latency_parts(run.mapping)
    return {
        "work": real * run.layer.shape.n,
        "padding": (occupied * g_o * g_k - real) * run.layer.shape.n,
        "idle_columns": totals["busy"] * per_row - occupied * g_o * g_k * run.layer.shape.n,
        "missing_rows": missing * per_row,
        "imbalance": (totals["imbalance"] - missing) * per_row,
        "starved": totals["starved"] * per_row,
        "conflict": totals["conflict"] * per_row,
        "handover": (totals["accept"] + totals["fetch"]) * per_row,
        "fill": waits["fill"] * lanes,
        "drain": waits["drain"] * lanes,
        "dram_weights": waits["weights"] * lanes,
        "dram_activations": waits["activations"] * lanes,
        "dram_outputs": waits["outputs"] * lanes,
    }


def layer_bounds(run: LayerRun, machine: Machine) -> dict[str, int]:
    """Cycles by `BOUNDS`, each a lower bound of the layer's latency with this mapping.

    ``array``: a pass takes at least as long as its busiest row is busy. ``fill`` and ``drain``: every word and every output
    goes through one port. ``dram``: all transfers share one channel.
    """
    shape, mapping = run.layer.shape, run.mapping
    unified, dense = occupancy(machine)
    of_row = run.blocks[:, :, 1] * unified + run.blocks[:, :, 2] * dense
    groups, tiles = mapping.passes.shape
    slots = np.zeros((groups, tiles * run.rows), np.int64)
    slots[:, : of_row.shape[1]] = np.take_along_axis(of_row, run.order, axis=1)
    busiest = slots.reshape(groups, tiles, run.rows).max(axis=2)
    transfers = ("load_weight_cycles", "load_input_cycles", "stream_cycles", "store_cycles")
    return {
        "array": int((busiest * mapping.passes).sum()),
        "fill": -(-mapping.totals["filled_words"] // machine.operand_store.fill_words_per_cycle),
        "drain": -(-shape.out_channels * shape.n // machine.output.words_per_cycle),
        "dram": sum(mapping.totals[name] for name in transfers),
    }


def _occupied(run: LayerRun, machine: Machine) -> tuple[int, int]:
    """``(PE-cycles, PE-cycles × real weights)`` of all executed blocks for one output column."""
    shape = run.layer.shape
    g_o, g_k = machine.array.block
    unified, dense = occupancy(machine)
    cycles = np.array([0, unified, dense])[effective_types(run.layer.types, machine)]
    _, m_blocks, k_blocks = cycles.shape
    outputs = np.minimum(g_o, shape.m - g_o * np.arange(m_blocks))
    positions = np.minimum(g_k, shape.k - g_k * np.arange(k_blocks))
    return int(cycles.sum()), int((outputs @ cycles @ positions).sum())


def _live_rows(run: LayerRun) -> NDArray[np.int64]:
    """``int64[T]``: rows of the array that a row tile gives a block row to."""
    tiles, m_blocks = run.mapping.passes.shape[1], run.order.shape[1]
    return np.minimum(run.rows, m_blocks - run.rows * np.arange(tiles))


def machine_levers(machine: Machine) -> list[Lever]:
    """What an architect would try, one thing at a time: mostly twice of something."""
    weights, array = machine.weights, machine.array
    memories = {
        f"weights.{name}_kib": 2 * getattr(weights, f"{name}_kib")
        for name in ("type", "sign", "magnitude", "dense")
    }
    store = {"operand_store.size_kib": 2 * machine.operand_store.size_kib}
    output = {"output.size_kib": 2 * machine.output.size_kib}
    levers = [
        Lever("twice the DRAM bandwidth", {"dram.gb_per_s": 2 * machine.dram.gb_per_s}),
        Lever("twice the operand banks", {"operand_store.banks": 2 * machine.operand_store.banks}),
        Lever("a queue twice as deep", {"front_end.queue_depth": 2 * machine.front_end.queue_depth}),
        Lever("a window twice as wide", {"front_end.skip_window": 2 * machine.front_end.skip_window}),
        Lever(
            "twice the lanes and ports",
            {
                "array.multipliers": 2 * array.multipliers,
                "array.sign_adders": 2 * array.sign_adders,
                "weights.dense_port_bits": 2 * weights.dense_port_bits,
                "weights.sign_port_bits": 2 * weights.sign_port_bits,
            },
        ),
        Lever("twice the rows", {"array.rows": 2 * array.rows, **memories, **output}),
        Lever("twice the columns", {"array.columns": 2 * array.columns, **store, **output}),
        Lever(
            "twice the fill rate",
            {"operand_store.fill_words_per_cycle": 2 * machine.operand_store.fill_words_per_cycle},
        ),
        Lever("twice the drain rate", {"output.words_per_cycle": 2 * machine.output.words_per_cycle}),
        Lever("twice the operand store", store),
        Lever("twice the weight memories", memories),
        Lever(
            "twice the activation buffer",
            {"activation_buffer.size_kib": 2 * machine.activation_buffer.size_kib},
        ),
        Lever("twice the output buffer", output),
    ]
    if machine.features.row_balance == "none":
        levers.append(Lever("rows sorted by their work", {"features.row_balance": "sorted"}))
    if array.columns > 1:
        levers.append(Lever("inputs in batches, per input", batch=array.columns))
    return levers


def _try_levers(
    machine: Machine, layers: Sequence[Layer], latency: int, levers: Sequence[Lever]
) -> pd.DataFrame:
    technology = load_technology(machine.technology.table)
    area = sum(machine_area(machine, technology).values())
    columns = [
        "lever",
        "change",
        "batch",
        "latency_cycles",
        "saved_cycles",
        "saved_share",
        "area_mm2_added",
        "note",
    ]
    rows: list[dict[str, Any]] = []
    for lever in levers:
        nothing = float("nan")
        row: dict[str, Any] = dict.fromkeys(columns, nothing) | {
            "lever": lever.name,
            "change": _change_text(machine, lever),
            "batch": lever.batch,
            "note": "",
        }
        try:
            changed = machine.with_fields(dict(lever.changes))
            cycles = _latency(changed, layers, lever.batch)
            row["area_mm2_added"] = sum(machine_area(changed, technology).values()) - area
            row |= {
                "latency_cycles": cycles,
                "saved_cycles": latency - cycles,
                "saved_share": 1 - cycles / latency,
            }
        except (InputError, FitError) as error:
            row["note"] = str(error)
        rows.append(row)
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("saved_cycles", ascending=False, kind="stable", ignore_index=True)


def _latency(machine: Machine, layers: Sequence[Layer], batch: int) -> float:
    if batch > 1:
        layers = [
            replace(layer, shape=replace(layer.shape, batch=batch * layer.shape.batch)) for layer in layers
        ]
    return sum(run_layer(layer, machine).mapping.latency_cycles for layer in layers) / batch


def _change_text(machine: Machine, lever: Lever) -> str:
    """``banks 16 → 32``; several fields by their names alone, all of them twice what they were."""
    if lever.batch > 1:
        return f"batch × {lever.batch}"
    texts = []
    for dotted, value in lever.changes.items():
        *parents, leaf = dotted.split(".")
        before: Any = machine
        for name in (*parents, leaf):
            before = getattr(before, name)
        name = f"{parents[-1]}.{leaf}" if leaf == "size_kib" else leaf
        if len(lever.changes) == 1:
            return f"{name} {_short(before)} → {_short(value)}"
        texts.append(name if value == 2 * before else f"{name} {_short(before)} → {_short(value)}")
    doubled = all("→" not in text for text in texts)
    return ", ".join(texts) + (" × 2" if doubled else "")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
