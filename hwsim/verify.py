"""Verification: the RTL of the array against the kernel, the plain-Python oracle and a NumPy integer reference.

Random layers in a few integers each, the machines that they run on, the references, the comparison, and the shrinking of one
that differs. The design itself and its harness are in `hwsim.rtl_simulator`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwsim.causal import NO_STALLS, Stalls, causal_timeline
from hwsim.errors import FitError, InputError
from hwsim.layer import DENSE, UNIFIED, Layer, LayerShape, QuantizedWeights, Requantizer, random_types
from hwsim.lowering import effective_types, lower_machine
from hwsim.machine import Machine, load_machine, parse_machine
from hwsim.oracle import COUNTERS, oracle_pass
from hwsim.program import Program, layer_program
from hwsim.rtl_simulator import Mismatch, RtlResult, RtlSimulator
from hwsim.simulator import LayerRun, run_layer

__all__ = [
    "VERIFICATION_MACHINES",
    "Failure",
    "LayerSpec",
    "Summary",
    "check",
    "check_layer",
    "load_reproducer",
    "pass_order",
    "random_spec",
    "reference_outputs",
    "segment_counters",
    "shrink",
    "verification_machine",
    "verify_machine",
]

_UNWRITTEN = -(2**31)

# --- The layers and machines that are verified ------------------------------------------------------------------------------

_SMALL = {
    "array.rows": 4,
    "array.columns": 3,
    "array.block": [2, 2],
    "array.multipliers": 2,
    "array.sign_adders": 4,
    "front_end.skip_window": 3,
    "front_end.queue_depth": 2,
    "operand_store.banks": 4,
    "operand_store.size_kib": 1,
    "weights.type_kib": 4,
    "weights.sign_kib": 16,
    "weights.magnitude_kib": 16,
    "weights.dense_kib": 64,
    "output.words_per_cycle": 6,
}

_SMALL_MEMORIES = {
    "weights.type_kib": 0.125,
    "weights.sign_kib": 0.25,
    "weights.magnitude_kib": 0.5,
    "weights.dense_kib": 1.75,
    "activation_buffer.size_kib": 0.75,
    "output.size_kib": 0.1875,
}

VERIFICATION_MACHINES: dict[str, dict[str, object]] = {
    "small": {},
    "four-by-four": {
        "array.columns": 2,
        "array.block": [4, 4],
        "array.multipliers": 4,
        "array.sign_adders": 16,
        "output.words_per_cycle": 32,
        "weights.dense_kib": 128,
    },
    "one-row": {"array.rows": 1, "array.columns": 1, "array.block": [1, 1], "operand_store.banks": 1},
    "one-bank": {"operand_store.banks": 1, "array.rows": 5},
    "no-lookahead": {"front_end.skip_window": 1, "front_end.queue_depth": 1, "operand_store.banks": 3},
    "always-one-cycle": {
        "array.multipliers": 4,
        "weights.dense_port_bits": 64,
        "weights.sign_port_bits": 64,
        "front_end.queue_depth": 1,
        "front_end.skip_window": 8,
    },
    "seventeen-cycles": {
        "array.block": [1, 17],
        "array.multipliers": 1,
        "array.sign_adders": 1,
        "operand_store.size_kib": 2,
        "array.columns": 2,
    },
    "slow-drain": {"output.words_per_cycle": 1, "array.columns": 5, "output.size_kib": 0.25},
    "segments": {"operand_store.size_kib": 0.0390625, "operand_store.banks": 2, "output.size_kib": 0.125},
    "wide-fill": {
        "array.rows": 3,
        "array.block": [3, 2],
        "array.multipliers": 5,
        "array.sign_adders": 4,
        "operand_store.banks": 3,
        "operand_store.fill_words_per_cycle": 4,
        "operand_store.size_kib": 0.125,
        "weights.dense_port_bits": 20,
        "weights.sign_port_bits": 7,
        "activation_buffer.size_kib": 0.25,
    },
    "sorted": {"features.row_balance": "sorted", "array.rows": 3, "front_end.skip_window": 2},
    "dense": {"features.skip_pruned": False, "features.unified_path": False},
    "skip-only": {"features.unified_path": False, "features.row_balance": "sorted"},
    "unified-only": {"features.skip_pruned": False, "array.block": [4, 1], "array.multipliers": 1},
    "odd-formats": {
        "precision.weight_bits": 3,
        "precision.magnitude_bits": 11,
        "precision.activation_bits": 5,
        "precision.accumulator_bits": 13,
        "weights.dense_port_bits": 7,
        "weights.sign_port_bits": 5,
        "array.block": [1, 4],
        "operand_store.size_kib": 0.25,
    },
    "deep-queue": {"front_end.queue_depth": 33, "front_end.skip_window": 20, "operand_store.banks": 7},
    # Memories so small that weights, inputs and outputs come and go in groups, on channels slow and fast.
    "groups": {**_SMALL_MEMORIES, "dram.gb_per_s": 1.6},
    "groups-sorted": {
        **_SMALL_MEMORIES,
        "features.row_balance": "sorted",
        "array.rows": 3,
        "dram.gb_per_s": 0.7,
        "dram.burst_bytes": 8,
        "operand_store.size_kib": 0.0625,
    },
    "groups-wide-channel": {
        **_SMALL_MEMORIES,
        "array.rows": 2,
        "array.columns": 2,
        "array.block": [1, 3],
        "dram.gb_per_s": 25.6,
        "output.words_per_cycle": 1,
        "precision.activation_bits": 6,
    },
}
"""Machines of the verification: what each changes of a small one. Every corner of the contract is some machine's or layer's."""


@cache
def verification_machine(name: str) -> Machine:
    """A machine of `VERIFICATION_MACHINES` by its name."""
    return load_machine("msa-8x8").with_fields({**_SMALL, **VERIFICATION_MACHINES[name], "name": name})


@dataclass(frozen=True)
class LayerSpec:
    """A random layer in a few integers, so that a failing one can be shrunk and written down.

    Attributes
    ----------
    m, k, n, groups : int
        Output channels and input channels of a group; output columns, or vectors.
    height, kernel, stride : int
        Output rows; an odd kernel with as much padding as keeps sizes at stride 1.
    pruned, unified : float
        Shares of block types.
    seed : int
        Of types, weights, input and requantiser.
    linear : bool
        Every column an output row of its own (only with one group).
    relu : bool
    stalls : Stalls
    """

    m: int
    k: int
    n: int
    groups: int = 1
    height: int = 1
    kernel: int = 1
    stride: int = 1
    pruned: float = 0.4
    unified: float = 0.3
    seed: int = 0
    linear: bool = False
    relu: bool = False
    stalls: Stalls = NO_STALLS

    def layer(self, machine: Machine) -> Layer:
        """The layer with random types, weights and requantiser for a machine."""
        rng = np.random.default_rng([self.seed, 1])
        if self.linear and self.groups == 1:
            shape = LayerShape("random", "linear", self.k, self.m, batch=self.n)
        else:
            shape = LayerShape(
                name="random",
                kind="conv",
                in_channels=self.k * self.groups,
                out_channels=self.m * self.groups,
                input_size=tuple((size - 1) * self.stride + 1 for size in (self.height, self.n)),
                kernel=(self.kernel, self.kernel),
                stride=(self.stride, self.stride),
                padding=((self.kernel // 2, self.kernel // 2),) * 2,
                dilation=(1, 1),
                groups=self.groups,
            )
        block = machine.array.block
        types = random_types(shape, block, self.pruned, self.unified, rng)
        return Layer(
            shape,
            block,
            types,
            _random_weights(shape, block, types, machine, self._requantizer(machine), rng),
        )

    def inputs(self, machine: Machine) -> NDArray[np.int64]:
        """``int64[groups, k, n]``: random activations of this layer's amplitude, its extremes included."""
        low, high = _signed_range(self._amplitude_bits(machine))
        rng = np.random.default_rng([self.seed, 2])
        shape = self.layer(machine).shape
        values = rng.integers(low, high + 1, (shape.groups, shape.k, shape.n))
        return np.where(rng.random(values.shape) < 0.1, low, values)

    def _requantizer(self, machine: Machine) -> Requantizer:
        """Mostly such that results are neither all 0 nor all clamped; some of every kind that the formats allow."""
        rng = np.random.default_rng([self.seed, 5])
        channels = self.m * self.groups
        scale = rng.choice([-1, 1], channels) * rng.integers(1, 30, channels)
        precision = machine.precision
        widest = precision.magnitude_bits if self.unified else precision.weight_bits
        bits = self._amplitude_bits(machine) + widest + math.log2(self.k * self.kernel**2) / 2
        beyond = max(min(bits, precision.accumulator_bits) - precision.activation_bits, 0)
        # In a fifth of the channels the lowest bit of the sum moves the result.
        dropped = np.where(rng.random(channels) < 0.2, 0, beyond + rng.integers(-3, 3, channels))
        shift = np.clip(dropped + np.log2(np.abs(scale)), 0, 48).astype(np.int64)
        bias = rng.integers(-30, 30, channels)
        odd = rng.random(channels) < 0.1
        return Requantizer(
            np.where(odd, rng.integers(-(2**31), 2**31, channels), bias).astype(np.int32),
            np.where(odd, rng.integers(-(2**15), 2**15, channels), scale).astype(np.int16),
            np.where(odd, rng.integers(0, 256, channels), shift).astype(np.uint8),
            self.relu,
        )

    def _amplitude_bits(self, machine: Machine) -> int:
        """Small inputs make small sums, of which the requantiser lets every bit through."""
        return 1 + int(np.random.default_rng([self.seed, 4]).integers(machine.precision.activation_bits))


