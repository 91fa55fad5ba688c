"""Energy of one PE from gate-level switching: netlist, Icarus Verilog, toggles × Liberty energy.

A cross-check of the technology tables' ratios between a dense and a unified block. The netlist of `hwsim.synthesis` runs blocks
of random data with the cells' own Verilog models and their path delays, so that glitches count. Every change of a net costs the
internal energy of the cell that drives it (at the net's load) and ``C·V²/2`` of the input pins that it drives; registers also
pay for their clock and data pins. Left out are wires (no layout), the clock tree, input slopes beyond the library's fastest,
and leakage.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from hwsim.liberty import Library
from hwsim.lowering import occupancy
from hwsim.machine import Machine
from hwsim.synthesis import SynthesisError, netlist_text

__all__ = ["WORKLOADS", "BlockEnergy", "pe_switching"]

WORKLOADS = {"dense": (1.0, 0.0), "unified": (0.0, 1.0), "mixed": (0.5, 0.5)}
"""Shares of dense and unified blocks of each measured workload."""

_PERIOD_NS = 40


@dataclass(frozen=True)
class BlockEnergy:
    """Energy of a workload on one PE.

    Attributes
    ----------
    workload : str
    blocks, cycles : int
    clock_pj : float
        Clock pins of the registers, per block: they are not gated.
    logic_pj : float
        Everything else, per block.
    toggles : float
        Changes of nets per block, without the clock's.
    """

    workload: str
    blocks: int
    cycles: int
    clock_pj: float
    logic_pj: float
    toggles: float


@dataclass(frozen=True)
class _Stimulus:
    """Values of the PE's inputs by name, one per cycle, and the packed accumulators at the end."""

    inputs: dict[str, list[int]]
    accumulators: int


def pe_switching(
    machine: Machine, library: Library, *, blocks: int = 60, seed: int = 0, glitches: bool = True
) -> list[BlockEnergy]:
    """Energy per block of each of `WORKLOADS` on one PE of a machine.

    The outputs of the netlist are compared with integer arithmetic on the way.

    Parameters
    ----------
    machine : Machine
        With the unified path, and a sign port that brings a block's signs and magnitude in one cycle.
    library : Library
        Beside its Liberty file must be the cells' Verilog models (same name, ``.v``).
    blocks : int
        Blocks of a workload.
    seed : int
        Of weights and activations (uniform over their range).
    glitches : bool
        Whether cells have their path delays; without them every net changes at most once per clock edge or input.

    Raises
    ------
    InputError
        No Icarus Verilog, no models, or a machine as above not.
    SynthesisError
        The netlist computes something else than the PE should.
    """
    models = Path(library.path).with_suffix(".v")
    problems = []
    if shutil.which("iverilog") is None:
        hint = "apt-get install --no-install-recommends iverilog"
        problems.append(Problem("iverilog", "not found", hint))
    if not models.exists():
        problems.append(
            Problem(str(models), "no such file", "the cells' Verilog models lie beside the Liberty file")
        )
    if not machine.features.unified_path or occupancy(machine)[0] != 1:
        problems.append(
            Problem(machine.name, "a unified block must take one cycle", "take msa-16x16, the default")
        )
    if problems:
        raise InputError("energy", problems)
    text, netlist = netlist_text("pe", machine, library)
    module = next(m for m in netlist["modules"].values() if int(m.get("attributes", {}).get("top", "0"), 2))
    result = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "netlist.v").write_text(text, "utf-8")
        for workload, shares in WORKLOADS.items():
            stimulus = _stimulus(machine, shares, blocks, np.random.default_rng(seed))
            (work / "bench.v").write_text(_bench(module, stimulus), "utf-8")
            drained = _simulate(work, models, glitches)
            if drained != stimulus.accumulators:
                raise SynthesisError(
                    f"pe, {workload} work: the netlist gives {drained:x}, not {stimulus.accumulators:x}"
                )
            cycles = len(stimulus.inputs["dense"])
            clock, logic, toggles = _energy(module, library, work / "waves.vcd")
            result.append(
                BlockEnergy(workload, blocks, cycles, clock / blocks, logic / blocks, toggles / blocks)
            )
    return result


def _packed(values: NDArray[np.int64] | list[int], bits: int) -> int:
    return sum((int(value) & ((1 << bits) - 1)) << (bits * index) for index, value in enumerate(values))


