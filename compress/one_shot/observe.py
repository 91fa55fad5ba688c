"""The layers in order of execution, and what reaches each of them in the compressed and in the original network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Self

import torch
from torch import Tensor, nn

from compress.curvature import Moments, column_permutation, in_chunks, is_observable, listening
from compress.norms import NORMS
from compress.rules import Plan, PlannedLayer
from hwsim.errors import InputError, Problem

__all__ = ["Observed", "Observer", "Step", "execution"]

MAX_HESSIAN_ENTRIES = 1 << 28
"""Of one layer, all groups together: 2 GiB in float64; some four times as much is needed at once."""

MAX_HELD_BYTES = 1 << 28
"""Inputs of the original network that are held for the layers to come."""


@dataclass(frozen=True, eq=False)
class Step:
    """A layer, how often a forward pass runs it, and the batch normalisation that reads its outputs, if it is the only one.

    ``uses`` is 0 where the layer cannot be observed; ``reason`` then says why. Steps of one ``source`` see the same inputs, as
    query, key and value of an attention do.
    """

    layer: PlannedLayer
    uses: int
    norm: nn.Module | None
    reason: str = ""
    source: tuple[int, int] | None = None


def execution(model: nn.Module, plan: Plan, sample: Tensor) -> list[Step]:
    """The layers in order of their first use; those that do not run, or cannot be observed, come last."""
    uses: dict[str, int] = {}
    norms: dict[str, nn.Module] = {}
    outputs: list[tuple[str, Tensor]] = []
    # Held, so that no other tensor gets the identity of one; the version tells what was changed in place.
    sources: dict[str, list[tuple[Tensor, int]]] = {}
    seen = {layer.name: layer.module for layer in plan.layers if is_observable(layer.module)}
    followers = {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}

    def ran(name: str, module: nn.Module, inputs: Tensor, out: Tensor) -> None:
        if name in seen and module is seen[name]:
            uses[name] = uses.get(name, 0) + 1
            outputs.append((name, out))
            sources.setdefault(name, []).append((inputs, inputs._version))
        elif isinstance(module, NORMS) and module.track_running_stats:
            norms.update({layer: module for layer, held in outputs if held is inputs})

    with listening(seen | followers, ran):
        model(sample[:2])
    readers = [id(module) for module in norms.values()]
    steps = {}
    for layer in plan.layers:
        norm = norms.get(layer.name)
        # Statistics shared by several layers, or a layer with several outputs, have no single shift.
        alone = norm is not None and readers.count(id(norm)) == 1 and uses[layer.name] == 1
        reason = "it never runs" if is_observable(layer.module) else "its inputs cannot be observed"
        read = [(id(held), version) for held, version in sources.get(layer.name, [])]
        # Other than a Linear, a layer cuts its inputs up in its own way.
        is_plain = len(read) == 1 and isinstance(layer.module, nn.Linear) and not alone
        source = read[0] if is_plain else None
        steps[layer.name] = Step(layer, uses.get(layer.name, 0), norm if alone else None, reason, source)
    return [steps[name] for name in uses] + [step for step in steps.values() if not step.uses]


class _Enough(Exception):
    """Ends a forward pass after the layer that is looked at."""


@contextmanager
def _held_inputs(step: Step, name: str, model: nn.Module) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """A function that gives the inputs of all uses of a layer for one batch, and runs the network no further."""
    held: list[Tensor] = []

    def keep(_name: str, _module: nn.Module, inputs: Tensor, _outputs: Tensor) -> None:
        held.append(inputs)
        if len(held) == step.uses:
            raise _Enough

    def run(batch: Tensor) -> list[Tensor]:
        held.clear()
        with suppress(_Enough):
            model(batch)
        return list(held)

    with listening({name: model.get_submodule(name)}, keep):
        yield run


_LEAST_VARIANCE = 1e-6
"""Share of its mean square below which an input counts as constant: sums of products in float32 tell no less, and what their
rounding leaves may be negative."""


@dataclass(eq=False)
class _OriginalInputs:
    """What reaches the layers of the original network, which does not change: one pass serves several layers."""

    model: nn.Module
    steps: Sequence[Step]
    batches: Sequence[Tensor]
    held: dict[str, list[list[Tensor]]] = field(default_factory=dict)

    def take(self, step: Step) -> list[list[Tensor]]:
        """Inputs of all uses of a layer, batch by batch; they are let go here."""
        if step.layer.name not in self.held:
            self.held = {}
            uses, limit = self._ahead(step), MAX_HELD_BYTES / len(self.batches)
            for batch in self.batches:
                found = self._inputs(batch, uses, step.layer.name, limit)
                # What the first batch has room for is kept of the others.
                uses, limit = {name: uses[name] for name in found}, math.inf
                for name, inputs in found.items():
                    self.held.setdefault(name, []).append(inputs)
        return self.held.pop(step.layer.name)

    def _ahead(self, first: Step) -> dict[str, int]:
        """Uses of this layer and of those behind it; of layers that see the same, one will be asked for."""
        sources, uses = set(), {}
        start = [step.layer.name for step in self.steps].index(first.layer.name)
        for step in self.steps[start:]:
            if step.uses and (step.source is None or step.source not in sources):
                uses[step.layer.name] = step.uses
                sources.add(step.source)
        return uses

    def _inputs(
        self, batch: Tensor, uses: Mapping[str, int], needed: str, limit: float
    ) -> dict[str, list[Tensor]]:
        """Inputs of a batch up to so many bytes, but of ``needed`` in any case."""
        found: dict[str, list[Tensor]] = {name: [] for name in uses}
        held_bytes, missing = 0, sum(uses.values())

        def keep(name: str, _module: nn.Module, inputs: Tensor, _outputs: Tensor) -> None:
            nonlocal held_bytes, missing
            found[name].append(inputs.clone())  # what follows may change them in place
            held_bytes, missing = held_bytes + inputs.nbytes, missing - 1
            is_full = held_bytes > limit and len(found[needed]) == uses[needed]
            if is_full or not missing:
                raise _Enough

        with listening({name: self.model.get_submodule(name) for name in uses}, keep), suppress(_Enough):
            self.model(batch)
        return {name: inputs for name, inputs in found.items() if len(inputs) == uses[name] or name == needed}


@dataclass(frozen=True, eq=False)
class Observed:
    """Means over all positions that reached a layer, columns in the order of the block view.

    Attributes
    ----------
    products : float64 Tensor ``[groups, k, k]``
        ``x·xᵀ`` of the inputs of the compressed network.
    cross : float64 Tensor ``[groups, k, k]`` or None
        ``x·zᵀ`` with the inputs z of the original network.
    mean, wanted_mean : float64 Tensor ``[groups, k]``
        Of x, and of the inputs whose outputs are wanted.
    wanted_variance : float64 Tensor ``[groups, m]``
        Of the wanted outputs.
    """

    products: Tensor
    cross: Tensor | None
    mean: Tensor
    wanted_mean: Tensor
    wanted_variance: Tensor

    def centred(self) -> Observed:
        """Without what a bias takes care of."""

        def outer(a: Tensor, b: Tensor) -> Tensor:
            return a[:, :, None] * b[:, None, :]

        products = self.products - outer(self.mean, self.mean)
        squares, variances = (values.diagonal(dim1=1, dim2=2) for values in (self.products, products))
        varies = (variances > _LEAST_VARIANCE * squares).to(products)
        products *= outer(varies, varies)
        cross = None
        if self.cross is not None:
            cross = (self.cross - outer(self.mean, self.wanted_mean)) * varies[:, :, None]
        return replace(self, products=products, cross=cross)


def _observe(
    step: Step, model: nn.Module, original: _OriginalInputs | None, batches: Sequence[Tensor], weight: Tensor
) -> Observed:
    layer = step.layer
    entries = layer.groups * layer.k**2
    if entries > MAX_HESSIAN_ENTRIES:
        message = f"{layer.k} inputs per output: their Hessian takes {8 * entries / 2**30:.1f} GiB"
        raise InputError(
            f"layer {layer.name}", Problem("weight", message, "leave it out by a rule with exempt = true")
        )
    columns = column_permutation(layer.weight_shape, layer.settings.column_order).to(weight.device)
    moments, wanted = Moments.zeros(layer, full=True), Moments.zeros(layer, full=False)
    is_crossed = original is not None
    cross = torch.zeros_like(moments.second) if is_crossed else None
    squares = torch.zeros(layer.groups, layer.m, dtype=torch.float64, device=weight.device)
    aims = repeat(None) if original is None else original.take(step)
    with _held_inputs(step, layer.name, model) as inputs_of:
        for batch, wanted_inputs in zip(batches, aims, strict=original is not None):
            found = inputs_of(batch)
            for x, z in zip(found, wanted_inputs or found, strict=True):
                for part, aim in zip(in_chunks(layer.module, x), in_chunks(layer.module, z), strict=True):
                    rows = part.transpose(0, 1).flatten(1, 2)
                    moments.add_rows(rows)
                    goal = aim.transpose(0, 1).flatten(1, 2) if is_crossed else rows
                    wanted.first += goal.sum(dim=1)
                    if cross is not None:
                        cross += rows.mT @ goal
                    if step.norm is not None:
                        squares += (goal[:, :, columns] @ weight.float().mT).square().sum(dim=1)
    count = max(moments.positions, 1)
    products = (moments.second / count)[:, columns][:, :, columns]
    if not bool(torch.isfinite(products).all()):
        message = "the inputs that reach it are not finite"
        raise InputError("calibration", Problem(layer.name, message, "check weights and calibration inputs"))
    wanted_mean = wanted.first[:, columns] / count
    variance = squares / count - (weight @ wanted_mean[:, :, None])[:, :, 0].square()
    return Observed(
        products,
        None if cross is None else (cross / count)[:, columns][:, :, columns],
        moments.first[:, columns] / count,
        wanted_mean,
        variance,
    )


@dataclass(eq=False)
class Observer:
    """What reached each layer; what the last one saw is kept for the next that sees the same."""

    model: nn.Module
    original: _OriginalInputs | None
    batches: Sequence[Tensor]
    last: tuple[tuple[int, int] | None, Observed] | None = None

    @classmethod
    def of(
        cls, model: nn.Module, original: nn.Module, steps: Sequence[Step], batches: Sequence[Tensor]
    ) -> Self:
        """``original`` may be the model itself: then its own inputs are wanted."""
        return cls(model, None if original is model else _OriginalInputs(original, steps, batches), batches)

    def look(self, step: Step, weight: Tensor) -> Observed:
        if self.last is None or step.source is None or self.last[0] != step.source:
            self.last = None  # one Hessian at a time
            self.last = step.source, _observe(step, self.model, self.original, self.batches, weight)
        return self.last[1]
