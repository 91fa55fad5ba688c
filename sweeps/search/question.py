"""What a search looks for: objectives and constraints on columns of the results, checked before anything is evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem, nearest_name
from sweeps.batch import SUMMARY_COLUMNS
from sweeps.space import Space

__all__ = ["AVERAGE_POWER", "Constraint", "Question", "ask", "searchable_columns", "with_derived"]

AVERAGE_POWER = "average_power_mw"
"""Energy of an inference over its latency, DRAM included; worked out from the two, it is not stored."""

_NAMES = ("block_rows", "block_columns", "pruned", "unified")
_TRAINED = ("accuracy_dense_float", "accuracy_float", "accuracy_integer", "file_bytes")
_CONSTRAINT = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=)\s*(\S+)\s*", re.ASCII)
_MOST_OBJECTIVES = 3


@dataclass(frozen=True)
class Constraint:
    """A bound on a column: ``Constraint("area_mm2", 12.0)`` is at most, with ``at_least`` at least."""

    column: str
    bound: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{self.column}{'>=' if self.at_least else '<='}{self.bound:g}"

    def violation(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """By which share of the bound values miss it, ``float64`` of the same shape; 0 or less where they keep it."""
        excess = self.bound - values if self.at_least else values - self.bound
        return excess / (abs(self.bound) or 1.0)


@dataclass(frozen=True)
class Question:
    """Columns to minimise and to maximise, and the constraints under which; `ask` makes one from text.

    Attributes
    ----------
    minimise, maximise : tuple of str
        Two or three columns in all.
    constraints : tuple of Constraint
    """

    minimise: tuple[str, ...] = ()
    maximise: tuple[str, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    @property
    def objectives(self) -> tuple[str, ...]:
        """All columns, those to minimise first."""
        return (*self.minimise, *self.maximise)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of objectives and constraints, every one once."""
        return tuple(dict.fromkeys([*self.objectives, *(item.column for item in self.constraints)]))

    def costs(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """``float64[rows, objectives]``: smaller is better, NaN where there is no value."""
        signs = np.array([1.0] * len(self.minimise) + [-1.0] * len(self.maximise))
        return frame[list(self.objectives)].to_numpy(np.float64) * signs

    def violations(self, frame: pd.DataFrame) -> NDArray[np.float64]:
        """``float64[rows, constraints]``: 0 or less where a constraint is kept, NaN where there is no value."""
        columns = [item.violation(frame[item.column].to_numpy(np.float64)) for item in self.constraints]
        return np.stack(columns, axis=1) if columns else np.zeros((len(frame), 0))

    def feasible(self, frame: pd.DataFrame) -> NDArray[np.bool_]:
        """Which rows have every value and keep every constraint."""
        return self.has_values(frame) & np.all(self.violations(frame) <= 0, axis=1)

    def has_values(self, frame: pd.DataFrame) -> NDArray[np.bool_]:
        """Which rows have a finite value in every column of the question."""
        return np.isfinite(frame[list(self.columns)].to_numpy(np.float64)).all(axis=1)

    def __str__(self) -> str:
        goals = [f"least {name}" for name in self.minimise] + [f"most {name}" for name in self.maximise]
        under = f" with {', '.join(map(str, self.constraints))}" if self.constraints else ""
        return ", ".join(goals) + under


def ask(
    space: Space, minimise: Sequence[str] = (), maximise: Sequence[str] = (), constraints: Sequence[str] = ()
) -> Question:
    """A question from text, checked against the columns that the points of a space will have.

    Parameters
    ----------
    space : Space
    minimise, maximise : sequences of str
        Column names, two or three in all.
    constraints : sequence of str
        ``"area_mm2<=12"``, ``"accuracy_integer>=0.88"``.

    Raises
    ------
    InputError
        With every problem found.

    Examples
    --------
    >>> space = Space(networks=["lenet5"], blocks=["4x4"], ratios=[[0.5, 0.5]], random={})
    >>> str(ask(space, ["latency_ms", "energy_pj"], constraints=["area_mm2 <= 12"]))
    'least latency_ms, least energy_pj with area_mm2<=12'
    """
    names = [*minimise, *maximise]
    allowed = searchable_columns(space)
    problems = [_unknown("objective", name, allowed, space) for name in names if name not in allowed]
    problems += [
        Problem("objective", f'"{name}" is named twice', "every column once")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if not 2 <= len(names) <= _MOST_OBJECTIVES:
        hint = "as in --minimise latency_ms --minimise energy_pj"
        problems.append(Problem("objective", f"{len(names)} columns, a search has two or three", hint))
    bounds = [_constraint(text, allowed, space, problems) for text in constraints]
    if len(space.seeds) > 1:
        hint = "list one seed, and sweep the front's points over others afterwards"
        message = f"{len(space.seeds)} seeds; a search over seeds would choose the luckiest"
        problems.append(Problem("seeds", message, hint))
    if problems:
        raise InputError(f"search of {space.name}", problems)
    return Question(tuple(minimise), tuple(maximise), tuple(item for item in bounds if item is not None))


def searchable_columns(space: Space) -> list[str]:
    """The numeric columns that the points of a space will have, machine axes and derived ones included."""
    axes = [name for name, values in space.machine.axes.items() if _is_numeric(values)]
    trained = _TRAINED if space.training is not None else ()
    return [*SUMMARY_COLUMNS, AVERAGE_POWER, *_NAMES, *trained, *axes]


def with_derived(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `AVERAGE_POWER` where energy (pJ) and latency (ms) are there: 1 pJ/ms is 10⁻⁶ mW."""
    if not {"energy_pj", "latency_ms"} <= set(frame.columns):
        return frame
    return frame.assign(**{AVERAGE_POWER: frame["energy_pj"] / frame["latency_ms"] * 1e-6})


def needed_columns(question: Question) -> list[str]:
    """The stored columns from which those of a question come."""
    sources = ["energy_pj", "latency_ms"] if AVERAGE_POWER in question.columns else []
    return list(dict.fromkeys([*(name for name in question.columns if name != AVERAGE_POWER), *sources]))


def _is_numeric(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _constraint(
    text: str, allowed: Sequence[str], space: Space, problems: list[Problem]
) -> Constraint | None:
    match = _CONSTRAINT.fullmatch(text)
    if match is None:
        hint = "COLUMN<=NUMBER or COLUMN>=NUMBER, as in area_mm2<=12"
        problems.append(Problem("constraint", f"{text!r} is not a bound on a column", hint))
        return None
    name, sign, number = match.groups()
    if name not in allowed:
        problems.append(_unknown("constraint", name, allowed, space))
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        problems.append(Problem(f"constraint {name}", f"{number!r} is not a finite number"))
    return Constraint(name, bound, sign == ">=")


def _unknown(field: str, name: str, allowed: Sequence[str], space: Space) -> Problem:
    if name in _TRAINED and space.training is None:
        hint = "a [training] table in place of [random]"
        return Problem(
            field, f'"{name}" is known of trained weights only; the space draws them at random', hint
        )
    return Problem(field, f'no numeric column "{name}"', nearest_name(name, allowed))
