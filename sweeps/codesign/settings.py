"""What a co-design is asked for: a goal, and the space of machines and block shapes that it may choose from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from compress.budget import Budget, Quantity
from hwsim.errors import InputError, Problem, nearest_name
from hwsim.machine import Machine, validation_problems
from sweeps.space import Hold, MachineSpace, Training, machine_for_block, read_space_file

__all__ = [
    "CoDesignSpace",
    "Constraints",
    "Goal",
    "Weighing",
    "load_codesign_space",
    "machine_label",
    "parse_codesign_space",
    "parse_goal",
]

GoalQuantity = Literal["latency_us", "latency_cycles", "energy_pj", "image_bytes", "file_bytes"]
GOALS: tuple[GoalQuantity, ...] = get_args(GoalQuantity)

Weighing = Literal["magnitude", "fisher", "hessian"]
"""By what the energy of a block is weighted; see `compress.allocation.allocate`."""


@dataclass(frozen=True)
class Goal:
    """So much may be spent on one input; within it the network is to lose the least.

    Attributes
    ----------
    quantity : {"latency_us", "latency_cycles", "energy_pj", "image_bytes", "file_bytes"}
    limit : float
    """

    quantity: GoalQuantity
    limit: float

    def budget(self, machine: Machine) -> Budget:
        """The same on one machine, as `compress.budget` counts it; microseconds become its cycles."""
        if self.quantity == "file_bytes":
            return Budget("file_bytes", self.limit)
        if self.quantity == "latency_us":
            # A hair more than the product: 4.1 µs at 1,000 MHz are 4,100 cycles, not the 4,099.999… of binary fractions.
            return Budget("latency_cycles", math.floor(self.limit * machine.clock_mhz + 1e-6), machine)
        quantity: Quantity = self.quantity
        return Budget(quantity, self.limit, machine)

    @property
    def objective(self) -> str:
        """The figure in which machines are compared for one plan: the goal's own, or where bytes are limited the time."""
        return "energy_pj" if self.quantity == "energy_pj" else "latency_us"

    def __str__(self) -> str:
        return f"{self.quantity} ≤ {self.limit:,.10g}"


def parse_goal(text: str) -> Goal:
    """``"latency_us=4.5"`` as a `Goal`.

    Raises
    ------
    InputError
        An unknown quantity (with the nearest name), or a limit that is not a positive number.

    Examples
    --------
    >>> parse_goal("latency_us=4.5")
    Goal(quantity='latency_us', limit=4.5)
    """
    name, separator, value = (part.strip() for part in text.partition("="))
    problems = []
    if not separator:
        problems.append(Problem("", f'"{text}" is not NAME=LIMIT', 'as in "latency_us=4.5"'))
    elif name not in GOALS:
        problems.append(Problem(name, "no such quantity", nearest_name(name, GOALS)))
    try:
        limit = float(value) if separator else 1.0
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        problems.append(Problem(name, f'"{value}", must be a positive number'))
    if problems:
        raise InputError("budget", problems)
    return Goal(name, limit)  # type: ignore[arg-type]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Limit = Annotated[float, Field(gt=0)]

_LARGEST_BLOCK = 256


