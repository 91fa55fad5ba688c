"""Two methods compared seed by seed: paired differences at equal budgets, and speed at equal accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sweeps.statistics import estimate

__all__ = ["Paired", "SpeedUp", "paired", "speed_ups"]


@dataclass(frozen=True)
class Paired:
    """Mean of paired differences with its interval.

    Attributes
    ----------
    mean, low, high : float
        The interval of Student's t at 95 %; NaN at both ends for a single pair.
    count, positive : int
        Pairs, and those whose difference is above zero.
    """

    mean: float
    low: float
    high: float
    count: int
    positive: int


def paired(differences: Sequence[float]) -> Paired:
    """The mean of differences that belong together seed by seed, and the 95 % interval of Student's t.

    By `sweeps.statistics.estimate`. With three seeds the quantile is 4.303: wide, and rightly so.

    Examples
    --------
    >>> result = paired([1.0, 2.0, 3.0])
    >>> round(result.mean, 3), round(result.low, 3), round(result.high, 3)
    (2.0, -0.484, 4.484)
    """
    found = estimate(differences)
    if found is None:
        raise ValueError("no differences to take the mean of")
    half = math.nan if found.half_width is None else found.half_width
    positive = sum(difference > 0 for difference in differences)
    return Paired(found.mean, found.mean - half, found.mean + half, found.n, positive)


@dataclass(frozen=True)
class SpeedUp:
    """How much faster one method is where it is as accurate as a run of the other.

    Attributes
    ----------
    seed : int
    limit : float
        The goal of the other's run.
    factor : float or None
        Latency of that run over the latency at which the first is as accurate; None where it is so nowhere.
    is_bound : bool
        The first is more accurate than that in its fastest run already: the factor is at least this.
    """

    seed: int
    limit: float
    factor: float | None
    is_bound: bool


def speed_ups(rows: Sequence[dict[str, Any]], faster: str, than: str) -> list[SpeedUp]:
    """Speed at equal accuracy, per seed and goal of the slower side.

    Each row has a ``side``, ``seed``, ``limit``, ``accuracy`` (``integer``) and ``trained`` (``latency_us``).
    The runs of ``faster`` with the same seed give a curve of accuracy over latency; between two of them accuracy is taken to be
    linear in latency, and beyond them nothing is assumed. A run that another beats in both is left out of the curve.
    """
    found = []
    for row in rows:
        if row["side"] != than:
            continue
        curve = _front(
            [
                (other["trained"]["latency_us"], other["accuracy"]["integer"])
                for other in rows
                if other["side"] == faster and other["seed"] == row["seed"]
            ]
        )
        latency, is_bound = _latency_at(curve, row["accuracy"]["integer"])
        factor = None if latency is None else row["trained"]["latency_us"] / latency
        found.append(SpeedUp(row["seed"], row["limit"], factor, is_bound))
    return found


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points by latency, each more accurate than all faster ones."""
    front: list[tuple[float, float]] = []
    for latency, accuracy in sorted(points):
        if not front or accuracy > front[-1][1]:
            front.append((latency, accuracy))
    return front


def _latency_at(curve: list[tuple[float, float]], accuracy: float) -> tuple[float | None, bool]:
    if not curve or accuracy > curve[-1][1]:
        return None, False
    if accuracy <= curve[0][1]:
        return curve[0][0], accuracy < curve[0][1]
    latencies, accuracies = zip(*curve, strict=True)
    return float(np.interp(accuracy, accuracies, latencies)), False
