"""The alternation: the best plan for a machine, the best machine for that plan, until neither changes.

On one machine `compress.allocation.allocate` deals out block types and shapes at the least damage ``Σ −ln(energy kept)``
that the goal pays for. For that plan every machine of the space is simulated, and the one that spends least takes over; what it
saves, the next plan spends. A plan follows from its machine alone, so a machine that comes back is a fixed point or a cycle.

A plan for native blocks of one shape runs only on machines whose native block divides it, so the alternation cannot find its
way from small native blocks to larger ones: it is started once from every native block shape, and the best state seen wins.

Source: alternating minimisation (block coordinate descent), e.g. Bertsekas, "Nonlinear Programming", 2nd ed. 1999, section 2.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.admm import project_layer
from compress.allocation import allocate
from compress.rules import CompressionConfig, Plan, plan_layers
from compress.shapes import layer_shapes, module_name
from hwsim.errors import FitError, InputError, Problem
from hwsim.evaluate import Evaluator
from hwsim.layer import DENSE, Layer
from hwsim.machine import Machine
from sweeps.codesign.settings import CoDesignSpace, Goal, machine_label

__all__ = [
    "Alternation",
    "Bench",
    "Figures",
    "Network",
    "Step",
    "alternate",
    "cheapest",
    "compression_config",
    "exhaustive",
]

_MOST_STEPS = 50
"""Of one start; a space of so many machines that all take their turn has not been seen."""

_START_RATIOS = 0.75, 0.25
"""Pruned and unified share of the plan for which a start's first machine is chosen."""


def compression_config(space: CoDesignSpace, machine: Machine, **settings: Any) -> CompressionConfig:
    """Settings of a compression for a machine: its native block, its number formats."""
    return CompressionConfig(
        block=machine.array.block,
        projection=space.training.projection,
        weight_bits=machine.precision.weight_bits,
        magnitude_bits=machine.precision.magnitude_bits,
        exempt_first_last=space.training.exempt == "first_and_last",
        **settings,
    )


@dataclass(frozen=True, eq=False)
class Network:
    """What is compressed.

    Attributes
    ----------
    model : nn.Module
        Trained.
    input_shape : tuple of int
        Of one input.
    curvature : mapping from layer name to Tensor
        By which blocks are weighed; empty for their plain magnitudes.
    """

    model: nn.Module
    input_shape: tuple[int, ...]
    curvature: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """What layers cost on a machine, by the names of goals and constraints; ``error`` says where they do not fit."""

    values: dict[str, float]
    error: str | None = None

    def excess(self, limits: Mapping[str, float]) -> list[str]:
        """The limits that are not kept, in words."""
        return [
            f"{name} {self.values[name]:,.6g} of {limit:,.6g}"
            for name, limit in limits.items()
            if not self.values[name] <= limit
        ]