class Constraints(_Part):
    """What a machine must keep with the chosen plan, beside the goal; None: no limit.

    Attributes
    ----------
    area_mm2, energy_pj, latency_us, image_bytes : float or None
    """

    area_mm2: Limit | None = None
    energy_pj: Limit | None = None
    latency_us: Limit | None = None
    image_bytes: Limit | None = None

    def limits(self) -> dict[str, float]:
        """Those that are set, by name."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


def _shape(text: str) -> tuple[int, int]:
    sizes = [int(part) for part in text.split("x") if part.isascii() and part.isdigit()]
    if len(sizes) != 2 or text.count("x") != 1 or not all(1 <= size <= _LARGEST_BLOCK for size in sizes):
        raise ValueError(f'must be "OUTPUTSxREDUCTION", each 1 to {_LARGEST_BLOCK}, for example "4x4"')
    return sizes[0], sizes[1]


def _plain_shapes(texts: tuple[str, ...]) -> tuple[str, ...]:
    plain = tuple("x".join(map(str, _shape(text))) for text in texts)
    if not plain:
        raise ValueError("empty, at least one is needed")
    if repeated := [text for i, text in enumerate(plain) if text in plain[:i]]:
        raise ValueError(f"{repeated[0]} is listed twice, every value once")
    return plain


class CoDesignSpace(_Part):
    """Machines and block shapes to choose from, and how the winner is trained.

    Attributes
    ----------
    name : str
    blocks : tuple of str
        Block shapes ``"4x4"``: native ones of machines, and those that layers may get.
    hold : tuple of {"lanes", "area"}
        How the machine follows its native block (`sweeps.space.machine_for_block`).
    machine : MachineSpace
        Base and axes. Number formats cannot be axes, since what coarser ones cost is not known before the training.
    constraints : Constraints
    weighing : {"magnitude", "fisher", "hessian"}
    training : Training
        Of the winner; its ``projection`` and ``exempt`` hold for the plan too.

    Raises
    ------
    InputError
        With every problem found.

    Examples
    --------
    >>> space = CoDesignSpace(blocks=["4x4", "8x8"], machine={"base": "msa-16x16", "axes": {"array.columns": [8, 16]}})
    >>> len(space.machines()[0])
    4
    """

    name: Annotated[str, Field(min_length=1, max_length=200)] = "codesign"
    blocks: Annotated[tuple[str, ...], AfterValidator(_plain_shapes)]
    hold: Annotated[tuple[Hold, ...], Field(min_length=1)] = ("lanes",)
    machine: MachineSpace
    constraints: Constraints = Constraints()
    weighing: Weighing = "magnitude"
    training: Training = Training()

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InputError("codesign space", validation_problems(error, CoDesignSpace)) from None

    @field_validator("hold", mode="before")
    @classmethod
    def _one_word_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _formats_are_fixed(self) -> CoDesignSpace:
        problems = [
            Problem(
                f"machine.axes.{name}",
                "cannot be an axis of a co-design: what coarser numbers cost is known after the training only",
                "one co-design for each",
            )
            for name in self.machine.axes
            if name.startswith("precision.")
        ]
        if problems:
            raise InputError("codesign space", problems)
        return self

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The block shapes as numbers."""
        return tuple(_shape(text) for text in self.blocks)

    @property
    def varied(self) -> tuple[str, ...]:
        """The machine fields in which machines differ."""
        return tuple(name for name, values in self.machine.axes.items() if len(values) > 1)

    def shapes_for(self, machine: Machine) -> list[tuple[int, int]]:
        """The block shapes that a machine can run, its native one first."""
        native = machine.array.block
        shapes = [shape for shape in self.shapes if shape[0] % native[0] == 0 and shape[1] % native[1] == 0]
        return sorted(shapes, key=lambda shape: (shape != native, shape))

    def machines(self) -> tuple[list[Machine], list[str]]:
        """Every machine that there can be within the area, and why the others are not.

        Returns
        -------
        machines : list of Machine
            Native block outermost, then hold, then the axes; each once.
        refused : list of str
            One reason per combination that is no valid machine or too large.
        """
        from sweeps.batch import area_mm2

        found: dict[Machine, None] = {}
        refused = []
        names = tuple(self.machine.axes)
        limit_mm2 = self.constraints.area_mm2 or math.inf
        for block, hold in itertools.product(self.shapes, self.hold):
            for values in itertools.product(*self.machine.axes.values()):
                fields = dict(zip(names, values, strict=True))
                try:
                    changed = self.machine.base.with_fields(fields)
                    machine = machine_for_block(changed, block, hold, area_mm2)
                except InputError as error:
                    refused.append(str(error))
                    continue
                area = area_mm2(machine)
                if area > limit_mm2:
                    refused.append(
                        f"{machine_label(machine, self.varied)}: {area:.4g} mm², {area - limit_mm2:.3g} over the limit"
                    )
                else:
                    found[machine] = None
        return list(found), refused

    def problems_with(self, goal: Goal) -> list[Problem]:
        """What of a goal does not suit this space."""
        problems = []
        if goal.quantity == "latency_cycles" and "clock_mhz" in self.machine.axes:
            message = "cycles of machines with different clocks are different times"
            problems.append(Problem("budget", message, "give latency_us"))
        if goal.quantity in self.constraints.limits():
            problems.append(
                Problem(f"constraints.{goal.quantity}", "is limited by the budget already", "leave one out")
            )
        return problems


def machine_label(machine: Machine, names: tuple[str, ...]) -> str:
    """A machine of a space in a few words: native block, and the fields that vary.

    >>> from hwsim.machine import load_machine
    >>> machine_label(load_machine("msa-16x16"), ("array.rows",))
    '4x4 rows=16'
    """
    data = machine.model_dump(mode="json")

    def value(dotted: str) -> Any:
        part: Any = data
        for piece in dotted.split("."):
            part = part[piece]
        return part

    fields = [f"{name.rpartition('.')[2]}={value(name)}" for name in names]
    return " ".join(["x".join(map(str, machine.array.block)), *fields])


def parse_codesign_space(data: dict[str, Any], source: str) -> CoDesignSpace:
    """A space from the content of a file.

    Raises
    ------
    InputError
        With every problem found; ``source`` stands in front.
    """
    from compress.data import BY_NAME

    problems: list[Problem] = []
    space = None
    try:
        space = CoDesignSpace(**data)
    except InputError as error:
        problems += error.problems
    training = data.get("training")
    dataset = training.get("dataset") if isinstance(training, dict) else None
    if isinstance(dataset, str) and dataset not in BY_NAME:
        problems.append(
            Problem("training.dataset", f'unknown name "{dataset}"', nearest_name(dataset, BY_NAME))
        )
    if problems or space is None:
        raise InputError(source, problems)
    return space


def load_codesign_space(path: str | Path, training: Mapping[str, Any] | None = None) -> CoDesignSpace:
    """A space from a TOML file; the path of a machine file in it counts from the file's own folder.

    Parameters
    ----------
    path : str or Path
    training : mapping, optional
        Fields of its training that are to be others.

    Raises
    ------
    InputError
        The file cannot be read, is not TOML, or is not a valid space.
    """
    data = read_space_file(path)
    if training:
        stored = data.get("training", {})
        data["training"] = {**stored, **training} if isinstance(stored, dict) else stored
    return parse_codesign_space(data, str(path))