def _stimulus(
    machine: Machine, shares: tuple[float, float], blocks: int, rng: np.random.Generator
) -> _Stimulus:
    """What the row tells a PE (hwsim/rtl/weight_feed.sv), for random blocks one after the other."""
    (g_o, g_k), precision = machine.array.block, machine.precision
    n, lanes = g_o * g_k, min(machine.array.multipliers, g_o * g_k)
    adders = min(machine.array.sign_adders, n)
    out_bits, in_bits = max(1, (g_o - 1).bit_length()), max(1, (g_k - 1).bit_length())
    factor_bits = max(precision.weight_bits, precision.magnitude_bits + 1)
    names = "dense first word lane_valid lane_factor lane_out lane_in adder_valid adder_negative adder_out adder_in"
    inputs: dict[str, list[int]] = {name: [] for name in [*names.split(), "live_set", "switch_set"]}
    accumulators = np.zeros(g_o, np.int64)
    kinds = np.repeat([1, 0], [round(blocks * shares[0]), blocks - round(blocks * shares[0])])
    rng.shuffle(kinds)
    half = 1 << (precision.activation_bits - 1)
    weights, signs, magnitude = np.zeros(n, np.int64), np.zeros(n, np.int64), 0

    def cycle(dense: int, first: int, word: int, busy: int) -> None:
        item = (n if dense else g_o) - lanes * busy + np.arange(lanes)
        place = np.where(item < 0, 0, item)
        out, inner = (place // g_k if dense else place), place % g_k
        values = {
            "dense": dense,
            "first": first,
            "word": word,
            "lane_valid": _packed(((item >= 0) & (busy > 0)).astype(np.int64), 1),
            "lane_factor": _packed(weights[place] if dense else np.full(lanes, magnitude), factor_bits),
            "lane_out": _packed(out, out_bits),
            "lane_in": _packed(inner, in_bits),
            "adder_valid": _packed(np.full(adders, int(not dense and busy > 0)), 1),
            "adder_negative": _packed(signs[:adders], 1),
            "adder_out": _packed(np.arange(adders) // g_k, out_bits),
            "adder_in": _packed(np.arange(adders) % g_k, in_bits),
            "live_set": 0,
            "switch_set": 0,
        }
        for name, value in values.items():
            inputs[name].append(value)

    # Both sets are cleared first: the set that does not accumulate is cleared by switch_set.
    for live in (0, 1, 0):
        cycle(0, 0, 0, 0)
        inputs["live_set"][-1], inputs["switch_set"][-1] = live, 1
    for dense in kinds.tolist():
        x = rng.integers(-half, half, g_k)
        word = _packed(x, precision.activation_bits)
        if dense:
            weight_half = 1 << (precision.weight_bits - 1)
            weights = rng.integers(-weight_half, weight_half, n)
            accumulators += weights.reshape(g_o, g_k) @ x
        else:
            signs = rng.integers(0, 2, n)
            magnitude = int(rng.integers(0, 1 << precision.magnitude_bits))
            accumulators += magnitude * ((1 - 2 * signs).reshape(g_o, g_k) @ x)
        busy = -(-n // lanes) if dense else 1
        for left in range(busy, 0, -1):
            cycle(dense, int(left == busy), word, left)
    cycle(0, 0, word, 0)
    inputs["live_set"][-1] = 1  # shows the set that has accumulated
    return _Stimulus(inputs, _packed(accumulators, precision.accumulator_bits))


def _bench(module: dict[str, Any], stimulus: _Stimulus) -> str:
    """A test bench: inputs change a quarter of a period after the clock's edge; waves begin after the clearing."""
    ports = module["ports"]
    lines = ["`timescale 1ns/10ps", "module bench;", "reg clock = 0;"]
    for name, port in ports.items():
        width = len(port["bits"])
        kind = "wire" if port["direction"] == "output" else "reg"
        if name != "clock":
            lines.append(f"{kind} [{width - 1}:0] {name};")
    lines.append(f"pe dut({', '.join(f'.{name}({name})' for name in ports)});")
    lines += [f"always #{_PERIOD_NS // 2} clock = !clock;", "initial begin", '$dumpfile("waves.vcd");']
    cycles = len(stimulus.inputs["dense"])
    for cycle in range(cycles):
        if cycle == 3:
            lines.append("$dumpvars(1, dut);")
        lines.append(f"#{_PERIOD_NS // 4};")
        for name, values in stimulus.inputs.items():
            if cycle == 0 or values[cycle] != values[cycle - 1]:
                lines.append(f"{name} = {len(ports[name]['bits'])}'h{values[cycle]:x};")
        lines.append("@(posedge clock);" if cycle < cycles - 1 else f"#{_PERIOD_NS // 4};")
    lines += ['$display("drained %h", drained);', "$finish;", "end", "endmodule"]
    return "\n".join(lines) + "\n"


def _simulate(work: Path, models: Path, glitches: bool) -> int:
    for command in (
        [
            "iverilog",
            *(["-gspecify"] if glitches else []),
            "-g2012",
            "-o",
            "bench",
            "bench.v",
            "netlist.v",
            str(models),
        ],
        ["vvp", "-n", "bench"],
    ):
        result = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SynthesisError(f"{command[0]}: {(result.stderr or result.stdout).strip()[-500:]}")
    found = re.search(r"drained ([0-9a-f]+)", result.stdout)
    if found is None:
        raise SynthesisError(f"pe: the netlist's accumulators are undefined: {result.stdout.strip()[-200:]}")
    return int(found[1], 16)


def _changes(waves: Path) -> Iterator[tuple[str, int, bool]]:
    """``(net, bit, rises)`` of every change between 0 and 1 in a VCD file."""
    names: dict[str, tuple[str, int]] = {}
    values: dict[str, str] = {}
    with waves.open() as file:
        for line in file:
            if line.startswith("$var"):
                _, _, width, code, name, *_ = line.split()
                names[code] = (name.removeprefix("\\"), int(width))
            elif line[0] in "01xz":
                code, value = line[1:].strip(), line[0]
                before = values.get(code, "x")
                values[code] = value
                if before != value and before in "01" and value in "01":
                    yield names[code][0], 0, value == "1"
            elif line[0] == "b":
                value, code = line[1:].split()
                name, bits = names[code]
                value = value.rjust(bits, value[0] if value[0] in "xz" else "0")
                before = values.get(code, "x" * bits)
                values[code] = value
                if before != value:
                    for index in range(bits):
                        old, new = before[bits - 1 - index], value[bits - 1 - index]
                        if old != new and old in "01" and new in "01":
                            yield name, index, new == "1"


def _energy(module: dict[str, Any], library: Library, waves: Path) -> tuple[float, float, float]:
    """``(clock pJ, other pJ, toggles)`` of all changes of a VCD file."""
    energies: dict[int, list[float]] = {}  # of a net: one rise, one fall
    for cell in module["cells"].values():
        for pin, bits in cell["connections"].items():
            described = library.cells[cell["type"]].pins[pin]
            for bit in bits:
                if isinstance(bit, int) and not described.is_output:
                    costs = energies.setdefault(bit, [0.0, 0.0])
                    for edge in (0, 1):
                        costs[edge] += described.capacitance_pf * library.voltage_v**2 / 2
                        if described.energy_pj is not None:
                            costs[edge] += described.energy_pj[edge].at(0.0)
    loads: dict[int, float] = {}
    for cell in module["cells"].values():
        for pin, bits in cell["connections"].items():
            for bit in bits:
                loads[bit] = loads.get(bit, 0.0) + library.cells[cell["type"]].pins[pin].capacitance_pf
    for cell in module["cells"].values():
        for pin, bits in cell["connections"].items():
            described = library.cells[cell["type"]].pins[pin]
            for bit in bits:
                if described.is_output and described.energy_pj is not None:
                    costs = energies.setdefault(bit, [0.0, 0.0])
                    for edge in (0, 1):
                        costs[edge] += described.energy_pj[edge].at(loads[bit])
    nets: dict[tuple[str, int], int] = {}
    for name, net in module["netnames"].items():
        for index, bit in enumerate(net["bits"]):
            if isinstance(bit, int):
                nets[name, index] = bit
    chosen = {bit: key for key, bit in nets.items()}  # one name of each net
    wanted = {key: energies[bit] for bit, key in chosen.items() if bit in energies}
    clock = nets["clock", 0]
    clock_key = chosen[clock]
    clock_pj = logic_pj = 0.0
    toggles = 0
    for name, index, rises in _changes(waves):
        if (name, index) not in wanted:
            continue
        energy_pj = wanted[name, index][0 if rises else 1]
        if (name, index) == clock_key:
            clock_pj += energy_pj
        else:
            logic_pj += energy_pj
            toggles += 1
    return clock_pj, logic_pj, float(toggles)
