"""The rival of co-design: the same ratios in every layer, on the machine that suits them best.

It chooses from the same machines, block shapes and weights, by the same damage and within the same goal: machine, one block
shape for all layers, one share of dense blocks, and the share of pruned blocks to half a percent. What it may not do is treat
layers differently, but for leaving the first and the last one dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from compress.admm import project_layer
from compress.rules import CompressionConfig, Plan, plan_layers
from hwsim.errors import InputError, Problem
from hwsim.machine import Machine
from sweeps.codesign.alternation import Bench, Figures, Network, cheapest
from sweeps.codesign.settings import CoDesignSpace, Goal

__all__ = ["UniformChoice", "best_uniform"]

_DENSE_SHARES = 0.0, 0.05, 0.1, 0.25, 0.5
_STEPS = 200
"""Shares of pruned blocks are multiples of 1/200."""


@dataclass(frozen=True, eq=False)
class UniformChoice:
    """Ratios for all layers, and the machine that runs them at least cost.

    Attributes
    ----------
    config : CompressionConfig
    machine : Machine
    damage : float
        ``Σ −ln(share of energy kept)``.
    figures : Figures
        With the blocks of the first projection.
    """

    config: CompressionConfig
    machine: Machine
    damage: float
    figures: Figures


def best_uniform(
    network: Network,
    space: CoDesignSpace,
    goal: Goal,
    *,
    exempt_first_last: bool,
    progress: Callable[[int, int], None] | None = None,
) -> UniformChoice:
    """Uniform ratios of the least damage within a goal.

    Parameters
    ----------
    network : Network
    space : CoDesignSpace
    goal : Goal
    exempt_first_last : bool
        Whether the first and the last layer stay dense.
    progress : callable, optional
        Called with the kinds of ratios that are done and their number.

    Raises
    ------
    InputError
        No uniform ratios reach it on any machine of the space.
    """
    machines, _ = space.machines()
    bench = Bench(network, machines)
    found: list[UniformChoice] = []
    kinds = [(shape, dense) for shape in space.shapes for dense in _DENSE_SHARES]
    for done, (shape, dense) in enumerate(kinds):
        if progress is not None:
            progress(done, len(kinds))
        choice = _most_kept(bench, space, goal, shape, dense, exempt_first_last)
        if choice is not None:
            found.append(choice)
    if progress is not None:
        progress(len(kinds), len(kinds))
    if not found:
        raise InputError("uniform ratios", Problem(goal.quantity, f"{goal.limit:,.10g} cannot be reached"))
    return min(found, key=lambda choice: choice.damage)


def _most_kept(
    bench: Bench, space: CoDesignSpace, goal: Goal, shape: tuple[int, int], dense: float, exempt: bool
) -> UniformChoice | None:
    """The smallest share of pruned blocks with which some machine keeps the goal, by bisection."""

    def at(step: int) -> UniformChoice | None:
        pruned = step / _STEPS
        config = CompressionConfig(
            block=shape,
            pruned=pruned,
            unified=round(1 - dense - pruned, 6),
            projection=space.training.projection,
            weight_bits=space.machine.base.precision.weight_bits,
            magnitude_bits=space.machine.base.precision.magnitude_bits,
            exempt_first_last=exempt,
        )
        plan = plan_layers(bench.network.model, config)
        figures = bench.measure_plan(plan)
        best = cheapest(figures, goal, space.constraints.limits(), bound=goal.limit)
        if best is None:
            return None
        own = figures[best]
        assert own is not None  # it was the cheapest
        return UniformChoice(config, bench.machines[best], _damage(bench.network, plan), own)

    low, high = -1, math.floor((1 - dense) * _STEPS + 1e-9)
    reached = at(high)
    if reached is None:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        choice = at(middle)
        if choice is None:
            low = middle
        else:
            high, reached = middle, choice
    return reached


def _damage(network: Network, plan: Plan) -> float:
    """``Σ −ln(share of energy kept)`` of a plan by ratios, over the layers that it compresses."""
    total = 0.0
    for layer in plan.layers:
        if layer.counts == (0, 0):
            continue
        weight = layer.module.get_parameter("weight").detach()
        h = network.curvature.get(layer.name)
        energy = float((weight.double().square() * (1.0 if h is None else h.double())).sum())
        kept = 1 - project_layer(layer, weight, h).cost / energy
        total += -math.log(kept) if kept > 0 else math.inf
    return total
