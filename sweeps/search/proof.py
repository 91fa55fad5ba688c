"""A search beside the whole truth: on a space small enough to enumerate, how much of the front it finds, and how soon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hwsim.errors import InputError, Problem
from sweeps.batch import Grid
from sweeps.figures import Plot
from sweeps.pareto import knee_rows
from sweeps.runner import run_sweep
from sweeps.search.outcome import Scale, found_front, history_plot, hypervolume_history
from sweeps.search.proposals import SAMPLERS, Sampler
from sweeps.search.question import Question, needed_columns
from sweeps.search.run import SearchSettings, run_search, trials_of
from sweeps.space import Space
from sweeps.store import PointReader

__all__ = ["GOAL", "LARGEST", "Proof", "enumerate_space", "prove"]

GOAL = 0.98
LARGEST = 100_000
"""Points of a space that is enumerated on demand; more is surely a mistake."""


@dataclass(frozen=True, eq=False)
class Proof:
    """Searches beside the enumeration.

    Attributes
    ----------
    question : Question
    points, feasible, front : int
        Of the whole space.
    evaluations : int
        Of each search.
    runs : DataFrame
        A row per sampler and seed: ``sampler``, ``seed``, ``hypervolume_ratio``, ``knees_found``, ``knees``, ``front_share``
        (distinct objective values of the true front that were found), ``evaluations_to_goal`` (missing if not reached).
    plot : Plot
        Hypervolume, as a share of the true one, over evaluations.
    """

    question: Question
    points: int
    feasible: int
    front: int
    evaluations: int
    runs: pd.DataFrame
    plot: Plot

    def summary(self) -> pd.DataFrame:
        """A row per sampler: hypervolume ratio, knees, share of the front, evaluations to the goal."""
        rows = []
        for sampler, runs in self.runs.groupby("sampler", sort=False):
            reached = runs["evaluations_to_goal"].dropna()
            rows.append(
                {
                    "sampler": str(sampler),
                    "hypervolume mean": f"{runs['hypervolume_ratio'].mean():.4f}",
                    "least": f"{runs['hypervolume_ratio'].min():.4f}",
                    "knees found": f"{runs['knees_found'].sum()} of {runs['knees'].sum()}",
                    "runs with all": f"{(runs['knees_found'] == runs['knees']).sum()} of {len(runs)}",
                    "front found": f"{100 * runs['front_share'].mean():.0f} %",
                    "points to goal": f"{reached.median():.0f}" if len(reached) == len(runs) else "–",
                }
            )
        return pd.DataFrame(rows)


def enumerate_space(space: Space, folder: str | Path, question: Question) -> pd.DataFrame:
    """Every point of a space as rows of `sweeps.search.Search.trials`.

    Raises
    ------
    InputError
        The space has more than `LARGEST` points.
    """
    grid = Grid(space)
    if len(grid) > LARGEST:
        hint = "take values from its axes until it is small enough"
        raise InputError(
            f"space {space.name}", Problem("", f"{len(grid)} points to enumerate, at most {LARGEST}", hint)
        )
    store = run_sweep(space, folder, details="none").store
    points = PointReader(store, ["error", *needed_columns(question)])
    return trials_of(grid, np.arange(len(grid)), points, question)


def prove(
    space: Space,
    folder: str | Path,
    question: Question,
    *,
    evaluations: int,
    seeds: Sequence[int] = range(5),
    samplers: Sequence[Sampler] = SAMPLERS,
    name: str = "search-proof",
    progress: Callable[[int, int], None] | None = None,
) -> Proof:
    """Enumerate a space, search it with every sampler and seed, and compare.

    All hypervolumes are measured in the box of the true front (`sweeps.search.outcome.Scale`); a knee counts as found when a
    feasible point with the same values in its objectives was.

    Parameters
    ----------
    space, folder, question
    evaluations : int
    seeds : sequence of int
    samplers : sequence of str
    name : str
        Of the figure's files.
    progress : callable, optional
        Called with the searches done and those that there will be.

    Raises
    ------
    InputError
        As `enumerate_space`; no point of the space is feasible.
    """
    truth = enumerate_space(space, folder, question)
    front = found_front(truth, question)
    costs = question.costs(front)
    scale = Scale.of(costs)
    whole = scale.hypervolume(costs)
    knees = {subset: costs[row, subset] for subset, row in knee_rows(costs).items()}
    distinct = {tuple(row) for row in costs.tolist()}
    rows: list[dict[str, Any]] = []
    histories: dict[str, pd.DataFrame] = {}
    for sampler in samplers:
        runs = []
        for seed in seeds:
            settings = SearchSettings(sampler, evaluations, seed)
            trials = run_search(space, folder, question, settings).trials
            history = hypervolume_history(trials, question, scale)
            history["hypervolume"] /= whole
            runs.append(history.assign(run=seed))
            found = question.costs(trials[trials["feasible"]])
            reached = history.loc[history["hypervolume"] >= GOAL, "evaluation"]
            rows.append(
                {
                    "sampler": sampler,
                    "seed": seed,
                    "hypervolume_ratio": history["hypervolume"].iloc[-1],
                    "knees_found": sum(
                        bool((found[:, subset] == knee).all(axis=1).any()) for subset, knee in knees.items()
                    ),
                    "knees": len(knees),
                    "front_share": len(distinct & {tuple(row) for row in found.tolist()}) / len(distinct),
                    "evaluations_to_goal": reached.min() if len(reached) else np.nan,
                }
            )
            if progress is not None:
                progress(len(rows), len(seeds) * len(samplers))
        histories[sampler] = pd.concat(runs, ignore_index=True)
    caption = f"{question}; lines are medians over {len(seeds)} seeds, bands the least and most."
    return Proof(
        question,
        len(truth),
        int(truth["feasible"].sum()),
        len(distinct),
        evaluations,
        pd.DataFrame(rows),
        history_plot(histories, name, caption, GOAL),
    )
