"""The types of all blocks of all layers that keep the most of every layer's energy within a budget.

What is made least is the damage ``Σ −ln(kept energy / energy)`` over the layers, the energy of a layer being ``Σ h·w²``: so the
product of the shares that the layers keep is made greatest. (A plain sum of shares empties a large layer that small ones
outvote.) Every block can be bought up from PRUNED to UNIFIED to DENSE. Steps are taken in the order of damage removed per
cost, as one Lagrange multiplier for the whole network would choose: within a layer kept energy is concave in cost, and so is
its logarithm. Prices are linear; what has been spent is measured after, with the true cost, so the budget is kept to the last
unit.

Source: Lagrangian relaxation of discrete choices under one budget: Shoham, Gersho, "Efficient bit allocation for an arbitrary
set of quantizers", IEEE Trans. ASSP 1988. The order of the steps is that of the scores of Lee et al., "Layer-adaptive
Sparsity for the Magnitude-based Pruning", ICLR 2021, per cost; that they belong to this damage, and the steps of blocks, are
derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compress.budget import CostFunction, uniform_costs
from compress.rules import PlannedLayer
from hwsim.errors import InputError, Problem
from hwsim.layer import DENSE, PRUNED, UNIFIED

__all__ = ["Choice", "LayerOption", "UnreachableError", "least_damage", "option_of"]

_FAILURES = 100
"""Steps that did not fit any more, after which the rest of the budget is left."""

_TOGGLES = 16
"""Most layers for which it is tried whether they are better off without any DENSE block."""


class UnreachableError(InputError):
    """A budget that nothing meets: ``smallest`` is what the network costs with a single executed block per layer."""

    def __init__(self, problem: Problem, smallest: float) -> None:
        super().__init__("budget", problem)
        self.smallest = smallest

    def __reduce__(self) -> tuple[type[UnreachableError], tuple[Problem, float]]:  # type: ignore[override]
        return type(self), (self.problems[0], self.smallest)


@dataclass(frozen=True, eq=False)
class LayerOption:
    """A layer with one block shape: what its blocks lose, and what they cost.

    Attributes
    ----------
    layer : PlannedLayer
    prune, unify : float64 array ``[groups, Mb, Kb]``
        Energy that pruning and unifying each block loses; a dense one loses none.
    floor : float
        Cost with every block pruned.
    unify_price, dense_price : float
        What one unified and one dense block cost more, on average over a layer of nothing else.
    """

    layer: PlannedLayer
    prune: NDArray[np.float64]
    unify: NDArray[np.float64]
    floor: float
    unify_price: float
    dense_price: float

    @cached_property
    def energy(self) -> float:
        """``Σ h·w²`` in the unit of the damages."""
        return float(self.prune.sum())

    def value_at(self, multiplier: float) -> tuple[float, float]:
        """``(damage + multiplier · cost, cost)`` with the types that are best at this multiplier."""
        steps = self.steps
        taken = max(1, int(np.searchsorted(-steps.gain, -multiplier, side="right")))
        cost = self.floor + float(steps.price[:taken].sum())
        return _damage_of(float(steps.saved[:taken].sum()), self.energy) + multiplier * cost, cost

    @cached_property
    def steps(self) -> _Steps:
        """Steps up with every type allowed."""
        return _steps(self, has_dense=True)


def _damage_of(kept: float, energy: float) -> float:
    """``−ln(kept / energy)``; a layer without energy has none to lose."""
    return -math.log(min(kept / energy, 1.0)) if kept > 0 else 0.0 if energy == 0 else math.inf


@dataclass(frozen=True, eq=False)
class Choice:
    """A layer with its types, their cost, and the damage that they do (``−ln`` of the share of energy kept)."""

    layer: PlannedLayer
    types: NDArray[np.uint8]
    cost: float
    damage: float


def option_of(
    layer: PlannedLayer, prune: NDArray[np.float64], unify: NDArray[np.float64], cost: CostFunction
) -> LayerOption:
    """A layer with the prices of its blocks, from the costs of a layer of nothing but each type."""
    blocks = prune.size
    floor, unified, dense = uniform_costs(cost, layer)
    tiny = 1e-9 * max(floor, unified, dense, 1e-300)  # where memory bounds the time, blocks may be free
    prices = (max((each - floor) / blocks, tiny) for each in (unified, dense))
    return LayerOption(layer, prune, unify, floor, *prices)


def least_damage(
    options: Sequence[Sequence[LayerOption]], cost: CostFunction, fixed: float, limit: float, quantity: str
) -> list[Choice]:
    """One option per layer with types for all blocks: the least damage found at a measured total of at most ``limit``.

    Parameters
    ----------
    options : sequence of sequence of LayerOption
        Block shapes to choose from, per layer.
    cost : CostFunction
    fixed : float
        Cost of everything else.
    limit : float
    quantity : str
        Named in messages.

    Raises
    ------
    UnreachableError
        Even with one executed block per layer the budget is not met.
    """
    chosen = _choose_options(options, fixed, limit)
    reached = _solutions(chosen, cost, fixed, limit)
    if not reached:  # the shapes that linear prices choose are not always the ones that really cost least
        chosen = _cheapest(options, cost)
        reached = _solutions(chosen, cost, fixed, limit)
    if not reached:
        raise _unreachable(chosen, cost, fixed, limit, quantity)
    best = min(reached, key=_total_damage)
    # The first DENSE block of a layer makes all its type codes wider: few of them may not be worth it.
    mixed = [i for i, choice in enumerate(best) if (choice.types == DENSE).any()]
    for i in mixed if len(mixed) <= _TOGGLES else []:
        allowed = [(choice.types == DENSE).any() and j != i for j, choice in enumerate(best)]
        trial = _solve(chosen, allowed, cost, fixed, limit)
        if trial is not None and _total_damage(trial) < _total_damage(best):
            best = trial
    return best


def _solutions(
    chosen: Sequence[LayerOption], cost: CostFunction, fixed: float, limit: float
) -> list[list[Choice]]:
    """With DENSE blocks in every layer and in none, as far as the budget is met."""
    found = (_solve(chosen, [has_dense] * len(chosen), cost, fixed, limit) for has_dense in (True, False))
    return [choices for choices in found if choices is not None]


def _total_damage(choices: Sequence[Choice]) -> float:
    return sum(choice.damage for choice in choices)


def _choose_options(
    options: Sequence[Sequence[LayerOption]], fixed: float, limit: float
) -> list[LayerOption]:
    """The block shape of each layer that is best at the multiplier at which the budget is just met."""
    if all(len(each) == 1 for each in options):
        return [each[0] for each in options]
    low, high = 1e-30, 1e30
    for _ in range(80):
        middle = (low * high) ** 0.5
        spent = fixed + sum(min(option.value_at(middle) for option in each)[1] for each in options)
        low, high = (low, middle) if spent <= limit else (middle, high)
    return [min(each, key=lambda option: option.value_at(high)) for each in options]


def _cheapest(options: Sequence[Sequence[LayerOption]], cost: CostFunction) -> list[LayerOption]:
    """The block shape of each layer with which a single executed block costs least, measured."""
    return [min(each, key=lambda option: _Network([option], [False], cost).cost(0, 1)) for each in options]


@dataclass(frozen=True, eq=False)
class _Steps:
    """Steps up of one layer, in falling order of damage removed per cost.

    Attributes
    ----------
    gain : float64 array ``[steps]``
        Damage removed per cost; infinite for the first step, without which the layer would cut the network in two.
    saved, price : float64 array ``[steps]``
        Energy kept by the step, and what it costs.
    blocks : int64 array ``[steps, n]``
        Flat indices of the blocks that take the step together (one, or one per block row).
    codes : uint8 array ``[steps]``
        The type that they get.
    """

    gain: NDArray[np.float64]
    saved: NDArray[np.float64]
    price: NDArray[np.float64]
    blocks: NDArray[np.int64]
    codes: NDArray[np.uint8]

    @classmethod
    def in_order(
        cls,
        saved: NDArray[np.float64],
        price: NDArray[np.float64],
        blocks: NDArray[np.int64],
        codes: NDArray[np.uint8],
    ) -> _Steps:
        """Sorted by energy per cost, which is the order of damage per cost within a layer."""
        order = np.argsort(-saved / price, kind="stable")
        saved, price = saved[order], price[order]
        kept = np.cumsum(saved)
        gain = np.full(saved.size, np.inf)
        before = np.maximum(kept[:-1], np.finfo(np.float64).tiny)
        gain[1:] = np.log1p(saved[1:] / before) / price[1:]
        return cls(gain, saved, price, blocks[order], codes[order])


def _steps(option: LayerOption, has_dense: bool) -> _Steps:
    if option.layer.settings.balanced_rows:
        return _row_steps(option)
    prune, unify = option.prune.ravel(), option.unify.ravel()
    up, top = option.unify_price, option.dense_price
    index, first = np.arange(prune.size), prune - unify
    if not has_dense:
        return _Steps.in_order(
            first, np.full(prune.size, up), index[:, None], np.full(prune.size, UNIFIED, np.uint8)
        )
    # Where the second step is worth more per cost than the first, the hull goes straight to DENSE.
    direct = unify * up > first * (top - up) if top > up else np.ones(prune.size, bool)
    rest = ~direct
    saved = np.concatenate([np.where(direct, prune, first), unify[rest]])
    price = np.concatenate([np.where(direct, top, up), np.full(int(rest.sum()), top - up)])
    codes = np.concatenate([np.where(direct, DENSE, UNIFIED), np.full(int(rest.sum()), DENSE)]).astype(
        np.uint8
    )
    return _Steps.in_order(saved, price, np.concatenate([index, index[rest]])[:, None], codes)


def _row_steps(option: LayerOption) -> _Steps:
    """Balanced rows: the best block left of every block row at once. Such layers get no DENSE blocks."""
    columns = option.prune.shape[-1]
    saved = (option.prune - option.unify).reshape(-1, columns)
    order = np.argsort(-saved, axis=1, kind="stable")
    rows = np.arange(len(saved))[:, None]
    return _Steps.in_order(
        np.take_along_axis(saved, order, axis=1).sum(axis=0),
        np.full(columns, len(saved) * option.unify_price),
        (rows * columns + order).T.copy(),
        np.full(columns, UNIFIED, np.uint8),
    )


class _Network:
    """The steps of all layers in one order, and what a prefix of it costs."""

    def __init__(self, options: Sequence[LayerOption], allowed: Sequence[bool], cost: CostFunction) -> None:
        self.options = options
        self._cost = cost
        self._steps = [
            option.steps if dense else _steps(option, False)
            for option, dense in zip(options, allowed, strict=True)
        ]
        gains = [steps.gain for steps in self._steps]
        layer = np.repeat(np.arange(len(gains)), [gain.size for gain in gains])
        order = np.argsort(-np.concatenate(gains), kind="stable")
        self.layer_of = layer[order]
        self._known: dict[tuple[int, int], float] = {}

    @cached_property
    def _taken(self) -> list[NDArray[np.int64]]:
        """Per layer the places of its steps in the common order."""
        return [np.flatnonzero(self.layer_of == i) for i in range(len(self.options))]

    def counts(self, prefix: int) -> list[int]:
        """How many steps of each layer lie in a prefix."""
        return [int(np.searchsorted(places, prefix)) for places in self._taken]

    def types(self, layer: int, steps: int) -> NDArray[np.uint8]:
        """Block types of a layer after its first steps."""
        option, all_steps = self.options[layer], self._steps[layer]
        types = np.full(option.prune.size, PRUNED, np.uint8)
        for code in (UNIFIED, DENSE):
            types[all_steps.blocks[:steps][all_steps.codes[:steps] == code].ravel()] = code
        return types.reshape(option.prune.shape)

    def cost(self, layer: int, steps: int) -> float:
        """Measured cost of a layer after its first steps."""
        key = layer, steps
        if key not in self._known:
            self._known[key] = self._cost(self.options[layer].layer, self.types(*key))
        return self._known[key]

    def total(self, counts: Sequence[int]) -> float:
        """Measured cost of all layers."""
        return sum(self.cost(layer, steps) for layer, steps in enumerate(counts))

    def choice(self, layer: int, steps: int) -> Choice:
        """A layer after its first steps."""
        option, types = self.options[layer], self.types(layer, steps)
        lost = float(option.prune[types == PRUNED].sum() + option.unify[types == UNIFIED].sum())
        damage = _damage_of(option.energy - lost, option.energy)
        return Choice(option.layer, types, self.cost(layer, steps), damage)


def _solve(
    options: Sequence[LayerOption], allowed: Sequence[bool], cost: CostFunction, fixed: float, limit: float
) -> list[Choice] | None:
    """The longest prefix of the steps that the budget pays for, then every later step that still fits."""
    network = _Network(options, allowed, cost)
    low, high = len(options), len(network.layer_of)
    if fixed + network.total(network.counts(low)) > limit:
        return None
    if fixed + network.total(network.counts(high)) <= limit:
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if fixed + network.total(network.counts(middle)) <= limit else (low, middle)
        )
    counts = network.counts(low)
    total = fixed + network.total(counts)
    failures = 0
    stuck: set[int] = set()
    for layer in network.layer_of[low:].tolist():
        if layer in stuck:
            continue
        more = network.cost(layer, counts[layer] + 1) - network.cost(layer, counts[layer])
        if total + more <= limit:
            counts[layer] += 1
            total += more
        else:
            # Its next steps remove less damage and cost as much: nothing of this layer fits any more.
            stuck.add(layer)
            failures += 1
            if failures == _FAILURES or len(stuck) == len(options):
                break
    return [network.choice(layer, steps) for layer, steps in enumerate(counts)]


def _unreachable(
    chosen: Sequence[LayerOption], cost: CostFunction, fixed: float, limit: float, quantity: str
) -> UnreachableError:
    """Demand, smallest reachable figure, gap, and what would close it."""
    network = _Network(chosen, [False] * len(chosen), cost)
    smallest = fixed + network.total(network.counts(len(chosen)))
    message = (
        f"{limit:,.10g} cannot be reached: with a single executed block per layer the network still costs {smallest:,.10g}, "
        f"{smallest - limit:,.10g} more"
    )
    hint = "raise the budget, or use larger blocks"
    if fixed:
        hint += (
            f"; {fixed:,.10g} of it go to exempt layers and what no block type changes (exempt_first_last = false, or "
            "--all-layers, frees the first and last layer)"
        )
    return UnreachableError(Problem(quantity, message, hint), smallest)
