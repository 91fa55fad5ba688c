"""A cheap model of the results so far, and the points that it expects on the front.

Latency, energy and area are nearly products of what each axis contributes, so their logarithms are nearly sums, and what two or
three axes do together is a small correction. Kernel ridge regression with a cubic polynomial kernel on the axes' values (one
indicator for each) fits just that. It is ours, not Optuna's; nothing of it goes into a result, every point is evaluated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sweeps.pareto import knee_rows, not_dominated

__all__ = ["predict", "promising"]

_DEGREE = 3
_RIDGE = 1e-3
"""Of the kernel matrix's mean diagonal: noise below what neighbouring points differ by, enough for a stable solution."""
_SLAB = 4096


def predict(
    codes: NDArray[np.int64], values: NDArray[np.float64], wanted: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Values at other points, by kernel ridge regression with kernel ``(1 + share of axes with equal values)³``.

    Source: Saunders, Gammerman and Vovk, "Ridge regression learning algorithm in dual variables", ICML 1998.

    Parameters
    ----------
    codes, wanted : int64 arrays ``[points, axes]``
    values : float64 array ``[points, columns]``

    Returns
    -------
    float64 array ``[wanted, columns]``
    """
    mean = values.mean(axis=0)
    kernel = _kernel(codes, codes)
    kernel[np.diag_indices(len(codes))] += _RIDGE * 2.0**_DEGREE
    weights = np.linalg.solve(kernel, values - mean)
    parts = [_kernel(wanted[at : at + _SLAB], codes) @ weights for at in range(0, len(wanted), _SLAB)]
    return np.concatenate(parts) + mean if parts else np.zeros((0, values.shape[1]))


def promising(
    codes: NDArray[np.int64],
    costs: NDArray[np.float64],
    margins: NDArray[np.float64],
    fits: NDArray[np.bool_],
    candidates: NDArray[np.int64],
    count: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Candidates that are expected on the front of known points and candidates, its knees first; then those on the next front.

    Parameters
    ----------
    codes, candidates : int64 arrays ``[points, axes]``
    costs : float64 array ``[points, objectives]``
        Smaller is better.
    margins : float64 array ``[points, constraints]``
        Relative violations, 0 or less where a constraint is kept.
    fits : bool array ``[points]``
        Which points have a result; at least one.
    count : int
    rng : Generator

    Returns
    -------
    int64 array ``[at most count]``
        Rows of ``candidates``.
    """
    objectives = costs.shape[1]
    values = np.column_stack([_straightened(costs[fits]), np.log1p(np.maximum(margins[fits], -0.99))])
    expected = predict(codes[fits], values, candidates)
    good = (expected[:, objectives:] <= 0).all(axis=1)
    if not fits.all():
        good &= predict(codes, fits[:, None].astype(np.float64), candidates)[:, 0] >= 0.5
    known = values[(values[:, objectives:] <= 0).all(axis=1), :objectives]
    places = np.concatenate([np.full(len(known), -1), np.flatnonzero(good)])
    rows = np.concatenate([known, expected[good, :objectives]])
    chosen: list[int] = []
    while len(chosen) < count and (places >= 0).any():
        front = not_dominated(rows)
        knees = list(dict.fromkeys(places[front][list(knee_rows(rows[front]).values())].tolist()))
        others = rng.permutation(np.setdiff1d(places[front], knees)).tolist()
        chosen += [place for place in (*knees, *others) if place >= 0]
        places, rows = places[~front], rows[~front]
    return np.array(chosen[:count], np.int64)


def _kernel(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    equal = np.zeros((len(left), len(right)))
    for one, other in zip(left.T, right.T, strict=True):
        equal += one[:, None] == other
    return (1.0 + equal / left.shape[1]) ** _DEGREE


def _straightened(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the columns that have one sign, in the same order; other columns as they are."""
    columns = []
    for column in costs.T:
        one_sign = (column > 0).all() or (column < 0).all()
        columns.append(np.sign(column) * np.log(np.abs(column)) if one_sign else column)
    return np.stack(columns, axis=1)
