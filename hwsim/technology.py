"""Technology tables: energy, area and leakage per elementary event, every number with its source and node.

A table is a TOML file of records. A record holds a value (or values over operand widths), where it was taken
from, and the process node it was taken at; the record's name carries the unit. A table that was measured at
another node than `Technology.node_nm` is scaled by the functions of this module, each of which names its
source:

- `energy_between_nodes`, `area_between_nodes`: Stillmaker and Baas 2017;
- `wire_energy_between_supplies`: energy of a wire follows the square of its supply;
- `leakage_density_between_nodes`: the leakage of a circuit stays, its area shrinks;
- `by_width`: adders, shifters and multipliers of other widths;
- `memory_macro`: SRAM of other capacities and port widths, on the CACTI 7 table.

A file of one's own starts from a packaged table (``base = "45nm-horowitz"``) and replaces whole records, so
that no number is left with the source of another one.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.gates import area_model
from hwsim.machine import validation_problems

__all__ = [
    "ByWidth",
    "EnergyByWidth",
    "EnergyFigure",
    "Figure",
    "MemoryMacro",
    "SramTable",
    "Technology",
    "area_between_nodes",
    "by_width",
    "energy_between_nodes",
    "leakage_density_between_nodes",
    "load_technology",
    "memory_macro",
    "remembered",
    "technology_names",
    "wire_energy_between_supplies",
]

Source = Annotated[str, Field(min_length=8, max_length=1000)]
NodeNm = Annotated[float, Field(strict=True, ge=7, le=130)]
SupplyV = Annotated[float, Field(strict=True, ge=0.6, le=1.4)]
Positive = Annotated[float, Field(strict=True, gt=0, le=1e9)]


class _Record(BaseModel):
    """A record is immutable, and a field that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: Source
    node_nm: NodeNm


class Figure(_Record):
    """One number, its source and the node it was taken at. Its unit stands in the name of the record."""

    value: Positive


class EnergyFigure(Figure):
    """An energy: `Figure` and the supply it was taken at."""

    supply_v: SupplyV


class ByWidth(_Record):
    """A number at one or more operand widths; `by_width` gives it at others."""

    bits: tuple[Annotated[int, Field(strict=True, ge=1, le=1024)], ...] = Field(min_length=1)
    values: tuple[Positive, ...]

    @model_validator(mode="after")
    def _one_value_per_width(self) -> ByWidth:
        if len(self.values) != len(self.bits):
            raise ValueError(
                f"{len(self.bits)} bits but {len(self.values)} values; one value per width is needed"
            )
        if any(high <= low for low, high in pairwise(self.bits)):
            raise ValueError(f"bits {list(self.bits)} must rise")
        return self


class EnergyByWidth(ByWidth):
    """Energies by operand width: `ByWidth` and the supply they were taken at."""

    supply_v: SupplyV


Row = tuple[Positive, ...]


class SramTable(_Record):
    """Single-port SRAM macros: a row per port width, a column per capacity.

    Attributes
    ----------
    capacity_kib : tuple of float ``[capacities]``
        Rising.
    port_bits : tuple of int ``[ports]``
        Rising.
    read_energy_pj, write_energy_pj : tuples ``[ports][capacities]``
        Per access of one whole port width.
    area_mm2, leakage_mw : tuples ``[ports][capacities]``
        Of the whole macro.
    """

    capacity_kib: tuple[Positive, ...] = Field(min_length=1)
    port_bits: tuple[Annotated[int, Field(strict=True, ge=1, le=65536)], ...] = Field(min_length=1)
    read_energy_pj: tuple[Row, ...]
    write_energy_pj: tuple[Row, ...]
    area_mm2: tuple[Row, ...]
    leakage_mw: tuple[Row, ...]

    @model_validator(mode="after")
    def _rectangular(self) -> SramTable:
        problems = [
            f"{axis} must rise"
            for axis in ("capacity_kib", "port_bits")
            if any(high <= low for low, high in pairwise(getattr(self, axis)))
        ]
        shape = (len(self.port_bits), len(self.capacity_kib))
        for name in ("read_energy_pj", "write_energy_pj", "area_mm2", "leakage_mw"):
            rows = getattr(self, name)
            if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
                problems.append(
                    f"{name} must have {shape[0]} rows (port_bits) of {shape[1]} values (capacity_kib)"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True)
