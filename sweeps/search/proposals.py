"""Which points to evaluate next: Optuna's samplers over the axes of a space, and a model of the results so far,
and steps to the neighbours of the front.

Everything follows from the seed and the results so far, so a search that starts again proposes the same points again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from sweeps.batch import Grid
from sweeps.pareto import knee_rows, not_dominated
from sweeps.search.surrogate import promising

if TYPE_CHECKING:
    import optuna

__all__ = ["SAMPLERS", "UNFIT", "History", "Proposer", "Sampler"]

Sampler = Literal["hybrid", "nsga2", "tpe", "random"]
SAMPLERS: tuple[Sampler, ...] = ("hybrid", "nsga2", "tpe", "random")

UNFIT = 1e6
"""Violation of a point that does not fit its machine: more than that of any constraint that is nearly kept."""

_POPULATION = 50
_GENERATIONS = 8
"""The population is 50, or less where that would leave fewer generations than this."""
_TPE_BATCH = 10
_GENERATIONS_FIRST = 2
"""Of NSGA-II alone, before the hybrid asks its model too."""
_MODELLED = 2000
"""The model is of so many latest points: its cost grows with their cube."""
_POOL = 20_000
"""The model looks at all points of a space of up to so many."""


@dataclass
class History:
    """Evaluated points in the order in which they were proposed.

    Attributes
    ----------
    numbers : list of int
        As `sweeps.batch.Grid` numbers them.
    costs : list of float arrays ``[objectives]``
        Smaller is better; zeros where a point does not fit.
    margins : list of float arrays ``[constraints]``
        Relative violations, 0 or less where a constraint is kept; zeros where a point does not fit.
    violations : list of float
        0 where a point is feasible; the sum of relative violations; `UNFIT` where it has no result.
    rows : dict
        Number -> place in these lists.
    """

    numbers: list[int] = field(default_factory=list)
    costs: list[NDArray[np.float64]] = field(default_factory=list)
    margins: list[NDArray[np.float64]] = field(default_factory=list)
    violations: list[float] = field(default_factory=list)
    rows: dict[int, int] = field(default_factory=dict)

    def add(
        self, number: int, costs: NDArray[np.float64], margins: NDArray[np.float64], violation: float
    ) -> None:
        """Append one result."""
        self.rows[number] = len(self.numbers)
        self.numbers.append(number)
        self.costs.append(costs)
        self.margins.append(margins)
        self.violations.append(violation)


class Proposer:
    """Proposes points and learns from their results.

    Parameters
    ----------
    grid : Grid
    objectives : int
    sampler : {"hybrid", "nsga2", "tpe", "random"}
    evaluations : int
        How many there will be.
    seed : int

    Raises
    ------
    InputError
        Optuna is not installed.
    """

    def __init__(self, grid: Grid, objectives: int, sampler: Sampler, evaluations: int, seed: int) -> None:
        self.grid, self.sampler = grid, sampler
        self.steps = _Steps(grid)
        self.population = min(_POPULATION, max(evaluations // _GENERATIONS, 2))
        self.study, self.distributions = _study(grid, self.steps, objectives, sampler, self.population, seed)
        self.rng = np.random.default_rng(seed)
        self.asked: list[tuple[optuna.trial.Trial, int]] = []

    def ask(self, history: History) -> list[int]:
        """Numbers of points, in order; some may have been proposed before.

        At least one is new while there are points left.
        """
        if self.sampler == "hybrid" and len(history.numbers) >= _GENERATIONS_FIRST * self.population:
            count = max(self.population // 5, 1)
            numbers = self._from_optuna(max(count // 4, 1))
            for find in (self._promising, self._neighbours):
                numbers += self._offered(find(history, {*history.rows, *numbers}, count))
        else:
            count = _TPE_BATCH if self.sampler == "tpe" else self.population
            numbers = self._from_optuna(count)
        if history.rows.keys() >= set(numbers):
            numbers += self._offered(self._unseen(history, count))
        return numbers

    def tell(self, history: History) -> None:
        """Learn from the results of everything that was asked."""
        for trial, number in self.asked:
            row = history.rows.get(number)
            if row is not None:  # the last batch may have been more than the evaluations that were left
                trial.set_constraint("violation", history.violations[row])
                self.study.tell(trial, history.costs[row].tolist())
        self.asked = []

    def _from_optuna(self, count: int) -> list[int]:
        numbers = []
        for _ in range(count):
            trial = self.study.ask(self.distributions)
            places = [trial.params[name] for name in self.grid.names]
            self.asked.append((trial, self.steps.number(places)))
            numbers.append(self.asked[-1][1])
        return numbers

    def _offered(self, numbers: Sequence[int]) -> list[int]:
        """The same numbers, as trials that Optuna learns from as from its own."""
        for number in numbers:
            self.study.enqueue_trial(
                dict(zip(self.grid.names, self.steps.places(number).tolist(), strict=True))
            )
        return self._from_optuna(len(numbers))

    def _promising(self, history: History, seen: set[int], count: int) -> list[int]:
        """Points that the model of the results so far expects on the front."""
        known = slice(-_MODELLED, None)
        violations = np.array(history.violations[known])
        fits = violations < UNFIT
        if not fits.any():
            return []
        candidates = self._candidates(history, seen)
        if not len(candidates):
            return []
        chosen = promising(
            self.grid.codes(np.array(history.numbers[known])),
            np.array(history.costs[known]),
            np.array(history.margins[known]),
            fits,
            self.grid.codes(candidates),
            count,
            self.rng,
        )
        return candidates[chosen].tolist()

    def _neighbours(self, history: History, seen: set[int], count: int) -> list[int]:
        """Unseen points a step away from the knees of the front, then from most of its points."""
        front = self._front(history)
        costs = np.array([history.costs[history.rows[number]] for number in front])
        knees = [front[row] for row in dict.fromkeys(knee_rows(costs).values())]
        found: list[int] = []
        for sources in (knees, front):
            reached = Counter(step for number in sources for step in self.steps.neighbours(number))
            new = np.array(sorted(reached.keys() - seen - set(found)), np.int64)
            self.rng.shuffle(new)
            found += sorted(new.tolist(), key=lambda number: -reached[number])
        return found[:count]

    def _front(self, history: History) -> list[int]:
        """The front of the points that miss the constraints least: the feasible ones as soon as there are any."""
        violations = np.array(history.violations)
        best = np.flatnonzero(violations == violations.min())
        front = best[not_dominated(np.array(history.costs)[best])]
        return [history.numbers[row] for row in front.tolist()]

    def _candidates(self, history: History, seen: set[int]) -> NDArray[np.int64]:
        """All unseen points; of a space too large for that, random ones and those within two steps of the front."""
        if len(self.grid) <= _POOL:
            pool = np.arange(len(self.grid))
        else:
            near = set(self._front(history))
            for _ in range(2):
                near |= {step for number in sorted(near) for step in self.steps.neighbours(number)}
                if len(near) > _POOL:
                    near = set(self.rng.choice(np.array(sorted(near)), _POOL, replace=False).tolist())
            drawn = self.rng.integers(len(self.grid), size=_POOL)
            pool = np.union1d(drawn, np.array(sorted(near), np.int64))
        return np.setdiff1d(pool, np.array(sorted(seen), np.int64))

    def _unseen(self, history: History, count: int) -> list[int]:
        """Random points that were not evaluated yet, up to ``count`` of them."""
        count = min(count, len(self.grid) - len(history.numbers))
        found: dict[int, None] = {}
        while len(found) < count:
            drawn = self.rng.integers(len(self.grid), size=max(4 * count, len(history.numbers)))
            found |= dict.fromkeys(number for number in drawn.tolist() if number not in history.rows)
        return list(found)[:count]


class _Steps:
    """The axes of a space as places in order: numbers by size, words as listed; and the steps from point to point."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.ordered = [name != "seed" and _in_order(values) for name, values in _axes(grid)]
        self.codes = [
            np.argsort(np.array(values), kind="stable") if ordered else np.arange(len(values))
            for (_, values), ordered in zip(_axes(grid), self.ordered, strict=True)
        ]
        self.place_of = [np.argsort(codes) for codes in self.codes]

    def number(self, places: Sequence[int]) -> int:
        codes = tuple(int(codes[place]) for codes, place in zip(self.codes, places, strict=True))
        return int(np.ravel_multi_index(codes, self.grid.shape))

    def places(self, number: int) -> NDArray[np.int64]:
        codes = np.unravel_index(number, self.grid.shape)
        return np.array([places[code] for places, code in zip(self.place_of, codes, strict=True)])

    def neighbours(self, number: int) -> list[int]:
        """Points that differ in one axis: by one place where it has an order, by any value where it has none."""
        places = self.places(number).tolist()
        found = []
        for axis, (size, ordered) in enumerate(zip(self.grid.shape, self.ordered, strict=True)):
            others = (places[axis] - 1, places[axis] + 1) if ordered else range(size)
            for other in others:
                if 0 <= other < size and other != places[axis]:
                    found.append(self.number([*places[:axis], other, *places[axis + 1 :]]))
        return found


def _axes(grid: Grid) -> list[tuple[str, tuple[Any, ...]]]:
    return list(zip(grid.names, grid.values, strict=True))


def _in_order(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _study(
    grid: Grid, steps: _Steps, objectives: int, sampler: Sampler, population: int, seed: int
) -> tuple[optuna.Study, dict[str, optuna.distributions.BaseDistribution]]:
    try:
        import optuna
    except ImportError:
        problem = Problem("", "the package optuna is not installed", 'pip install "hwsim[search]"')
        raise InputError("search", problem) from None
    # It would tell of every study that is made, in the middle of the progress bar.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=population, seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(multivariate=True, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    study = optuna.create_study(
        directions=["minimize"] * objectives, sampler=made["nsga2" if sampler == "hybrid" else sampler]()
    )
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, size, ordered in zip(grid.names, grid.shape, steps.ordered, strict=True):
        distributions[name] = (
            optuna.distributions.IntDistribution(0, size - 1)
            if ordered
            else optuna.distributions.CategoricalDistribution(range(size))
        )
    return study, distributions
