"""The description of an accelerator: what a machine file says, validated and frozen.

Units stand in the field names. Whatever the cycle model needs as integers is derived in `hwsim.lowering`, the only place
that converts units. Every problem of a file is reported at once, with the nearest valid name.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from fractions import Fraction
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hwsim.errors import InputError, Problem, nearest_name

__all__ = [
    "NO_FEATURES",
    "ActivationBuffer",
    "Array",
    "Dram",
    "Features",
    "FrontEnd",
    "Machine",
    "OperandStore",
    "Output",
    "Precision",
    "TechnologyChoice",
    "WeightMemories",
    "load_machine",
    "preset_names",
    "validation_problems",
]

MAX_ROWS = 4096
MAX_KIB = 2**20
Count = Annotated[int, Field(strict=True, ge=1, le=65536)]
Size = Annotated[float, Field(strict=True, gt=0, le=MAX_KIB)]
Rate = Annotated[float, Field(strict=True, gt=0, le=1e6)]
Switch = Annotated[bool, Field(strict=True)]


class _Part(BaseModel):
    """A part of the description: immutable, and a field that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Machines are keys of what is known of them, millions of times in a sweep: all values as one tuple compare and hash faster.
    @cached_property
    def identity(self) -> tuple[int, tuple[Any, ...]]:
        """Hash and values of the fields, nested as the parts are."""
        values = tuple(
            value.identity if isinstance(value, _Part) else value
            for value in map(self.__dict__.get, self._names())
        )
        return hash(values), values

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self is other or self.identity == other.identity

    def __hash__(self) -> int:
        return self.identity[0]

    def __copy__(self) -> Self:
        copied = super().__copy__()
        for name in (
            copied.__dict__.keys() - self._names()
        ):  # a copy is made to be changed: keep nothing that was worked out
            del copied.__dict__[name]
        return copied

    def __getstate__(self) -> dict[Any, Any]:
        # Hashes of text differ from process to process, so what was worked out stays behind.
        state = super().__getstate__()
        fields = {name: value for name, value in state["__dict__"].items() if name in self._names()}
        return state | {"__dict__": fields}

    @classmethod
    def _names(cls) -> dict[str, Any]:
        return cls.__pydantic_fields__


class Array(_Part):
    """The array of processing elements (PEs) and the lanes of one PE.

    Attributes
    ----------
    rows, columns : int
        PEs per column and per row of the array; a row works on one block row, a column on one output column.
    block : tuple of int
        ``(g_o, g_k)``, the native block: output channels × reduction positions.
    multipliers : int
        Multipliers of one PE.
    sign_adders : int
        Sign-controlled adders of one PE.
    """

    rows: Annotated[int, Field(strict=True, ge=1, le=MAX_ROWS)]
    columns: Annotated[int, Field(strict=True, ge=1, le=4096)]
    block: tuple[
        Annotated[int, Field(strict=True, ge=1, le=256)], Annotated[int, Field(strict=True, ge=1, le=256)]
    ]
    multipliers: Count
    sign_adders: Count


class FrontEnd(_Part):
    """The skip front end of a row: type codes looked at per cycle and entries of its queue."""

    skip_window: Annotated[int, Field(strict=True, ge=1, le=4096)]
    queue_depth: Annotated[int, Field(strict=True, ge=1, le=4096)]


class ActivationBuffer(_Part):
    """The buffer of raw input rows, double buffered; ``size_kib`` is the whole of it."""

    size_kib: Size


class OperandStore(_Part):
    """The words of the current column tile in ``banks`` banks; ``size_kib`` covers both halves."""

    banks: Annotated[int, Field(strict=True, ge=1, le=4096)]
    size_kib: Size
    fill_words_per_cycle: Count


class WeightMemories(_Part):
    """Ports in bits per row and cycle; sizes are totals over all rows."""

    dense_port_bits: Count
    sign_port_bits: Count
    type_kib: Size
    sign_kib: Size
    magnitude_kib: Size
    dense_kib: Size


class Output(_Part):
    """The drain port and the output buffer (double buffered; ``size_kib`` is the whole of it)."""

    words_per_cycle: Count
    size_kib: Size


class Precision(_Part):
    """Widths of the number formats in bits. Weights and activations are two's complement, magnitudes unsigned."""

    weight_bits: Annotated[int, Field(strict=True, ge=2, le=16)]
    magnitude_bits: Annotated[int, Field(strict=True, ge=1, le=16)]
    activation_bits: Annotated[int, Field(strict=True, ge=2, le=16)]
    accumulator_bits: Annotated[int, Field(strict=True, ge=8, le=62)]


class Dram(_Part):
    """One channel: bandwidth (1 GB = 10⁹ bytes), bytes of a burst, energy per transferred bit."""

    gb_per_s: Rate
    burst_bytes: Annotated[int, Field(strict=True, ge=1, le=65536)]
    pj_per_bit: Annotated[float, Field(strict=True, ge=0, le=1e4)]


class Features(_Part):
    """What the machine exploits. With both switches off it is a dense machine and keeps no type codes."""

    skip_pruned: Switch = True
    unified_path: Switch = True
    row_balance: Literal["none", "sorted"] = "none"