def _random_weights(
    shape: LayerShape,
    block: tuple[int, int],
    types: NDArray[np.uint8],
    machine: Machine,
    requantizer: Requantizer,
    rng: np.random.Generator,
) -> QuantizedWeights:
    precision = machine.precision
    full = (shape.groups, shape.m, shape.k)
    low, high = _signed_range(precision.weight_bits)
    # A unified block that runs as a dense one must fit the dense format.
    top = 2**precision.magnitude_bits - 1
    if not machine.features.unified_path:
        top = min(top, high)
    per_weight = np.repeat(np.repeat(types, block[0], 1), block[1], 2)[:, : shape.m, : shape.k]
    dense = np.where(rng.random(full) < 0.1, low, rng.integers(low, high + 1, full))
    magnitudes = np.where(rng.random(types.shape) < 0.2, top, rng.integers(0, top + 1, types.shape))
    return QuantizedWeights(
        dense=np.where(per_weight == DENSE, dense, 0).astype(np.int16),
        signs=np.where(per_weight == UNIFIED, rng.integers(0, 2, full), 0).astype(np.uint8),
        magnitudes=np.where(types == UNIFIED, magnitudes, 0).astype(np.uint16),
        weight_bits=precision.weight_bits,
        magnitude_bits=precision.magnitude_bits,
        step_size=1.0,
        requantizer=requantizer,
    )


