"""The block view of a weight: what a block is, without saying what becomes of it. Pure functions on tensors.

A weight of any Linear or convolution is first a stack of matrices, one per group, ``[groups, m, k]``: ``m``
output channels, ``k`` reduction positions. The matrices are cut into blocks of ``g_o × g_k``; blocks at the
edges may be ragged, and the padding that completes them is zero and never counted.

Source: the reshaped weight of Lin et al., "Efficient Micro-Structured Weight Unification and Pruning for
Neural Network Compression", arXiv 2106.08301 (2021).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "ColumnOrder",
    "block_sums",
    "blocks_to_matrix",
    "expand_blocks",
    "matrix_to_blocks",
    "matrix_to_weight",
    "real_entries",
    "weight_to_matrix",
]

ColumnOrder = Literal["tap_major", "channel_major"]


def weight_to_matrix(weight: Tensor, groups: int = 1, column_order: ColumnOrder = "tap_major") -> Tensor:
    """The matrices of a weight, one per group.

    Parameters
    ----------
    weight : Tensor ``[out, in]`` or ``[c_out, c_in/groups, *kernel]``
    groups : int
        Must divide ``c_out``.
    column_order : {"tap_major", "channel_major"}
        tap_major: the input channel is the fastest index of a row, so a block does not mix kernel taps where
        ``c_in/groups`` is a multiple of ``g_k``. channel_major: the kernel tap is.

    Returns
    -------
    Tensor ``[groups, m, k]``
        A view where possible; ``m = c_out/groups``, ``k = prod(kernel) · c_in/groups``.

    Examples
    --------
    >>> weight_to_matrix(torch.arange(6).reshape(1, 2, 3)).tolist()  # two channels, three taps
    [[[0, 3, 1, 4, 2, 5]]]
    """
    out_channels, in_channels, *kernel = weight.shape
    taps = math.prod(kernel)
    by_channel = weight.reshape(groups, out_channels // groups, in_channels, taps)
    if column_order == "tap_major":
        by_channel = by_channel.transpose(2, 3)
    return by_channel.reshape(groups, out_channels // groups, in_channels * taps)


def matrix_to_weight(
    matrix: Tensor,
    weight_shape: tuple[int, ...],
    column_order: ColumnOrder = "tap_major",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The inverse of `weight_to_matrix`: ``[groups, m, k]`` to a new weight of ``weight_shape``."""
    groups, m, _ = matrix.shape
    in_channels, taps = weight_shape[1], math.prod(weight_shape[2:])
    if column_order == "tap_major":
        matrix = matrix.reshape(groups, m, taps, in_channels).transpose(2, 3)
    return matrix.reshape(weight_shape).clone(memory_format=memory_format)


def matrix_to_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """The padded blocks of a stack of matrices.

    Parameters
    ----------
    matrix : Tensor ``[groups, m, k]``
    block : tuple of int
        ``(g_o, g_k)``.

    Returns
    -------
    Tensor ``[groups, Mb, g_o, Kb, g_k]``
        Ragged edges are completed with zeros; a view where there are none.
    """
    groups, m, k = matrix.shape
    g_o, g_k = block
    m_blocks, k_blocks = -(-m // g_o), -(-k // g_k)
    if m % g_o or k % g_k:
        matrix = torch.nn.functional.pad(matrix, (0, k_blocks * g_k - k, 0, m_blocks * g_o - m))
    return matrix.reshape(groups, m_blocks, g_o, k_blocks, g_k)


def blocks_to_matrix(blocks: Tensor, m: int, k: int) -> Tensor:
    """The inverse of `matrix_to_blocks`: ``[groups, Mb, g_o, Kb, g_k]`` to ``[groups, m, k]`` without padding."""
    groups, m_blocks, g_o, k_blocks, g_k = blocks.shape
    return blocks.reshape(groups, m_blocks * g_o, k_blocks * g_k)[:, :m, :k]


def block_sums(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """The sum over the real entries of every block: ``[groups, m, k]`` to ``[groups, Mb, Kb]``."""
    # Rows of a block first: that reduction runs over contiguous columns and leaves g_o times less for the
    # second.
    return matrix_to_blocks(matrix, block).sum(dim=2).sum(dim=-1)


def expand_blocks(values: Tensor, block: tuple[int, int], m: int, k: int) -> Tensor:
    """Every block's value at each of its real entries: ``[groups, Mb, Kb]`` to ``[groups, m, k]``."""
    groups, m_blocks, k_blocks = values.shape
    g_o, g_k = block
    return blocks_to_matrix(values[:, :, None, :, None].expand(groups, m_blocks, g_o, k_blocks, g_k), m, k)


def real_entries(m: int, k: int, block: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """``int64[Mb, Kb]``: how many entries of every block are real, padding left out.

    Examples
    --------
    >>> real_entries(5, 6, (4, 4)).tolist()
    [[16, 8], [4, 2]]
    """
    heights, widths = (
        torch.clamp(size - torch.arange(0, size, step, device=device), max=step)
        for size, step in zip((m, k), block, strict=True)
    )
    return heights[:, None] * widths[None, :]
