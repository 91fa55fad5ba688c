"""Coarser integers for a smaller file: each weight is rounded where the loss gains least per bit saved.

One number decides, the multiplier λ: what a bit is worth in units of the loss (nats). Per layer the grid is chosen, per
weight or shared magnitude the point on it, both by least ``½·h·(ŵ − w)² + λ·bits(ŵ)`` with h the diagonal of the Fisher
matrix. What comes out is the integers that run and that the file holds; `compress.codec` adds nothing and loses nothing.

Sources: entropy-constrained quantisation: Chou, Lookabaugh, Gray, "Entropy-constrained vector quantization", IEEE
Trans. ASSP 37 (1989); uniform grid and rounding by rate: Wiedemann et al., "DeepCABAC", arXiv 1907.11900 (2019).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.curvature import Curvature, curvatures
from compress.layers import CompressedLayer
from compress.norms import reestimate_norms
from compress.quantize import dequantize, magnitude_range, weight_range
from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, UNIFIED, QuantizedWeights, expand_blocks

__all__ = [
    "coarsen",
    "coarsen_network",
    "coarsen_within",
    "refit_biases",
    "round_biases",
    "round_to_step",
    "set_weights",
]

Array = NDArray[np.float64]

STEP_FACTORS = (0.35, 0.5, 0.7, 1.0, 1.4)
"""Steps that are tried, as multiples of the one that is best at high rate."""

LOG_RATIOS = (1.12, 1.25, 1.4)
"""Ratios of neighbouring magnitudes on the logarithmic grids that are tried."""

SEARCH_VALUES = 1 << 12
"""Values on which a grid is chosen: a regular sample of larger layers."""

TURNS = 3
"""Turns in which bits and rounding settle."""

MULTIPLIERS = tuple(1e-10 * 2.0 ** (i / 2) for i in range(61))
"""λ that `coarsen_within` tries: nats per bit."""

LOSS_BATCH = 512

_PART = 1 << 15
"""Integers that `round_to_step` looks at together."""

NO_SYMBOL_BITS = 16.0
"""Cost of a grid point that nothing was rounded to so far."""


# --- one layer


@dataclass(frozen=True, eq=False)
class _Values:
    """Values that share a grid.

    Attributes
    ----------
    exact : float64 array ``[n]``
    curvature : float64 array ``[n]``
    sign_bits : float64 array ``[n]``
        Bits that a value costs besides its symbol where it is not 0.
    """

    exact: Array
    curvature: Array
    sign_bits: Array

    def sample(self) -> _Values:
        stride = -(-len(self.exact) // SEARCH_VALUES)
        return self._at(slice(None, None, stride))

    def parts(self) -> Iterator[_Values]:
        """All values, some at a time."""
        starts = range(0, max(1, len(self.exact)), _PART)
        return (self._at(slice(start, start + _PART)) for start in starts)

    def _at(self, where: slice) -> _Values:
        return _Values(self.exact[where], self.curvature[where], self.sign_bits[where])


@dataclass(frozen=True, eq=False)
class _Rounding:
    """Indices into a grid, the bits that each point costs, and the sum of loss and rate that was reached."""

    indices: NDArray[np.int64]
    bits: Array
    cost: float


def _bits(indices: NDArray[np.int64], points: int) -> Array:
    counts = np.bincount(indices, minlength=points)
    return np.where(counts > 0, -np.log2(np.maximum(counts, 1) / counts.sum()), NO_SYMBOL_BITS)


def _nearest(exact: Array, grid: Array) -> NDArray[np.int64]:
    return np.searchsorted((grid[1:] + grid[:-1]) / 2, exact)


def _round(
    values: _Values, grid: Array, zero: int, multiplier: float, bits: Array | None = None
) -> _Rounding:
    """Round to an ascending grid by loss and rate: to the nearest point, its neighbour towards 0, or 0.

    The bits come from the rounding itself, settled in a few turns, unless they are given.
    """
    nearest = _nearest(values.exact, grid)
    candidates = (nearest, nearest - np.sign(nearest - zero), np.full_like(nearest, zero))
    losses = [0.5 * values.curvature * (grid[indices] - values.exact) ** 2 for indices in candidates]
    for loss, indices in zip(losses, candidates, strict=True):
        loss += multiplier * values.sign_bits * (indices != zero)
    chosen = nearest
    for _ in range(1 if bits is not None else TURNS):
        price = multiplier * (bits if bits is not None else _bits(chosen, len(grid)))
        chosen, least = candidates[0], losses[0] + price[candidates[0]]
        for loss, indices in zip(losses[1:], candidates[1:], strict=True):
            total = loss + price[indices]
            better = total < least
            chosen, least = np.where(better, indices, chosen), np.where(better, total, least)
    return _Rounding(chosen, _bits(chosen, len(grid)), float(least.sum()))


@dataclass(frozen=True, eq=False)
class _Grid:
    """Integers that may be used, ascending and with 0, and the real value of one unit."""

    integers: NDArray[np.int64]
    step: float

    @property
    def points(self) -> Array:
        return self.integers.astype(np.float64) * float(np.float32(self.step))

    @property
    def zero(self) -> int:
        return int(np.searchsorted(self.integers, 0))


def _best_step(values: _Values, multiplier: float) -> float:
    """The step that is best at high rate: the rate falls by a bit where the step doubles, the loss is h·step²/24."""
    return float(np.sqrt(12 * multiplier / (np.log(2) * values.curvature.mean())))


def _uniform(values: _Values, step: float, low: int, high: int, stride: int = 1) -> _Grid:
    """Multiples of a step from the least to the greatest value, within a range of integers."""
    least = int(np.floor(min(values.exact.min(), 0) / step))
    most = int(np.ceil(max(values.exact.max(), 0) / step))
    first, last = max(least, -(-low // stride)), min(most, high // stride)
    return _Grid(np.arange(first, last + 1) * stride, step / stride)


def _fitted(values: _Values, low: int, high: int) -> float:
    """The smallest step at which no value is clipped; tiny for zeros alone."""
    up, down = max(values.exact.max(), 0) / high, max(-values.exact.min(), 0) / max(-low, 1)
    return float(max(up, down, np.finfo(np.float32).tiny))


def _choose(values: _Values, grids: list[_Grid], multiplier: float) -> tuple[_Grid, float, Array]:
    """The best of some grids on a sample: with its cost there and the bits of its points."""
    part = values.sample()
    tried = [(_round(part, grid.points, grid.zero, multiplier), grid) for grid in grids]
    rounding, grid = min(tried, key=lambda pair: pair[0].cost)
    return grid, rounding.cost, rounding.bits


def _dense_grids(values: _Values, multiplier: float, bits: int, least_step: float = 0.0) -> list[_Grid]:
    low, high = weight_range(bits)
    smallest = max(_fitted(values, low, high), least_step)
    steps = {max(factor * _best_step(values, multiplier), smallest) for factor in STEP_FACTORS}
    return [_uniform(values, step, low, high) for step in sorted(steps)]


def _magnitude_grids(values: _Values, multiplier: float, bits: int) -> list[_Grid]:
    low, high = magnitude_range(bits)
    smallest = _fitted(values, low, high)
    steps = {max(factor * _best_step(values, multiplier), smallest) for factor in STEP_FACTORS}
    grids = [_uniform(values, step, low, high) for step in sorted(steps)]
    for ratio in LOG_RATIOS:
        powers = ratio ** -np.arange(0, 1 + int(np.log(high) / np.log(ratio)))
        grids.append(_Grid(np.unique(np.rint(np.append(high * powers, 0)).astype(np.int64)), smallest))
    return grids


def coarsen(
    layer: CompressedLayer,
    curvature: Curvature,
    multiplier: float,
    *,
    weight_bits: int | None = None,
    magnitude_bits: int | None = None,
) -> CompressedLayer:
    """The layer on a coarser grid: types as they are, integers chosen by loss and rate.

    Parameters
    ----------
    layer : CompressedLayer
        Its effective weights are what is approximated. A requantiser is dropped, since it was made for other integers.
    curvature : Curvature
        As of `compress.curvature.curvatures`.
    multiplier : float
        λ: loss in nats that a saved bit may cost; positive.
    weight_bits, magnitude_bits : int
        Of the new integers; as before where left out.

    Returns
    -------
    CompressedLayer
        A magnitude that is rounded to 0 leaves its block UNIFIED, with positive signs, which cost nothing.

    Raises
    ------
    InputError
        A multiplier that is not positive.
    """
    if not 0 < multiplier < np.inf:
        raise InputError("coarsen", Problem("multiplier", f"{multiplier}, must be positive and finite"))
    weights, block = layer.weights, layer.block
    weight_bits = weight_bits or weights.weight_bits
    magnitude_bits = magnitude_bits or weights.magnitude_bits
    _, m, k = weights.dense.shape
    is_dense = expand_blocks(layer.types == DENSE, block, m, k)
    is_unified = layer.types == UNIFIED
    step = float(np.float32(weights.step_size))
    dense = _Values(
        weights.dense[is_dense] * step, curvature.at(is_dense), np.zeros(int(np.count_nonzero(is_dense)))
    )
    in_blocks = entries = np.zeros(0)
    if is_unified.any():
        in_blocks, entries = (part[is_unified] for part in curvature.of_blocks(block))
    shared = _Values(weights.magnitudes[is_unified] * step, in_blocks, entries)
    grids = _grids(dense, shared, multiplier, weight_bits, magnitude_bits)
    integers = np.zeros(weights.dense.shape, np.int16)
    magnitudes = np.zeros(layer.types.shape, np.uint16)
    new_step = 1.0
    for values, chosen, target, mask in (
        (dense, grids[0], integers, is_dense),
        (shared, grids[1], magnitudes, is_unified),
    ):
        if chosen is not None:
            grid, bits = chosen
            rounded = [
                _round(part, grid.points, grid.zero, multiplier, bits).indices for part in values.parts()
            ]
            target[mask] = grid.integers[np.concatenate(rounded)]
            new_step = grid.step
    return _with_integers(layer, integers, magnitudes, new_step, weight_bits, magnitude_bits)


def _with_integers(
    layer: CompressedLayer,
    dense: NDArray[np.int16],
    magnitudes: NDArray[np.uint16],
    step: float,
    weight_bits: int,
    magnitude_bits: int,
) -> CompressedLayer:
    """The layer with other integers; a block whose magnitude is 0 has positive signs."""
    _, m, k = dense.shape
    signs = layer.weights.signs * expand_blocks(magnitudes > 0, layer.block, m, k)
    coarse = QuantizedWeights(dense, signs, magnitudes, weight_bits, magnitude_bits, float(np.float32(step)))
    return replace(layer, weights=coarse)


def round_to_step(
    layer: CompressedLayer, step: float, *, weight_bits: int | None = None, magnitude_bits: int | None = None
) -> CompressedLayer:
    """The layer with every weight and magnitude at the nearest multiple of a step: no calibration, no thought of the rate.

    Parameters
    ----------
    layer : CompressedLayer
        Its effective weights are what is approximated. A requantiser is dropped, since it was made for other integers.
    step : float
        Positive. Where the largest value would not fit the bits, the smallest step at which it does.
    weight_bits, magnitude_bits : int
        Of the new integers; as before where left out.

    Raises
    ------
    InputError
        A step that is not positive.
    """
    if not 0 < step < np.inf:
        raise InputError("round", Problem("step", f"{step}, must be positive and finite"))
    weights = layer.weights
    ranges = (
        weight_range(weight_bits or weights.weight_bits),
        magnitude_range(magnitude_bits or weights.magnitude_bits),
    )
    unit = float(np.float32(weights.step_size))
    integers = weights.dense, weights.magnitudes
    least = max(
        max(int(values.max(initial=0)), -int(values.min(initial=0))) * unit / high
        for values, (_, high) in zip(integers, ranges, strict=True)
    )
    step = float(np.float32(max(step, least)))
    dense, magnitudes = (
        _multiples(values, unit, step, bounds) for values, bounds in zip(integers, ranges, strict=True)
    )
    return _with_integers(
        layer,
        dense,
        magnitudes,
        step,
        weight_bits or weights.weight_bits,
        magnitude_bits or weights.magnitude_bits,
    )


def _multiples(
    integers: NDArray[np.integer], unit: float, step: float, bounds: tuple[int, int]
) -> NDArray[Any]:
    """Integers of one unit as the nearest ones of another, of the same dtype; a part at a time, since parts are float64."""
    rounded = np.empty(integers.shape, integers.dtype)
    for part, target in zip(_parts(integers), _parts(rounded), strict=True):
        target[...] = np.rint(part * unit / step).clip(*bounds)
    return rounded


def _parts(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    flat = values.reshape(-1)
    return (flat[start : start + _PART] for start in range(0, flat.size, _PART))


_Chosen = tuple[_Grid, Array] | None


def _grids(
    dense: _Values, shared: _Values, multiplier: float, weight_bits: int, magnitude_bits: int
) -> tuple[_Chosen, _Chosen]:
    """Grids of dense weights and of magnitudes, with the bits of their points.

    Both add into one accumulator, so they have one step: where a layer has both, dense weights take every second, fourth or
    eighth point of the finer grid, as a magnitude stands for a whole block and deserves more precision.
    """
    if not len(shared.exact):
        if not len(dense.exact):
            return None, None
        grid, _, bits = _choose(dense, _dense_grids(dense, multiplier, weight_bits), multiplier)
        return (grid, bits), None
    if not len(dense.exact):
        grid, _, bits = _choose(shared, _magnitude_grids(shared, multiplier, magnitude_bits), multiplier)
        return None, (grid, bits)
    low, high = weight_range(weight_bits)
    least_step = _fitted(shared, *magnitude_range(magnitude_bits))
    coarse, _, _ = _choose(dense, _dense_grids(dense, multiplier, weight_bits, least_step), multiplier)
    best: tuple[float, _Chosen, _Chosen] | None = None
    for stride in (1, 2, 4, 8):
        step = coarse.step / stride
        if stride > 1 and (
            step < least_step or coarse.integers[-1] * stride > high or coarse.integers[0] * stride < low
        ):
            break
        wide, dense_cost, dense_bits = _choose(
            dense, [_uniform(dense, coarse.step, low, high, stride)], multiplier
        )
        fine, shared_cost, shared_bits = _choose(
            shared, [_uniform(shared, step, *magnitude_range(magnitude_bits))], multiplier
        )
        # Costs are those of samples; both layers' parts weigh by their real numbers.
        cost = dense_cost * len(dense.exact) / len(dense.sample().exact)
        cost += shared_cost * len(shared.exact) / len(shared.sample().exact)
        if best is None or cost < best[0]:
            best = (cost, (wide, dense_bits), (replace(fine, step=wide.step), shared_bits))
    assert best is not None  # a stride of 1 is always tried
    return best[1], best[2]


# --- a network


def set_weights(model: nn.Module, layers: Mapping[str, CompressedLayer]) -> None:
    """Give every module of ``layers`` the weight that its integers say."""
    with torch.no_grad():
        for name, layer in layers.items():
            weight = model.get_submodule(name).get_parameter("weight")
            weight.copy_(dequantize(layer, tuple(weight.shape)))


def coarsen_network(
    model: nn.Module,
    layers: Mapping[str, CompressedLayer],
    curvature: Mapping[str, Curvature],
    multiplier: float,
    inputs: Tensor,
) -> dict[str, CompressedLayer]:
    """`coarsen` for every layer; the weights of the model follow, and batch normalisation on calibration inputs."""
    coarse = {name: coarsen(layer, curvature[name], multiplier) for name, layer in layers.items()}
    set_weights(model, coarse)
    reestimate_norms(model, inputs)
    return coarse


def coarsen_within(
    model: nn.Module,
    layers: Mapping[str, CompressedLayer],
    inputs: Tensor,
    labels: Tensor,
    max_loss: float,
    *,
    seed: int = 0,
) -> tuple[dict[str, CompressedLayer], float]:
    """The coarsest integers whose loss on calibration inputs is at most ``max_loss`` above that of the finest.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; its weights are those of ``layers``, and follow, as does batch normalisation
        (`compress.norms.reestimate_norms`). Biases of the layers are rounded too.
    layers : mapping of str to CompressedLayer
    inputs, labels : Tensor
        Of calibration.
    max_loss : float
        Nats of mean cross-entropy.
    seed : int
        See `compress.curvature.curvatures`.

    Returns
    -------
    layers : dict of str to CompressedLayer
        Those that came in, where even the finest of the coarser ones lose too much.
    multiplier : float
        λ that was reached; 0 where nothing was coarsened.

    Raises
    ------
    InputError
        A budget that is not positive.
    """
    if not 0 < max_loss < np.inf:
        raise InputError("coarsen", Problem("max_loss", f"{max_loss}, must be positive and finite"))
    curvature = curvatures(model, layers, inputs, seed=seed)
    round_biases(model, layers)
    allowed = _loss(model, inputs, labels) + max_loss
    low, high = -1, len(MULTIPLIERS)  # the finest is as good as given, beyond the coarsest nothing is
    best, state = dict(layers), copy.deepcopy(model.state_dict())
    while high - low > 1:
        middle = (low + high) // 2
        tried = coarsen_network(model, layers, curvature, MULTIPLIERS[middle], inputs)
        if _loss(model, inputs, labels) <= allowed:
            low, best, state = middle, tried, copy.deepcopy(model.state_dict())
        else:
            high = middle
    model.load_state_dict(state)
    return best, MULTIPLIERS[low] if low >= 0 else 0.0


@torch.no_grad()
def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    parts = zip(inputs.split(LOSS_BATCH), labels.split(LOSS_BATCH), strict=True)
    sums = [
        float(nn.functional.cross_entropy(model(batch), truth, reduction="sum")) for batch, truth in parts
    ]
    return sum(sums) / len(inputs)


def round_biases(model: nn.Module, names: Mapping[str, CompressedLayer], fraction_bits: int = 12) -> None:
    """Round the biases of the layers to multiples of ``2**-fraction_bits``, which the file holds in half the bytes."""
    scale = float(1 << fraction_bits)
    with torch.no_grad():
        for bias in _biases(model, names):
            bias.copy_(torch.round(bias * scale) / scale)


def _biases(model: nn.Module, names: Mapping[str, CompressedLayer]) -> list[nn.Parameter]:
    found = (model.get_submodule(name)._parameters.get("bias") for name in names)
    return [bias for bias in found if bias is not None]


def refit_biases(
    model: nn.Module,
    names: Mapping[str, CompressedLayer],
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int = 2,
    lr: float = 2e-3,
    batch_size: int = 64,
) -> None:
    """Train the biases of the layers, nothing else, and round them.

    Pruning and rounding to 0 shift the mean of what a layer gives; its bias can take that back. For networks that nobody
    retrains; after retraining it gains nothing.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    names : mapping
        Layers by module name; those without a bias are passed over.
    inputs, labels : Tensor
        Of calibration; taken in order, so shuffled if they are sorted.
    epochs : int
    lr : float
        Of Adam; falls to 0 over the run.
    batch_size : int
    """
    biases = _biases(model, names)
    if not biases:
        return
    optimizer = torch.optim.Adam(biases, lr=lr)
    batches = list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True))
    with torch.enable_grad():
        for turn in range(epochs * len(batches)):
            batch, truth = batches[turn % len(batches)]
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - turn / (epochs * len(batches)))
            gradients = torch.autograd.grad(nn.functional.cross_entropy(model(batch), truth), biases)
            for bias, gradient in zip(biases, gradients, strict=True):
                bias.grad = gradient
            optimizer.step()
    for bias in biases:
        bias.grad = None
    round_biases(model, names)
