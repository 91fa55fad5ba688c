"""Means over seeds with their intervals, and differences of pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "estimate", "paired_difference"]

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.

Source: NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2.
"""


@dataclass(frozen=True)
class Estimate:
    """A mean and how well it is known.

    Attributes
    ----------
    mean : float
    half_width : float or None
        Of the 95 % interval by Student's t; None for a single value.
    n : int
    """

    mean: float
    half_width: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of some values with its 95 % interval; None for none.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half_width, 3), found.n
    (2.0, 2.484, 3)
    """
    if not values:
        return None
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return Estimate(mean, None, 1)
    quantile = T_975[min(n - 1, len(T_975)) - 1]
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(n), n)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """The mean of ``values − reference`` over the seeds that both have.

    >>> paired_difference({0: 3.0, 1: 5.0, 2: 9.0}, {0: 1.0, 1: 3.0}).mean
    2.0
    """
    return estimate([values[seed] - reference[seed] for seed in sorted(set(values) & set(reference))])
