"""Liberty files: the cells of a standard-cell library, as far as area, pins and switching energy need them.

A Liberty file is a tree of groups (``cell (NAND2X1) { ... }``) with attributes (``area : 24;``). `load_library` reads the whole
tree and keeps of every cell what `hwsim.synthesis` and `hwsim.switching` use. Nothing of a library is stored in this package.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import FormatError, InputError, Problem

__all__ = ["DEFAULT_LIBERTY", "Cell", "EnergyTable", "Library", "Pin", "load_library", "parse_liberty"]

DEFAULT_LIBERTY = Path("/usr/share/qflow/tech/osu018/osu018_stdcells.lib")
"""Oklahoma State University's cells for TSMC 0.18 µm, where Debian's package qflow-tech-osu018 puts them."""

_TOKEN = re.compile(r'"([^"]*)"|([{}():;,])|([^\s{}():;,"]+)')
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_CAPACITANCE_PF = {"pf": 1.0, "ff": 1e-3, "nf": 1e3}


@dataclass
class Group:
    """A group of the file: ``name (arguments) { attributes, groups }``."""

    name: str
    arguments: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    def find(self, name: str) -> Iterator[Group]:
        """The groups of that name directly below."""
        return (group for group in self.groups if group.name == name)

    def text(self, name: str, default: str = "") -> str:
        """An attribute as written."""
        return " ".join(self.attributes.get(name, (default,)))


@dataclass(frozen=True)
class EnergyTable:
    """Internal energy of one transition over the output's load, at the smallest input slope of the table.

    Attributes
    ----------
    loads_pf, energies_pj : float arrays ``[points]``
        One point, at load 0, where the energy does not depend on the load.
    """

    loads_pf: NDArray[np.float64]
    energies_pj: NDArray[np.float64]

    def at(self, load_pf: float) -> float:
        """Energy in pJ, in straight lines between the points; the end values outside."""
        return float(np.interp(load_pf, self.loads_pf, self.energies_pj))


@dataclass(frozen=True)
class Pin:
    """A pin: its direction, input capacitance in pF, function (outputs), and internal energy per rise and fall.

    ``energy_pj`` holds the ``(rise, fall)`` tables; of an output the mean over its inputs' arcs, of an input what its
    transition costs by itself.
    """

    name: str
    is_output: bool
    capacitance_pf: float
    function: str
    energy_pj: tuple[EnergyTable, EnergyTable] | None


@dataclass(frozen=True)
class Cell:
    """A cell: area in the library's unit (µm²), pins, and whether it is a register or a latch."""

    name: str
    area_um2: float
    is_sequential: bool
    pins: dict[str, Pin]


@dataclass(frozen=True)
class Library:
    """A standard-cell library.

    Attributes
    ----------
    name, path : str
    sha256 : str
        Of the file.
    voltage_v : float
        Nominal supply.
    cells : dict
    nand2_um2 : float
        Area of the smallest cell with two inputs whose function is NAND: one gate equivalent.
    """

    name: str
    path: str
    sha256: str
    voltage_v: float
    cells: dict[str, Cell]
    nand2_um2: float


