"""The projection of a layer onto "exactly P blocks pruned, U unified, the rest free".

A unified block has one magnitude and free signs; ``sign(w) · mean|w|`` is its nearest point, at the cost
``Σw² − n·mean|w|²``; a pruned block costs ``Σw²``, a dense one nothing. Which block becomes what is an
assignment with two cardinality constraints, solved exactly by a search on one multiplier.

Source: the projection is derived in ``docs/method.md``; the method is Lin et al., arXiv 2106.08301 (2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.assign_device import assign_on_device, power_of_two
from compress.blocks import ColumnOrder, block_sums, expand_blocks, real_entries
from compress.rules import types_shape
from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, PRUNED, UNIFIED, type_counts

__all__ = [
    "BlockCosts",
    "Projection",
    "ProjectionMethod",
    "assign_types",
    "assign_types_by_row",
    "block_costs",
    "fill_blocks",
    "layer_costs",
    "project",
    "project_to_counts",
]

ProjectionMethod = Literal["exact", "prune_first"]

DIVERGED_HINT = "training diverged: lower the learning rate or rho and start from the last good weights"

_CHUNK_ENTRIES = 1 << 18
"""Entries looked at together: a chunk and its temporaries stay in the cache (4× faster at 10 M weights)."""

_DEVICE_CHUNK_ENTRIES = 1 << 24
"""The same on an accelerator, where a chunk must be large against the launch of a kernel; 64 MiB of float32."""

_SAMPLE_BLOCKS = 1 << 13
"""Blocks of the sample that gives large layers a first guess of the multiplier."""

_SMALLEST_SAFE_COST = 1e-30
"""Below this the squares of a layer come near float32's underflow, and costs are taken again in float64."""


class BlockCosts(NamedTuple):
    """What it costs to prune and to unify every block: tensors ``[groups, Mb, Kb]``, float32 or float64.

    Attributes
    ----------
    magnitude : Tensor
        The best shared magnitude, the (curvature-weighted) mean of ``|w|``.
    prune, unify : Tensor
        Squared distance (in the norm of the curvature) to the pruned and to the unified block.
    """

    magnitude: Tensor
    prune: Tensor
    unify: Tensor


@dataclass(frozen=True, eq=False)
class Projection:
    """A projected layer.

    Attributes
    ----------
    weight : Tensor
        Of the shape and dtype that came in.
    types : uint8 Tensor ``[groups, Mb, Kb]``
        0 PRUNED, 1 UNIFIED, 2 DENSE.
    distance : float64 Tensor ``[]``
        Squared distance between the weight and its projection (in the norm of the curvature), where the weight is: reading
        it from an accelerator waits for what runs there.
    """

    weight: Tensor
    types: Tensor
    distance: Tensor

    @property
    def cost(self) -> float:
        """`distance` as a number."""
        return float(self.distance)


