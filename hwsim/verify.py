"""Verification: the RTL of the array against the kernel, the plain-Python oracle and a NumPy integer reference.

The references, the comparison, and the shrinking of a layer that differs. Layers and machines are in
`hwsim.verification_layers`, the design itself and its harness in `hwsim.rtl_simulator`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwsim.causal import NO_STALLS, Stalls, causal_timeline
from hwsim.errors import FitError, InputError
from hwsim.layer import Layer
from hwsim.lowering import effective_types, lower_machine
from hwsim.machine import Machine, parse_machine
from hwsim.oracle import COUNTERS, oracle_pass
from hwsim.program import Program, layer_program
from hwsim.rtl_simulator import Mismatch, RtlResult, RtlSimulator
from hwsim.simulator import LayerRun, run_layer
from hwsim.verification_layers import (
    VERIFICATION_MACHINES,
    LayerSpec,
    random_machine,
    random_spec,
    verification_machine,
)
from hwsim.version import MODEL_VERSION

__all__ = [
    "VERIFICATION_MACHINES",
    "Failure",
    "LayerSpec",
    "Summary",
    "check",
    "check_layer",
    "compare_transfers",
    "load_reproducer",
    "load_results",
    "pass_order",
    "random_machine",
    "random_spec",
    "reference_outputs",
    "result_line",
    "segment_counters",
    "shrink",
    "verification_machine",
    "verify_machine",
]

_UNWRITTEN = -(2**31)

# --- The references ---------------------------------------------------------------------------------------------------------


def reference_outputs(layer: Layer, inputs: NDArray[np.int64], machine: Machine) -> NDArray[np.int64]:
    """``int64[out_channels, n]``: the layer in Python's exact integers, from the weights and not from the image."""
    bits = machine.precision.accumulator_bits
    weights = layer.integer_matrix().astype(np.int64)
    # |sums| stay far below 2**63 for every format that a machine can have and layers of this size.
    sums = np.concatenate([weights[group] @ inputs[group] for group in range(weights.shape[0])])
    wrapped = ((sums + 2 ** (bits - 1)) & (2**bits - 1)) - 2 ** (bits - 1)
    requantizer = layer.weights.requantizer if layer.weights is not None else None
    half_range = 2 ** (machine.precision.activation_bits - 1)
    low, high = -half_range, half_range - 1
    outputs = np.empty_like(wrapped)
    for channel, row in enumerate(wrapped.tolist()):
        bias, scale, shift, relu = 0, 1, 0, False
        if requantizer is not None:
            bias, scale = int(requantizer.bias[channel]), int(requantizer.scale[channel])
            shift, relu = int(requantizer.shift[channel]), requantizer.relu
        half = 1 << (shift - 1) if shift else 0
        for place, acc in enumerate(row):
            y = min(max(((acc + bias) * scale + half) >> shift, low), high)
            outputs[channel, place] = max(y, 0) if relu else y
    return outputs


def segment_counters(run: LayerRun, machine: Machine) -> NDArray[np.int64]:
    """``int64[G, T, segments, 13]``: every segment of one pass of each row tile by the plain-Python oracle."""
    types = effective_types(run.layer.types, machine)
    config = lower_machine(machine).pass_config
    groups, tiles, segments, _ = run.counters.shape
    out = np.empty_like(run.counters)
    for group in range(groups):
        for tile in range(tiles):
            rows = run.order[group, tile * config.rows : (tile + 1) * config.rows]
            for segment in range(segments):
                begin = segment * config.segment_words
                counted = oracle_pass(
                    types[group, rows].tolist(),
                    rows=config.rows,
                    skip_window=config.skip_window,
                    queue_depth=config.queue_depth,
                    banks=config.banks,
                    unified_cycles=config.unified_cycles,
                    dense_cycles=config.dense_cycles,
                    begin=begin,
                    end=min(begin + config.segment_words, types.shape[2]),
                )
                out[group, tile, segment] = [counted[name] for name in COUNTERS]
    return out


def pass_order(program: Program, columns: int) -> Iterator[tuple[int, int]]:
    """Group and row tile of every pass in order."""
    for step in program.steps:
        for _ in range(0, step.positions, columns):
            for tile in range(step.first_tile, step.first_tile + step.tiles):
                yield step.group, tile


# --- The comparison ---------------------------------------------------------------------------------------------------------


def check_layer(
    simulator: RtlSimulator, layer: Layer, inputs: NDArray[np.int64], with_stalls: Stalls = NO_STALLS
) -> RtlResult:
    """Run a layer through the RTL and compare it with oracle, kernel, mapper and integer reference.

    Raises
    ------
    FitError, InputError
        The layer does not fit the machine or the design.
    Mismatch
        At the first difference, with where it is and both values.
    """
    machine = simulator.machine
    run = run_layer(layer, machine)
    result = simulator.run(run, inputs, with_stalls)
    where = f"machine {machine.name}, layer {layer.name}"
    _compare_counters(segment_counters(run, machine), run.counters, f"{where}: kernel against oracle")
    program = layer_program(run, machine)
    passes = pass_order(program, machine.array.columns)
    expected = np.concatenate([run.counters[group, tile] for group, tile in passes])
    _compare_counters(expected, result.counters, f"{where}: RTL against oracle")
    _compare_times(run, machine, program, with_stalls, result, where)
    reference = reference_outputs(run.layer, inputs, machine)
    if not np.array_equal(reference, result.outputs):
        channel, place = (int(i) for i in np.argwhere(reference != result.outputs)[0])
        found = int(result.outputs[channel, place])
        raise Mismatch(
            f"{where}: output [{channel}, {place}] is {'missing' if found == _UNWRITTEN else found} in RTL, "
            f"{int(reference[channel, place])} by the integer reference"
        )
    return result


