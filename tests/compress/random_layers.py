"""Random compressed layers for the tests of the file and of its integers."""

from __future__ import annotations

import numpy as np

from compress.layers import CompressedLayer
from hwsim.layer import DENSE, UNIFIED, QuantizedWeights, Requantizer


def make_layer(
    name: str,
    groups: int,
    m: int,
    k: int,
    block: tuple[int, int],
    shares: tuple[float, float, float],
    seed: int,
    *,
    weight_bits: int = 8,
    magnitude_bits: int = 8,
    spread: float = 3.0,
    stride: int = 1,
    zero_signs: bool = False,
    requantizer: bool = False,
) -> CompressedLayer:
    """A random layer whose rows and columns differ in scale, as real ones do."""
    random = np.random.default_rng(seed)
    grid = (groups, -(-m // block[0]), -(-k // block[1]))
    types = random.choice(3, size=grid, p=shares).astype(np.uint8)
    expanded = np.repeat(np.repeat(types, block[0], 1), block[1], 2)[:, :m, :k]
    half = 1 << (weight_bits - 1)
    scale = np.exp(random.normal(0, 0.5, (groups, m, 1)) + random.normal(0, 0.5, (groups, 1, k)))
    dense = np.clip(np.rint(random.laplace(0, spread, (groups, m, k)) * scale) * stride, -half, half - 1)
    magnitudes = np.minimum(random.poisson(spread, grid), (1 << magnitude_bits) - 1) * (types == UNIFIED)
    large = np.repeat(np.repeat(magnitudes > 0, block[0], 1), block[1], 2)[:, :m, :k]
    signs = random.integers(0, 2, (groups, m, k)) * (expanded == UNIFIED)
    outputs = groups * m
    weights = QuantizedWeights(
        dense=(dense * (expanded == DENSE)).astype(np.int16),
        signs=(signs if zero_signs else signs * large).astype(np.uint8),
        magnitudes=magnitudes.astype(np.uint16),
        weight_bits=weight_bits,
        magnitude_bits=magnitude_bits,
        step_size=0.0123,
        requantizer=Requantizer(
            random.integers(-(2**31), 2**31, outputs).astype(np.int32),
            random.integers(-(2**15), 2**15, outputs).astype(np.int16),
            random.integers(0, 49, outputs).astype(np.uint8),
            relu=bool(seed % 2),
        )
        if requantizer
        else None,
    )
    return CompressedLayer(name, block, "tap_major", types, weights)