NO_FEATURES = Features(skip_pruned=False, unified_path=False, row_balance="none")
"""Of a dense machine: nothing is skipped, nothing unified, and rows that are alike need no order."""


class TechnologyChoice(_Part):
    """The table of energies and areas: a name that ships with hwsim, or the path of a TOML file."""

    table: str = "45nm-horowitz"


class Machine(_Part):
    """A validated accelerator. Build one with `load_machine`, or change one with `Machine.with_fields`.

    Examples
    --------
    >>> machine = load_machine("msa-16x16")
    >>> machine.array.rows, machine.array.block
    (16, (4, 4))
    >>> machine.with_fields({"array.rows": 32}).array.rows
    32
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    clock_mhz: Rate
    array: Array
    front_end: FrontEnd
    activation_buffer: ActivationBuffer
    operand_store: OperandStore
    weights: WeightMemories
    output: Output
    precision: Precision
    dram: Dram
    features: Features = Features()
    technology: TechnologyChoice = TechnologyChoice()

    @field_validator("clock_mhz", "dram", mode="after")
    @classmethod
    def _rate_is_a_short_decimal(cls, value: Any) -> Any:
        rate = value.gb_per_s if isinstance(value, Dram) else value
        if not _is_short_decimal(rate):
            raise ValueError(f"{rate} has more than six decimals; exact cycle counts need a short decimal")
        return value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Machine:
        problems = list(_cross_field_problems(self))
        if problems:
            raise InputError(f"machine {self.name}", problems)
        return self

    @property
    def word_bits(self) -> int:
        """Bits of one operand-store word: ``g_k × columns`` activations."""
        return self.array.block[1] * self.array.columns * self.precision.activation_bits

    @property
    def is_dense(self) -> bool:
        """Whether both features are off: every block runs as DENSE and there is no type stream."""
        return not (self.features.skip_pruned or self.features.unified_path)

    @property
    def load_bytes_per_cycle(self) -> int:
        """Bytes that the DRAM channel brings in a cycle, rounded up: the lanes of the load port."""
        return math.ceil(Fraction(str(self.dram.gb_per_s)) * 1000 / Fraction(str(self.clock_mhz)))

    def with_fields(self, changes: dict[str, Any]) -> Machine:
        """A copy with some fields changed; names are dotted (``"array.rows"``).

        Raises
        ------
        InputError
            A name is unknown (with the nearest one), or the result is not a valid machine.
        """
        # Parts that do not change are taken as they are, with what was worked out of them.
        data: dict[str, Any] = {name: getattr(self, name) for name in self._names()}
        problems = []
        for dotted, value in changes.items():
            name, _, leaf = dotted.partition(".")
            part = data.get(name)
            if isinstance(part, _Part):
                part = data[name] = part.model_dump(mode="json")
            if leaf and isinstance(part, dict) and leaf in part:
                part[leaf] = value
            elif not leaf and name in data and not isinstance(part, dict):
                data[name] = value
            else:
                problems.append(Problem(dotted, "no such field", nearest_name(dotted, self.field_names())))
        if problems:
            raise InputError(f"machine {self.name}", problems)
        return parse_machine(data, f"machine {self.name}")

    def without_features(self) -> Machine:
        """The dense machine with the same array (`NO_FEATURES`)."""
        return self.model_copy(update={"features": NO_FEATURES})

    @cached_property
    def logic_fields(self) -> tuple[Any, ...]:
        """What logic and wires depend on: everything but name, clock, DRAM, sizes of memories and the technology."""
        store, weights = self.operand_store, self.weights
        ports = (weights.dense_port_bits, weights.sign_port_bits, self.output.words_per_cycle)
        parts = (self.array, self.front_end, self.precision, self.features)
        return (*(part.identity for part in parts), store.banks, store.fill_words_per_cycle, *ports)

    @cached_property
    def static_fields(self) -> tuple[Any, ...]:
        """Everything but name, clock, DRAM and the technology."""
        parts = (self.activation_buffer, self.operand_store, self.weights, self.output)
        return (*self.logic_fields, *(part.identity for part in parts))

    @staticmethod
    def logic_fields_of(machine: Machine) -> tuple[Any, ...]:
        """`logic_fields` as a function, for `hwsim.kept.kept_by`."""
        return machine.logic_fields

    @staticmethod
    def static_fields_of(machine: Machine) -> tuple[Any, ...]:
        """`static_fields` as a function, for `hwsim.kept.kept_by`."""
        return machine.static_fields

    @classmethod
    def field_names(cls) -> list[str]:
        """Every field that `with_fields` accepts, dotted."""
        names = []
        for name, info in cls.model_fields.items():
            part = info.annotation
            if isinstance(part, type) and issubclass(part, _Part):
                names += [f"{name}.{field}" for field in part.model_fields]
            else:
                names.append(name)
        return names

    def to_json(self) -> str:
        """The resolved description as canonical JSON (sorted keys): stored with results and hashed."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{_lookup(self, name)}</td></tr>" for name in self.field_names()
        )
        return f"<table><caption>machine {self.name}</caption>{rows}</table>"