@dataclass(frozen=True, eq=False)
class Step:
    """One machine and the best plan for it.

    Attributes
    ----------
    start, number : int
        Which start of the alternation, and which step of it; both from 0.
    machine : Machine
    plan : Plan or None
        None where the goal cannot be reached on this machine, for the reason in ``problem``.
    damage : float
        ``Σ −ln(share of energy kept)`` over the layers; infinite without a plan.
    figures : Figures or None
        Of the plan on this machine, with the blocks that a first projection gives.
    problem : str
        Why the state cannot win; empty where it can.
    """

    start: int
    number: int
    machine: Machine
    plan: Plan | None
    damage: float
    figures: Figures | None
    problem: str = ""

    def row(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The step as plain values, units in the names."""
        row: dict[str, Any] = {
            "start": self.start,
            "step": self.number,
            "machine": machine_label(self.machine, names),
            "damage": self.damage if math.isfinite(self.damage) else None,
        }
        if self.plan is not None and self.plan.allocation is not None:
            row["reached"] = self.plan.allocation.reached
            row["blocks"] = " ".join(
                dict.fromkeys("x".join(map(str, layer.settings.block)) for layer in self.plan.layers)
            )
        if self.figures is not None:
            row |= self.figures.values
        return row | {"problem": self.problem}


@dataclass(frozen=True, eq=False)
class Alternation:
    """What an alternation saw.

    Attributes
    ----------
    steps : tuple of Step
    endings : tuple of str
        How each start ended, in words.
    best : Step
        The least damage; of equals what spends less.
    machines, refused : int
        Machines of the space, and combinations that are none.
    """

    steps: tuple[Step, ...]
    endings: tuple[str, ...]
    best: Step
    machines: int
    refused: int


class Bench:
    """Measures plans on the machines of a space; what it has found it keeps."""

    def __init__(self, network: Network, machines: Sequence[Machine]) -> None:
        self.network = network
        self.machines = machines
        self._shapes = layer_shapes(network.model, network.input_shape)
        self._evaluator = Evaluator()

    def layers(self, plan: Plan, block: tuple[int, int]) -> list[Layer] | None:
        """The layers of a plan as its first projection gives them; None where the native block does not divide them.

        What stays dense has no shape of its own and is cut as the machine wants it.
        """
        types: dict[str, tuple[tuple[int, int], NDArray[np.uint8]]] = {}
        for layer in plan.layers:
            shape = layer.settings.block
            if layer.counts == (0, 0):
                continue
            if shape[0] % block[0] or shape[1] % block[1]:
                return None
            projected = project_layer(layer, layer.module.get_parameter("weight"))
            types[layer.name] = shape, projected.types.cpu().numpy()
        found = []
        for shape_of in self._shapes:
            dense = np.full((shape_of.groups, *shape_of.blocks(block)), DENSE, np.uint8)
            found.append(Layer(shape_of, *types.get(module_name(shape_of.name), (block, dense))))
        return found

    def measure_plan(self, plan: Plan) -> list[Figures | None]:
        """Figures of a plan on every machine; None on those that cannot run its blocks."""
        cut = {block: self.layers(plan, block) for block in {m.array.block for m in self.machines}}
        found: list[Figures | None] = [None] * len(self.machines)
        for block, layers in cut.items():
            if layers is None:
                continue
            places = [i for i, machine in enumerate(self.machines) if machine.array.block == block]
            for place, figures in zip(
                places, self.measure(layers, [self.machines[i] for i in places]), strict=True
            ):
                found[place] = figures
        return found

    def measure(self, layers: Sequence[Layer], machines: Sequence[Machine]) -> list[Figures]:
        """Figures of layers on machines that can run their blocks."""
        results = self._evaluator.evaluate(layers, machines)
        columns = results.columns
        found = []
        for i, machine in enumerate(machines):
            cycles = float(columns["latency_cycles"][i])
            values = {
                "latency_us": cycles / machine.clock_mhz,
                "latency_cycles": cycles,
                "energy_pj": float(columns["energy_pj"][i]),
                "image_bytes": float(columns["image_bytes"][i]),
                "area_mm2": float(columns["area_mm2"][i]),
            }
            found.append(Figures(values, results.error[i]))
        return found


def cheapest(
    figures: Sequence[Figures | None], goal: Goal, limits: Mapping[str, float], *, bound: float = math.inf
) -> int | None:
    """The machine that spends least of the goal's objective within limits and ``bound``; ties by energy, area, order."""
    best: tuple[tuple[float, ...], int] | None = None
    for i, found in enumerate(figures):
        if found is None or found.error is not None or found.excess(limits):
            continue
        values = found.values
        if goal.quantity in values and values[goal.quantity] > bound:
            continue
        rank = values[goal.objective], values["energy_pj"], values["area_mm2"]
        if best is None or rank < best[0]:
            best = rank, i
    return None if best is None else best[1]


def alternate(
    network: Network,
    space: CoDesignSpace,
    goal: Goal,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Alternation:
    """Choose plan and machine together.

    Parameters
    ----------
    network : Network
    space : CoDesignSpace
    goal : Goal
    progress : callable, optional
        Called with the starts that are done and their number.

    Raises
    ------
    InputError
        The goal does not suit the space, no machine of it is within the area, or on none the goal can be reached: every
        problem is told.

    Notes
    -----
    Deterministic: nothing is drawn.
    """
    machines, refused = space.machines()
    problems = space.problems_with(goal)
    if not machines:
        shown = "; ".join(refused[:3]) + ("; …" if len(refused) > 3 else "")
        problems.append(Problem("machine", f"none of {len(refused)} combinations can be built: {shown}"))
    if problems:
        raise InputError("codesign", problems)
    search = _Search(network, space, goal, Bench(network, machines))
    starts = search.starts()
    endings = []
    for number, first in enumerate(starts):
        if progress is not None:
            progress(number, len(starts))
        endings.append(search.run(number, first))
    if progress is not None:
        progress(len(starts), len(starts))
    eligible = [step for step in search.steps if not step.problem]
    if not eligible:
        tried = {machine_label(step.machine, space.varied): step.problem for step in search.steps}
        raise InputError("codesign", [Problem(label, problem) for label, problem in tried.items()])
    return Alternation(
        tuple(search.steps), tuple(endings), min(eligible, key=search.rank), len(machines), len(refused)
    )


def exhaustive(network: Network, space: CoDesignSpace, goal: Goal) -> Step | None:
    """The least damage over a plan for every single machine of a space; None where none reaches the goal.

    What an alternation is measured against where there is time for it.
    """
    search = _Search(network, space, goal, Bench(network, space.machines()[0]))
    steps = [search.step(0, number, machine)[0] for number, machine in enumerate(search.bench.machines)]
    return min((step for step in steps if not step.problem), key=search.rank, default=None)


class _Search:
    """One alternation; ``steps`` grows."""

    def __init__(self, network: Network, space: CoDesignSpace, goal: Goal, bench: Bench) -> None:
        self.network = network
        self.space = space
        self.goal = goal
        self.bench = bench
        self.steps: list[Step] = []
        self._limits = space.constraints.limits()
        self._names = space.varied
        self._met: dict[Machine, int] = {}

    def rank(self, step: Step) -> tuple[float, ...]:
        """By what states are compared: damage first."""
        assert step.figures is not None  # eligible steps have them
        values = step.figures.values
        return step.damage, values[self.goal.objective], values["energy_pj"], values["area_mm2"]

    def starts(self) -> list[Machine]:
        """Per native block shape the machine that runs a plain plan of that shape at least cost."""
        found = []
        for block in dict.fromkeys(machine.array.block for machine in self.bench.machines):
            example = next(m for m in self.bench.machines if m.array.block == block)
            config = compression_config(
                self.space, example, pruned=_START_RATIOS[0], unified=_START_RATIOS[1]
            )
            figures = [
                each if machine.array.block == block else None
                for machine, each in zip(
                    self.bench.machines,
                    self.bench.measure_plan(plan_layers(self.network.model, config)),
                    strict=True,
                )
            ]
            best = cheapest(figures, self.goal, {})
            found.append(example if best is None else self.bench.machines[best])
        return found

    def run(self, start: int, machine: Machine) -> str:
        """One start, until neither plan nor machine changes; says how it ended."""
        own: dict[Machine, int] = {}
        for number in range(_MOST_STEPS):
            if machine in self._met and machine not in own:
                return f"joined start {self._met[machine]} at {machine_label(machine, self._names)}"
            if machine in own:
                period = number - own[machine]
                if period == 1:
                    return f"settled after {number} plans: neither plan nor machine changed any more"
                return f"came back after {number} plans: a cycle of {period}; the best state of it is kept"
            own[machine] = number
            self._met[machine] = start
            step, following = self.step(start, number, machine)
            self.steps.append(step)
            if following is None:
                return f"stopped: {step.problem}"
            machine = following
        return f"stopped after {_MOST_STEPS} plans; the best state is kept"

    def step(self, start: int, number: int, machine: Machine) -> tuple[Step, Machine | None]:
        """The plan for a machine, and the machine for the plan."""
        try:
            plan = allocate(
                self.network.model,
                None,
                compression_config(self.space, machine),
                budget=self.goal.budget(machine),
                method=self.space.weighing,
                blocks=self.space.shapes_for(machine),
                curvature_of=self.network.curvature,
                input_shape=self.network.input_shape,
            )
        except (InputError, FitError) as error:
            return Step(start, number, machine, None, math.inf, None, str(error)), None
        figures = self.bench.measure_plan(plan)
        own = figures[self.bench.machines.index(machine)]
        assert own is not None  # the shapes were chosen for its native block
        problem = own.error or "; ".join(own.excess(self._limits))
        step = Step(start, number, machine, plan, damage_of(plan), own, problem)
        best = cheapest(figures, self.goal, self._limits)
        # Where no machine keeps all limits with this plan, the alternation has nowhere to go.
        return step, None if best is None else self.bench.machines[best]


def damage_of(plan: Plan) -> float:
    """``Σ −ln(share of energy kept)`` over the layers of a plan that was dealt out by a budget."""
    assert plan.allocation is not None
    shares = [values["energy_kept_percent"] / 100 for values in plan.allocation.layers.values()]
    return sum(-math.log(share) if share > 0 else math.inf for share in shares)
