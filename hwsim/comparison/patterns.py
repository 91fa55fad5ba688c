"""Where a network's kept weights lie when single weights are pruned: by magnitude, or at random."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from hwsim.layer import LayerShape

__all__ = ["Pattern"]

DRAWN_CHUNK = 32
"""Random patterns are drawn in chunks of so many positions, so that multiples of it see one and the same pattern."""


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
        if self.kept == self.shape.weight_count:
            return self._places(chunk)
        if self.weights is not None:
            starts = np.arange(0, self.shape.k, chunk)
            return np.add.reduceat(self._largest, starts, axis=2, dtype=np.int64)
        if chunk % DRAWN_CHUNK:
            return self._drawn(chunk)
        fine = self._drawn_fine
        return np.add.reduceat(fine, np.arange(0, fine.shape[2], chunk // DRAWN_CHUNK), axis=2)

    def _places(self, chunk: int) -> NDArray[np.int64]:
        starts = np.arange(0, self.shape.k, chunk)
        sizes = np.diff(np.append(starts, self.shape.k))
        return np.broadcast_to(sizes, (self.shape.groups, self.shape.m, starts.size)).copy()

    def _drawn(self, chunk: int) -> NDArray[np.int64]:
        """The counts of a uniform draw, without drawing the places themselves."""
        places = self._places(chunk)
        rng = np.random.default_rng(self.seed)
        return rng.multivariate_hypergeometric(places.reshape(-1), self.kept).reshape(places.shape)

    @cached_property
    def _drawn_fine(self) -> NDArray[np.int64]:
        return self._drawn(DRAWN_CHUNK)

    @cached_property
    def _largest(self) -> NDArray[np.bool_]:
        """``bool[groups, m, k]``: the kept weights."""
        assert self.weights is not None
        magnitudes = np.abs(self.weights).reshape(-1)
        mask = np.zeros(magnitudes.size, bool)
        if self.kept:
            least = np.partition(magnitudes, magnitudes.size - self.kept)[magnitudes.size - self.kept]
            mask = magnitudes > least
            mask[np.flatnonzero(magnitudes == least)[: self.kept - np.count_nonzero(mask)]] = True
        return mask.reshape(self.weights.shape)
