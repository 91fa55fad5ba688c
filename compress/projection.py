"""The projection of a layer onto "exactly P blocks pruned, U unified, the rest free".

A unified block has one magnitude and free signs; ``sign(w) · mean|w|`` is its nearest point, at the cost
``Σw² − n·mean|w|²``; a pruned block costs ``Σw²``, a dense one nothing. Which block becomes what is an
assignment with two cardinality constraints, solved exactly by a search on one multiplier.

Source: the projection is derived in ``docs/method.md``; the method is Lin et al., arXiv 2106.08301 (2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from compress.assign import ProjectionMethod, assign_with_cost
from compress.assign_device import assign_on_device, power_of_two
from compress.blocks import ColumnOrder, block_sums, expand_blocks, real_entries
from compress.rules import types_shape
from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, UNIFIED, type_counts

__all__ = [
    "BlockCosts",
    "Projection",
    "block_costs",
    "fill_blocks",
    "layer_costs",
    "project",
    "project_to_counts",
]

DIVERGED_HINT = "training diverged: lower the learning rate or rho and start from the last good weights"

_CHUNK_ENTRIES = 1 << 18
"""Entries looked at together: a chunk and its temporaries stay in the cache (4× faster at 10 M weights)."""

_DEVICE_CHUNK_ENTRIES = 1 << 24
"""The same on an accelerator, where a chunk must be large against the launch of a kernel; 64 MiB of float32."""

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
    groups, m, k = weights.size
    g_o, device = block[0], weights.weight.device
    shape = (groups, -(-m // g_o), -(-k // block[1]))
    costs = BlockCosts(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(3)))
    for rows in weights.chunks(g_o):
        plain, first, second, total = _chunk_costs(weights, rows, block, curvature, dtype, scales)
        counts = real_entries(min(rows.stop, m) - rows.start, k, block, device)
        magnitude = plain / counts.to(dtype)
        if curvature is not None:
            magnitude = torch.where(total > 0, first / total, magnitude)
        here = slice(rows.start // g_o, -(-rows.stop // g_o))
        costs.magnitude[:, here] = magnitude
        costs.prune[:, here] = second
        # Rounding may push the difference of two nearly equal sums below zero.
        costs.unify[:, here] = (second - first * magnitude).clamp_(min=0)
    return costs


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
        The same counts in every block row; see `compress.assign.assign_types`.

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
        distance, magnitude = distance * distance_scale, costs.magnitude.to(weight.dtype)
        del costs
    else:
        shared, *rest = layer_costs(weight, block, groups, column_order, curvature, name)
        arrays = [cost.numpy() for cost in rest]
        rest.clear()
        codes, total = assign_with_cost(
            arrays, pruned_blocks, unified_blocks, method, balanced_rows=balanced_rows
        )
        types, distance = torch.from_numpy(codes), torch.tensor(total, dtype=torch.float64)
        magnitude = shared.to(weight.dtype)
    projected = fill_blocks(weight, types, magnitude, block, groups, column_order)
    return Projection(projected, types, distance)


@torch.no_grad()
def layer_costs(
    weight: Tensor,
    block: tuple[int, int],
    groups: int = 1,
    column_order: ColumnOrder = "tap_major",
    curvature: Tensor | None = None,
    name: str = "weight",
) -> BlockCosts:
    """`block_costs` of a weight in its own shape, safe to compare: in float32 or, where that would underflow, in float64.

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
    costs = _costs(rows, block, h, torch.promote_types(weight.dtype, torch.float32))
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
    costs = _costs(rows, block, h, torch.promote_types(weight.dtype, torch.float32), (scale, h_scale))
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