@lru_cache(maxsize=4096)
def _is_short_decimal(rate: float) -> bool:
    return Fraction(str(rate)).denominator <= 10**6


def _lookup(machine: Machine, dotted: str) -> Any:
    value: Any = machine
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _cross_field_problems(machine: Machine) -> list[Problem]:
    """What single fields cannot show: memories that hold less than one word or block."""
    problems = []
    for field in ("activation_buffer", "operand_store", "output"):
        size_kib = getattr(machine, field).size_kib
        if size_kib * 1024 != int(size_kib * 1024):
            problems.append(Problem(f"{field}.size_kib", f"{size_kib} KiB is not a whole number of bytes"))
    half_bits = int(machine.operand_store.size_kib * 1024) * 8 // 2
    if half_bits < machine.word_bits:
        problems.append(
            Problem(
                "operand_store.size_kib",
                f"half of {machine.operand_store.size_kib} KiB is {half_bits} bits, but one word "
                f"(block[1] × columns × activation_bits) has {machine.word_bits} bits: no pass can be fed",
                f"at least {-(-machine.word_bits * 2 // 8) / 1024} KiB",
            )
        )
    g_o, g_k = machine.array.block
    demand_bits = {"dense_kib": g_o * g_k * machine.precision.weight_bits}
    if machine.features.unified_path:
        demand_bits |= {"sign_kib": g_o * g_k, "magnitude_kib": machine.precision.magnitude_bits}
    if not machine.is_dense:
        demand_bits |= {"type_kib": 2}
    for field, bits in demand_bits.items():
        size_kib = getattr(machine.weights, field)
        share_bytes = int(size_kib * 1024) // machine.array.rows
        if share_bytes * 8 < bits:
            problems.append(
                Problem(
                    f"weights.{field}",
                    f"{size_kib} KiB over {machine.array.rows} rows leaves {share_bytes} bytes a row, "
                    f"less than one block of {bits} bits: the row cannot be fed",
                    f"at least {-(-bits // 8) * machine.array.rows / 1024} KiB, or a smaller block",
                )
            )
    return problems


def validation_problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem of a pydantic error in the words of this project, with the nearest name for unknown fields."""
    problems: list[Problem] = []
    items = error.errors()
    for item in items:
        if item["type"] == "too_short" and any(
            len(other["loc"]) > len(item["loc"]) and other["loc"][: len(item["loc"])] == item["loc"]
            for other in items
        ):
            continue  # pydantic counts the entries that are right; the wrong ones are told themselves
        location = [str(part) for part in item["loc"]]
        dotted = ".".join(location)
        inner = (item.get("ctx") or {}).get("error")
        if isinstance(inner, InputError):
            problems += inner.problems
        elif item["type"] == "extra_forbidden":
            allowed = _fields_at(model, location[:-1])
            problems.append(Problem(dotted, "unknown field", nearest_name(location[-1], allowed)))
        elif item["type"] == "missing":
            problems.append(Problem(dotted, "missing", "required"))
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            value = item.get("input")
            message = message.replace("valid tuple", "list")
            found = "" if isinstance(value, dict | BaseModel) else f"found {value!r}"
            if item["type"] == "literal_error" and isinstance(value, str):
                names = re.findall("'([^']*)'", item["ctx"]["expected"])
                found = f"{found}, {nearest_name(value, names)}"
            problems.append(Problem(dotted, message, found))
    return problems


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    current = model
    for name in location:
        info = current.model_fields.get(name)
        if info is None:  # the index of an entry of a list: its model was found with the list
            continue
        inner = _model_in(info.annotation)
        if inner is None:
            break
        current = inner
    return list(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation names: itself, or inside ``| None``, ``tuple[…]`` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def parse_machine(data: dict[str, Any], source: str) -> Machine:
    """A machine from the content of a machine file.

    Parameters
    ----------
    data : dict
        What the TOML file holds.
    source : str
        Named in messages.

    Raises
    ------
    InputError
        With every problem found.
    """
    try:
        return Machine.model_validate(data)
    except ValidationError as error:
        raise InputError(source, validation_problems(error, Machine)) from None
    except InputError as error:
        raise InputError(source, error.problems) from None


def preset_names() -> list[str]:
    """The machines that ship with hwsim."""
    files = resources.files("hwsim").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_machine(name_or_path: str | Path) -> Machine:
    """A preset by its name, or a machine file by its path.

    Raises
    ------
    InputError
        No such preset or file, not TOML, or not a valid machine.
    """
    text = str(name_or_path)
    if text in preset_names():
        content = resources.files("hwsim").joinpath("presets", f"{text}.toml").read_text("utf-8")
        source = f"preset {text}"
    else:
        content, source = _read_text(Path(text)), text
    try:
        data = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise InputError(source, f"not valid TOML: {error}") from None
    return parse_machine(data, source)


def _read_text(path: Path) -> str:
    if not path.exists():
        hint = nearest_name(path.name.removesuffix(".toml"), preset_names())
        raise InputError(str(path), Problem("", "no such machine file and no such preset", hint))
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
