"""ADMM: pull the weights towards the compressed form while the user's own loop trains the network.

``min f(W) + Σ_l ρ_l/2 · ‖W_l − Z_l + U_l‖²``: the optimizer moves W, `ADMM.step` sets ``Z = Π(W + U)`` with
types chosen anew and ``U += W − Z``.

Source: Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating Direction Method
of Multipliers" (2011), section 3; for weights: Zhang et al., "A Systematic DNN Weight Pruning Framework using
Alternating Direction Method of Multipliers", ECCV 2018.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor, nn

from compress.blocks import weight_to_matrix
from compress.parallel import ranks, unwrapped
from compress.projection import DIVERGED_HINT, Projection, block_costs, fill_blocks, project_to_counts
from compress.rules import CompressionConfig, Plan, PlannedLayer, plan_layers
from hwsim.errors import FormatError, InputError, Problem, nearest_name
from hwsim.layer import DENSE

__all__ = ["ADMM", "Residual", "UpdateResiduals", "project_layer", "project_to_types", "ramp_share"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Residual:
    """How far one layer was from its compressed form at one update.

    Attributes
    ----------
    layer : str
    update : int
        Counted from 1.
    rho : float
        The penalty in force before the update.
    primal : float
        ``‖W − Z‖ / ‖W‖``: what a projection at this moment would take away.
    dual : float
        ``ρ·‖Z − Z_old‖ / ‖W‖``: how far the target moved.
    type_changes : float
        Share of the blocks whose type changed.
    sign_flips : float
        Share of the weights whose target changed its sign.
    """

    layer: str
    update: int
    rho: float
    primal: float
    dual: float
    type_changes: float
    sign_flips: float


class UpdateResiduals(Sequence[Residual]):
    """The residuals of one update, one per layer; on an accelerator they are read when somebody looks, and not before.

    Reading raises `InputError` where the weights of a layer had become NaN or infinite on an accelerator; on the CPU the
    projection has said so already.
    """

    def __init__(
        self, update: int, layers: Sequence[PlannedLayer], rhos: Sequence[float], numbers: Tensor
    ) -> None:
        self._update = update
        self._layers = layers
        self._rhos = rhos
        self._numbers = numbers

    @cached_property
    def _values(self) -> list[Residual]:
        rows = self._numbers.tolist()
        problems = [
            Problem(layer.name, f"weights were NaN or infinite at update {self._update}", DIVERGED_HINT)
            for layer, row in zip(self._layers, rows, strict=True)
            if not all(map(math.isfinite, row))
        ]
        if problems:
            raise InputError("ADMM", problems)
        return [
            Residual(layer.name, self._update, rho, *row)
            for layer, rho, row in zip(self._layers, self._rhos, rows, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> Residual: ...

    @overload
    def __getitem__(self, index: slice) -> list[Residual]: ...

    def __getitem__(self, index: int | slice) -> Residual | list[Residual]:
        return self._values[index]


@dataclass(eq=False)
class _State:
    """The ADMM variables of one layer; ``pull = Z − U`` is what the penalty needs at every step."""

    layer: PlannedLayer
    weight: nn.Parameter
    curvature: Tensor | None
    rho: float
    target: Tensor
    dual: Tensor
    types: Tensor
    pull: Tensor


class _Penalty(torch.autograd.Function):
    """``Σ ρ/2 · Σ h·(W − pull)²`` with its gradient ``ρ·h·(W − pull)``: one pass forwards, one backwards."""

    @staticmethod
    def forward(ctx: Any, states: list[_State], *weights: Tensor) -> Tensor:
        value = weights[0].new_zeros(())
        gradients = []
        for state, weight in zip(states, weights, strict=True):
            difference = weight - state.pull
            gradient = difference if state.curvature is None else difference * state.curvature
            value.add_(torch.dot(difference.flatten(), gradient.flatten()), alpha=state.rho / 2)
            gradients.append(gradient)
        ctx.save_for_backward(*gradients)
        ctx.rhos = [state.rho for state in states]
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        # In float64 up to the last product, and never as a number of the host, which would wait for the device.
        factors = [(grad_output.double() * rho).to(grad_output.dtype) for rho in ctx.rhos]
        return None, *(g * factor for g, factor in zip(ctx.saved_tensors, factors, strict=True))


class ADMM:
    """Alternating direction method of multipliers for the compressed form of a network.

    Parameters
    ----------
    model : nn.Module
    config : CompressionConfig or Plan
    rho : float or mapping from layer name to float
        Penalty of the first update; of every compressed layer where it is a mapping.
    rho_growth : float
        Factor per update; the scaled dual shrinks by the same factor.
    rho_max : float
        Ceiling of the growth.
    ramp_updates : int
        Progressive ratios: the counts of pruned and of unified blocks grow over so many updates to their full number, fast
        at first (`ramp_share`). 0: full counts from the start.
    curvature : mapping from layer name to Tensor of the weight's shape, optional
        A diagonal ``h ≥ 0``; penalty and projection of that layer then use the norm ``Σ h·x²``.

    Attributes
    ----------
    model : nn.Module
    plan : Plan
    residuals : list of Residual
        One per layer and update; looking at it reads what an accelerator still holds.
    updates : int

    Raises
    ------
    InputError
        NaN or infinite weights, names that are no compressed layer, a ρ that is not positive.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> config = CompressionConfig(block=(2, 2), exempt_first_last=False)
    >>> admm = ADMM(model, config, rho=0.1)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    >>> for epoch in range(3):
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(1, 8)).square().mean() + admm.penalty()
    ...     loss.backward()
    ...     optimizer.step()
    ...     residuals = admm.step()
    >>> sorted(admm.finalize())
    ['0', '2']
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompressionConfig | Plan,
        *,
        rho: float | Mapping[str, float] = 3e-2,
        rho_growth: float = 1.3,
        rho_max: float = 1.0,
        ramp_updates: int = 0,
        curvature: Mapping[str, Tensor] | None = None,
    ) -> None:
        # The names of a network wrapped by DistributedDataParallel are those of what it wraps.
        self.model = model = unwrapped(model)
        self.plan = config if isinstance(config, Plan) else plan_layers(model, config)
        compressed = [layer for layer in self.plan.layers if sum(layer.counts)]
        rhos = dict(rho) if isinstance(rho, Mapping) else {layer.name: float(rho) for layer in compressed}
        curvature = dict(curvature or {})
        _check_settings(self.plan, compressed, rhos, rho_growth, rho_max, ramp_updates, curvature)
        self.rho_growth = rho_growth
        self.rho_max = rho_max
        self.ramp_updates = ramp_updates
        self.updates = 0
        self._history: list[Sequence[Residual]] = []
        self._states = [
            _start(layer, rhos[layer.name], curvature.get(layer.name), ramp_share(0, ramp_updates))
            for layer in compressed
        ]

    @property
    def rho(self) -> dict[str, float]:
        """The penalty in force, by layer."""
        return {state.layer.name: state.rho for state in self._states}

    @property
    def residuals(self) -> list[Residual]:
        """All residuals so far."""
        return [residual for update in self._history for residual in update]

    def penalty(self) -> Tensor:
        """``Σ_l ρ_l/2 · ‖W_l − Z_l + U_l‖²``, a scalar to add to the loss; differentiable once.

        Once per step of the optimizer: with accumulated gradients in one of the parts. Among processes whose gradients are
        averaged each adds all of it (the average of equal gradients is that gradient).
        """
        if not self._states:
            return torch.zeros(())
        penalty: Tensor = _Penalty.apply(self._states, *(state.weight for state in self._states))
        return penalty

    @torch.no_grad()
    def step(self) -> UpdateResiduals:
        """The dual update, called every epoch or every few thousand steps; restart the learning rate with it.

        Among several processes each calls it: from equal weights all make the same update, without communication.

        Returns
        -------
        sequence of Residual
            Of this update, one per layer; also appended to ``residuals``. On an accelerator nothing is read, and nobody
            waits, until it is looked at.

        Raises
        ------
        InputError
            Weights have become NaN or infinite; on an accelerator when the residuals are read.
        """
        self.updates += 1
        rhos = [state.rho for state in self._states]
        numbers = [self._update(state) for state in self._states]
        latest = UpdateResiduals(
            self.updates,
            [state.layer for state in self._states],
            rhos,
            torch.stack(numbers) if numbers else torch.zeros(0, 4),
        )
        self._history.append(latest)
        if _log.isEnabledFor(logging.DEBUG):
            for line in latest:
                _log.debug("%s", line)
        return latest

    def _update(self, state: _State) -> Tensor:
        """Float64 ``[4]``: primal, dual, type changes and sign flips, left on the device."""
        # One layout in memory for all ADMM variables, whatever the weight's: a resumed run adds in the same order.
        weight = state.weight.detach().contiguous()
        share = ramp_share(self.updates, self.ramp_updates)
        projection = project_layer(state.layer, weight + state.dual, state.curvature, share)
        target = projection.weight
        size = torch.linalg.vector_norm(weight).clamp_(min=torch.finfo(weight.dtype).tiny).double()
        scratch = torch.sub(target, state.target)
        moved = torch.linalg.vector_norm(scratch).double()
        flips = (torch.mul(target, state.target, out=scratch) < 0).float().mean().double()
        changes = (projection.types != state.types).float().mean().double()
        gap = torch.sub(weight, target, out=scratch)
        primal = torch.linalg.vector_norm(gap).double() / size
        numbers = torch.stack([primal, state.rho * moved / size, changes, flips])
        rho = max(state.rho, min(state.rho * self.rho_growth, self.rho_max))
        state.target, state.types = target, projection.types
        state.dual.add_(gap).mul_(state.rho / rho)
        state.rho = rho
        torch.sub(state.target, state.dual, out=state.pull)
        return numbers

    def warnings(self, tolerance: float = 0.1, type_tolerance: float = 0.02) -> list[str]:
        """What has not converged and what to change, one line per reason; empty where all is well.

        Parameters
        ----------
        tolerance : float
            Largest primal residual that passes.
        type_tolerance : float
            Largest share of block types that may still have changed at the last update.

        Notes
        -----
        A residual or a share equal to its tolerance passes. The projection takes ``primal²`` of a layer's energy away: 1 %
        at the default tolerance.
        """
        if self._states and not self.updates:
            return ["admm.step() was never called: the projection is one-shot, from unprepared weights"]
        lines = []
        if self._states and self.updates < self.ramp_updates:
            lines.append(
                f"only {self.updates} of the {self.ramp_updates} updates over which the ratios grow were made: the projection "
                "goes beyond what was trained for; lower ramp_updates, or train for more updates"
            )
        lines += [
            f"{state.layer.name}: its weight is frozen (requires_grad is False), so ADMM cannot move it: the projection takes "
            "it in one shot; exempt the layer by a rule, or train it"
            for state in self._states
            if not state.weight.requires_grad
        ]
        latest = self._history[-1] if self._history else ()
        apart = [last for last in latest if last.primal > tolerance]
        unsettled = [
            last for last in latest if last.primal <= tolerance and last.type_changes > type_tolerance
        ]
        if apart:
            layers = _worst([(last.primal, f"{last.layer} {last.primal:.2g}") for last in apart])
            lines.append(
                f"primal residual after {apart[0].update} updates above {tolerance:g} in {len(apart)} of {len(latest)} "
                f"layers ({layers}): the projection will move the weights by that share; raise rho "
                f"(now {apart[0].rho:.2g}), rho_growth (now {self.rho_growth:g}) or rho_max "
                f"(now {self.rho_max:g}), or train for more updates"
            )
        if unsettled:
            layers = _worst(
                [(last.type_changes, f"{last.layer} {last.type_changes:.1%}") for last in unsettled]
            )
            lines.append(
                f"block types that changed at the last of {unsettled[0].update} updates above {type_tolerance:.0%} in "
                f"{len(unsettled)} of {len(latest)} layers ({layers}): train for more updates, or raise rho "
                f"(now {unsettled[0].rho:.2g})"
            )
        return lines

    @torch.no_grad()
    def finalize(self) -> dict[str, Tensor]:
        """Project the weights for good, in place, and log what has not converged.

        Returns
        -------
        dict from layer name to uint8 Tensor ``[groups, Mb, Kb]``
            The frozen types of every layer of the plan, on the CPU; exempt layers are DENSE throughout.

        Raises
        ------
        InputError
            NaN or infinite weights.
        """
        for line in self.warnings() if ranks().is_main else ():
            _log.warning("%s", line)
        types = {
            layer.name: torch.full(layer.types_shape, DENSE, dtype=torch.uint8) for layer in self.plan.layers
        }
        for state in self._states:
            projection = project_layer(state.layer, state.weight, state.curvature)
            if not bool(torch.isfinite(projection.weight).all()):
                problem = Problem("weight", "holds NaN or infinite weights", DIVERGED_HINT)
                raise InputError(f"layer {state.layer.name}", problem)
            state.weight.copy_(projection.weight)
            types[state.layer.name] = projection.types.cpu()
        return types

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact resumption needs, flat and of tensors only, as safetensors takes it."""
        state = {"rho": torch.tensor([state.rho for state in self._states], dtype=torch.float64)}
        numbers = [astuple(residual)[1:] for residual in self.residuals]
        state["residuals"] = torch.tensor(numbers, dtype=torch.float64).reshape(
            self.updates, len(self._states), _RESIDUAL_NUMBERS
        )
        for item in self._states:
            for field in _STATE_TENSORS:
                state[f"{item.layer.name}.{field}"] = getattr(item, field).clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`; the model's own weights and the optimizer are restored by the caller.

        Raises
        ------
        FormatError
            Entries that are missing, unknown or of another shape, all of them named; nothing is changed then.
        """
        expected = {key: value for key, value in self.state_dict().items() if key != "residuals"}
        problems = [Problem(key, "missing") for key in sorted((set(expected) | {"residuals"}) - set(state))]
        for key, value in state.items():
            if key == "residuals":
                if value.dim() != 3 or tuple(value.shape[1:]) != (len(self._states), _RESIDUAL_NUMBERS):
                    problems.append(
                        Problem(
                            key,
                            f"shape {tuple(value.shape)}, expected [n, {len(self._states)}, {_RESIDUAL_NUMBERS}]",
                        )
                    )
            elif key not in expected:
                problems.append(Problem(key, "unknown entry", nearest_name(key, expected)))
            elif value.shape != expected[key].shape or value.dtype != expected[key].dtype:
                found, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (value, expected[key]))
                problems.append(
                    Problem(key, f"{found}, expected {wanted}", "was it another block or network?")
                )
        if problems:
            raise FormatError("ADMM state", problems)
        self.updates = state["residuals"].shape[0]
        self._history = [
            [
                Residual(item.layer.name, int(row[0]), *row[1:])
                for item, row in zip(self._states, update, strict=True)
            ]
            for update in state["residuals"].tolist()
        ]
        for item, rho in zip(self._states, state["rho"].tolist(), strict=True):
            for field in _STATE_TENSORS:
                setattr(item, field, state[f"{item.layer.name}.{field}"].to(item.weight.device, copy=True))
            item.rho = rho
            item.pull = item.target - item.dual


