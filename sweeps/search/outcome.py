"""What a search found: the front, its knees, how the hypervolume grew, and the figures and files that show it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from hwsim.files import write_atomically
from sweeps.batch import Grid
from sweeps.figures import Plot, save_plot
from sweeps.figures.base import add_legend
from sweeps.pareto import hypervolume, knee_rows, not_dominated
from sweeps.search.question import Question
from sweeps.search.run import Search
from sweeps.style import COLUMN_INCHES, MARKERS, NEUTRAL, PALETTE, new_figure, style

__all__ = [
    "Scale",
    "configurations",
    "found_front",
    "found_knees",
    "history_plot",
    "hypervolume_history",
    "save_search",
]

_BEYOND = 0.1
_STEPS = 200


@dataclass(frozen=True)
class Scale:
    """The box in which hypervolume is measured: from the best of each objective on a front to a tenth beyond its worst.

    Attributes
    ----------
    best, reference : float64 arrays ``[objectives]``
        As costs: smaller is better. A column that is the same all along the front counts a tenth of its size.
    """

    best: NDArray[np.float64]
    reference: NDArray[np.float64]

    @classmethod
    def of(cls, front: NDArray[np.float64]) -> Scale:
        """The box of a front's costs, ``float64[rows, objectives]``, at least one row."""
        best, worst = front.min(axis=0), front.max(axis=0)
        size = np.where(worst > best, worst - best, np.where(best == 0, 1.0, np.abs(best)))
        return cls(best, worst + _BEYOND * size)

    def hypervolume(self, costs: NDArray[np.float64]) -> float:
        """The share of the box that rows dominate, 0 to 1 for rows within it."""
        names = [f"c{i}" for i in range(len(self.best))]
        scaled = (costs - self.best) / (self.reference - self.best)
        frame = pd.DataFrame(scaled[not_dominated(scaled)] if len(scaled) else scaled, columns=names)
        return hypervolume(frame, dict.fromkeys(names, 1.0), minimise=names)


def found_front(trials: pd.DataFrame, question: Question) -> pd.DataFrame:
    """The feasible trials that no other feasible trial dominates, the first objective's best first.

    Raises
    ------
    InputError
        No trial is feasible; the message says how near the nearest is.
    """
    feasible = trials[trials["feasible"]]
    if feasible.empty:
        raise InputError("search", _nothing_feasible(trials, question))
    front = feasible[not_dominated(question.costs(feasible))]
    ascending = [name in question.minimise for name in question.objectives]
    return front.sort_values(list(question.objectives), ascending=ascending, kind="stable", ignore_index=True)


def found_knees(front: pd.DataFrame, question: Question) -> dict[tuple[str, ...], pd.Series]:
    """The knee of each pair of objectives, and of all three if there are three: names -> the row of the front."""
    rows = knee_rows(question.costs(front))
    return {tuple(question.objectives[i] for i in subset): front.iloc[row] for subset, row in rows.items()}


def hypervolume_history(trials: pd.DataFrame, question: Question, scale: Scale) -> pd.DataFrame:
    """``evaluation`` and ``hypervolume`` (share of the box of ``scale``) after up to 200 of the evaluations."""
    ends = np.unique(np.linspace(1, len(trials), min(_STEPS, len(trials))).round().astype(int))
    costs, feasible = question.costs(trials), trials["feasible"].to_numpy()
    front = costs[:0]
    rows = []
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        front = np.concatenate([front, costs[start:end][feasible[start:end]]])
        front = front[not_dominated(front)] if len(front) else front
        rows.append({"evaluation": end, "hypervolume": scale.hypervolume(front)})
    return pd.DataFrame(rows)


