"""One pass cycle by cycle as a figure: what every row scans, holds, asks for, gets and executes, and what the banks grant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hwsim.layer import DENSE, PRUNED, UNIFIED
from hwsim.oracle import COUNTERS
from hwsim.trace import STATE_FIELDS, PassTrace
from sweeps.figures import Plot
from sweeps.style import PAGE_INCHES, PALETTE, new_figure, style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

__all__ = ["trace_plot"]

_BLOCK_COLORS = {PRUNED: "#C9C9C9", UNIFIED: PALETTE[4], DENSE: PALETTE[1]}
_BLOCK_TEXT = {PRUNED: "pruned, skipped", UNIFIED: "unified", DENSE: "dense"}
_REFUSED = PALETTE[5]
_IDLE_TEXT = {"fetch": "f", "accept": "a", "conflict": "c", "starved": "s"}
_QUEUE_COLOR = "#7F7F7F"
# Heights of the strips of a row, top to bottom, and the space between rows.
_STRIPS = {"scan": 0.95, "queue": 0.45, "fetch": 0.8, "PE": 0.9}
_GAP = 0.45
_ROW = sum(_STRIPS.values()) + _GAP
_INCHES = 0.19  # of a unit of height


def trace_plot(trace: PassTrace, first: int = 1, last: int | None = None, name: str = "pass") -> Plot:
    """Cycles ``first … last`` (from 1, both included) of a pass; by default all of them.

    Parameters
    ----------
    trace : PassTrace
    first, last : int
    name : str
        Of the files that `sweeps.figures.save_plot` writes.
    """
    last = trace.cycles if last is None else last
    rows, banks = trace.states.shape[1], trace.of.machine.operand_store.banks
    height = rows * _ROW + _bank_height(banks)
    with style():
        figure = new_figure(PAGE_INCHES, 0.75 + _INCHES * height)
        axes = figure.subplots()
        font = min(5.5, 230 / max(last - first + 1, 24))
        labels: list[tuple[float, str]] = []
        for row in range(rows):
            top = -row * _ROW
            labels += _draw_row(axes, trace, row, top, range(first - 1, last), font)
        labels += _draw_banks(axes, trace, -rows * _ROW, range(first - 1, last), font)
        axes.set_yticks([y for y, _ in labels], [text for _, text in labels])
        axes.tick_params(axis="y", length=0, labelsize=6)
        for row, block_row in enumerate(trace.of.block_rows.tolist()):
            text = f"row {row}" if row == block_row else f"row {row}\nblock\nrow {block_row}"
            axes.text(
                -0.085,
                -row * _ROW - 0.5 * (_ROW - _GAP),
                text,
                fontsize=7,
                ha="center",
                va="center",
                transform=axes.get_yaxis_transform(),
            )
        axes.set_xlim(first - 1, last)
        axes.set_ylim(-height + 0.2, 0.15)
        axes.set_xticks(
            [c - 0.5 for c in range(first, last + 1) if c % 5 == 0 or c == 1],
            [str(c) for c in range(first, last + 1) if c % 5 == 0 or c == 1],
        )
        axes.set_xlabel("Cycle (idle PEs: s starved, f fetching, a accepting, c waiting in a bank conflict)")
        for c in range(first - 1, last + 1):
            axes.axvline(c, color="#E6E6E6", linewidth=0.3, zorder=0)
        axes.spines["left"].set_visible(False)
        figure.legend(
            handles=_handles(),
            loc="outside upper center",
            ncols=8,
            fontsize=6,
            handlelength=1.0,
            handletextpad=0.4,
            columnspacing=1.0,
        )
    caption = (
        f"One pass of {trace.of.machine.name} cycle by cycle, from the {trace.source}: block columns "
        f"{trace.of.begin} to {trace.of.end - 1}; of each row the type codes that its scan passes over or pushes, the "
        "entries of its queue, the block column that it asks its bank for, the operand that waits, and the block that "
        "its PEs work on; of each bank the block column that it grants."
    )
    return Plot(name, "One pass cycle by cycle", caption, figure, _table(trace, first, last))


def _table(trace: PassTrace, first: int, last: int) -> pd.DataFrame:
    """One line per cycle and row."""
    rows = trace.states.shape[1]
    states = trace.states[first - 1 : last]
    table = pd.DataFrame(states.reshape(-1, len(STATE_FIELDS)), columns=list(STATE_FIELDS))
    table["row_class"] = [COUNTERS[index] for index in table["row_class"]]
    table.insert(0, "cycle", np.repeat(np.arange(first, last + 1), rows))
    table.insert(1, "row", np.tile(np.arange(rows), last - first + 1))
    table.insert(2, "block_row", np.tile(trace.of.block_rows, last - first + 1))
    return table.rename(columns={"busy": "busy_cycles", "queue": "queue_entries"})


def _draw_row(
    axes: Axes, trace: PassTrace, row: int, top: float, cycles: range, font: float
) -> list[tuple[float, str]]:
    places, y = {}, top
    for strip, height in _STRIPS.items():
        y -= height
        places[strip] = y
    _draw_scan(axes, trace, row, places["scan"], cycles)
    depth = trace.of.machine.front_end.queue_depth
    queue = trace.field("queue")[:, row]
    for c in cycles:
        if queue[c]:
            axes.bar(c + 0.5, 0.4 * queue[c] / depth, 0.8, places["queue"], color=_QUEUE_COLOR, linewidth=0)
    _draw_fetch(axes, trace, row, places["fetch"], cycles, font)
    _draw_execution(axes, trace, row, places["PE"], cycles, font)
    axes.axhline(top + 0.5 * _GAP, color="#8C8C8C", linewidth=0.4, zorder=0)
    return [(places[strip] + 0.5 * height - 0.03, strip) for strip, height in _STRIPS.items()]


def _draw_scan(axes: Axes, trace: PassTrace, row: int, bottom: float, cycles: range) -> None:
    """A small square per code, in the order of the scan from the top, coloured by type."""
    scan = [*trace.field("scan")[:, row].tolist(), trace.of.end]
    types = trace.of.executed_types[row]
    slots = max(trace.of.machine.front_end.skip_window, 3)
    size = 0.85 / slots
    for c in cycles:
        for index, j in enumerate(range(scan[c], scan[c + 1])):
            axes.bar(
                c + 0.5,
                0.8 * size,
                0.62,
                bottom + 0.88 - (index + 1) * size,
                color=_BLOCK_COLORS[int(types[j])],
                linewidth=0,
            )


def _draw_fetch(axes: Axes, trace: PassTrace, row: int, bottom: float, cycles: range, font: float) -> None:
    """The block column asked for: framed in its colour where granted, struck out where another one was first."""
    request, granted = trace.field("request")[:, row], trace.field("granted")[:, row]
    operand = trace.field("operand")[:, row]
    for c in cycles:
        if operand[c] >= 0:
            axes.bar(c + 0.5, 0.1, 1.0, bottom + 0.02, color="black", linewidth=0)
        if request[c] >= 0:
            color = "black" if granted[c] else _REFUSED
            if not granted[c]:
                axes.bar(c + 0.5, 0.52, 0.9, bottom + 0.17, color="#F7D9C8", linewidth=0)
            axes.text(
                c + 0.5, bottom + 0.42, str(request[c]), fontsize=font, ha="center", va="center", color=color
            )


def _draw_execution(
    axes: Axes, trace: PassTrace, row: int, bottom: float, cycles: range, font: float
) -> None:
    columns = trace.executing_column()[:, row]
    kinds = trace.field("executing")[:, row]
    for start, stop in _runs(columns, trace.field("busy")[:, row], cycles):
        if columns[start] < 0:
            continue
        axes.bar(
            start + 0.04,
            0.76,
            stop - start - 0.08,
            bottom + 0.08,
            align="edge",
            color=_BLOCK_COLORS[int(kinds[start])],
            linewidth=0,
        )
        axes.text(
            0.5 * (start + stop), bottom + 0.44, str(columns[start]), fontsize=font, ha="center", va="center"
        )
    classes = trace.field("row_class")[:, row]
    for c in cycles:
        letter = _IDLE_TEXT.get(COUNTERS[classes[c]])
        if letter:
            axes.text(
                c + 0.5,
                bottom + 0.44,
                letter,
                fontsize=font,
                ha="center",
                va="center",
                color="#5A5A5A",
                style="italic",
            )
    finished = [c for c in cycles if COUNTERS[classes[c]] == "imbalance"]
    if finished:
        axes.bar(
            finished[0],
            0.76,
            finished[-1] + 1 - finished[0],
            bottom + 0.08,
            align="edge",
            facecolor="white",
            edgecolor="#B0B0B0",
            hatch="/////",
            linewidth=0,
        )


def _runs(columns: np.ndarray, busy: np.ndarray, cycles: range) -> Iterator[tuple[int, int]]:
    """Runs of cycles in which the PEs work on one block."""
    start = cycles.start
    for c in range(cycles.start + 1, cycles.stop + 1):
        if c == cycles.stop or columns[c] != columns[start] or (busy[c] >= busy[c - 1] and columns[c] >= 0):
            yield start, c
            start = c


def _bank_height(banks: int) -> float:
    return 0.7 * min(banks, 16) + 0.3


def _draw_banks(
    axes: Axes, trace: PassTrace, top: float, cycles: range, font: float
) -> list[tuple[float, str]]:
    """Per bank the block column that it grants, dark where several rows share it."""
    banks = trace.of.machine.operand_store.banks
    request, granted = trace.field("request"), trace.field("granted")
    axes.axhline(top + 0.5 * _GAP, color="#8C8C8C", linewidth=0.4, zorder=0)
    labels = []
    for bank in range(min(banks, 16)):
        bottom = top - 0.7 * (bank + 1)
        labels.append((bottom + 0.35, f"bank {bank}"))
        for c in cycles:
            served = (granted[c] == 1) & (request[c] % banks == bank)
            count = int(served.sum())
            if not count:
                continue
            axes.bar(
                c + 0.5,
                0.58,
                0.92,
                bottom + 0.06,
                color=PALETTE[2],
                alpha=0.25 if count == 1 else 0.75,
                linewidth=0,
            )
            column = int(request[c][served][0])
            axes.text(c + 0.5, bottom + 0.34, str(column), fontsize=font, ha="center", va="center")
    return labels


def _handles() -> list[Artist]:
    from matplotlib.patches import Patch

    faces: list[tuple[str, dict[str, Any]]] = [
        (_BLOCK_TEXT[kind], {"facecolor": color}) for kind, color in _BLOCK_COLORS.items()
    ]
    faces += [
        ("operand waits", {"facecolor": "black"}),
        ("refused by the bank", {"facecolor": "#F7D9C8"}),
        ("finished", {"facecolor": "white", "edgecolor": "#B0B0B0", "hatch": "/////"}),
        ("granted to one row", {"facecolor": PALETTE[2], "alpha": 0.25}),
        ("multicast to several", {"facecolor": PALETTE[2], "alpha": 0.75}),
    ]
    return [Patch(label=label, linewidth=0, **look) for label, look in faces]