def _is_host(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for an accelerator."""
    return tensor.device.type == "cpu"


class _Rows(NamedTuple):
    """The matrices of a weight a few rows at a time; all of a convolution's at once would be a copy of it.

    Attributes
    ----------
    weight : Tensor ``[groups, m, c_in/groups, taps]``
        A view where possible.
    column_order : {"tap_major", "channel_major"}
    """

    weight: Tensor
    column_order: ColumnOrder

    @classmethod
    def of(cls, weight: Tensor, groups: int, column_order: ColumnOrder) -> Self:
        """Rows of a weight ``[out, in]`` or ``[c_out, c_in/groups, *kernel]``."""
        out_channels, in_channels, *kernel = weight.shape
        shape = (groups, out_channels // groups, in_channels, math.prod(kernel))
        return cls(weight.reshape(shape), column_order)

    @property
    def size(self) -> tuple[int, int, int]:
        """``(groups, m, k)``."""
        groups, m, in_channels, taps = self.weight.shape
        return groups, m, in_channels * taps

    def chunks(self, g_o: int) -> list[slice]:
        """Block rows that are looked at together."""
        groups, m, k = self.size
        entries = _CHUNK_ENTRIES if _is_host(self.weight) else _DEVICE_CHUNK_ENTRIES
        rows = max(1, entries // (groups * k * g_o)) * g_o
        return [slice(start, start + rows) for start in range(0, m, rows)]

    def read(self, rows: slice) -> Tensor:
        """``[groups, rows, k]``."""
        part = self.weight[:, rows]
        if self.column_order == "tap_major":
            part = part.transpose(2, 3)
        return part.reshape(*part.shape[:2], -1)

    def write(self, rows: slice, values: Tensor) -> None:
        """Put values ``[groups, rows, k]`` in their place; only of a weight that the view reaches."""
        part = self.weight[:, rows]
        if self.column_order == "tap_major":
            part = part.transpose(2, 3)
        part.copy_(values.reshape(part.shape))


def block_costs(matrix: Tensor, block: tuple[int, int], curvature: Tensor | None = None) -> BlockCosts:
    """Magnitude and costs of every block.

    Parameters
    ----------
    matrix : Tensor ``[groups, m, k]``
    block : tuple of int
    curvature : Tensor ``[groups, m, k]``, optional
        A diagonal ``h ≥ 0``: then magnitude ``Σh|w|/Σh``, ``prune = Σhw²``, ``unify = Σhw² − (Σh|w|)²/Σh``. A
        block without any curvature costs nothing and keeps the plain mean.

    Notes
    -----
    Source: derived; with ``h = 1`` this is the Euclidean case.
    """
    h = None if curvature is None else _Rows(curvature[..., None], "channel_major")
    return _costs(_Rows(matrix[..., None], "channel_major"), block, h, matrix.dtype)


def _costs(
    weights: _Rows,
    block: tuple[int, int],
    curvature: _Rows | None,
    dtype: torch.dtype,
    scales: tuple[Tensor, Tensor] | None = None,
) -> BlockCosts:
    """`block_costs` chunk by chunk, in ``dtype``; ``scales`` multiply weights and curvature first."""
    _, m, k = weights.size
    counts = real_entries(m, k, block, weights.weight.device).to(dtype)
    parts = [
        _chunk_costs(weights, rows, block, curvature, dtype, scales) for rows in weights.chunks(block[0])
    ]
    plain, first, second, total = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    magnitude = plain / counts
    if curvature is not None:
        magnitude = torch.where(total > 0, first / total, magnitude)
    # Rounding may push the difference of two nearly equal sums below zero.
    return BlockCosts(magnitude, second, (second - first * magnitude).clamp_(min=0))


def _chunk_costs(
    weights: _Rows,
    rows: slice,
    block: tuple[int, int],
    curvature: _Rows | None,
    dtype: torch.dtype,
    scales: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``Σ|w|``, ``Σh|w|``, ``Σhw²`` and ``Σh`` of the blocks of some rows; without curvature the last has no meaning."""
    chunk = weights.read(rows).to(dtype)
    if scales is not None:
        chunk = chunk * scales[0]
    magnitudes = chunk.abs()
    plain = block_sums(magnitudes, block)
    if curvature is None:
        return plain, plain, block_sums(chunk.square(), block), plain
    h = curvature.read(rows).to(dtype)
    if scales is not None:
        h = h * scales[1]
    weighted = magnitudes * h
    squares = block_sums(weighted * magnitudes, block)
    return plain, block_sums(weighted, block), squares, block_sums(h, block)


def assign_types(
    prune_cost: NDArray,
    unify_cost: NDArray,
    pruned_blocks: int,
    unified_blocks: int,
    method: ProjectionMethod = "exact",
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

    Returns
    -------
    uint8 array
        Of the costs' shape. Among equal blocks the lower index is pruned first, then unified.

    Raises
    ------
    InputError
        Counts that do not fit the number of blocks, or costs that are negative or not finite.

    Notes
    -----
    Costs are scaled by one power of two to 60-bit integers, so every comparison is exact: the result is
    optimal for integer costs below 2**53, and within ``2**-60`` of the largest cost per block for any others.

    Examples
    --------
    >>> assign_types(np.array([4, 4, 4, 4]), np.array([1, 1, 1, 1]), 1, 1).tolist()
    [0, 1, 2, 2]
    """
    _check_assignment(prune_cost, unify_cost, pruned_blocks, unified_blocks)
    prune, unify = _as_integers(prune_cost.ravel(), unify_cost.ravel())
    types = np.full(prune.size, DENSE, np.uint8)
    if method == "prune_first":
        types[_smallest(prune, pruned_blocks)] = PRUNED
        survivors = np.flatnonzero(types == DENSE)
        types[survivors[_smallest(unify[survivors], unified_blocks)]] = UNIFIED
    elif pruned_blocks + unified_blocks == prune.size:
        types[:] = UNIFIED
        types[_smallest(prune - unify, pruned_blocks)] = PRUNED
    elif pruned_blocks == 0 or unified_blocks == 0:
        types[_smallest(prune, pruned_blocks)] = PRUNED
        types[_smallest(unify, unified_blocks)] = UNIFIED
    else:
        types, _ = _assign_exactly(prune, unify, pruned_blocks, unified_blocks)
    return types.reshape(prune_cost.shape)


def assign_types_by_row(
    prune_cost: NDArray,
    unify_cost: NDArray,
    pruned_blocks: int,
    unified_blocks: int,
    method: ProjectionMethod = "exact",
) -> NDArray[np.uint8]:
    """`assign_types` of every block row by itself: the same counts in each, at the least total cost under that constraint.

    The rows of an array that run such block rows side by side have the same work in every pass.

    Parameters
    ----------
    prune_cost, unify_cost : arrays ``[..., Kb]``
    pruned_blocks, unified_blocks : int
        Of the whole array; multiples of its number of rows.

    Raises
    ------
    InputError
        Counts that the rows cannot share equally, or as `assign_types`.

    Notes
    -----
    Source: k of n per row group, as in dynamic probabilistic pruning: Gonzalez-Carabarin et al., "Dynamic Probabilistic
    Pruning: A General Framework for Hardware-Constrained Pruning at Different Granularities", IEEE TNNLS 2022. The constraint
    does not couple rows, so the best of every row is the best of all.

    Examples
    --------
    >>> assign_types_by_row(np.array([[1, 2], [8, 9]]), np.zeros((2, 2), int), 2, 2).tolist()
    [[0, 1], [0, 1]]
    """
    rows = math.prod(prune_cost.shape[:-1])
    problems = [
        Problem(field, f"{count} blocks cannot be shared equally by {rows} block rows")
        for field, count in (("pruned_blocks", pruned_blocks), ("unified_blocks", unified_blocks))
        if count % rows
    ]
    if problems:
        raise InputError("assignment of block types", problems)
    columns = prune_cost.shape[-1]
    types = [
        assign_types(*costs, pruned_blocks // rows, unified_blocks // rows, method)
        for costs in zip(prune_cost.reshape(-1, columns), unify_cost.reshape(-1, columns), strict=True)
    ]
    return np.stack(types).reshape(prune_cost.shape)


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


def _as_integers(prune_cost: NDArray, unify_cost: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both costs scaled by one power of two to integers below 2**60: from here on all arithmetic is exact."""
    largest = max((float(cost.max()) for cost in (prune_cost, unify_cost) if cost.size), default=0.0)
    scale = 2.0 ** (60 - np.frexp(largest)[1]) if largest > 0 else 1.0
    return _scaled(prune_cost, scale), _scaled(unify_cost, scale)


def _scaled(cost: NDArray, scale: float) -> NDArray[np.int64]:
    values = cost.astype(np.float64)
    values *= scale
    return np.rint(values, out=values).astype(np.int64)


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
    shifted = prune - d
    prefers = (shifted > unify).view(np.int8) - (shifted < unify).view(np.int8)
    key = np.minimum(shifted, unify, out=shifted)
    threshold = int(np.partition(key, total - 1)[total - 1])
    return _Face(threshold, key < threshold, key == threshold, prefers)


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
        if most < pruned:
            low, most_threshold, least_sum = d, face.threshold, d + face.threshold
        else:
            high, least_threshold, most_sum = d, face.threshold, d + face.threshold
        gain = prune - unify
        settled_pruned = (gain <= low) & (prune < least_sum)
        settled_unified = (gain >= high) & (unify < least_threshold)
        settled_dense = (prune > most_sum) & (unify > most_threshold)
        del face, gain
        keep = ~(settled_pruned | settled_unified | settled_dense)
        for settled, code in ((settled_pruned, PRUNED), (settled_unified, UNIFIED), (settled_dense, DENSE)):
            types[settled if isinstance(index, slice) else index[settled]] = code
        pruned -= int(np.count_nonzero(settled_pruned))
        unified -= int(np.count_nonzero(settled_unified))
        index = np.flatnonzero(keep) if isinstance(index, slice) else index[keep]
        prune, unify = prune[keep], unify[keep]


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


def project(
    weight: Tensor,
    block: tuple[int, int],
    pruned: float,
    unified: float,
    *,
    groups: int = 1,
    column_order: ColumnOrder = "tap_major",
    method: ProjectionMethod = "exact",
    curvature: Tensor | None = None,
    name: str = "weight",
) -> Projection:
    """The nearest weight with exactly the asked-for counts of pruned and unified blocks.

    Parameters
    ----------
    weight : float Tensor ``[out, in]`` or ``[c_out, c_in/groups, *kernel]``
    block : tuple of int
        ``(g_o, g_k)``.
    pruned, unified : float
        Shares of the blocks of all groups together; the counts are those of `hwsim.layer.type_counts`.
    groups : int
    column_order : {"tap_major", "channel_major"}
    method : {"exact", "prune_first"}
        See `assign_types`.
    curvature : Tensor of the weight's shape, optional
        A diagonal ``h ≥ 0``: nearest is then meant in ``Σ h·(w − z)²``.
    name : str
        Named in messages.

    Raises
    ------
    InputError
        NaN or infinite weights, a negative or infinite curvature, or ratios that `type_counts` refuses.

    Examples
    --------
    >>> projection = project(torch.tensor([[1.0, -3.0, 0.1, 0.0]]), (1, 2), pruned=0.5, unified=0.5)
    >>> projection.weight.tolist(), projection.types.tolist()
    ([[2.0, -2.0, 0.0, 0.0]], [[[1, 0]]])
    """
    counts = type_counts(_block_count(weight, block, groups, name), pruned, unified)
    return project_to_counts(
        weight,
        block,
        *counts,
        groups=groups,
        column_order=column_order,
        method=method,
        curvature=curvature,
        name=name,
    )


def _block_count(weight: Tensor, block: tuple[int, int], groups: int, name: str) -> int:
    if weight.numel() == 0:
        raise InputError(f"layer {name}", Problem("weight", f"is empty, shape {tuple(weight.shape)}"))
    if min(block) < 1:
        raise InputError(f"layer {name}", Problem("block", f"{block}, both sizes must be at least 1"))
    return math.prod(types_shape(tuple(weight.shape), groups, block))


def project_to_counts(
    weight: Tensor,
    block: tuple[int, int],
    pruned_blocks: int,
    unified_blocks: int,
    *,
    groups: int = 1,
    column_order: ColumnOrder = "tap_major",
    method: ProjectionMethod = "exact",
    balanced_rows: bool = False,
    curvature: Tensor | None = None,
    name: str = "weight",
) -> Projection:
    """`project` with counts in place of ratios.

    Parameters
    ----------
    pruned_blocks, unified_blocks : int
        Of all groups together.
    balanced_rows : bool
        The same counts in every block row; see `assign_types_by_row`.

    Raises
    ------
    InputError
        As `project`; counts that do not fit the blocks, or that balanced rows cannot share.

    Examples
    --------
    >>> weight = torch.tensor([[1.0, -3.0, 0.1, 0.0], [5.0, 5.0, 4.0, 4.0]])
    >>> project_to_counts(weight, (1, 2), 2, 2, balanced_rows=True).types.tolist()
    [[[1, 0], [1, 0]]]
    """
    _block_count(weight, block, groups, name)
    if not _is_host(weight):
        costs, distance_scale = _device_costs(weight, block, groups, column_order, curvature)
        types, distance = assign_on_device(
            costs.prune, costs.unify, pruned_blocks, unified_blocks, method, balanced_rows
        )
        distance = distance * distance_scale
    else:
        costs = layer_costs(weight, block, groups, column_order, curvature, name)
        types, distance = _assign(costs, pruned_blocks, unified_blocks, method, balanced_rows)
    magnitude = costs.magnitude.to(weight.dtype)
    del costs
    projected = fill_blocks(weight, types, magnitude, block, groups, column_order)
    return Projection(projected, types, distance)


def _assign(
    costs: BlockCosts, pruned_blocks: int, unified_blocks: int, method: ProjectionMethod, balanced_rows: bool
) -> tuple[Tensor, Tensor]:
    """Types and the sum of their costs."""
    prune_cost, unify_cost = costs.prune.numpy(), costs.unify.numpy()
    assign = assign_types_by_row if balanced_rows else assign_types
    codes = assign(prune_cost, unify_cost, pruned_blocks, unified_blocks, method)
    total = prune_cost[codes == PRUNED].sum(dtype=np.float64) + unify_cost[codes == UNIFIED].sum(
        dtype=np.float64
    )
    return torch.from_numpy(codes), torch.tensor(total, dtype=torch.float64)


@torch.no_grad()
def layer_costs(
    weight: Tensor,
    block: tuple[int, int],
    groups: int = 1,
    column_order: ColumnOrder = "tap_major",
    curvature: Tensor | None = None,
    name: str = "weight",
) -> BlockCosts:
    """`block_costs` of a weight in its own shape, safe to compare: finite, and in float64 where float32 would underflow.

    Raises
    ------
    InputError
        NaN or infinite weights, a negative or infinite curvature.
    """
    rows = _Rows.of(weight, groups, column_order)
    h = None if curvature is None else _Rows.of(curvature.to(weight), groups, column_order)
    problems = []
    if h is not None and not bool(((h.weight >= 0) & (h.weight < torch.inf)).all()):
        problems.append(Problem("curvature", "holds a negative, NaN or infinite entry; all must be ≥ 0"))
    costs = _costs(rows, block, h, weight.dtype)
    # A NaN needs no search of its own: it ends up in its block's cost.
    largest = float(costs.prune.max())
    if not problems and _SMALLEST_SAFE_COST < largest < math.inf:
        return costs
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        problems.append(
            Problem("weight", f"{bad} of {weight.numel()} weights are NaN or infinite", DIVERGED_HINT)
        )
    if problems:
        raise InputError(f"layer {name}", problems)
    return _costs(rows, block, h, torch.float64)


@torch.no_grad()
def _device_costs(
    weight: Tensor,
    block: tuple[int, int],
    groups: int,
    column_order: ColumnOrder,
    curvature: Tensor | None,
) -> tuple[BlockCosts, Tensor]:
    """`layer_costs` without a look at any value, and the factor that its costs were divided by.

    Weights and curvature are scaled by powers of two to at most 1 first, which is exact and takes the place of the second
    attempt in float64.
    """
    rows = _Rows.of(weight, groups, column_order)
    scale, h, h_scale = _to_one(weight), None, weight.new_ones(())
    if curvature is not None:
        curvature = curvature.to(weight)
        h, h_scale = _Rows.of(curvature, groups, column_order), _to_one(curvature)
    costs = _costs(rows, block, h, weight.dtype, (scale, h_scale))
    return costs._replace(magnitude=costs.magnitude / scale), 1 / (scale.double().square() * h_scale.double())


def _to_one(values: Tensor) -> Tensor:
    """The power of two that brings the largest magnitude into [0.5, 1); within float32's normal range."""
    _, exponent = torch.frexp(torch.linalg.vector_norm(values, ord=torch.inf))
    return power_of_two(-exponent.clamp(-120, 120)).to(values.dtype)


@torch.no_grad()
def fill_blocks(
    weight: Tensor,
    types: Tensor,
    magnitude: Tensor,
    block: tuple[int, int],
    groups: int = 1,
    column_order: ColumnOrder = "tap_major",
) -> Tensor:
    """A weight with the types of its blocks: 0, sign(w) · magnitude with sign(0) = +1, or w itself.

    Parameters
    ----------
    weight : Tensor ``[out, in]`` or ``[c_out, c_in/groups, *kernel]``
    types : uint8 Tensor ``[groups, Mb, Kb]``
    magnitude : Tensor ``[groups, Mb, Kb]``
        Of the weight's dtype; read at UNIFIED blocks.

    Returns
    -------
    Tensor
        A contiguous one of the weight's shape.
    """
    filled = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
    source, target = (_Rows.of(part, groups, column_order) for part in (weight, filled))
    k, shared, dense = source.size[2], magnitude * (types == UNIFIED), types == DENSE
    # On an accelerator a look would wait for it; the result is the same.
    any_dense = not _is_host(weight) or bool(dense.any())
    for rows in source.chunks(block[0]):
        block_rows = slice(rows.start // block[0], -(-rows.stop // block[0]))
        chunk = source.read(rows)
        # Adding zero turns −0 into +0: before, so that its sign counts as +1; after, so that pruned weights
        # are +0.
        projected = torch.copysign(
            expand_blocks(shared[:, block_rows], block, chunk.shape[1], k), chunk + 0.0
        )
        projected += 0.0
        if any_dense:
            is_dense = expand_blocks(dense[:, block_rows], block, chunk.shape[1], k)
            projected = torch.where(is_dense, chunk, projected)
        target.write(rows, projected)
    return filled
