"""What a budget is counted in, and what a layer with given block types costs in it.

A cost is a function of one layer of a plan and its block types; the total of a network is the sum over its layers and a fixed
part. Bytes of the memory image, cycles and energy are those of the simulator, to the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress.blocks import real_entries
from compress.rules import PlannedLayer
from compress.shapes import layer_shapes, module_name
from hwsim.energy import EventCounts, layer_energy
from hwsim.errors import FitError, InputError, Problem, nearest_name
from hwsim.layer import DENSE, PRUNED, UNIFIED, Layer, LayerShape
from hwsim.machine import Machine, load_machine
from hwsim.simulator import layer_events, run_layer
from hwsim.technology import load_technology

__all__ = [
    "Budget",
    "CostFunction",
    "FileRates",
    "LayerRates",
    "Quantity",
    "file_bytes",
    "machine_cost",
    "parse_budget",
    "type_entropy_bits",
]

Quantity = Literal["file_bytes", "image_bytes", "latency_cycles", "energy_pj"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

CostFunction = Callable[[PlannedLayer, NDArray[np.uint8]], float]
"""``cost(layer, types)``: of a planned layer (its settings give block shape and bits) with block types ``[groups, Mb, Kb]``."""

DEFAULT_MACHINE = "msa-16x16"
REQUANTIZER_BYTES = 7
"""Bias, scale and shift of one output channel in the file."""


@dataclass(frozen=True)
class LayerRates:
    """What the streams of a layer take in a file, per symbol.

    Attributes
    ----------
    type_share : float
        Bits of the types as a share of their entropy without contexts.
    magnitude_bits, dense_bits : float
        Of one shared magnitude, and of one dense weight.
    sign_bits : float
        Of one weight of a unified block; below 1 where magnitudes are 0 and have no signs.
    other_bytes : float
        Tables, checksums and requantiser.
    """

    type_share: float
    magnitude_bits: float
    dense_bits: float
    sign_bits: float
    other_bytes: float


@dataclass(frozen=True)
class FileRates:
    """What a file of a network takes, from one that was written: see `compress.file_budget.file_rates`.

    Attributes
    ----------
    layers : mapping of str to LayerRates
    fixed_bytes : float
        Header, biases and normalisation.
    """

    layers: Mapping[str, LayerRates]
    fixed_bytes: float


@dataclass(frozen=True)
class Budget:
    """So much of something may be spent on one input.

    Attributes
    ----------
    quantity : {"file_bytes", "image_bytes", "latency_cycles", "energy_pj"}
        file_bytes: with ``rates`` the whole file; without, an upper estimate of the streams and the float32 tensors.
        image_bytes: the memory images of all layers. latency_cycles, energy_pj: of the machine, with memory.
    limit : float
        Positive and finite.
    machine : Machine or None
        On which the last three are measured; None for the first.
    rates : FileRates or None
        For the first: bits per symbol as the codec needed them.

    Raises
    ------
    InputError
        An unknown quantity, a limit that is not positive and finite, a machine that is missing or makes no sense.
    """

    quantity: Quantity
    limit: float
    machine: Machine | None = None
    rates: FileRates | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.quantity not in QUANTITIES:
            message = f'"{self.quantity}" is no such quantity'
            problems.append(Problem("quantity", message, nearest_name(self.quantity, QUANTITIES)))
        elif self.quantity == "file_bytes" and self.machine is not None:
            problems.append(Problem("machine", "a file has the same bytes for every machine", "leave it out"))
        elif self.quantity != "file_bytes" and self.machine is None:
            # Without one, cost_function would count bytes of a file.
            message = f"{self.quantity} depends on the machine, and none is given"
            problems.append(Problem("machine", message, f'load_machine("{DEFAULT_MACHINE}")'))
        if not 0 < self.limit < math.inf:
            problems.append(Problem(self.quantity, f"{self.limit:,.10g}, must be a positive number"))
        if problems:
            raise InputError("budget", problems)

    def cost_function(
        self, model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> CostFunction:
        """The cost of a layer of this very model, with inputs of this shape and type, in the budget's quantity."""
        if self.machine is None:
            layers = {} if self.rates is None else self.rates.layers
            return lambda layer, types: file_bytes(layer, types, layers.get(layer.name))
        shapes: dict[str, list[LayerShape]] = {}
        for shape in layer_shapes(model, input_shape, dtype=dtype):
            shapes.setdefault(module_name(shape.name), []).append(shape)
        return machine_cost(self.machine, self.quantity, shapes)

    def fixed_cost(self, model: nn.Module, layers: Sequence[PlannedLayer]) -> float:
        """What no block type changes: in a file, all tensors but the layers' weights, in float32."""
        if self.quantity != "file_bytes":
            return 0.0
        if self.rates is not None:
            return self.rates.fixed_bytes
        held = {f"{layer.name}.weight" for layer in layers}
        return 4.0 * sum(values.numel() for name, values in model.state_dict().items() if name not in held)