class MemoryMacro:
    """One single-port memory: energy of an access of one whole port width, area and leakage of the whole.

    Attributes
    ----------
    read_energy_pj, write_energy_pj : float
        Per access.
    area_mm2, leakage_mw : float
    """

    read_energy_pj: float
    write_energy_pj: float
    area_mm2: float
    leakage_mw: float


# Coefficients of E(V) = a V² + b V + c, relative energies of one circuit at each node, and areas relative to
# 45 nm. Source: A. Stillmaker, B. Baas, Scaling equations for the accurate prediction of CMOS device
# performance from 180 nm to 7 nm, Integration 58, 2017, doi:10.1016/j.vlsi.2017.02.002.
_ENERGY_COEFFICIENTS = {
    130.0: (7.171, -6.709, 2.904),
    90.0: (4.762, -4.781, 2.092),
    65.0: (3.755, -4.398, 1.975),
    45.0: (1.103, -0.362, 0.2767),
    32.0: (0.9559, -0.7823, 0.471),
    20.0: (0.373, -0.1582, 0.04104),
    16.0: (0.2958, -0.1241, 0.03024),
    14.0: (0.2363, -0.09675, 0.02239),
    10.0: (0.2068, -0.09311, 0.02375),
    7.0: (0.1776, -0.09097, 0.02447),
}
_AREA_FACTORS = {
    130.0: 6.4,
    90.0: 2.8,
    65.0: 1.5,
    45.0: 1.0,
    32.0: 0.46,
    20.0: 0.21,
    16.0: 0.19,
    14.0: 0.17,
    10.0: 0.10,
    7.0: 0.059,
}


def _interpolate_log(x: float, xs: list[float], ys: list[float]) -> float:
    """A straight line in log-log through the points around ``x``; the end values outside them."""
    if x <= xs[0]:
        return ys[0]
    for (low, high), (first, second) in zip(pairwise(xs), pairwise(ys), strict=True):
        if x <= high:
            share = math.log(x / low) / math.log(high / low)
            return first ** (1 - share) * second**share
    return ys[-1]


def _at_node(node_nm: float, values: dict[float, float]) -> float:
    nodes = sorted(values)
    return _interpolate_log(node_nm, nodes, [values[node] for node in nodes])


def energy_between_nodes(
    energy_pj: float, from_nm: float, from_supply_v: float, to_nm: float, to_supply_v: float
) -> float:
    """The dynamic energy of a logic circuit at another node and supply, in pJ.

    The published polynomials in the supply at both nodes, straight lines in log-log between the published
    nodes.

    Source: Stillmaker and Baas, Integration 58, 2017, doi:10.1016/j.vlsi.2017.02.002. Check: 45 nm, 0.9 V to
    22 nm, 0.8 V gives 0.226; CACTI 7's SRAM of 8 KiB to 512 KiB at these nodes gives 0.22 to 0.27.

    Examples
    --------
    >>> round(energy_between_nodes(1.0, 45, 0.9, 22, 0.8), 3)
    0.226
    """
    relative = [
        _at_node(node, {n: a * volt**2 + b * volt + c for n, (a, b, c) in _ENERGY_COEFFICIENTS.items()})
        for node, volt in ((from_nm, from_supply_v), (to_nm, to_supply_v))
    ]
    return energy_pj * relative[1] / relative[0]


def area_between_nodes(area: float, from_nm: float, to_nm: float) -> float:
    """The area of a logic circuit at another node, in the unit it came in.

    Source: Stillmaker and Baas, Integration 58, 2017, doi:10.1016/j.vlsi.2017.02.002 (area factors); straight
    lines in log-log between the published nodes. Check: 45 to 22 nm gives 0.246; CACTI 7's SRAM gives 0.24 to
    0.30.

    Examples
    --------
    >>> round(area_between_nodes(1.0, 45, 22), 3)
    0.246
    """
    return area * _at_node(to_nm, _AREA_FACTORS) / _at_node(from_nm, _AREA_FACTORS)


def wire_energy_between_supplies(energy_pj: float, from_supply_v: float, to_supply_v: float) -> float:
    """The energy of a wire of the same length at another supply, in pJ: it follows the square of the supply.

    Source: Keckler et al., IEEE Micro 31(5), 2011: the capacitance of a wire per millimetre stays about the
    same from node to node, so that its energy goes with C·V².
    """
    return energy_pj * (to_supply_v / from_supply_v) ** 2


