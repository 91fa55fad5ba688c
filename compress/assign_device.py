"""The assignment of block types on an accelerator: the same types as `compress.assign.assign_types`, without reading back.

Every decision is a tensor operation on fixed shapes, so the host never waits for the device; it costs a fixed number of
sorts. Tested on the CPU and on the meta device, where reading a value is impossible.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hwsim.layer import DENSE, PRUNED, UNIFIED

__all__ = ["assign_on_device", "power_of_two"]

_BISECTIONS = 63
"""Costs are 60-bit integers, so multipliers lie within ``2**61 + 2`` of each other."""


@torch.no_grad()
def assign_on_device(
    prune_cost: Tensor,
    unify_cost: Tensor,
    pruned_blocks: int,
    unified_blocks: int,
    method: Literal["exact", "prune_first"] = "exact",
    balanced_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Types with exactly these counts, and the sum of their costs.

    Parameters
    ----------
    prune_cost, unify_cost : float Tensors ``[groups, Mb, Kb]``
        Not negative. Where one is NaN the types mean nothing; the caller notices that by his own figures.
    pruned_blocks, unified_blocks : int
        Of all groups together; with balanced rows multiples of ``groups · Mb``.
    method : {"exact", "prune_first"}
    balanced_rows : bool
        The same counts in every block row.

    Returns
    -------
    types : uint8 Tensor ``[groups, Mb, Kb]``
    total : float64 Tensor ``[]``
    """
    rows = prune_cost.shape[0] * prune_cost.shape[1] if balanced_rows else 1
    prune, unify = _as_integers(prune_cost.reshape(rows, -1), unify_cost.reshape(rows, -1))
    pruned, unified = pruned_blocks // rows, unified_blocks // rows
    if method == "prune_first":
        first = _smallest(prune, pruned)
        second = _smallest(unify.masked_fill(first, torch.iinfo(torch.int64).max), unified)
        is_pruned, is_unified = first, second
    elif pruned + unified == prune.shape[1]:
        is_pruned = _smallest(prune - unify, pruned)
        is_unified = ~is_pruned
    elif pruned == 0 or unified == 0:
        is_pruned, is_unified = _smallest(prune, pruned), _smallest(unify, unified)
    else:
        is_pruned, is_unified = _assign_exactly(prune, unify, pruned, unified)
    types = torch.full_like(is_pruned, DENSE, dtype=torch.uint8)
    types = types.masked_fill(is_unified, UNIFIED).masked_fill(is_pruned, PRUNED).reshape(prune_cost.shape)
    cost = torch.where(types == PRUNED, prune_cost, torch.where(types == UNIFIED, unify_cost, 0.0))
    return types, cost.sum(dtype=torch.float64)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` as float64, by its bits: a device's own power function need not be exact.

    >>> power_of_two(torch.tensor([-3, 0, 60])).tolist()
    [0.125, 1.0, 1.152921504606847e+18]
    """
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _as_integers(prune: Tensor, unify: Tensor) -> tuple[Tensor, Tensor]:
    """Costs scaled by one power of two per row to integers below 2**60."""
    largest = torch.maximum(prune.amax(dim=1, keepdim=True), unify.amax(dim=1, keepdim=True)).double()
    scale = torch.where(largest > 0, power_of_two(60 - torch.frexp(largest)[1]), 1.0)
    return _scaled(prune, scale), _scaled(unify, scale)


def _scaled(cost: Tensor, scale: Tensor) -> Tensor:
    return (cost.double() * scale).round_().to(torch.int64)


def _smallest(values: Tensor, count: int) -> Tensor:
    """A mask ``[rows, n]`` of the ``count`` smallest of each row, the lower index first among equals."""
    order = values.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)


def _first(mask: Tensor, count: Tensor | int) -> Tensor:
    """The first ``count`` entries of a mask, row by row."""
    return mask & (mask.cumsum(dim=1) <= count)


def _count(mask: Tensor) -> Tensor:
    return mask.sum(dim=1, keepdim=True)


def _assign_exactly(prune: Tensor, unify: Tensor, pruned: int, unified: int) -> tuple[Tensor, Tensor]:
    """The bisection of `compress.projection`, with a fixed number of steps; a multiplier that fits is kept to the end."""
    total = pruned + unified
    low = prune.amin(dim=1, keepdim=True) - unify.amax(dim=1, keepdim=True) - 1
    high = prune.amax(dim=1, keepdim=True) - unify.amin(dim=1, keepdim=True) + 1
    for _ in range(_BISECTIONS):
        d = torch.div(low + high, 2, rounding_mode="floor")
        chosen, tied, prefers = _face(prune, unify, d, total)
        from_ties = total - _count(chosen)
        most = _count(chosen & (prefers <= 0)) + torch.minimum(from_ties, _count(tied & (prefers <= 0)))
        fewest = _count(chosen & (prefers < 0)) + (from_ties - _count(tied & (prefers >= 0))).clamp(min=0)
        low = torch.where(fewest <= pruned, d, low)
        high = torch.where(most >= pruned, d, high)
    return _settle(
        *_face(prune, unify, torch.div(low + high, 2, rounding_mode="floor"), total), pruned, unified
    )


def _face(prune: Tensor, unify: Tensor, d: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a multiplier leaves open: blocks chosen for certain, blocks on the threshold, and what each prefers."""
    shifted = prune - d
    prefers = (shifted > unify).to(torch.int8) - (shifted < unify).to(torch.int8)
    key = torch.minimum(shifted, unify)
    threshold = key.sort(dim=1).values[:, total - 1 : total]
    return key < threshold, key == threshold, prefers


def _settle(
    chosen: Tensor, tied: Tensor, prefers: Tensor, pruned: int, unified: int
) -> tuple[Tensor, Tensor]:
    """Ties are dealt out to meet both counts, lower indices first."""
    need_pruned = pruned - _count(chosen & (prefers < 0))
    free = chosen & (prefers == 0)
    only_pruned, either, only_unified = (tied & (prefers == p) for p in (-1, 0, 1))
    from_ties = pruned + unified - _count(chosen)
    # Of the blocks taken from the ties as few are pruned as the counts allow; the free ones supply the rest.
    tied_pruned = torch.maximum(from_ties - _count(either | only_unified), need_pruned - _count(free)).clamp(
        min=0
    )
    tied_unified = from_ties - tied_pruned
    either_pruned = (tied_pruned - _count(only_pruned)).clamp(min=0)
    either_unified = (tied_unified - _count(only_unified)).clamp(min=0)
    free_is_pruned = _first(free, need_pruned - tied_pruned)
    either_is_pruned = _first(either, either_pruned)
    is_pruned = (
        (chosen & (prefers < 0))
        | free_is_pruned
        | _first(only_pruned, tied_pruned - either_pruned)
        | either_is_pruned
    )
    is_unified = (
        (chosen & (prefers > 0))
        | (free & ~free_is_pruned)
        | _first(only_unified, tied_unified - either_unified)
        | (_first(either, either_pruned + either_unified) & ~either_is_pruned)
    )
    return is_pruned, is_unified