_STATE_TENSORS = ("target", "dual", "types")
_RESIDUAL_NUMBERS = 6


def ramp_share(update: int, ramp_updates: int) -> float:
    """Share of the full counts at an update: ``1 − (1 − (update + 1)/(ramp_updates + 1))³``, from 0 to ``ramp_updates``.

    Source: the cubic schedule of Zhu, Gupta, "To prune, or not to prune", arXiv 1710.01878 (2017), counted so that the
    start (update 0) already pulls somewhere.

    Examples
    --------
    >>> [round(ramp_share(update, 3), 3) for update in (0, 1, 2, 3, 4)]
    [0.578, 0.875, 0.984, 1.0, 1.0]
    """
    return 1.0 if update >= ramp_updates else 1 - (1 - (update + 1) / (ramp_updates + 1)) ** 3


def project_layer(
    layer: PlannedLayer, weight: Tensor, curvature: Tensor | None = None, share: float = 1.0
) -> Projection:
    """The projection of a weight by the plan of its layer; see `compress.projection.project_to_counts`.

    Parameters
    ----------
    layer : PlannedLayer
    weight : Tensor of the layer's weight shape
    curvature : Tensor of that shape, optional
    share : float
        Of the counts of pruned and unified blocks; rounded down, with balanced rows per row.
    """
    settings = layer.settings
    rows = layer.types_shape[0] * layer.types_shape[1] if settings.balanced_rows else 1
    return project_to_counts(
        weight,
        settings.block,
        *(rows * math.floor(share * (count // rows)) for count in layer.counts),
        groups=layer.groups,
        column_order=settings.column_order,
        method=settings.projection,
        balanced_rows=settings.balanced_rows,
        curvature=curvature,
        name=layer.name,
    )


@torch.no_grad()
def project_to_types(layer: PlannedLayer, types: Tensor) -> None:
    """Bring a layer's weight, in place, to the nearest one with these very types ``[groups, Mb, Kb]``."""
    settings, weight = layer.settings, layer.module.get_parameter("weight")
    matrix = weight_to_matrix(weight, layer.groups, settings.column_order)
    magnitude = block_costs(matrix, settings.block).magnitude
    types = types.to(weight.device)
    weight.copy_(fill_blocks(weight, types, magnitude, settings.block, layer.groups, settings.column_order))


def _start(layer: PlannedLayer, rho: float, curvature: Tensor | None, share: float) -> _State:
    weight = layer.module.get_parameter("weight")
    projection = project_layer(layer, weight, curvature, share)
    target = projection.weight
    if curvature is not None:
        curvature = curvature.detach().to(weight)
    dual, pull = torch.zeros_like(target), target.clone()
    return _State(layer, weight, curvature, rho, target, dual, projection.types, pull)


def _worst(layers: Sequence[tuple[float, str]], shown: int = 4) -> str:
    """The largest by name, and how many more."""
    texts = [text for _, text in sorted(layers, key=lambda layer: -layer[0])]
    more = [f"{len(texts) - shown} more"] if len(texts) > shown else []
    return ", ".join(texts[:shown] + more)


def _check_settings(
    plan: Plan,
    layers: list[PlannedLayer],
    rhos: dict[str, float],
    rho_growth: float,
    rho_max: float,
    ramp_updates: int,
    curvature: dict[str, Tensor],
) -> None:
    shapes = {layer.name: layer.weight_shape for layer in layers}
    # An allocation may leave a layer whole; its curvature does no harm.
    known = {layer.name: layer.weight_shape for layer in plan.layers}
    problems = [
        Problem(f"{field}.{name}", "no such compressed layer", nearest_name(name, names))
        for field, given, names in (("rho", rhos, shapes), ("curvature", curvature, known))
        for name in given
        if name not in names
    ]
    problems += [
        Problem(f"rho.{name}", "missing", "every compressed layer needs one")
        for name in shapes
        if name not in rhos
    ]
    problems += [
        Problem(f"rho.{name}", f"{rho}, must be positive and finite")
        for name, rho in rhos.items()
        if not 0 < rho < math.inf
    ]
    if not 1 <= rho_growth < math.inf:
        problems.append(Problem("rho_growth", f"{rho_growth}, must be at least 1 and finite"))
    if not 0 < rho_max < math.inf:
        problems.append(Problem("rho_max", f"{rho_max}, must be positive and finite"))
    if ramp_updates < 0:
        problems.append(Problem("ramp_updates", f"{ramp_updates}, must not be negative"))
    problems += [
        Problem(f"curvature.{name}", f"shape {tuple(h.shape)}, the weight has {known[name]}")
        for name, h in curvature.items()
        if name in known and tuple(h.shape) != known[name]
    ]
    if problems:
        raise InputError("ADMM", problems)