@lru_cache(maxsize=4)
def load_library(path: Path) -> Library:
    """The cells of a Liberty file.

    Raises
    ------
    InputError
        No such file; for the default with how to install it.
    FormatError
        Not Liberty, or a library without a NAND or a register that Yosys could map to.
    """
    if not path.is_file():
        hint = "give a file with --liberty"
        if path == DEFAULT_LIBERTY:
            hint = "apt-get install --no-install-recommends qflow-tech-osu018, or give another with --liberty FILE"
        raise InputError(str(path), Problem("liberty", "no such file", hint))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(str(path), Problem("liberty", f"cannot be read: {error.strerror}")) from None
    top = parse_liberty(content.decode("utf-8", "replace"), str(path))
    if top.name != "library":
        raise FormatError(
            str(path), Problem("liberty", f"begins with {top.name!r}, not with 'library (...)'")
        )
    unit = top.attributes.get("capacitive_load_unit", ("1", "pf"))
    if len(unit) != 2 or unit[1].lower() not in _CAPACITANCE_PF:
        raise FormatError(
            str(path), Problem("capacitive_load_unit", f"found {unit}, allowed: (1, pf), (1, ff)")
        )
    pf = _number(unit[0], str(path)) * _CAPACITANCE_PF[unit[1].lower()]
    cells = {}
    for group in top.find("cell"):
        cell = _cell(group, pf, str(path))
        cells[cell.name] = cell
    nands = [cell.area_um2 for cell in cells.values() if _is_nand2(cell)]
    problems = []
    if not nands:
        problems.append(
            Problem("cell", f"no two-input NAND among {len(cells)} cells: gate equivalents need one")
        )
    if not any(cell.is_sequential for cell in cells.values()):
        problems.append(Problem("cell", f"no flip-flop among {len(cells)} cells"))
    if problems:
        raise FormatError(str(path), problems)
    return Library(
        name=top.arguments[0] if top.arguments else path.stem,
        path=str(path),
        sha256=hashlib.sha256(content).hexdigest(),
        voltage_v=_number(top.text("nom_voltage", "0"), str(path)),
        cells=cells,
        nand2_um2=min(nands),
    )


def parse_liberty(text: str, source: str = "liberty") -> Group:
    """The tree of groups of a Liberty file.

    Raises
    ------
    FormatError
        Text that is no such tree, with the line.

    Examples
    --------
    >>> tree = parse_liberty('library (tiny) { cell (INV) { area : 16; pin (A) { direction : input; } } }')
    >>> [(cell.arguments, cell.text("area")) for cell in tree.find("cell")]
    [(('INV',), '16')]
    """
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text).replace("\\\n", " ")
    tokens = [(match[1], match[2], match[3], match.start()) for match in _TOKEN.finditer(text)]
    root = Group("", ())
    stack = [root]
    words: list[str] = []
    arguments: list[str] | None = None

    def fail(at: int, message: str) -> FormatError:
        line = text.count("\n", 0, at) + 1
        return FormatError(source, Problem("liberty", f"line {line}: {message}", "is this a Liberty file?"))

    inside, value = False, False
    for quoted, sign, word, at in tokens:
        if sign == "(":
            if len(words) == 1 and not value:
                inside, arguments = True, []
            elif not value:
                raise fail(at, "'(' without a name before it")
        elif sign == ")":
            inside = False
        elif sign == "{":
            if len(words) != 1 or arguments is None:
                raise fail(at, "'{' without 'name (...)' before it")
            group = Group(words[0], tuple(arguments))
            stack[-1].groups.append(group)
            stack.append(group)
            words, arguments, value = [], None, False
        elif sign == ":":
            if len(words) != 1:
                raise fail(at, "':' without a name before it")
            value = True
        elif sign in (";", "}"):
            if value and len(words) > 1:
                stack[-1].attributes[words[0]] = tuple(words[1:])
            elif words and arguments is not None:
                stack[-1].attributes[words[0]] = tuple(arguments)
            elif words:
                raise fail(at, f"{words[0]!r} has no value")
            words, arguments, value = [], None, False
            if sign == "}":
                if len(stack) == 1:
                    raise fail(at, "'}' without '{'")
                stack.pop()
        elif sign != ",":
            item = word if word is not None else quoted
            if inside and arguments is not None:
                arguments.append(item)
            elif arguments is not None and not value:  # `name (...)` ended by its line instead of a semicolon
                stack[-1].attributes[words[0]] = tuple(arguments)
                words, arguments = [item], None
            else:
                words.append(item)
    if len(stack) != 1 or not root.groups:
        raise fail(len(text), "the file ends inside a group" if len(stack) > 1 else "no group found")
    return root.groups[0]


