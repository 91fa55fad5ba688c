"""Run a search: propose, evaluate through the runner and its store, learn, until the evaluations are spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from sweeps.batch import Grid
from sweeps.runner import SweepProgress, SweepRunner
from sweeps.search.proposals import UNFIT, History, Proposer, Sampler
from sweeps.search.question import Question, needed_columns, with_derived
from sweeps.space import Space
from sweeps.store import PointReader

__all__ = ["Search", "SearchProgress", "SearchSettings", "run_search", "trials_of"]


@dataclass(frozen=True)
class SearchSettings:
    """What, with the space and the question, decides which points a search evaluates.

    Attributes
    ----------
    sampler : {"hybrid", "nsga2", "tpe", "random"}
        ``hybrid`` is two generations of NSGA-II, then a tenth NSGA-II and in equal parts points that a model of the results
        expects on the front (`sweeps.search.surrogate`), and neighbours of the knees and of the front.
    evaluations : int
        Different points, those that the store holds already included; at most the size of the space.
    seed : int
    """

    sampler: Sampler = "hybrid"
    evaluations: int = 500
    seed: int = 0


@dataclass(frozen=True)
class SearchProgress:
    """Where a search stands.

    Attributes
    ----------
    evaluated, evaluations : int
    feasible : int
        Of those evaluated.
    doing : str
    """

    evaluated: int
    evaluations: int
    feasible: int
    doing: str


@dataclass(frozen=True, eq=False)
class Search:
    """What a search did.

    Attributes
    ----------
    space : Space
    question : Question
    settings : SearchSettings
    trials : DataFrame
        A row per evaluated point in the order of the search: ``evaluation`` from 1, ``key``, ``number`` (of the point in the
        space), ``feasible``, ``violation``, ``error``, and the columns of the question.
    computed, reused : int
        Points that were simulated now, and that the store held already.
    """

    space: Space
    question: Question
    settings: SearchSettings
    trials: pd.DataFrame
    computed: int
    reused: int


def run_search(
    space: Space,
    folder: str | Path,
    question: Question,
    settings: SearchSettings | None = None,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: Callable[[SearchProgress], None] | None = None,
) -> Search:
    """Search a space for the front of a question; every result goes into the store of ``folder``.

    The points of the store are the memory of the search: one that was stopped, or killed, and is started again with the same
    settings proposes the same points, finds the results of those that were evaluated, and goes on from there.

    Parameters
    ----------
    space : Space
    folder : path
        As of `sweeps.runner.run_sweep`.
    question : Question
        From `sweeps.search.ask`.
    settings : SearchSettings, optional
    workers, scheduler
        As of `sweeps.runner.run_sweep`.
    progress : callable, optional
        Called with a `SearchProgress` every now and then.

    Raises
    ------
    InputError
        As `run_sweep`; fewer than one evaluation; Optuna is not installed.
    HwsimError
        As `run_sweep`; what was evaluated before stays.
    """
    settings = settings or SearchSettings()
    if settings.evaluations < 1:
        raise InputError(
            "search", Problem("evaluations", f"found {settings.evaluations}, at least 1 is needed")
        )
    grid = Grid(space)
    evaluations = min(settings.evaluations, len(grid))
    proposer = Proposer(grid, len(question.objectives), settings.sampler, evaluations, settings.seed)
    history = History()
    frames: list[pd.DataFrame] = []
    computed = 0

    def tell(now: SweepProgress | None = None) -> None:
        if progress is not None:
            done = now.points_done if now else 0
            feasible = sum(violation <= 0 for violation in history.violations)
            doing = now.doing if now else "proposing"
            progress(SearchProgress(len(history.numbers) + done, evaluations, feasible, doing))

    tell()
    with SweepRunner(space, folder, workers=workers, scheduler=scheduler, details="none") as runner:
        points = PointReader(runner.store, ["error", *needed_columns(question)])
        while len(history.numbers) < evaluations:
            asked = dict.fromkeys(proposer.ask(history))
            numbers = np.array([number for number in asked if number not in history.rows], np.int64)
            numbers = numbers[: evaluations - len(history.numbers)]
            if len(numbers):
                computed += runner.evaluate(numbers, tell if progress else None).computed
                frames.append(trials_of(grid, numbers, points, question))
                _remember(history, frames[-1], question)
            proposer.tell(history)
    tell()
    trials = pd.concat(frames, ignore_index=True)
    trials.insert(0, "evaluation", np.arange(1, len(trials) + 1))
    return Search(space, question, settings, trials, computed, len(trials) - computed)


def trials_of(
    grid: Grid, numbers: NDArray[np.int64], points: PointReader, question: Question
) -> pd.DataFrame:
    """The rows of `Search.trials` of some points that the store holds, in the order of ``numbers``."""
    keys = grid.keys(grid.codes(numbers))
    frame = with_derived(points.rows(keys).to_pandas()).drop_duplicates("key")
    frame = frame.set_index("key").loc[keys].reset_index()
    violations = question.violations(frame)
    there = frame["error"].isna().to_numpy() & question.has_values(frame)
    violation = np.where(there, np.maximum(violations, 0.0).sum(axis=1), UNFIT)
    return frame.assign(number=numbers, feasible=violation <= 0, violation=violation)[
        ["number", "key", "feasible", "violation", "error", *question.columns]
    ]


def _remember(history: History, frame: pd.DataFrame, question: Question) -> None:
    fits = (frame["violation"] < UNFIT).to_numpy()[:, None]
    costs = np.where(fits, question.costs(frame), 0.0)
    margins = np.where(fits, question.violations(frame), 0.0)
    for row, (number, violation) in enumerate(zip(frame["number"], frame["violation"], strict=True)):
        history.add(int(number), costs[row], margins[row], float(violation))