def leakage_density_between_nodes(density_mw_per_mm2: float, from_nm: float, to_nm: float) -> float:
    """Leakage of logic per area at another node, in mW/mm²: the circuit leaks the same on a smaller area.

    Source: assumption, after CACTI 7.0's itrs-lstp SRAM: 8 KiB leak 2.3 µW at 45 nm and 3.6 µW at 22 nm, on a
    quarter of the area.
    """
    return density_mw_per_mm2 / area_between_nodes(1.0, from_nm, to_nm)


def by_width(record: ByWidth, size: float, power: int = 1) -> float:
    """The value of a record at a width it does not list.

    Straight lines between the listed widths, in proportion to the width outside them: adders, shifters and
    registers grow linearly with their width, multipliers with the product of both widths (``power`` 2).

    Source: array multipliers hold one cell per pair of operand bits and ripple adders one per bit. Check on
    Horowitz 2014: from 8 to 32 bits the multiplier's energy grows 15.5-fold (proportion says 16), the adder's
    3.3-fold (4); areas grow 12.4-fold (16) and 3.8-fold (4). The listed widths are met exactly.

    Parameters
    ----------
    record : ByWidth
    size : float
        Width in bits, or with ``power`` 2 the product of both widths in bits².
    power : int
        Power of the listed widths that ``size`` is in.
    """
    sizes = [float(bits) ** power for bits in record.bits]
    if size <= sizes[0]:
        return record.values[0] * size / sizes[0]
    for (low, high), (first, second) in zip(pairwise(sizes), pairwise(record.values), strict=True):
        if size <= high:
            return first + (second - first) * (size - low) / (high - low)
    return record.values[-1] * size / sizes[-1]


def memory_macro(table: SramTable, capacity_bits: float, port_bits: int) -> MemoryMacro:
    """A memory of any capacity and port width, built from the macros of an SRAM table.

    Between the listed capacities and port widths: straight lines in log-log, which meet the listed values
    exactly. A port wider than the widest is several macros side by side, a memory larger than the largest
    several in a row of which one is accessed. What is smaller than the smallest capacity or port is the
    smallest macro, and only its port is used in part.

    Source: assumption: between two of CACTI's organisations energies and areas follow powers of the capacity.
    The kinks are CACTI's own changes of organisation: at 45 nm and 8 bits a 16 KiB macro costs 10 % more per
    read than a 32 KiB one.

    Parameters
    ----------
    table : SramTable
    capacity_bits : float
    port_bits : int
        Bits of one access.
    """
    abreast = math.ceil(port_bits / table.port_bits[-1])
    deep = math.ceil(capacity_bits / abreast / (table.capacity_kib[-1] * 8192))
    ports = [float(bits) for bits in table.port_bits]
    capacities = list(table.capacity_kib)
    capacity_kib = capacity_bits / abreast / deep / 8192

    def value(rows: tuple[Row, ...]) -> float:
        at_capacity = [_interpolate_log(capacity_kib, capacities, list(row)) for row in rows]
        return _interpolate_log(port_bits / abreast, ports, at_capacity)

    return MemoryMacro(
        read_energy_pj=value(table.read_energy_pj) * abreast,
        write_energy_pj=value(table.write_energy_pj) * abreast,
        area_mm2=value(table.area_mm2) * abreast * deep,
        leakage_mw=value(table.leakage_mw) * abreast * deep,
    )


