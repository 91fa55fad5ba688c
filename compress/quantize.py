"""Integers of a compressed layer: one step size for its dense weights and its magnitudes, and the way back.

One step size per layer, since both kinds of block add into one accumulator of the machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.blocks import expand_blocks, matrix_to_weight, real_entries
from compress.layers import CompressedLayer
from hwsim.layer import DENSE, UNIFIED, QuantizedWeights

__all__ = [
    "choose_step_size",
    "dequantize",
    "fake_quantize",
    "magnitude_range",
    "quantize_blocks",
    "weight_range",
]

_SHRINKS = tuple(2 ** (-i / 12) for i in range(61))
"""Candidate step sizes as shares of the largest useful one: 1 down to 1/32 in steps of 6 %."""

_TINY = float(np.finfo(np.float32).tiny)

_SEARCH_VALUES = 1 << 15
"""Dense weights and magnitudes that the search looks at: a regular sample of larger layers."""


def weight_range(bits: int) -> tuple[int, int]:
    """Least and greatest integer of a two's complement weight.

    >>> weight_range(8)
    (-128, 127)
    """
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def magnitude_range(bits: int) -> tuple[int, int]:
    """Least and greatest integer of an unsigned magnitude.

    >>> magnitude_range(8)
    (0, 255)
    """
    return 0, (1 << bits) - 1


class _FakeQuantize(torch.autograd.Function):
    """Round to the grid forwards, pass the gradient straight through backwards."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step_size: Tensor, low: int, high: int) -> Tensor:
        return torch.round(values / step_size).clamp_(low, high).mul_(step_size)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return grad_output, None, None, None


def fake_quantize(values: Tensor, step_size: Tensor, low: int, high: int) -> Tensor:
    """``clamp(round(values / step_size), low, high) · step_size`` with a straight-through gradient.

    Rounds half to even, as `quantize_blocks` does: what training sees is what the integers say.

    Source: Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons",
    arXiv 1308.3432 (2013). Clipped values keep their gradient too, or they could never come back.
    """
    quantized: Tensor = _FakeQuantize.apply(values, step_size, low, high)
    return quantized


@torch.no_grad()
def choose_step_size(
    dense: Tensor,
    magnitudes: Tensor,
    types: Tensor,
    block: tuple[int, int],
    weight_bits: int,
    magnitude_bits: int,
) -> float:
    """The step size of a layer with the least squared error over its real weights.

    The range is not simply fitted to the largest value: at 2 to 4 bits a single outlier would waste most of
    the grid. Candidates go from the fitted step down to 1/32 of it, so the search is never worse than
    fitting; at 8 bits both are nearly the same.

    Parameters
    ----------
    dense : float Tensor ``[groups, m, k]``
        Read in DENSE blocks only.
    magnitudes : float Tensor ``[groups, Mb, Kb]``
        Read at UNIFIED blocks only; each counts once per real weight of its block.
    types : uint8 Tensor ``[groups, Mb, Kb]``
    block : tuple of int
    weight_bits, magnitude_bits : int

    Returns
    -------
    float
        Exactly representable in float32; 1.0 for a layer without a non-zero weight.
    """
    _, m, k = dense.shape
    steps = candidate_steps(dense, magnitudes, types, block, weight_bits, magnitude_bits)
    if len(steps) == 1:
        return steps[0]
    weights = dense[expand_blocks(types == DENSE, block, m, k)]
    shared = magnitudes[types == UNIFIED]
    entries = real_entries(m, k, block).to(types.device).expand(types.shape)[types == UNIFIED]
    least, greatest = weight_range(weight_bits)
    _, most = magnitude_range(magnitude_bits)
    stride = -(-(weights.numel() + shared.numel()) // _SEARCH_VALUES)
    weights, shared, entries = (part[::stride].double() for part in (weights, shared, entries))
    one = torch.ones_like
    values = torch.cat([weights, shared])
    counts = torch.cat([one(weights), entries])
    low = torch.cat([one(weights) * least, one(shared) * 0])
    high = torch.cat([one(weights) * greatest, one(shared) * most])

    def error(step_size: float) -> float:
        quantized = torch.clamp(torch.round(values / step_size), low, high) * step_size
        return float((counts * (values - quantized).square()).sum())

    return min(steps, key=error)


def candidate_steps(
    dense: Tensor,
    magnitudes: Tensor,
    types: Tensor,
    block: tuple[int, int],
    weight_bits: int,
    magnitude_bits: int,
) -> list[float]:
    """Step sizes that a layer may have, from the one that fits its largest value down; ``[1.0]`` where all is zero."""
    weights = dense[expand_blocks(types == DENSE, block, *dense.shape[1:])]
    shared = magnitudes[types == UNIFIED]
    fitted = max(
        _largest(weights) / weight_range(weight_bits)[1],
        _largest(shared) / magnitude_range(magnitude_bits)[1],
    )
    if fitted == 0:
        return [1.0]
    return [max(float(np.float32(fitted * shrink)), _TINY) for shrink in _SHRINKS]


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


@torch.no_grad()
def quantize_blocks(
    dense: Tensor,
    negative: Tensor,
    magnitudes: Tensor,
    types: Tensor,
    block: tuple[int, int],
    step_size: float,
    weight_bits: int,
    magnitude_bits: int,
) -> QuantizedWeights:
    """The integers of a layer.

    Parameters
    ----------
    dense : float Tensor ``[groups, m, k]``
        Read in DENSE blocks only.
    negative : bool Tensor ``[groups, m, k]``
        Signs of UNIFIED blocks, read there only.
    magnitudes : float Tensor ``[groups, Mb, Kb]``
        Read at UNIFIED blocks only. One that rounds to 0 leaves its block UNIFIED, with its signs.
    types : uint8 Tensor ``[groups, Mb, Kb]``
    block : tuple of int
    step_size : float
        As of `choose_step_size`.
    weight_bits, magnitude_bits : int

    Returns
    -------
    QuantizedWeights
        With zeros wherever a block's type does not use an entry.
    """
    _, m, k = dense.shape
    is_dense, is_unified = (expand_blocks(types == code, block, m, k) for code in (DENSE, UNIFIED))
    weights = torch.round(dense / step_size).clamp_(*weight_range(weight_bits)) * is_dense
    shared = torch.round(magnitudes / step_size).clamp_(*magnitude_range(magnitude_bits)) * (types == UNIFIED)
    return QuantizedWeights(
        dense=weights.cpu().numpy().astype(np.int16),
        signs=(negative & is_unified).cpu().numpy().astype(np.uint8),
        magnitudes=shared.cpu().numpy().astype(np.uint16),
        weight_bits=weight_bits,
        magnitude_bits=magnitude_bits,
        step_size=step_size,
    )


def dequantize(layer: CompressedLayer, weight_shape: tuple[int, ...]) -> Tensor:
    """The float32 weight of a compressed layer, exactly ``integer · float32(step_size)``.

    Parameters
    ----------
    layer : CompressedLayer
    weight_shape : tuple of int
        Shape of the module's weight.
    """
    return matrix_to_weight(torch.from_numpy(layer.float_matrix()), weight_shape, layer.column_order)
