"""One layer: the blocks of asked-for counts with the least squared error of the layer's outputs.

ADMM with the Hessian in its W-step finds types and signs; magnitudes and dense weights are then fitted exactly, signs chosen
anew while that helps, and everything is rounded to integers with the errors of rounding made up for.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from compress.layers import CompressedLayer
from compress.one_shot.form import Form, choose_levels, refit
from compress.one_shot.quadratic import Quadratic
from compress.one_shot.recipe import OneShotRecipe
from compress.projection import Projection, project_to_counts
from compress.quantize import (
    candidate_steps,
    choose_step_size,
    magnitude_range,
    quantize_blocks,
    weight_range,
)
from compress.rules import PlannedLayer
from hwsim.layer import UNIFIED

__all__ = ["Solution", "projected", "quantized", "search", "solve"]

_PERIOD = 3
"""Iterations between two changes of ρ."""

_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Factor of ρ by the share of weights whose type or sign changed since the last change.

Source: the schedule of ALPS (Meng et al., NeurIPS 2024), there by the share of the support.
"""

_LEAST_GAIN = 1e-3
"""Share of the loss that a turn of signs must gain for another one."""


class Solution(NamedTuple):
    """A layer that was solved.

    Attributes
    ----------
    form : Form
    iterations : int
        Of ADMM.
    is_settled : bool
        Whether types and signs had come to rest.
    """

    form: Form
    iterations: int
    is_settled: bool


def _project(layer: PlannedLayer, matrix: Tensor, curvature: Tensor | None) -> Projection:
    """Of the block view; ``curvature`` ``[groups, 1, k]``."""
    flat = matrix.flatten(0, 1)
    return project_to_counts(
        flat,
        layer.settings.block,
        *layer.counts,
        groups=layer.groups,
        method=layer.settings.projection,
        balanced_rows=layer.settings.balanced_rows,
        curvature=None if curvature is None else curvature.to(matrix).expand_as(matrix).flatten(0, 1),
        name=layer.name,
    )


def _form_of(layer: PlannedLayer, projection: Projection, like: Tensor) -> Form:
    matrix = projection.weight.reshape(like.shape).to(like)
    return Form.of_matrix(matrix, projection.types.to(like.device), layer.settings.block)


def projected(layer: PlannedLayer, weight: Tensor, curvature: Tensor | None = None) -> Form:
    """The nearest blocks to a weight ``[groups, m, k]``, in the norm of a diagonal ``[groups, 1, k]``."""
    return _form_of(layer, _project(layer, weight, curvature), weight)


def search(layer: PlannedLayer, quadratic: Quadratic, recipe: OneShotRecipe) -> Solution:
    """Types and signs by ADMM: the W-step in closed form, the exact projection, ρ growing until nothing changes.

    Penalty and projection are in one norm: that of the Hessian's diagonal, or the Euclidean one.
    """
    is_weighted = recipe.norm == "diagonal"
    curvature = quadratic.diagonal.float() if is_weighted else None
    scale = quadratic.diagonal.sqrt() if is_weighted else torch.ones_like(quadratic.diagonal)
    # Without the norm's weights ρ has the unit of H.
    unit = 1.0 if is_weighted else float(quadratic.diagonal.mean())
    near = quadratic.near(scale)
    rho = recipe.rho * unit
    projection = _project(layer, quadratic.target.float(), curvature)
    blocks = projection.weight.reshape(quadratic.target.shape)
    dual = torch.zeros_like(blocks)
    seen, settled, iteration = _marks(projection), False, 0
    while iteration < recipe.max_iterations and not settled:
        iteration += 1
        weights = near.minimum(blocks - dual, rho)
        projection = _project(layer, weights + dual, curvature)
        blocks = projection.weight.reshape(blocks.shape)
        dual += weights - blocks
        if iteration % _PERIOD == 0:
            marks = _marks(projection)
            share = float((marks != seen).float().mean())
            seen, settled = marks, share == 0
            factor = next(factor for least, factor in _GROWTH if share >= least)
            rho *= factor
            dual /= factor
    return Solution(_form_of(layer, projection, quadratic.target), iteration, settled)


def _marks(projection: Projection) -> Tensor:
    """What must come to rest: which weights are zero, and the signs of the others."""
    return torch.sign(projection.weight).to(torch.int8)