class Technology(BaseModel):
    """A technology table (`load_technology`); the methods give each figure at the table's own node.

    Attributes
    ----------
    name : str
    node_nm : float
        The node of the machine; records of other nodes are scaled to it.
    supply_v : Figure
        The supply of the logic, in volt.
    adder_energy_pj, multiplier_energy_pj, shifter_energy_pj : EnergyByWidth
        Per operation. A multiplier of ``bits`` takes two operands of that width.
    gate_energy_pj : EnergyFigure
        One two-input gate or multiplexer of one bit.
    nand2_area_um2 : Figure
        Cell area of a two-input NAND: one gate equivalent.
    register_energy_pj : EnergyFigure
        One bit written, its clock pin in that cycle included.
    wire_energy_pj_per_mm : EnergyFigure
        One bit of random data (half of the bits change) over one millimetre.
    logic_leakage_mw_per_mm2 : Figure
    logic_utilization : Figure
        Cell area over placed area, at most 1.
    clock_gate_bits : Figure
        Register bits behind one clock gate.
    interface_gates : Figure
        Gate equivalents of what stands outside the RTL.
    sram : SramTable
        At the table's own node: SRAM is not scaled between nodes.

    Examples
    --------
    >>> technology = load_technology("45nm-horowitz")
    >>> technology.multiplier_pj(8, 8), technology.adder_pj(32)
    (0.2, 0.1)
    >>> round(load_technology("45nm-aladdin").multiplier_pj(8, 8), 2)
    0.92
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    node_nm: NodeNm
    supply_v: Figure
    adder_energy_pj: EnergyByWidth
    multiplier_energy_pj: EnergyByWidth
    shifter_energy_pj: EnergyByWidth
    gate_energy_pj: EnergyFigure
    nand2_area_um2: Figure
    register_energy_pj: EnergyFigure
    wire_energy_pj_per_mm: EnergyFigure
    logic_leakage_mw_per_mm2: Figure
    logic_utilization: Figure
    clock_gate_bits: Figure
    interface_gates: Figure
    sram: SramTable

    @model_validator(mode="after")
    def _records_fit_together(self) -> Technology:
        problems = []
        if not 0.6 <= self.supply_v.value <= 1.4:
            problems.append(Problem("supply_v.value", f"{self.supply_v.value} V, allowed: 0.6 to 1.4"))
        if self.logic_utilization.value > 1:
            problems.append(
                Problem(
                    "logic_utilization.value",
                    f"{self.logic_utilization.value}, a share of the area: at most 1",
                )
            )
        if self.clock_gate_bits.value < 1:
            problems.append(Problem("clock_gate_bits.value", f"{self.clock_gate_bits.value}, at least 1"))
        if self.sram.node_nm != self.node_nm:
            problems.append(
                Problem(
                    "sram.node_nm",
                    f"{self.sram.node_nm:g} nm, but the table is one of {self.node_nm:g} nm and SRAM is not "
                    "scaled between nodes",
                    "give an [sram] record of that node",
                )
            )
        if problems:
            raise InputError(f"technology {self.name}", problems)
        return self

    def _energy_pj(self, record: EnergyFigure | EnergyByWidth, energy_pj: float) -> float:
        return energy_between_nodes(
            energy_pj, record.node_nm, record.supply_v, self.node_nm, self.supply_v.value
        )

    def adder_pj(self, bits: int) -> float:
        """Energy of one addition of operands of ``bits``, in pJ."""
        return self._energy_pj(self.adder_energy_pj, by_width(self.adder_energy_pj, bits))

    def multiplier_pj(self, bits: int, other_bits: int) -> float:
        """Energy of one product of operands of ``bits`` and ``other_bits``, in pJ."""
        product = by_width(self.multiplier_energy_pj, bits * other_bits, power=2)
        return self._energy_pj(self.multiplier_energy_pj, product)

    def shifter_pj(self, bits: int) -> float:
        """Energy of one shift of a word of ``bits``, in pJ."""
        return self._energy_pj(self.shifter_energy_pj, by_width(self.shifter_energy_pj, bits))

    @property
    def gate_pj(self) -> float:
        """Energy of a two-input gate or multiplexer of one bit, in pJ."""
        return self._energy_pj(self.gate_energy_pj, self.gate_energy_pj.value)

    def gates_um2(self, term: str, count: float = 1.0) -> float:
        """Cell area of ``count`` units of a term of `hwsim.gates.TERM_COMPONENTS`, by the fit to synthesis runs, in µm²."""
        return count * area_model()["coefficients"][term] * self.nand2_um2

    def multiplier_um2(self, bits: int, other_bits: int) -> float:
        """Cell area of a multiplier of ``bits`` by ``other_bits``, as in a PE, in µm²: 567 gate equivalents for 8 × 8 bits.

        One that is synthesised by itself has 565.
        """
        return self.gates_um2("pe.multiplier_adders", (bits - 1) * (other_bits - 1))

    def adder_um2(self, bits: int) -> float:
        """Cell area of an adder of ``bits``, as in a PE's sums, in µm²: 7.1 gate equivalents a bit.

        An adder of 24 bits that is synthesised by itself has 7.2 a bit.
        """
        return self.gates_um2("pe.sign_adder_bits", bits)

    @property
    def register_um2(self) -> float:
        """Cell area of one register bit with its enable, as in the operand registers, in µm²."""
        return self.gates_um2("row_control.word_bits")

    @property
    def gate_um2(self) -> float:
        """Cell area of a two-input multiplexer of one bit, as in the multicast, in µm²."""
        return self.gates_um2("multicast.select_bits")

    @property
    def nand2_um2(self) -> float:
        """Cell area of one gate equivalent, in µm²."""
        return area_between_nodes(self.nand2_area_um2.value, self.nand2_area_um2.node_nm, self.node_nm)

    @property
    def register_pj(self) -> float:
        """Energy of writing one register bit, in pJ."""
        return self._energy_pj(self.register_energy_pj, self.register_energy_pj.value)

    @property
    def wire_pj_per_mm(self) -> float:
        """Energy of one bit of random data over one millimetre, in pJ."""
        record = self.wire_energy_pj_per_mm
        return wire_energy_between_supplies(record.value, record.supply_v, self.supply_v.value)

    @property
    def leakage_mw_per_mm2(self) -> float:
        """Leakage of logic per cell area, in mW/mm²."""
        record = self.logic_leakage_mw_per_mm2
        return leakage_density_between_nodes(record.value, record.node_nm, self.node_nm)

    def memory(self, capacity_bits: float, port_bits: int) -> MemoryMacro:
        """A memory of that capacity and port width (`memory_macro`)."""
        return memory_macro(self.sram, capacity_bits, port_bits)

    def to_json(self) -> str:
        """The resolved table as canonical JSON (sorted keys): stored with results and hashed."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


