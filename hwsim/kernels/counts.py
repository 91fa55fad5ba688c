"""How many blocks of each type a block row holds."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["count_types"]


@njit(cache=True, nogil=True)
def count_types(types: NDArray) -> NDArray:
    """``int64[G, Mb, 3]``: PRUNED, UNIFIED and DENSE blocks of each block row of ``types`` (``uint8[G, Mb, Kb]``)."""
    groups, m_blocks, k_blocks = types.shape
    counts = np.empty((groups, m_blocks, 3), np.int64)
    for group in range(groups):
        for row in range(m_blocks):
            unified = np.int64(0)
            dense = np.int64(0)
            for j in range(k_blocks):
                unified += types[group, row, j] == 1
                dense += types[group, row, j] == 2
            counts[group, row, 0] = k_blocks - unified - dense
            counts[group, row, 1] = unified
            counts[group, row, 2] = dense
    return counts