def _refined(quadratic: Quadratic, form: Form, turns: int) -> Form:
    """Exact fits and sweeps of signs in turn; never worse than the form that came in."""
    form = refit(quadratic, form)
    loss = quadratic.loss(form.matrix())
    for _ in range(turns if bool((form.types == UNIFIED).any()) else 0):
        swept, changed = choose_levels(quadratic, form)
        if not changed:
            break
        tried = refit(quadratic, swept)
        reached = quadratic.loss(tried.matrix())
        if reached >= loss:
            break
        gain, form, loss = 1 - reached / loss, tried, reached
        if gain < _LEAST_GAIN:
            break
    return form


def solve(layer: PlannedLayer, quadratic: Quadratic, recipe: OneShotRecipe) -> Solution:
    """The blocks of ADMM, or the plain projection of the target where that is better, refined."""
    plain = projected(layer, quadratic.target, quadratic.diagonal)
    if not any(layer.counts) or not recipe.max_iterations:
        return Solution(_refined(quadratic, plain, recipe.sign_turns), 0, True)
    found = search(layer, quadratic, recipe)
    best = min(found.form, plain, key=lambda form: quadratic.loss(form.matrix()))
    return found._replace(form=_refined(quadratic, best, recipe.sign_turns))


def _best_step(form: Form, quadratic: Quadratic, steps: list[float], bits: tuple[int, int]) -> float:
    """Of every sixth step, those around the best, and the one that the weights alone ask for."""

    def loss(step: float) -> float:
        return quadratic.loss(_rounded(form, step, *bits).matrix())

    near = steps.index(min(steps[::6], key=loss))
    alone = choose_step_size(form.dense, form.magnitudes, form.types, form.block, *bits)
    return min([*steps[max(0, near - 5) : near + 6], alone], key=loss)


def _rounded(form: Form, step: float, weight_bits: int, magnitude_bits: int, stride: int = 1) -> Form:
    low, high = _multiples(weight_bits, stride)
    magnitudes = torch.round(form.magnitudes / step).clamp_(*magnitude_range(magnitude_bits)) * step
    dense = torch.round(form.dense / (stride * step)).clamp_(low, high) * (stride * step)
    return replace(form, magnitudes=magnitudes, dense=dense)


def _multiples(weight_bits: int, stride: int) -> tuple[int, int]:
    """The least and the greatest multiple of a stride among the integers of so many bits, in strides."""
    low, high = weight_range(weight_bits)
    return -(-low // stride), high // stride


def _coarser(form: Form, step: float, least_step: float, weight_bits: int) -> tuple[float, int]:
    """A step not below the given one, and how many of it the step of dense weights is: at least ``least_step`` altogether.

    A magnitude stands for all weights of its block, so its error counts so many times: its step is finer by up to the square
    root of their number, and dense weights, which add into the same accumulator, take every second, fourth, … multiple of it:
    as long as the bits reach the largest of them.
    """
    if least_step <= step:
        return step, 1
    stride = 1
    if bool((form.types == UNIFIED).any()):
        finer = min(math.sqrt(math.prod(form.block)), least_step / step)
        stride = 1 << int(math.log2(finer))
        largest = float(form.dense.abs().max()) / least_step
        while stride > 1 and round(largest) > _multiples(weight_bits, stride)[1]:
            stride //= 2
    return float(np.float32(least_step / stride)), stride


def quantized(
    layer: PlannedLayer,
    form: Form,
    quadratic: Quadratic | None,
    sign_turns: int = 1,
    *,
    least_step: float = 0.0,
) -> CompressedLayer:
    """The integers of a form; with a quadratic, signs and dense weights make up for what rounding changed.

    Dense weights are multiples of at least ``least_step`` (`compress.one_shot.steps`).
    """
    settings = layer.settings
    bits = settings.weight_bits, settings.magnitude_bits
    layer_of = form.dense, form.magnitudes, form.types, settings.block
    if quadratic is None:
        step = choose_step_size(*layer_of, *bits)
    else:
        # By what the outputs lose: a few outliers that meet large inputs may matter more than the precision of all others.
        step = _best_step(form, quadratic, candidate_steps(*layer_of, *bits), bits)
    step, stride = _coarser(form, step, least_step, bits[0])
    form = _rounded(form, step, *bits, stride)
    for _ in range(sign_turns if quadratic is not None else 0):
        assert quadratic is not None
        form, changed = choose_levels(quadratic, form, (stride * step, *_multiples(bits[0], stride)))
        if not changed:
            break
    integers = quantize_blocks(
        form.dense, form.signs < 0, form.magnitudes, form.types, settings.block, step, *bits
    )
    return CompressedLayer(
        layer.name, settings.block, settings.column_order, form.types.cpu().numpy(), integers
    )