def _signed_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def random_spec(seed: int) -> LayerSpec:
    """A spec for a seed: sizes, ragged on every side, corners of the ratios, stalling ports in every third."""
    rng = np.random.default_rng([seed, 3])
    shares = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.1), (0.4, 0.3))
    pruned, unified = shares[int(rng.integers(len(shares)))]
    load, fill, drain = rng.integers(0, 200, 3).tolist() if rng.random() < 1 / 3 else (0, 0, 0)
    kernel, height = (3, int(rng.integers(1, 6))) if rng.random() < 1 / 3 else (1, 1)
    return LayerSpec(
        m=int(rng.integers(1, 28)),
        k=int(rng.integers(1, 90 // kernel**2)),
        n=int(rng.integers(1, 12)) if kernel == 1 else int(rng.integers(1, 8)),
        groups=int(rng.choice([1, 1, 1, 2, 3])),
        height=height,
        kernel=kernel,
        stride=int(rng.integers(1, 3)),
        pruned=pruned,
        unified=unified,
        seed=seed,
        linear=kernel == 1 and bool(rng.random() < 0.4),
        relu=bool(rng.random() < 0.3),
        stalls=Stalls(load, fill, drain, seed),
    )


# --- The references ---------------------------------------------------------------------------------------------------------


def reference_outputs(layer: Layer, inputs: NDArray[np.int64], machine: Machine) -> NDArray[np.int64]:
    """``int64[out_channels, n]``: the layer in Python's exact integers, from the weights and not from the image."""
    bits = machine.precision.accumulator_bits
    weights = layer.integer_matrix().astype(np.int64)
    # |sums| stay far below 2**63 for every format that a machine can have and layers of this size.
    sums = np.concatenate([weights[group] @ inputs[group] for group in range(weights.shape[0])])
    wrapped = ((sums + 2 ** (bits - 1)) & (2**bits - 1)) - 2 ** (bits - 1)
    requantizer = layer.weights.requantizer if layer.weights is not None else None
    low, high = _signed_range(machine.precision.activation_bits)
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
        raise Mismatch(f"{where}: end {step} of {len(expected)} (loads, steps, store) in cycle {found} in RTL, expected {expected[step:step + 1]}")
    ideal = causal_timeline(run, machine, program, wait_for_inputs=False, wait_for_drains=False).ends
    cost = run.mapping
    load = int(cost.column("load_weight_cycles")[0] + cost.column("load_input_cycles")[0])
    formula = [load, *(load + np.cumsum(cost.column("step_cycles"))).tolist(), cost.latency_cycles]
    if list(ideal) != formula:
        step = next(i for i, pair in enumerate(zip(ideal, formula, strict=True)) if pair[0] != pair[1])
        raise Mismatch(f"{where}: end {step} (loads, steps, store) in cycle {formula[step]} by the mapper, {ideal[step]} in plain Python")
    _compare_transfers(run, program, where)


def _compare_transfers(run: LayerRun, program: Program, where: str) -> None:
    """Cycles and bytes of every step's transfers: the compiled cost model against the list of them."""
    def bus_bytes(sizes: list[int]) -> int:
        return sum(-(-size // program.burst_bytes) * program.burst_bytes for size in sizes)

    for index, step in enumerate(program.steps):
        for name, transfers in (("load_weight", step.weights), ("load_input", step.inputs), ("store", (step.store,))):
            found = (program.cycles(transfers), bus_bytes([transfer.size_bytes for transfer in transfers]))
            mapped = tuple(int(run.mapping.column(f"{name}_{unit}")[index]) for unit in ("cycles", "bytes"))
            if found != mapped:
                raise Mismatch(f"{where}: step {index}, {name} is {mapped} (cycles, bytes) by the mapper, {found} transfer by transfer")


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
    segments, cycles, outputs : int
        Segments with 13 counters each, cycles of the array, output integers: all equal.
    seconds, rtl_seconds : float
        Altogether, without the build; in the simulation of the design.
    """

    machine: str
    layers: int
    skipped: int
    segments: int
    cycles: int
    outputs: int
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
    ran = segments = cycles = outputs = 0
    with RtlSimulator(machine) as simulator:
        for index in range(seed, seed + layers):
            spec = random_spec(index)
            try:
                result = check(simulator, spec)
            except Mismatch as problem:
                raise _shrunk(machine, spec, str(problem)) from None
            if result is not None:
                ran += 1
                segments += result.counters.shape[0]
                cycles += result.layer_cycles
                outputs += result.outputs.size
        spent = simulator.rtl_seconds
    return Summary(
        machine.name, ran, layers - ran, segments, cycles, outputs, time.perf_counter() - begun, spent
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
