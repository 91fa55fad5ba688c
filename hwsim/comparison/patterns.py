"""Where a network's kept weights lie when single weights are pruned: by magnitude, or at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from hwsim.layer import LayerShape

__all__ = ["Pattern"]


@dataclass(frozen=True, eq=False)
class Pattern:
    """The kept weights of a layer.

    Attributes
    ----------
    shape : LayerShape
    kept : int
        Kept weights of the layer, all groups together.
    weights : float array ``[groups, m, k]`` or None
        With weights the largest magnitudes are kept, ties by index. Without, ``kept`` places are drawn, all alike probable.
    seed : tuple of int
        Of the draw.

    Examples
    --------
    >>> shape = LayerShape("fc", "linear", in_channels=4, out_channels=2)
    >>> Pattern(shape, 3, np.array([[[1, 0, -5, 0], [0, 0, 2, 0]]])).nonzeros(2).tolist()
    [[[1, 1], [0, 1]]]
    """

    shape: LayerShape
    kept: int
    weights: NDArray | None = None
    seed: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        source = f"layer {self.shape.name}"
        if not 0 <= self.kept <= self.shape.weight_count:
            raise InputError(
                source, Problem("kept", f"{self.kept}, must lie in [0, {self.shape.weight_count}]")
            )
        expected = (self.shape.groups, self.shape.m, self.shape.k)
        if self.weights is None:
            return
        if self.weights.shape != expected:
            raise InputError(source, Problem("weights", f"shape {self.weights.shape}, expected {expected}"))
        if not np.isfinite(self.weights).all():
            raise InputError(source, Problem("weights", "not all of them are finite"))

    def nonzeros(self, chunk: int) -> NDArray[np.int64]:
        """``int64[groups, m, chunks]``: kept weights of each filter in each chunk of the reduction."""
        starts = np.arange(0, self.shape.k, chunk)
        sizes = np.diff(np.append(starts, self.shape.k))
        cells = (self.shape.groups, self.shape.m, starts.size)
        if self.kept == self.shape.weight_count:
            return np.broadcast_to(sizes, cells).copy()
        if self.weights is None:
            # the counts of a uniform draw, without drawing the places themselves
            rng = np.random.default_rng(self.seed)
            colors = np.broadcast_to(sizes, cells).reshape(-1)
            return rng.multivariate_hypergeometric(colors, self.kept).reshape(cells).astype(np.int64)
        mask = np.zeros(self.weights.size, bool)
        mask[np.argsort(-np.abs(self.weights).reshape(-1), kind="stable")[: self.kept]] = True
        return np.add.reduceat(mask.reshape(self.weights.shape), starts, axis=2, dtype=np.int64)