def _compare_times(
    run: LayerRun, machine: Machine, program: Program, with_stalls: Stalls, result: RtlResult, where: str
) -> None:
    """The RTL's steps against the causal model; the mapper's against the same model without its waits."""
    expected = causal_timeline(run, machine, program, with_stalls).ends
    if result.ends != expected:
        step = next(
            (i for i, pair in enumerate(zip(expected, result.ends, strict=False)) if pair[0] != pair[1]),
            min(len(expected), len(result.ends)),
        )
        found = result.ends[step] if step < len(result.ends) else "never"
        raise Mismatch(
            f"{where}: end {step} of {len(expected)} (loads, steps, store) in cycle {found} in RTL, "
            f"expected {expected[step : step + 1]}"
        )
    ideal = causal_timeline(run, machine, program, wait_for_inputs=False, wait_for_drains=False).ends
    cost = run.mapping
    load = int(cost.column("load_weight_cycles")[0] + cost.column("load_input_cycles")[0])
    formula = [load, *(load + np.cumsum(cost.column("step_cycles"))).tolist(), cost.latency_cycles]
    if list(ideal) != formula:
        step = next(i for i, pair in enumerate(zip(ideal, formula, strict=True)) if pair[0] != pair[1])
        raise Mismatch(
            f"{where}: end {step} (loads, steps, store) in cycle {formula[step]} by the mapper, "
            f"{ideal[step]} in plain Python"
        )
    compare_transfers(run, program, where)