def history_plot(
    histories: Mapping[str, pd.DataFrame], name: str, caption: str, goal: float | None = None
) -> Plot:
    """Hypervolume over evaluations, a line per label; bands are the least and most where there are several ``run``s.

    Parameters
    ----------
    histories : dict
        Label -> frame with ``evaluation``, ``hypervolume`` and, for several runs, ``run``.
    name, caption : str
    goal : float, optional
        Drawn as a dotted line.
    """
    parts = []
    with style():
        figure = new_figure(COLUMN_INCHES, 2.6)
        axes = figure.subplots()
        for i, (label, history) in enumerate(histories.items()):
            spread = history.groupby("evaluation")["hypervolume"].agg(["median", "min", "max"])
            places = spread.index.to_numpy()
            color = PALETTE[i % len(PALETTE)]
            look: dict[str, Any] = {
                "marker": MARKERS[i],
                "markevery": max(len(places) // 8, 1),
                "markersize": 3,
            }
            axes.plot(places, spread["median"], color=color, label=label, **look)
            if "run" in history and history["run"].nunique() > 1:
                axes.fill_between(places, spread["min"], spread["max"], color=color, alpha=0.15, linewidth=0)
            parts.append(history.assign(search=label))
        if goal is not None:
            axes.axhline(goal, color=NEUTRAL, linestyle=":", label=f"goal, {goal:g}")
        axes.set_xlabel("Points evaluated")
        axes.set_ylabel(
            "Hypervolume (share of the box)" if goal is None else "Hypervolume / true hypervolume"
        )
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.grid(True)
        handles = axes.get_legend_handles_labels()[0]
        if len(handles) > 1:
            add_legend(figure, "outside upper center", handles, columns=3)
    data = pd.concat(parts, ignore_index=True)
    return Plot(name, "Hypervolume over evaluations", caption, figure, data)


def configurations(search: Search, rows: pd.DataFrame) -> pd.DataFrame:
    """The axes that vary in the space, for some rows of the trials, with the rows' columns behind."""
    grid = Grid(search.space)
    codes = grid.codes(rows["number"].to_numpy(np.int64))
    columns: dict[str, list[object]] = {}
    for axis, (name, values) in enumerate(zip(grid.names, grid.values, strict=True)):
        if len(values) > 1:
            columns[name] = [_text(name, values[code]) for code in codes[:, axis].tolist()]
    chosen = pd.DataFrame(columns, index=rows.index)
    others = [name for name in search.question.columns if name not in chosen.columns]
    return pd.concat([chosen, rows[others]], axis=1)


def save_search(search: Search, folder: str | Path) -> dict[str, Path]:
    """Write ``trials.csv``, ``front.csv``, ``search.json`` and the figure ``hypervolume`` (PNG, PDF, CSV).

    Returns
    -------
    dict
        Paths by name.

    Raises
    ------
    InputError
        No trial is feasible; trials and settings are written all the same.
    HwsimError
        The disk is full or the folder cannot be written.
    """
    folder, question = Path(folder), search.question
    paths = {name: folder / name for name in ("search.json", "trials.csv", "front.csv")}
    settings = {
        "space": search.space.resolved(),
        "minimise": list(question.minimise),
        "maximise": list(question.maximise),
        "constraints": [str(item) for item in question.constraints],
        "sampler": search.settings.sampler,
        "evaluations": search.settings.evaluations,
        "seed": search.settings.seed,
    }
    for stale in (
        paths["front.csv"],
        *(folder / f"hypervolume.{suffix}" for suffix in ("png", "pdf", "csv")),
    ):
        stale.unlink(missing_ok=True)  # of an earlier search, whose front is no answer to this one
    write_atomically(paths["search.json"], json.dumps(settings, indent=1).encode())
    write_atomically(paths["trials.csv"], search.trials.to_csv(index=False).encode())
    front = found_front(search.trials, question)
    table = pd.concat([front[["key"]], configurations(search, front)], axis=1)
    write_atomically(paths["front.csv"], table.to_csv(index=False).encode())
    scale = Scale.of(question.costs(front))
    history = hypervolume_history(search.trials, question, scale)
    caption = (
        f"Share of the box between the best and a tenth beyond the worst of the front that the points found so far dominate. "
        f"{question}; {search.settings.sampler}, seed {search.settings.seed}."
    )
    plot = history_plot({search.settings.sampler: history}, "hypervolume", caption)
    return paths | save_plot(plot, folder)


def _text(name: str, value: object) -> object:
    if name == "block" and isinstance(value, tuple):
        return "x".join(str(size) for size in value)
    if name == "ratios" and isinstance(value, tuple):
        return " ".join(f"{share:g}" for share in value)
    return value


def _nothing_feasible(trials: pd.DataFrame, question: Question) -> Problem:
    errors = trials["error"].dropna()
    unfit = f"; {len(errors)} do not fit their machine, the first: {errors.iloc[0]}" if len(errors) else ""
    bounds = []
    for item in question.constraints:
        values = trials[item.column].dropna()
        if len(values):
            best = values.max() if item.at_least else values.min()
            bounds.append(f"{item}: {best:.6g} is the {'most' if item.at_least else 'least'} that was found")
    message = f"none of {len(trials)} points keeps every constraint{unfit}"
    return Problem("constraint", message, "; ".join(bounds) or "look at the machine and its memories")
