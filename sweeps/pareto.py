"""Pareto fronts of any columns: exact front, knee point, hypervolume."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem, nearest_name

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["hypervolume", "knee_point", "knee_rows", "not_dominated", "pareto_front"]

_CHUNK = 1024
_SOURCE = "Pareto front"


def pareto_front(
    frame: pd.DataFrame, *, minimise: Sequence[str] = (), maximise: Sequence[str] = ()
) -> pd.DataFrame:
    """The rows that no other row dominates, in their order.

    A row dominates another when it is at least as good in every column and better in one, so rows that
    are equal in all columns stay together or go together.

    Parameters
    ----------
    frame : DataFrame
    minimise, maximise : sequences of str
        One or more numeric columns in all.

    Raises
    ------
    InputError
        A column is missing, named twice, not numeric, or has a NaN.

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"latency_ms": [1, 2, 3], "accuracy": [0.8, 0.9, 0.9]})
    >>> pareto_front(frame, minimise=["latency_ms"], maximise=["accuracy"]).index.tolist()
    [0, 1]
    """
    return frame[not_dominated(_costs(frame, minimise, maximise))]


def not_dominated(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the rows that no other row dominates; ``float64[rows, columns]``, smaller is better, without NaN."""
    distinct, where = np.unique(costs, axis=0, return_inverse=True)
    return _not_dominated(distinct)[where.reshape(-1)]


def knee_point(
    frame: pd.DataFrame, *, minimise: Sequence[str] = (), maximise: Sequence[str] = ()
) -> pd.Series:
    """The row of the front at its bend: farthest from the plane through the worst corners, toward the
    best one.

    Every column is scaled to 0 … 1 over the front; the knee is the least sum (ties: the first row),
    which is the greatest distance to the plane through the points where one scaled column is 1 and the
    others are 0. Source: Das, "On characterizing the knee of the Pareto curve based on normal-boundary
    intersection", Structural Optimization 18 (1999), with the scaled axes' unit points in place of the
    individual minima.

    Raises
    ------
    InputError
        As `pareto_front`, an infinite value on the front, or a frame without rows.
    """
    if frame.empty:
        raise InputError(_SOURCE, Problem("", "no rows, so there is no knee"))
    front = pareto_front(frame, minimise=minimise, maximise=maximise)
    costs = _costs(front, minimise, maximise)
    if not np.isfinite(costs).all():
        raise InputError(_SOURCE, Problem("", "an infinite value on the front", "leave such rows out"))
    return front.iloc[_knee(costs)]


def knee_rows(costs: NDArray[np.float64]) -> dict[tuple[int, ...], int]:
    """The row at the knee of each pair of columns, and of all columns if there are three; as `knee_point`, ``costs`` as there.

    Parameters
    ----------
    costs : float64 array ``[rows, columns]``
        At least one row, two or three columns, finite; smaller is better.

    Returns
    -------
    dict
        Columns -> row.
    """
    columns = range(costs.shape[1])
    subsets = [pair for size in (2, 3) for pair in itertools.combinations(columns, size)]
    rows = {}
    for subset in subsets:
        part = costs[:, subset]
        front = np.flatnonzero(not_dominated(part))
        rows[subset] = int(front[_knee(part[front])])
    return rows


def _knee(front: NDArray[np.float64]) -> int:
    """The row of a front's costs at its knee."""
    best = front.min(axis=0)
    span = front.max(axis=0) - best
    scaled = (front - best) / np.where(span > 0, span, 1.0)
    return int(scaled.sum(axis=1).argmin())


def hypervolume(
    frame: pd.DataFrame,
    reference: Mapping[str, float],
    *,
    minimise: Sequence[str] = (),
    maximise: Sequence[str] = (),
) -> float:
    """Area or volume that the rows dominate up to a reference point, in the product of the columns' units.

    Parameters
    ----------
    frame : DataFrame
    reference : mapping
        Column name -> the worst value that still counts. Rows that are not better in every column add
        nothing.
    minimise, maximise : sequences of str
        Two or three columns in all.

    Raises
    ------
    InputError
        As `pareto_front`; not two or three columns; a reference value is missing or infinite, a value
        is infinite.
    """
    names = [*minimise, *maximise]
    problems = [Problem(name, "missing in the reference point") for name in names if name not in reference]
    if len(names) not in (2, 3):
        problems.append(Problem("", f"{len(names)} columns, the hypervolume is computed for 2 or 3"))
    if problems:
        raise InputError("hypervolume", problems)
    costs = _costs(frame, minimise, maximise)
    signs = np.array([1.0] * len(minimise) + [-1.0] * len(maximise))
    corner = np.array([float(reference[name]) for name in names]) * signs
    if not (np.isfinite(costs).all() and np.isfinite(corner).all()):
        raise InputError("hypervolume", Problem("", "an infinite value", "leave such rows out"))
    gains = corner - costs[(costs < corner).all(axis=1)]
    return _dominated_area(gains) if gains.shape[1] == 2 else _dominated_volume(gains)


