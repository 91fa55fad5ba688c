"""How many blocks of each type every layer gets: by a ratio spread over the layers, or by a budget.

A ratio is spread uniformly, by the Erdős–Rényi rule, or by ranking the blocks of all layers together. A budget (bytes, cycles
or energy) decides the type of every block of every layer at the least total damage, and per layer the block shape. The result
is a `Plan` with exact counts; ADMM then chooses anew, at every projection, which blocks take which type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from compress.budget import Budget, CostFunction, as_budget
from compress.curvature import CurvatureKind, LossFunction, curvature
from compress.fill import LayerOption, UnreachableError, least_damage, option_of
from compress.projection import layer_costs
from compress.rules import Allocation, CompressionConfig, Plan, PlannedLayer, plan_layers
from hwsim.errors import InputError, Problem, nearest_name
from hwsim.layer import DENSE, PRUNED, UNIFIED

__all__ = ["AllocationMethod", "allocate", "budget_spent", "erdos_renyi_densities", "keep_within"]

AllocationMethod = Literal["uniform", "erdos-renyi", "magnitude", "fisher", "hessian"]
METHODS: tuple[AllocationMethod, ...] = get_args(AllocationMethod)

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]

_CALIBRATION_BATCH = 64

_TRIMS = 20
"""Most rounds in which final types are brought within a budget; one or two do."""


def allocate(
    model: nn.Module,
    data: Data | None = None,
    config: CompressionConfig | None = None,
    *,
    budget: Budget | str | None = None,
    method: AllocationMethod | None = None,
    blocks: Sequence[tuple[int, int]] = (),
    curvature_of: Mapping[str, Tensor] | None = None,
    loss_fn: LossFunction = functional.cross_entropy,
    input_shape: tuple[int, ...] | None = None,
) -> Plan:
    """Deal out block types over the layers of a network.

    Parameters
    ----------
    model : nn.Module
        Trained.
    data : (inputs, targets), or an iterable of such batches, optional
        Calibration samples: for "fisher" and "hessian", and to know the size of an input for budgets of a machine. A few
        hundred do.
    config : CompressionConfig, optional
        Without a budget, its ratios (and rules) give the totals of pruned and unified blocks that are spread over the layers;
        with one, only its other settings count. Exempt layers stay dense.
    budget : Budget or str, optional
        ``"image_bytes=40000"``, ``"latency_cycles=8000,machine=msa-16x16"``; see `compress.budget`.
    method : {"uniform", "erdos-renyi", "magnitude", "fisher", "hessian"}, optional
        With a budget, by what the energy of a block is weighted: the last three; "magnitude" (``Σ w²``) by default. Without
        one, "uniform" by default.
    blocks : sequence of (int, int)
        With a budget: block shapes from which each layer gets the best; by default that of its settings.
    curvature_of : mapping from layer name to Tensor of the weight's shape, optional
        A diagonal curvature of your own, in place of the method's.
    loss_fn : callable
        For "fisher".
    input_shape : tuple of int, optional
        Of one input, where there are no data.

    Returns
    -------
    Plan
        With `Plan.allocation` set; prints as a table.

    Raises
    ------
    InputError
        Arguments that do not go together, a budget where every layer is exempt, or one that cannot be met: with the demand,
        the smallest reachable figure and the gap.
    FitError
        A layer does not fit the budget's machine.

    Examples
    --------
    >>> network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    >>> config = CompressionConfig(exempt_first_last=False)
    >>> plan = allocate(network, None, config, budget="image_bytes=1500", input_shape=(64,))
    >>> 1490 < plan.allocation.reached <= 1500
    True
    """
    config = config or CompressionConfig()
    wanted = as_budget(budget)
    chosen: AllocationMethod = method or ("magnitude" if wanted is not None else "uniform")
    batches = _batches(data)
    _check_arguments(chosen, wanted, blocks, batches, curvature_of, input_shape)
    plan = plan_layers(model, config)
    # A budget takes the counts from nobody's ratios: only whether a layer is exempt matters.
    treated = [
        layer for layer in plan.layers if not layer.exempt and (wanted is not None or layer.counts != (0, 0))
    ]
    if wanted is not None and not treated:
        message = (
            f"{wanted.limit:,.10g}, but every layer is exempt and stays dense: there is nothing to deal out"
        )
        hint = "exempt_first_last = false (or --all-layers), or exempt = false in a rule"
        raise InputError("budget", Problem(wanted.quantity, message, hint))
    if not treated or (wanted is None and chosen == "uniform"):
        return replace(plan, allocation=Allocation(chosen))
    if wanted is None and chosen == "erdos-renyi":
        return replace(plan.with_counts(_erdos_renyi(treated)), allocation=Allocation(chosen))
    h = dict(curvature_of or {})
    if chosen in ("fisher", "hessian") and curvature_of is None:
        kind: CurvatureKind = "fisher" if chosen == "fisher" else "hessian"
        h = curvature(kind, model, treated, batches, loss_fn)
    if wanted is None:
        return replace(plan.with_counts(_ranked(treated, h)), allocation=Allocation(chosen))
    # Bytes of a file do not depend on the size of an input.
    shape = input_shape or (tuple(batches[0][0].shape[1:]) if batches else ())
    dtype = batches[0][0].dtype if batches else torch.float32
    return _within(wanted, chosen, model, plan, treated, blocks, h, shape, dtype)


def _batches(data: Data | None) -> list[tuple[Tensor, Tensor]]:
    if data is None:
        return []
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        inputs, targets = data
        parts = zip(inputs.split(_CALIBRATION_BATCH), targets.split(_CALIBRATION_BATCH), strict=True)  # type: ignore[union-attr]
        return list(parts)
    return list(data)  # type: ignore[arg-type]


def _check_arguments(
    method: AllocationMethod,
    budget: Budget | None,
    blocks: Sequence[tuple[int, int]],
    batches: list[tuple[Tensor, Tensor]],
    curvature_of: Mapping[str, Tensor] | None,
    input_shape: tuple[int, ...] | None,
) -> None:
    problems = []
    if method not in METHODS:
        problems.append(Problem("method", f'"{method}" is no allocation', nearest_name(method, METHODS)))
    elif budget is not None and method in ("uniform", "erdos-renyi"):
        problems.append(
            Problem(
                "method",
                f'"{method}" spreads a ratio; a budget weighs blocks',
                "magnitude, fisher",
            )
        )
    if method in ("fisher", "hessian") and not batches and curvature_of is None:
        problems.append(Problem("data", f'"{method}" needs calibration samples'))
    if budget is not None and budget.machine is not None and not batches and input_shape is None:
        problems.append(
            Problem("data", f"{budget.quantity} depends on the size of an input", "give input_shape")
        )
    if blocks and budget is None:
        problems.append(
            Problem("blocks", "several block shapes are chosen from by a budget only", "give one block")
        )
    if problems:
        raise InputError("allocation", problems)


# --- a ratio, spread over the layers


def erdos_renyi_densities(sizes: Sequence[tuple[int, ...]], kept: float) -> NDArray[np.float64]:
    """Share of weights that each layer keeps by the Erdős–Rényi rule.

    The density of a layer is ``min(1, ε·Σ sizes / Π sizes)``, with the ε for which all layers together keep ``kept``.

    Parameters
    ----------
    sizes : sequence of tuple of int
        Shapes of the weights: outputs, inputs, kernel.
    kept : float
        In [0, 1], of the weights of all layers.

    Notes
    -----
    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science", Nature Communications 2018; with kernels: Evci et al., "Rigging the Lottery", ICML 2020.

    Examples
    --------
    >>> erdos_renyi_densities([(10, 10), (100, 100)], 0.1).round(4).tolist()
    [0.9182, 0.0918]
    """
    raw = np.array([sum(size) / math.prod(size) for size in sizes])
    weights = np.array([math.prod(size) for size in sizes], np.float64)
    target = kept * weights.sum()
    full = np.zeros(len(raw), bool)
    while True:
        free = ~full
        if not free.any():
            return np.ones(len(raw))
        scale = (target - weights[full].sum()) / (raw[free] * weights[free]).sum()
        over = free & (scale * raw > 1)
        if not over.any():
            return np.where(full, 1.0, scale * raw)
        full |= over


def _erdos_renyi(layers: Sequence[PlannedLayer]) -> dict[str, tuple[int, int]]:
    """Counts by the Erdős–Rényi rule, with the totals that the ratios ask for."""
    totals = np.array([math.prod(layer.types_shape) for layer in layers])
    pruned, unified = (sum(layer.counts[i] for layer in layers) for i in (0, 1))
    executed = int(totals.sum()) - pruned
    kept = executed / int(totals.sum())
    densities = erdos_renyi_densities([layer.weight_shape for layer in layers], kept)
    # The rule keeps so many weights; blocks at ragged edges are smaller, so their number is met by rounding.
    shares = densities * totals
    shares *= executed / max(float(shares.sum()), 1e-300)
    kept_blocks = _round_to_sum(np.minimum(shares, 1.0 * totals), executed, np.minimum(totals, 1), totals)
    unified_blocks = _round_to_sum(
        kept_blocks * (unified / max(executed, 1)), unified, 0 * totals, kept_blocks
    )
    counts = zip(layers, totals - kept_blocks, unified_blocks, strict=True)
    return {layer.name: _balanced(layer, int(p), int(u)) for layer, p, u in counts}


def _round_to_sum(
    shares: NDArray[np.floating], total: int, least: NDArray[np.int64], most: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Integers nearest to the shares that sum to ``total``, within bounds: largest remainders first, ties by index."""
    whole = np.clip(np.floor(shares + 1e-9).astype(np.int64), least, most)
    order = np.argsort(-(shares - np.floor(shares)), kind="stable")
    step = 1 if whole.sum() < total else -1
    while whole.sum() != total:
        room = most - whole if step > 0 else whole - least
        movable = [i for i in order if room[i] > 0]
        if not movable:
            break  # fewer blocks kept than there are layers
        missing = abs(total - int(whole.sum()))
        for i in movable[:missing]:
            whole[i] += step
    return whole