class _Remembered:
    """A technology that works out each figure once: sweeps ask for the same few adders and memories again and again."""

    def __init__(self, technology: Technology) -> None:
        self._technology = technology

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._technology, name)
        if callable(value):
            value = lru_cache(maxsize=65536)(value)
        setattr(self, name, value)
        return value


@lru_cache(maxsize=16)
def _remembered(technology: Technology) -> _Remembered:
    return _Remembered(technology)


def remembered(technology: Technology) -> Technology:
    """The same technology, its figures worked out once each."""
    return technology if isinstance(technology, _Remembered) else cast(Technology, _remembered(technology))


def technology_names() -> list[str]:
    """The tables that ship with hwsim."""
    files = resources.files("hwsim").joinpath("technology_tables").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_technology(name_or_path: str | Path) -> Technology:
    """A packaged table by its name, or a table of one's own by its path.

    A file may start from a packaged table with ``base = "45nm-horowitz"`` and give only the records that
    differ; a record is replaced as a whole.

    Raises
    ------
    InputError
        No such table or file, not TOML, an unknown base, or not a valid table; with every problem found.
    """
    text = str(name_or_path)
    if text in technology_names():
        return _packaged_table(text)
    return _parse(_resolve(_own_file(Path(text)), text), text)


@lru_cache(maxsize=16)
def _packaged_table(name: str) -> Technology:
    return _parse(_packaged_data(name), f"technology {name}")


def _packaged_data(name: str) -> dict[str, Any]:
    content = resources.files("hwsim").joinpath("technology_tables", f"{name}.toml").read_text("utf-8")
    return _resolve(tomllib.loads(content), f"technology {name}")


def _resolve(data: dict[str, Any], source: str) -> dict[str, Any]:
    """The content of a file on top of that of its base."""
    base = data.pop("base", None)
    if base is None:
        return data
    if base not in technology_names():
        hint = nearest_name(str(base), technology_names())
        raise InputError(source, Problem("base", f"no packaged table {base!r}", hint))
    return _packaged_data(base) | data


def _own_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        hint = nearest_name(path.name.removesuffix(".toml"), technology_names())
        raise InputError(str(path), Problem("", "no such file and no such technology table", hint))
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(str(path), f"not valid TOML: {error}") from None


def _parse(data: dict[str, Any], source: str) -> Technology:
    try:
        return Technology.model_validate(data)
    except ValidationError as error:
        raise InputError(source, validation_problems(error, Technology)) from None
    except InputError as error:
        raise InputError(source, error.problems) from None