def _costs(frame: pd.DataFrame, minimise: Sequence[str], maximise: Sequence[str]) -> NDArray[np.float64]:
    """``float64[rows, columns]``, smaller is better."""
    names = [*minimise, *maximise]
    problems = []
    if not names:
        problems.append(Problem("", "no column given", "name at least one to minimise or maximise"))
    if len(set(names)) < len(names):
        problems.append(Problem("", f"a column is named twice among {names}"))
    for name in names:
        if name not in frame.columns:
            problems.append(Problem(name, "no such column", nearest_name(name, map(str, frame.columns))))
        elif frame[name].dtype.kind not in "iufb":
            problems.append(Problem(name, f"holds {frame[name].dtype}, must be numbers"))
        elif missing := int(frame[name].isna().sum()):
            hint = "leave rows without a result out: frame.dropna(subset=[...])"
            problems.append(Problem(name, f"{missing} of {len(frame)} values are missing (NaN)", hint))
    if problems:
        raise InputError(_SOURCE, problems)
    signs = [1.0] * len(minimise) + [-1.0] * len(maximise)
    columns = [sign * frame[name].to_numpy(np.float64) for sign, name in zip(signs, names, strict=True)]
    return np.column_stack(columns) + 0.0  # no −0.0: it would be another value than 0.0 to np.unique


def _not_dominated(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the front among distinct rows in lexicographic order: only earlier rows can dominate a row."""
    mask = np.zeros(len(costs), bool)
    if costs.shape[1] == 1:
        mask[:1] = True
    elif costs.shape[1] == 2:
        mask[:1] = True
        mask[1:] = costs[1:, 1] < np.minimum.accumulate(costs[:-1, 1])
    else:
        front = costs[:0]
        for start in range(0, len(costs), _CHUNK):
            chunk = costs[start : start + _CHUNK]
            chunk_mask = ~_is_dominated(chunk, by=front)
            candidates = chunk[chunk_mask]
            chunk_mask[chunk_mask] = ~_is_dominated(candidates, by=candidates)
            mask[start : start + _CHUNK] = chunk_mask
            front = np.concatenate([front, chunk[chunk_mask]])
    return mask


def _is_dominated(costs: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a row is dominated by one of ``by``: rows that ``costs`` has not, or ``costs`` itself."""
    dominated = np.zeros(len(costs), bool)
    for start in range(0, len(by), _CHUNK):  # a bounded piece of the matrix of all pairs at a time
        others = by[start : start + _CHUNK]
        no_worse = np.ones((len(others), len(costs)), bool)
        for other, cost in zip(others.T, costs.T, strict=True):
            no_worse &= other[:, None] <= cost
        if by is costs:
            no_worse[np.arange(len(others)), start + np.arange(len(others))] = False
        dominated |= no_worse.any(axis=0)
    return dominated


def _dominated_area(gains: NDArray[np.float64]) -> float:
    """Area of the union of the rectangles from the origin to each row, ``float64[rows, 2]``, all positive."""
    gains = gains[np.argsort(-gains[:, 0], kind="stable")]
    widths = gains[:, 0] - np.append(gains[1:, 0], 0.0)
    return float(widths @ np.maximum.accumulate(gains[:, 1])) if len(gains) else 0.0


def _dominated_volume(gains: NDArray[np.float64]) -> float:
    """Volume of the union of the boxes from the origin to each row, slab by slab along the last column."""
    distinct = np.unique(-gains, axis=0)
    gains = -distinct[_not_dominated(distinct)]
    gains = gains[np.argsort(-gains[:, 2], kind="stable")]
    heights = gains[:, 2] - np.append(gains[1:, 2], 0.0)
    return sum(float(h) * _dominated_area(gains[: i + 1, :2]) for i, h in enumerate(heights) if h > 0)