def _balanced(layer: PlannedLayer, pruned: int, unified: int) -> tuple[int, int]:
    """Counts as they are, or with balanced rows the nearest that all block rows can share."""
    if not layer.settings.balanced_rows:
        return pruned, unified
    rows = layer.types_shape[0] * layer.types_shape[1]
    columns = layer.types_shape[2]
    has_dense = pruned + unified < rows * columns
    per_row = round(pruned / rows)
    if pruned < rows * columns:  # rounded up, all of the layer might go, and the network would be cut in two
        per_row = min(per_row, columns - 1)
    return rows * per_row, rows * (
        min(round(unified / rows), columns - per_row) if has_dense else columns - per_row
    )


def _ranked(layers: Sequence[PlannedLayer], h: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Counts by ranking the blocks of all layers together, with the totals that the ratios ask for.

    A block's score is its energy over that of all blocks of its layer that are at least as large. Pruning by it keeps, among
    all choices of so many blocks, the largest product of the layers' kept energies (see `compress.fill`).

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021.
    """
    pruned, unified = (sum(layer.counts[i] for layer in layers) for i in (0, 1))
    losses = [_losses(layer, h.get(layer.name)) for layer in layers]
    no_dense = all(sum(layer.counts) == math.prod(layer.types_shape) for layer in layers)
    energies = [prune - unify if no_dense else prune for prune, unify in losses]
    scores = np.concatenate([_scores(energy) for energy in energies])
    is_pruned = np.zeros(scores.size, bool)
    is_pruned[np.argsort(scores, kind="stable")[:pruned]] = True
    # Of what is left, those are unified that lose the smallest share of what their layer has.
    lost = np.concatenate([unify.ravel() for _, unify in losses])
    survivors = np.flatnonzero(~is_pruned)
    is_unified = np.zeros(scores.size, bool)
    is_unified[survivors[np.argsort(lost[survivors], kind="stable")[:unified]]] = True
    ends = np.cumsum([energy.size for energy in energies])[:-1]
    return {
        layer.name: _balanced(layer, int(p.sum()), int(u.sum()))
        for layer, p, u in zip(layers, np.split(is_pruned, ends), np.split(is_unified, ends), strict=True)
    }


def _scores(energy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each block's energy over that of all blocks that are at least as large (of equals, the lower index counts as larger)."""
    flat = energy.ravel()
    order = np.argsort(-flat, kind="stable")
    scores = np.empty_like(flat)
    scores[order] = flat[order] / np.maximum(np.cumsum(flat[order]), np.finfo(np.float64).tiny)
    return scores


def _losses(layer: PlannedLayer, h: Tensor | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What pruning and unifying each block loses: ``[groups, Mb, Kb]``, as shares of the layer's energy ``Σ h·w²``."""
    settings = layer.settings
    weight = layer.module.get_parameter("weight")
    costs = layer_costs(weight, settings.block, layer.groups, settings.column_order, h, layer.name)
    prune, unify = costs.prune.cpu().double().numpy(), costs.unify.cpu().double().numpy()
    total = max(float(prune.sum()), np.finfo(np.float64).tiny)
    return prune / total, unify / total


# --- a budget


def _within(
    budget: Budget,
    method: AllocationMethod,
    model: nn.Module,
    plan: Plan,
    treated: Sequence[PlannedLayer],
    blocks: Sequence[tuple[int, int]],
    h: Mapping[str, Tensor],
    input_shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Plan:
    cost = budget.cost_function(model, input_shape, dtype)
    fixed = budget.fixed_cost(model, plan.layers)
    names = {layer.name for layer in treated}
    exempt = {
        layer.name: cost(layer, np.full(layer.types_shape, DENSE, np.uint8))
        for layer in plan.layers
        if layer.name not in names
    }
    fixed += sum(exempt.values())
    options = [_options(layer, blocks, h.get(layer.name), cost) for layer in treated]
    found = least_damage(options, cost, fixed, budget.limit, budget.quantity)
    dealt = {choice.layer.name: choice for choice in found}
    layers = []
    spent: dict[str, dict[str, float]] = {
        name: {"cost": value, "energy_kept_percent": 100.0} for name, value in exempt.items()
    }
    for layer in plan.layers:
        if layer.name not in dealt:
            layers.append(layer)
            continue
        choice = dealt[layer.name]
        counts = np.bincount(choice.types.ravel(), minlength=3)
        layers.append(choice.layer.with_counts(int(counts[PRUNED]), int(counts[UNIFIED])))
        spent[layer.name] = {
            "cost": choice.cost,
            "energy_kept_percent": 100 * math.exp(-choice.damage),
        }
    allocation = Allocation(
        method,
        budget.quantity,
        budget.limit,
        fixed + sum(choice.cost for choice in found),
        budget.machine.name if budget.machine is not None else "",
        spent,
    )
    return replace(plan, layers=tuple(layers), allocation=allocation)


def budget_spent(
    budget: Budget,
    model: nn.Module,
    plan: Plan,
    types: Mapping[str, NDArray[np.uint8]],
    input_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> float:
    """What final block types cost in the quantity of a budget, measured as `allocate` did.

    Training moves the blocks of a plan about. Their counts stay, and with them bytes; cycles and energy also depend on how the
    blocks share rows and banks.
    """
    cost = budget.cost_function(model, input_shape, dtype)
    return budget.fixed_cost(model, plan.layers) + sum(
        cost(layer, types[layer.name]) for layer in plan.layers
    )


def keep_within(
    budget: Budget,
    model: nn.Module,
    plan: Plan,
    types: Mapping[str, Tensor],
    input_shape: tuple[int, ...],
) -> dict[str, Tensor]:
    """Final block types that keep the budget: as they are, or with the least valuable executed blocks stepped down.

    Where training moved blocks so that even a single executed block per layer costs more, types stay as they are: a training
    that is done is not refused. `budget_spent` says what they cost.

    Parameters
    ----------
    budget : Budget
    model : nn.Module
        With projected weights.
    plan : Plan
    types : mapping from layer name to uint8 Tensor ``[groups, Mb, Kb]``
    input_shape : tuple of int
        Of one input.

    Returns
    -------
    dict from layer name to uint8 Tensor
        Where those that came in are.
    """
    cost = budget.cost_function(model, input_shape)
    kept = {name: codes.cpu().numpy().copy() for name, codes in types.items()}
    treated = [layer for layer in plan.layers if not layer.exempt]
    fixed = budget.fixed_cost(model, plan.layers)
    fixed += sum(cost(layer, kept[layer.name]) for layer in plan.layers if layer.exempt)

    def excess() -> float:
        return fixed + sum(cost(layer, kept[layer.name]) for layer in treated) - budget.limit

    limit = budget.limit
    for _ in range(_TRIMS):
        if not treated or excess() <= 0:
            break
        options = [_options(layer, (), None, cost) for layer in treated]
        try:
            found = least_damage(options, cost, fixed, limit, budget.quantity)
        except UnreachableError as error:
            if error.smallest > budget.limit:
                break
            limit = error.smallest  # it was lowered too far
            found = least_damage(options, cost, fixed, limit, budget.quantity)
        for choice in found:
            # Blocks that are pruned have no energy left and are bought last: nothing is stepped up.
            kept[choice.layer.name] = np.minimum(kept[choice.layer.name], choice.types)
        limit -= max(excess(), 0.0)
    return {name: torch.from_numpy(codes).to(types[name].device) for name, codes in kept.items()}


def _options(
    layer: PlannedLayer, blocks: Sequence[tuple[int, int]], h: Tensor | None, cost: CostFunction
) -> list[LayerOption]:
    """The layer with each block shape that it may have."""
    options = []
    for block in dict.fromkeys(blocks or [layer.settings.block]):
        settings = layer.settings.model_copy(update={"block": block})
        shaped = replace(layer, settings=settings)
        options.append(option_of(shaped, *_losses(shaped, h), cost))
    return options