def _number(text: str, source: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise FormatError(source, Problem("liberty", f"{text!r} is not a number")) from None


def _cell(group: Group, pf: float, source: str) -> Cell:
    pins = {}
    for bundle in (group, *group.find("bus"), *group.find("bundle")):
        for pin in bundle.find("pin"):
            for name in pin.arguments:
                pins[name] = _pin(name, pin, pf, source)
    sequential = any(
        inner.name in ("ff", "latch", "ff_bank", "latch_bank", "statetable") for inner in group.groups
    )
    name = group.arguments[0] if group.arguments else "?"
    return Cell(name, _number(group.text("area", "0"), source), sequential, pins)


def _pin(name: str, group: Group, pf: float, source: str) -> Pin:
    tables: tuple[list[EnergyTable], list[EnergyTable]] = ([], [])
    for power in group.find("internal_power"):
        for kinds, found in zip((("rise_power", "power"), ("fall_power", "power")), tables, strict=True):
            for inner in power.groups:
                if inner.name in kinds:
                    found.append(_energy_table(inner, pf, source))
    energy = (_mean_table(tables[0]), _mean_table(tables[1])) if tables[0] and tables[1] else None
    return Pin(
        name=name,
        is_output=group.text("direction") == "output",
        capacitance_pf=_number(group.text("capacitance", "0"), source) * pf,
        function=group.text("function"),
        energy_pj=energy,
    )


def _energy_table(group: Group, pf: float, source: str) -> EnergyTable:
    # Energies are in capacitance × voltage² of the file's units; osu018 writes them in pJ (1 pF · 1 V²).
    rows = [
        [_number(item, source) for item in row.replace(",", " ").split()]
        for row in group.attributes.get("values", ("0",))
    ]
    index_1 = [
        _number(item, source)
        for item in " ".join(group.attributes.get("index_1", ())).replace(",", " ").split()
    ]
    if "index_2" in group.attributes and len(index_1) == len(rows):
        return EnergyTable(np.array(index_1) * pf, np.array([row[0] for row in rows]) * pf)
    return EnergyTable(np.zeros(1), np.array([rows[0][0]]) * pf)


def _mean_table(tables: list[EnergyTable]) -> EnergyTable:
    loads = tables[0].loads_pf
    return EnergyTable(loads, np.mean([[table.at(load) for load in loads] for table in tables], axis=0))


def _is_nand2(cell: Cell) -> bool:
    inputs = [pin.name for pin in cell.pins.values() if not pin.is_output]
    outputs = [pin for pin in cell.pins.values() if pin.is_output]
    if cell.is_sequential or len(inputs) != 2 or len(outputs) != 1 or not outputs[0].function:
        return False
    return all(
        _evaluate(outputs[0].function, dict(zip(inputs, bits, strict=True))) == (not all(bits))
        for bits in product((False, True), repeat=2)
    )


def _evaluate(function: str, values: dict[str, bool]) -> bool | None:
    """A Liberty function (``! ' * & + | ^``, juxtaposition is AND) of known inputs; None if it is none."""
    tokens = re.findall(r"[A-Za-z_]\w*|[!'*&+|^()01]", function)
    at = 0

    def either() -> bool:
        nonlocal at
        result = exclusive()
        while at < len(tokens) and tokens[at] in "+|":
            at += 1
            result = exclusive() or result
        return result

    def exclusive() -> bool:
        nonlocal at
        result = both()
        while at < len(tokens) and tokens[at] == "^":
            at += 1
            result = both() != result
        return result

    def both() -> bool:
        nonlocal at
        result = single()
        while at < len(tokens) and tokens[at] not in "+|^)":
            if tokens[at] in "*&":
                at += 1
            result = single() and result
        return result

    def single() -> bool:
        nonlocal at
        token = tokens[at]
        at += 1
        if token == "!":
            return not single()
        if token == "(":
            result = either()
            at += 1
        else:
            result = token == "1" if token in "01" else values[token]
        while at < len(tokens) and tokens[at] == "'":
            at += 1
            result = not result
        return result

    try:
        return either()
    except (IndexError, KeyError):
        return None