def parse_budget(text: str) -> Budget:
    """``"image_bytes=40000"`` or ``"latency_cycles=8000,machine=msa-16x16"`` as a `Budget`.

    Raises
    ------
    InputError
        An unknown quantity or field (with the nearest name), a limit that is not a positive number, a machine that is not
        known or makes no sense for the quantity.

    Examples
    --------
    >>> parse_budget("file_bytes=30000").limit
    30000.0
    """
    fields: dict[str, str] = {}
    problems = []
    for part in text.split(","):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator or not value:
            problems.append(Problem(name, f'"{part.strip()}" is not NAME=VALUE'))
        elif name in fields:
            problems.append(Problem(name, "given twice"))
        elif name not in (*QUANTITIES, "machine"):
            problems.append(Problem(name, "no such quantity", nearest_name(name, (*QUANTITIES, "machine"))))
        fields[name] = value
    given = [name for name in QUANTITIES if name in fields]
    if not problems and len(given) != 1:
        problems.append(Problem("", f"must name one of {', '.join(QUANTITIES)}", 'as in "image_bytes=40000"'))
    if problems:
        raise InputError("budget", problems)
    quantity, machine = given[0], fields.get("machine")
    try:
        limit = float(fields[quantity])
    except ValueError:
        message = f'"{fields[quantity]}", must be a positive number'
        raise InputError("budget", Problem(quantity, message)) from None
    if quantity == "file_bytes" and machine is None:
        return Budget(quantity, limit)
    return Budget(quantity, limit, load_machine(machine or DEFAULT_MACHINE))


def machine_cost(
    machine: Machine, quantity: Quantity, shapes: Mapping[str, Sequence[LayerShape]]
) -> CostFunction:
    """Bytes, cycles or energy of a layer on a machine, as `hwsim.simulate` counts them.

    Parameters
    ----------
    machine : Machine
    quantity : {"image_bytes", "latency_cycles", "energy_pj"}
    shapes : mapping from module name to the layer shapes of its uses
        A module that runs twice costs twice; one that never runs costs nothing.
    """
    technology = load_technology(machine.technology.table)

    def cost(layer: PlannedLayer, types: NDArray[np.uint8]) -> float:
        total = 0.0
        for shape in shapes.get(layer.name, ()):
            try:
                run = run_layer(Layer(shape, layer.settings.block, types), machine)
            except FitError as error:
                raise FitError(f"layer {layer.name} on machine {machine.name}: {error}") from None
            if quantity == "image_bytes":
                total += run.sizes.total_bytes
            elif quantity == "latency_cycles":
                total += run.mapping.latency_cycles
            else:
                events = EventCounts(**layer_events(run, machine))
                total += float(layer_energy(events, machine, technology).sum())
        return total

    return cost


def file_bytes(layer: PlannedLayer, types: NDArray[np.uint8], rates: LayerRates | None = None) -> float:
    """Bytes of a layer in an entropy-coded file, additive over its blocks but for the entropy of their types.

    Without rates everything but the types is taken at its full width, of real weights only, with 7 bytes of requantiser per
    output channel: an upper estimate.

    Source: Shannon's entropy of the types without their neighbours' context.
    """
    settings = layer.settings
    rates = rates or LayerRates(
        1.0, settings.magnitude_bits, settings.weight_bits, 1.0, REQUANTIZER_BYTES * layer.weight_shape[0]
    )
    entries = np.broadcast_to(real_entries(layer.m, layer.k, settings.block).numpy(), types.shape)
    bits = rates.type_share * type_entropy_bits(types)
    bits += rates.sign_bits * int(entries[types == UNIFIED].sum())
    bits += rates.magnitude_bits * int((types == UNIFIED).sum())
    bits += rates.dense_bits * int(entries[types == DENSE].sum())
    return bits / 8 + rates.other_bytes


def type_entropy_bits(types: NDArray[np.uint8]) -> float:
    """Entropy of the block types of a layer, each independent of the others."""
    counts = np.bincount(types.ravel(), minlength=3)
    shares = counts[counts > 0] / types.size
    return -types.size * float((shares * np.log2(shares)).sum())


def uniform_costs(cost: CostFunction, layer: PlannedLayer) -> tuple[float, float, float]:
    """Cost of a layer all of whose blocks are pruned, unified, dense."""
    pruned, unified, dense = (
        cost(layer, np.full(layer.types_shape, code, np.uint8)) for code in (PRUNED, UNIFIED, DENSE)
    )
    return pruned, unified, dense


def as_budget(budget: Budget | str | None) -> Budget | None:
    """A budget as it is, or read from its text."""
    return parse_budget(budget) if isinstance(budget, str) else budget
