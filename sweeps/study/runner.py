"""Go through the runs of a study: skip what is there, go on with what was stopped, leave alone what others work on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from compress.fit import Progress
from sweeps.study.folder import Result, StudyFolder
from sweeps.study.methods import execute
from sweeps.study.runs import ONE_SHOT, Run

__all__ = ["StudyProgress", "estimate_hours", "run_study", "select"]

_SECONDS_PER_EPOCH = {"lenet5": 25.0, "resnet20": 230.0, "autoencoder": 60.0, "crepe": 90.0}
"""A first guess on one core, until runs of the task have told better."""
_SECONDS_ONE_SHOT = {"projection": 60.0, "hessian": 900.0}
_SECONDS_BESIDE = 30.0
"""Of a run beside its epochs: data, files, measuring."""


@dataclass(frozen=True)
class StudyProgress:
    """Where a study stands.

    Attributes
    ----------
    done, total : int
        Runs.
    run : Run
        That is worked on, or has just ended.
    result : Result or None
        Of the run that has just ended.
    training : Progress or None
        Within the run.
    hours_left : float
        Of this process alone, at the speed of the runs that are done.
    """

    done: int
    total: int
    run: Run
    result: Result | None
    training: Progress | None
    hours_left: float


def select(runs: Iterable[Run], only: Sequence[str]) -> list[Run]:
    """The runs that have each of some words in their title; all of them where no word is given.

    >>> len(select([Run("lenet5", "dense", 0), Run("lenet5", "dense", 1)], ["seed 1"]))
    1
    """
    return [run for run in runs if all(word.lower() in run.title.lower() for word in only)]


def run_study(
    runs: Sequence[Run],
    folder: StudyFolder,
    *,
    threads: int = 1,
    limit: int | None = None,
    progress: Callable[[StudyProgress], None] | None = None,
) -> int:
    """Do the runs that the folder does not hold yet, in their order.

    Parameters
    ----------
    runs : sequence of Run
    folder : StudyFolder
        Other processes may work on it at the same time.
    threads : int
        Of torch. Results are the same to the last bit for the same number only.
    limit : int, optional
        Stop after so many runs.
    progress : callable, optional
        Called after every batch and every run.

    Returns
    -------
    int
        Runs that were done now.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    finished = 0
    try:
        for run in runs:
            if limit is not None and finished >= limit:
                break
            with folder.claim(run.key) as ours:
                if not ours or folder.is_done(run):
                    continue
                done, hours = sum(map(folder.is_done, runs)), estimate_hours(runs, folder)
                report = None
                if progress is not None:

                    def report(
                        training: Progress, run: Run = run, done: int = done, hours: float = hours
                    ) -> None:
                        progress(StudyProgress(done, len(runs), run, None, training, hours))

                result = execute(run, folder, report)
                folder.write(result)
                finished += 1
                if progress is not None:
                    hours = estimate_hours(runs, folder)
                    progress(StudyProgress(done + 1, len(runs), run, result, None, hours))
    finally:
        torch.set_num_threads(before)
    return finished


def estimate_hours(runs: Sequence[Run], folder: StudyFolder) -> float:
    """Hours that the missing runs take one after the other: epochs times the median time of an epoch so far."""
    pace: dict[str, list[float]] = {}
    untrained: dict[tuple[str, str], list[float]] = {}
    for result in folder.results():
        if result.epochs:
            pace.setdefault(result.run.task, []).append(result.wall_seconds / result.epochs)
        else:
            untrained.setdefault((result.run.task, result.run.method), []).append(result.wall_seconds)
    seconds = 0.0
    for run in runs:
        if folder.is_done(run):
            continue
        if run.method in ONE_SHOT:
            seconds += statistics.median(
                untrained.get((run.task, run.method), [_SECONDS_ONE_SHOT[run.method]])
            )
        else:
            found = pace.get(run.task)
            an_epoch = statistics.median(found) if found else _SECONDS_PER_EPOCH.get(run.task, 60.0)
            seconds += _SECONDS_BESIDE + an_epoch * run.trained_epochs
    return seconds / 3600
