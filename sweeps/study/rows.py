"""Stored runs as the rows of tables: all seeds of one method at one point together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hwsim.errors import InputError
from sweeps.statistics import Estimate, estimate, paired_difference
from sweeps.study.folder import Result
from sweeps.study.runs import METHODS, Run
from sweeps.study.task_names import MEASURES, Measure

__all__ = ["COMPARED", "Row", "measure_of", "rows_of", "value_of"]

COMPARED = "dense"
"""The method that differences are taken to, of the same seed."""


@dataclass(frozen=True)
class Row:
    """All seeds of one method at one point.

    Attributes
    ----------
    run : Run
        Any of them.
    planned : int
        Seeds that the study has.
    results : dict of int to Result
        By seed; the missing ones are not there.
    quality, difference : Estimate or None
        Of the task's measure in the unit of the table; the difference to the dense network of the same seed.
    """

    run: Run
    planned: int
    results: Mapping[int, Result]
    quality: Estimate | None
    difference: Estimate | None

    @property
    def mean_bytes(self) -> float:
        """Of the files; not to be asked of a row without results."""
        return statistics.fmean(result.file_bytes for result in self.results.values())


def rows_of(runs: Sequence[Run], results: Iterable[Result]) -> list[Row]:
    """One row per method, block shape, point and variant, in the order of the runs; with missing seeds, or with none at all.

    Parameters
    ----------
    runs : sequence of Run
        Planned.
    results : iterable of Result
        Stored; those of other runs are not looked at.
    """
    stored = {result.run.key: result for result in results}
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    dense = {
        run.task: {
            other.seed: value_of(stored[other.key])
            for other in runs
            if (other.task, other.method) == (run.task, COMPARED) and other.key in stored
        }
        for run in runs
    }
    rows = []
    for members in groups.values():
        found = {run.seed: stored[run.key] for run in members if run.key in stored}
        values = {seed: value_of(result) for seed, result in found.items()}
        rows.append(
            Row(
                run=members[0],
                planned=len(members),
                results=found,
                quality=estimate(list(values.values())),
                difference=paired_difference(values, dense[members[0].task]),
            )
        )
    order = list(METHODS)
    return sorted(rows, key=lambda row: order.index(row.run.method))


def measure_of(task: str) -> Measure:
    """How the quality of a task is shown."""
    return MEASURES.get(task, Measure("accuracy", "accuracy %", 100.0, 2))


def value_of(result: Result) -> float:
    """The quality in the unit of the tables."""
    measure = measure_of(result.run.task)
    if measure.name not in result.quality:
        raise InputError(f"result {result.run.key}", f"has no {measure.name}")
    return measure.factor * result.quality[measure.name]
