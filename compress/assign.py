"""Which block becomes what: types with exact counts at the least total cost, on the host.

Given what it costs to prune and to unify every block, P of them are pruned and U unified: an assignment with two cardinality
constraints, solved exactly by a search on one multiplier. `compress.assign_device` finds the same types on an accelerator.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, PRUNED, UNIFIED

__all__ = ["ProjectionMethod", "assign_types", "assign_with_cost"]

ProjectionMethod = Literal["exact", "prune_first"]

_PART = 1 << 16
"""Blocks that are turned to integers together; all at once would take two more arrays of their size."""

_WORTH_LEAVING = 0.25
"""Settled blocks are left out once no more than this share stays: before, what stays would be a second set of large arrays."""

_OPEN = 255
"""In place of a type: not settled yet."""

_SAMPLE_BLOCKS = 1 << 13
"""Blocks of the sample that gives large layers a first guess of the multiplier."""


def assign_types(
    prune_cost: NDArray,
    unify_cost: NDArray,
    pruned_blocks: int,
    unified_blocks: int,
    method: ProjectionMethod = "exact",
    *,
    balanced_rows: bool = False,
) -> NDArray[np.uint8]:
    """Types with exactly ``pruned_blocks`` PRUNED and ``unified_blocks`` UNIFIED; the rest is DENSE for free.

    Parameters
    ----------
    prune_cost, unify_cost : float or integer arrays of one shape
        Finite and not negative.
    pruned_blocks, unified_blocks : int
    method : {"exact", "prune_first"}
        exact: least total cost. prune_first: the cheapest to prune are pruned, then the cheapest of the
        others to unify are unified, the order of the method's authors.
    balanced_rows : bool
        The same counts in every block row ``[..., Kb]``: rows of an array that run them side by side have the same work in
        every pass. Both counts are then multiples of the number of rows.

    Returns
    -------
    uint8 array
        Of the costs' shape. Among equal blocks the lower index is pruned first, then unified.

    Raises
    ------
    InputError
        Counts that do not fit the number of blocks or that the rows cannot share equally, or costs that are negative or not
        finite.

    Notes
    -----
    Source of balanced rows: k of n per row group, as in dynamic probabilistic pruning: Gonzalez-Carabarin et al., "Dynamic
    Probabilistic Pruning: A General Framework for Hardware-Constrained Pruning at Different Granularities", IEEE TNNLS 2022.
    The constraint does not couple rows, so the best of every row is the best of all.

    Costs are scaled by one power of two to 60-bit integers, so every comparison is exact: the result is
    optimal for integer costs below 2**53, and within ``2**-60`` of the largest cost per block for any others.

    Examples
    --------
    >>> assign_types(np.array([4, 4, 4, 4]), np.array([1, 1, 1, 1]), 1, 1).tolist()
    [0, 1, 2, 2]
    >>> assign_types(np.array([[1, 2], [8, 9]]), np.zeros((2, 2), int), 2, 2, balanced_rows=True).tolist()
    [[0, 1], [0, 1]]
    """
    costs = [prune_cost, unify_cost]
    return assign_with_cost(costs, pruned_blocks, unified_blocks, method, balanced_rows=balanced_rows)[0]


def assign_with_cost(
    costs: list[NDArray],
    pruned_blocks: int,
    unified_blocks: int,
    method: ProjectionMethod = "exact",
    *,
    balanced_rows: bool = False,
) -> tuple[NDArray[np.uint8], float]:
    """`assign_types`, and the sum of the costs.

    Parameters
    ----------
    costs : list of two arrays
        To prune and to unify. They are taken out of the list, so that memory that nobody else holds is free before the search.
    """
    unify_cost, prune_cost = costs.pop(), costs.pop()
    if balanced_rows:
        return _assign_rows(prune_cost, unify_cost, pruned_blocks, unified_blocks, method)
    _check_assignment(prune_cost, unify_cost, pruned_blocks, unified_blocks)
    shape, scale = prune_cost.shape, _scale_of(prune_cost, unify_cost)
    prune = _scaled(prune_cost, scale)
    del prune_cost
    unify = _scaled(unify_cost, scale)
    del unify_cost
    types = _assign(prune, unify, pruned_blocks, unified_blocks, method)
    return types.reshape(shape), _total(types, prune, unify) / scale


def _assign_rows(
    prune_cost: NDArray, unify_cost: NDArray, pruned: int, unified: int, method: ProjectionMethod
) -> tuple[NDArray[np.uint8], float]:
    shape = prune_cost.shape
    rows, columns = math.prod(shape[:-1]), shape[-1]
    problems = [
        Problem(field, f"{count} blocks cannot be shared equally by {rows} block rows")
        for field, count in (("pruned_blocks", pruned), ("unified_blocks", unified))
        if count % rows
    ]
    if problems:
        raise InputError("assignment of block types", problems)
    found = [
        assign_with_cost(list(costs), pruned // rows, unified // rows, method)
        for costs in zip(prune_cost.reshape(-1, columns), unify_cost.reshape(-1, columns), strict=True)
    ]
    return np.stack([types for types, _ in found]).reshape(shape), math.fsum(total for _, total in found)


def _assign(
    prune: NDArray[np.int64], unify: NDArray[np.int64], pruned: int, unified: int, method: ProjectionMethod
) -> NDArray[np.uint8]:
    if method == "exact" and pruned and unified and pruned + unified < prune.size:
        return _assign_exactly(prune, unify, pruned, unified)[0]
    types = np.full(prune.size, DENSE, np.uint8)
    if method == "prune_first":
        types[_smallest(prune, pruned)] = PRUNED
        survivors = np.flatnonzero(types == DENSE)
        types[survivors[_smallest(unify[survivors], unified)]] = UNIFIED
    elif pruned + unified == prune.size:
        types[:] = UNIFIED
        types[_smallest(prune - unify, pruned)] = PRUNED
    else:
        types[_smallest(prune, pruned)] = PRUNED
        types[_smallest(unify, unified)] = UNIFIED
    return types


def _total(types: NDArray[np.uint8], prune: NDArray[np.int64], unify: NDArray[np.int64]) -> float:
    """The costs of the types, a part at a time."""
    parts = (slice(start, start + _PART) for start in range(0, types.size, _PART))
    return math.fsum(
        float(cost[part][types[part] == code].sum(dtype=np.float64))
        for part in parts
        for code, cost in ((PRUNED, prune), (UNIFIED, unify))
    )


def _check_assignment(prune_cost: NDArray, unify_cost: NDArray, pruned: int, unified: int) -> None:
    problems = []
    if prune_cost.shape != unify_cost.shape:
        problems.append(Problem("unify_cost", f"shape {unify_cost.shape}, prune_cost has {prune_cost.shape}"))
    for field, count in (("pruned_blocks", pruned), ("unified_blocks", unified)):
        if count < 0:
            problems.append(Problem(field, f"{count}, must not be negative"))
    if pruned + unified > prune_cost.size:
        message = f"{pruned} + {unified} blocks asked for, there are {prune_cost.size}"
        problems.append(Problem("pruned_blocks + unified_blocks", message))
    for field, cost in (("prune_cost", prune_cost), ("unify_cost", unify_cost)):
        if cost.size and not (cost.min() >= 0 and np.isfinite(cost.max())):
            problems.append(Problem(field, "holds a negative, NaN or infinite cost"))
    if problems:
        raise InputError("assignment of block types", problems)


def _scale_of(prune_cost: NDArray, unify_cost: NDArray) -> float:
    """The power of two that brings all costs below 2**60: as integers of that scale all arithmetic is exact."""
    largest = max((float(cost.max()) for cost in (prune_cost, unify_cost) if cost.size), default=0.0)
    return float(2.0 ** (60 - np.frexp(largest)[1])) if largest > 0 else 1.0


def _scaled(cost: NDArray, scale: float) -> NDArray[np.int64]:
    flat, integers = cost.ravel(), np.empty(cost.size, np.int64)
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART].astype(np.float64)
        part *= scale
        integers[start : start + _PART] = np.rint(part, out=part)
    return integers


def _smallest(values: NDArray, count: int) -> NDArray[np.bool_]:
    """A mask of the ``count`` smallest values, the lower index first among equals."""
    if count == 0:
        return np.zeros(values.size, bool)
    threshold = np.partition(values, count - 1)[count - 1]
    chosen = values < threshold
    ties = np.flatnonzero(values == threshold)
    chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return chosen


class _Face(NamedTuple):
    """What the multiplier ``d`` leaves open: the P + U smallest keys ``min(prune − d, unify)`` are chosen.

    Attributes
    ----------
    threshold : int
        The (P + U)-th smallest key.
    chosen, tied : bool arrays
        Key below and at the threshold.
    prefers : int8 array
        Sign of ``(prune − d) − unify``: −1 must be pruned if chosen, +1 must be unified, 0 either.
    """

    threshold: int
    chosen: NDArray[np.bool_]
    tied: NDArray[np.bool_]
    prefers: NDArray[np.int8]

    def count(self, among: NDArray[np.bool_], *prefers: int) -> int:
        """How many blocks of a mask have one of these preferences."""
        return sum(int(np.count_nonzero(among & (self.prefers == p))) for p in prefers)


def _face(prune: NDArray[np.int64], unify: NDArray[np.int64], d: int, total: int) -> _Face:
    key = prune - d
    np.minimum(key, unify, out=key)
    key.partition(total - 1)
    threshold = int(key[total - 1])
    del key  # taken once more, a part at a time: held, it would be a third large array beside what follows
    chosen, tied = np.empty(prune.size, bool), np.empty(prune.size, bool)
    prefers = np.empty(prune.size, np.int8)
    for start in range(0, prune.size, _PART):
        part = slice(start, start + _PART)
        lowered, other = prune[part] - d, unify[part]
        np.subtract(lowered > other, lowered < other, out=prefers[part], dtype=np.int8)
        np.minimum(lowered, other, out=lowered)
        np.less(lowered, threshold, out=chosen[part])
        np.equal(lowered, threshold, out=tied[part])
    return _Face(threshold, chosen, tied, prefers)


def _assign_exactly(
    prune: NDArray[np.int64], unify: NDArray[np.int64], pruned: int, unified: int
) -> tuple[NDArray[np.uint8], int]:
    """The optimal types (P, U > 0 and P + U < B) and their multiplier ``d``, by bisection on the count pruned.

    For a given d the best choice takes the P + U smallest ``min(prune − d, unify)``. The number pruned grows
    with d, and jumps only at integer d; at the right d, P lies between the fewest and the most that the ties
    allow. Along the way blocks whose type no d between the brackets can change are settled and left out.
    """
    types = np.empty(prune.size, np.uint8)
    index: NDArray[np.int64] | slice = slice(None)
    probes = _sampled_multipliers(prune, unify, pruned, unified)
    low, high = int(prune.min() - unify.max()) - 1, int(prune.max() - unify.min()) + 1
    # Within the bracket threshold(d) falls and d + threshold(d) rises with d; what is known of both is kept
    # here.
    most_threshold, least_threshold = int(unify.max()), int(prune.min()) - high
    least_sum, most_sum = int(prune.min()), int(prune.max())
    while True:
        d = probes.pop() if probes else (low + high) // 2
        if not low < d < high:
            continue
        face = _face(prune, unify, d, pruned + unified)
        from_ties = pruned + unified - int(np.count_nonzero(face.chosen))
        most = face.count(face.chosen, -1, 0) + min(from_ties, face.count(face.tied, -1, 0))
        fewest = face.count(face.chosen, -1) + max(0, from_ties - face.count(face.tied, 0, 1))
        if fewest <= pruned <= most:
            types[index] = _settle(face, pruned, unified)
            return types, d
        threshold = face.threshold
        del face
        if most < pruned:
            low, most_threshold, least_sum = d, threshold, d + threshold
        else:
            high, least_threshold, most_sum = d, threshold, d + threshold
        settled = _settled(
            prune, unify, (low, high), (least_sum, most_sum), (least_threshold, most_threshold)
        )
        keep = settled == _OPEN
        if np.count_nonzero(keep) > _WORTH_LEAVING * keep.size:
            continue
        here = ~keep if isinstance(index, slice) else index[~keep]
        types[here] = settled[~keep]
        pruned -= int(np.count_nonzero(settled == PRUNED))
        unified -= int(np.count_nonzero(settled == UNIFIED))
        index = np.flatnonzero(keep) if isinstance(index, slice) else index[keep]
        prune, unify = prune[keep], unify[keep]


def _settled(
    prune: NDArray[np.int64],
    unify: NDArray[np.int64],
    multipliers: tuple[int, int],
    sums: tuple[int, int],
    thresholds: tuple[int, int],
) -> NDArray[np.uint8]:
    """The types that no multiplier between the two can change, `_OPEN` for the others; a part at a time."""
    (low, high), (least_sum, most_sum), (least_threshold, most_threshold) = multipliers, sums, thresholds
    settled = np.full(prune.size, _OPEN, np.uint8)
    for start in range(0, prune.size, _PART):
        part = slice(start, start + _PART)
        p, u, codes = prune[part], unify[part], settled[part]
        gain = p - u
        codes[(gain <= low) & (p < least_sum)] = PRUNED
        codes[(gain >= high) & (u < least_threshold)] = UNIFIED
        codes[(p > most_sum) & (u > most_threshold)] = DENSE
    return settled


def _sampled_multipliers(
    prune: NDArray[np.int64], unify: NDArray[np.int64], pruned: int, unified: int
) -> list[int]:
    """Two multipliers that most likely enclose the right one, from every n-th block; they only save steps."""
    stride = prune.size // _SAMPLE_BLOCKS
    if stride < 4:
        return []
    prune, unify = prune[::stride], unify[::stride]
    expected, total = pruned // stride, (pruned + unified) // stride
    spread = 2 * int(np.sqrt(prune.size))
    counts = (expected - spread, expected + spread)
    return [_assign_exactly(prune, unify, p, total - p)[1] for p in counts if 0 < p < total]


def _settle(face: _Face, pruned: int, unified: int) -> NDArray[np.uint8]:
    """The types at the right multiplier: ties are dealt out to meet both counts, lower indices first."""
    types = np.full(face.prefers.size, DENSE, np.uint8)
    types[face.chosen & (face.prefers < 0)] = PRUNED
    types[face.chosen & (face.prefers > 0)] = UNIFIED
    need_pruned = pruned - face.count(face.chosen, -1)
    free = np.flatnonzero(face.chosen & (face.prefers == 0))
    only_pruned, either, only_unified = (np.flatnonzero(face.tied & (face.prefers == p)) for p in (-1, 0, 1))
    from_ties = pruned + unified - int(np.count_nonzero(face.chosen))
    # Of the blocks taken from the ties as few are pruned as the counts allow; the free ones supply the rest.
    tied_pruned = max(0, from_ties - either.size - only_unified.size, need_pruned - free.size)
    tied_unified = from_ties - tied_pruned
    free_pruned = need_pruned - tied_pruned
    either_pruned = max(0, tied_pruned - only_pruned.size)
    either_unified = max(0, tied_unified - only_unified.size)
    types[free[:free_pruned]] = PRUNED
    types[free[free_pruned:]] = UNIFIED
    types[only_pruned[: tied_pruned - either_pruned]] = PRUNED
    types[only_unified[: tied_unified - either_unified]] = UNIFIED
    types[either[:either_pruned]] = PRUNED
    types[either[either_pruned : either_pruned + either_unified]] = UNIFIED
    return types