def compare_transfers(run: LayerRun, program: Program, where: str) -> None:
    """Cycles and bytes of every step's transfers: the compiled cost model against the list of them."""

    def bus_bytes(sizes: list[int]) -> int:
        return sum(-(-size // program.burst_bytes) * program.burst_bytes for size in sizes)

    for index, step in enumerate(program.steps):
        for name, transfers in (
            ("load_weight", step.weights),
            ("load_input", step.inputs),
            ("store", (step.store,)),
        ):
            found = (program.cycles(transfers), bus_bytes([transfer.size_bytes for transfer in transfers]))
            mapped = tuple(int(run.mapping.column(f"{name}_{unit}")[index]) for unit in ("cycles", "bytes"))
            if found != mapped:
                raise Mismatch(
                    f"{where}: step {index}, {name} is {mapped} (cycles, bytes) by the mapper, {found} transfer by transfer"
                )


def _compare_counters(expected: NDArray[np.int64], found: NDArray[np.int64], where: str) -> None:
    if expected.shape != found.shape:
        raise Mismatch(f"{where}: {found.shape[0]} segments, {expected.shape[0]} expected")
    if not np.array_equal(expected, found):
        place = tuple(int(i) for i in np.argwhere(expected != found)[0])
        raise Mismatch(
            f"{where}: {COUNTERS[place[-1]]} of segment {list(place[:-1])} is {int(found[place])}, "
            f"{int(expected[place])} expected"
        )


def check(simulator: RtlSimulator, spec: LayerSpec) -> RtlResult | None:
    """`check_layer` of a random layer; None where it does not fit the machine's memories (nothing is run)."""
    machine = simulator.machine
    layer = spec.layer(machine)
    try:
        if run_layer(layer, machine).mapping.weight_residence == "streamed":
            return None
    except FitError:
        return None
    return check_layer(simulator, layer, spec.inputs(machine), spec.stalls)


def shrink(spec: LayerSpec, fails: Callable[[LayerSpec], bool]) -> LayerSpec:
    """A smaller layer that still fails: sizes are halved and lowered one by one, extras switched off, while it does."""
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(spec):
            if fails(smaller):
                spec, progress = smaller, True
                break
    return spec


def _smaller(spec: LayerSpec) -> Iterator[LayerSpec]:
    plainer = (
        replace(spec, stalls=NO_STALLS),
        replace(spec, groups=1),
        replace(spec, kernel=1),
        replace(spec, stride=1),
        replace(spec, relu=False),
        replace(spec, linear=False),
        *(replace(spec, n=size) for size in _smaller_sizes(spec.n)),
        *(replace(spec, height=size) for size in _smaller_sizes(spec.height)),
        *(replace(spec, m=size) for size in _smaller_sizes(spec.m)),
        *(replace(spec, k=size) for size in _smaller_sizes(spec.k)),
    )
    yield from (candidate for candidate in plainer if candidate != spec)


def _smaller_sizes(size: int) -> list[int]:
    return [smaller for smaller in dict.fromkeys((1, size // 2, size - 1)) if 1 <= smaller < size]


@dataclass(frozen=True)
class Summary:
    """What one machine's verification compared.

    Attributes
    ----------
    machine : str
    layers, skipped : int
        Layers that were run; layers that do not fit the machine's memories.
    steps, segments, cycles, outputs : int
        Steps, segments with 13 counters each, cycles of the design, output integers: all equal.
    waiting, wait_cycles : int
        Layers that took longer than the formula because hardware must wait for its data, and by how much.
    seconds, rtl_seconds : float
        Altogether, with the build; in the simulation of the design.
    """

    machine: str
    layers: int
    skipped: int
    steps: int
    segments: int
    cycles: int
    outputs: int
    waiting: int
    wait_cycles: int
    seconds: float
    rtl_seconds: float


class Failure(Mismatch):
    """A difference with the smallest layer found that shows it.

    Attributes
    ----------
    machine : Machine
    spec : LayerSpec
    """

    def __init__(self, machine: Machine, spec: LayerSpec, problem: str) -> None:
        super().__init__(problem)
        self.machine = machine
        self.spec = spec

    def to_json(self) -> str:
        """The reproducer: what `load_reproducer` reads."""
        data = {
            "machine": self.machine.model_dump(mode="json"),
            "layer": dataclasses.asdict(self.spec),
            "problem": str(self),
        }
        return json.dumps(data, indent=2) + "\n"


def verify_machine(machine: Machine, layers: int, seed: int) -> Summary:
    """Random layers ``seed … seed + layers - 1`` through one machine's design.

    Raises
    ------
    Failure
        At the first difference, shrunk.
    """
    begun = time.perf_counter()
    ran: list[tuple[int, int, int, int, int]] = []
    with RtlSimulator(machine) as simulator:
        for index in range(seed, seed + layers):
            spec = random_spec(index)
            try:
                result = check(simulator, spec)
            except Mismatch as problem:
                raise _shrunk(machine, spec, str(problem)) from None
            if result is not None:
                wait = 0
                if replace(spec.stalls, seed=0) == NO_STALLS:
                    wait = (
                        result.layer_cycles - run_layer(spec.layer(machine), machine).mapping.latency_cycles
                    )
                sizes = (result.counters.shape[0], result.layer_cycles, result.outputs.size)
                ran.append((len(result.ends) - 2, *sizes, wait))
        spent = simulator.rtl_seconds
    steps, segments, cycles, outputs, waits = np.array(ran, np.int64).reshape(-1, 5).T
    return Summary(
        machine=machine.name,
        layers=len(ran),
        skipped=layers - len(ran),
        steps=int(steps.sum()),
        segments=int(segments.sum()),
        cycles=int(cycles.sum()),
        outputs=int(outputs.sum()),
        waiting=int(np.count_nonzero(waits)),
        wait_cycles=int(waits.sum()),
        seconds=time.perf_counter() - begun,
        rtl_seconds=spent,
    )


def _shrunk(machine: Machine, spec: LayerSpec, problem: str) -> Failure:
    """The smallest layer that a newly started design also fails on; the layer itself if it needs those before it."""

    def difference(candidate: LayerSpec) -> str | None:
        try:
            with RtlSimulator(machine) as simulator:
                check(simulator, candidate)
        except Mismatch as found:
            return str(found)
        return None

    if difference(spec) is None:
        return Failure(machine, spec, f"{problem} (only after the layers of the seeds before {spec.seed})")
    smallest = shrink(spec, lambda candidate: difference(candidate) is not None)
    return Failure(machine, smallest, difference(smallest) or problem)


def load_reproducer(path: Path) -> tuple[Machine, LayerSpec]:
    """Machine and layer of a file that `Failure.to_json` wrote.

    Raises
    ------
    InputError
        Not such a file.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        layer = dict(data["layer"])
        spec = LayerSpec(**{**layer, "stalls": Stalls(**layer["stalls"])})
        description = data["machine"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), f"not a reproducer of hwsim verify: {error}") from None
    return parse_machine(description, str(path)), spec


def result_line(summary: Summary, layers: int, seed: int, key: str) -> str:
    """A finished machine as a line of a file of results; ``key`` is that of the design."""
    data = {
        "version": MODEL_VERSION,
        "design": key,
        "layers_asked": layers,
        "seed": seed,
        **dataclasses.asdict(summary),
    }
    return json.dumps(data) + "\n"


def load_results(path: Path, key: str) -> dict[tuple[str, int, int], Summary]:
    """Finished machines of a file of results, by name, layers and seed; those of another design or version are left out.

    Raises
    ------
    InputError
        Not such a file. A last line that was cut off is ignored.
    """
    results = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            data = json.loads(line)
            is_current = (data.pop("version"), data.pop("design")) == (MODEL_VERSION, key)
            asked = (data["machine"], data.pop("layers_asked"), data.pop("seed"))
            summary = Summary(**data)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(str(path), f"line {number} is none of hwsim verify: {error}") from None
        if is_current:
            results[asked] = summary
    return results
