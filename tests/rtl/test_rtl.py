"""The RTL against oracle, kernel, mapper and integer reference: to the cycle and to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hwsim import rtl_simulator, verify
from hwsim.causal import Stalls, causal_timeline, stalls, step_timing
from hwsim.cli import cli
from hwsim.errors import FitError, InputError
from hwsim.layer import Layer, LayerShape
from hwsim.lowering import lower_machine
from hwsim.machine import load_machine
from hwsim.program import Program, input_matrix, layer_program
from hwsim.rtl_simulator import (
    Mismatch,
    RtlSimulator,
    build,
    find_verilator,
    rtl_parameters,
    unified_in_time,
)
from hwsim.simulator import run_layer
from hwsim.verify import (
    VERIFICATION_MACHINES,
    LayerSpec,
    check,
    check_layer,
    load_reproducer,
    random_spec,
    reference_outputs,
    shrink,
    verification_machine,
    verify_machine,
)


def _missing() -> str | None:
    """Why the design cannot be built here."""
    try:
        find_verilator()
    except InputError as error:
        return str(error)
    for tool in ("g++", "make", "perl"):
        if shutil.which(tool) is None:
            return f"{tool} is not there, which a build by Verilator needs"
    return None


REASON = _missing()
needs_rtl = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FAST = ("small", "groups-sorted", "odd-formats")
"""Machines that every run of the tests builds; the others are for `make test-slow` and `hwsim verify`."""


@pytest.fixture(scope="module")
def simulators() -> Iterator[dict[str, RtlSimulator]]:
    """The fast machines' designs, running."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, map(verification_machine, FAST)))
    running = {name: RtlSimulator(verification_machine(name)) for name in FAST}
    yield running
    for simulator in running.values():
        simulator.close()


@st.composite
def specs(draw: st.DrawFn) -> LayerSpec:
    """Layers that shrink to one weight and one position on ports that never stall."""
    pruned = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    shares = st.sampled_from([0, 0, 60, 180])
    return LayerSpec(
        m=draw(st.integers(1, 30)),
        k=draw(st.integers(1, 40)),
        n=draw(st.integers(1, 9)),
        groups=draw(st.integers(1, 3)),
        height=draw(st.integers(1, 3)),
        kernel=draw(st.sampled_from([1, 1, 3])),
        stride=draw(st.integers(1, 2)),
        pruned=pruned,
        unified=draw(st.sampled_from([share for share in (0.0, 0.1, 0.7, 1.0) if share + pruned <= 1])),
        seed=draw(st.integers(0, 2**16)),
        linear=draw(st.booleans()),
        relu=draw(st.booleans()),
        stalls=Stalls(draw(shares), draw(shares), draw(shares), draw(st.integers(0, 99))),
    )


@needs_rtl
@pytest.mark.parametrize("name", FAST)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=specs())
def test_random_layers_are_equal_to_the_cycle_and_to_the_bit(
    simulators: dict[str, RtlSimulator], name: str, spec: LayerSpec
) -> None:
    check(simulators[name], spec)


CORNERS = {
    "one weight": LayerSpec(1, 1, 1, pruned=0, unified=0),
    "fewer rows than block rows, in groups": LayerSpec(60, 40, 4, pruned=0, unified=0.5),
    "halo between column groups": LayerSpec(5, 9, 7, height=6, kernel=3),
    "strided, a stalling load port": LayerSpec(
        7, 4, 5, height=4, kernel=3, stride=2, stalls=Stalls(load=150)
    ),
    "all pruned": LayerSpec(17, 23, 5, pruned=1, unified=0),
    "all unified": LayerSpec(17, 23, 5, pruned=0, unified=1),
    "all dense": LayerSpec(17, 23, 5, pruned=0, unified=0),
    "fewer block rows than rows": LayerSpec(2, 40, 4),
    "ragged last row tile": LayerSpec(19, 7, 4),
    "many column tiles, slow ports": LayerSpec(9, 21, 11, stalls=Stalls(100, 200, 200, 7)),
    "depthwise": LayerSpec(1, 9, 6, groups=8, pruned=0, unified=0.5),
    "a vector at a time": LayerSpec(12, 30, 7, linear=True, relu=True),
}


@needs_rtl
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("corner", CORNERS)
def test_corners(simulators: dict[str, RtlSimulator], name: str, corner: str) -> None:
    result = check(simulators[name], CORNERS[corner])
    assert result is not None
    assert result.outputs.size


@pytest.mark.parametrize("name", ["small", "four-by-four", "odd-formats"])
def test_random_layers_show_what_the_accumulators_hold(name: str) -> None:
    """A clamped or an empty result hides faults: most must be neither, and many must show the lowest bit of the sum."""
    machine = verification_machine(name)
    low, high = (
        -(2 ** (machine.precision.activation_bits - 1)),
        2 ** (machine.precision.activation_bits - 1) - 1,
    )
    shown = total = fine = 0
    for seed in range(40):
        spec = replace(random_spec(seed), relu=False, pruned=0.3, unified=0.4)
        outputs = reference_outputs(spec.layer(machine), spec.inputs(machine), machine)
        weights = spec.layer(machine).weights
        assert weights is not None
        assert weights.requantizer is not None
        open_range = (outputs != 0) & (outputs > low) & (outputs < high)
        exact = np.abs(weights.requantizer.scale.astype(int)) >> weights.requantizer.shift.clip(0, 30) > 0
        shown += int(open_range.sum())
        fine += int(open_range[exact].sum())
        total += outputs.size
    assert shown > 0.3 * total
    # 0.57 % with accumulators of 13 bits, 1 % with others: tens of outputs in the layers that a machine is verified with.
    assert fine > 0.005 * total


@needs_rtl
def test_a_stalling_load_port_stretches_the_loads(simulators: dict[str, RtlSimulator]) -> None:
    quiet = check(simulators["small"], LayerSpec(14, 33, 5, seed=3))
    stalled = check(simulators["small"], LayerSpec(14, 33, 5, seed=3, stalls=Stalls(load=190)))
    assert quiet is not None
    assert stalled is not None
    assert stalled.ends[0] > 2 * quiet.ends[0]
    assert stalled.ends[1] - stalled.ends[0] == quiet.ends[1] - quiet.ends[0]
    assert (stalled.outputs == quiet.outputs).all()


@needs_rtl
def test_steps_wait_for_their_data_and_the_model_says_for_how_long(
    simulators: dict[str, RtlSimulator],
) -> None:
    """Layers of both kinds of waiting; where there is none, the RTL takes the formula's time."""
    machine = verification_machine("groups-sorted")
    kinds = set()
    for seed in range(30):
        spec = replace(random_spec(seed), stalls=Stalls())
        result = check(simulators["groups-sorted"], spec)
        if result is None:
            continue
        timing = step_timing(run_layer(spec.layer(machine), machine), machine)
        assert result.layer_cycles == timing.causal_cycles
        assert (
            timing.causal_cycles - timing.formula_cycles
            == timing.input_wait_cycles + timing.drain_wait_cycles
        )
        assert min(timing.input_wait_cycles, timing.drain_wait_cycles) >= 0
        kinds.add((timing.input_wait_cycles > 0, timing.drain_wait_cycles > 0))
    assert kinds >= {(False, False), (True, False), (False, True)}


@needs_rtl
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("input", "had not arrived"),
        ("store", "had not drained"),
        ("address", "differ|outside|output|expected|by the"),
    ],
)
def test_a_wrong_program_is_seen(
    simulators: dict[str, RtlSimulator], monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    """The channel's own checks can fail: an input that is never loaded, outputs that do not exist, weights from elsewhere."""
    spec = LayerSpec(12, 9, 7, height=6, kernel=3)
    honest = rtl_simulator._transfer_table

    def wrong(program: Program) -> list[tuple[int, ...]]:
        table = [list(row) for row in honest(program)]
        at = {"input": 7, "store": 8, "address": 6}[fault]
        row = next(row for row in reversed(table) if row[0] == at)
        if fault == "input":
            row[4] -= 1  # a cell less arrives
        else:
            row[5] = max(row[5] - 9, 0)
        return [tuple(row) for row in table]

    monkeypatch.setattr(rtl_simulator, "_transfer_table", wrong)
    if fault == "store":
        fewer = [replace(step, outputs=step.outputs + 1) for step in program_of(spec).steps]
        monkeypatch.setattr(
            rtl_simulator,
            "layer_program",
            lambda run, machine: replace(layer_program(run, machine), steps=tuple(fewer)),
        )
    with pytest.raises(Mismatch, match=message):
        check(simulators["groups-sorted"], spec)


def program_of(spec: LayerSpec) -> Program:
    machine = verification_machine("groups-sorted")
    return layer_program(run_layer(spec.layer(machine), machine), machine)


@needs_rtl
def test_back_pressure_of_the_drain_port_stretches_the_layer(simulators: dict[str, RtlSimulator]) -> None:
    quiet = check(simulators["small"], LayerSpec(24, 4, 9, seed=5))
    stalled = check(simulators["small"], LayerSpec(24, 4, 9, seed=5, stalls=Stalls(drain=240)))
    assert quiet is not None
    assert stalled is not None
    assert stalled.layer_cycles > 2 * quiet.layer_cycles


@needs_rtl
@pytest.mark.parametrize("part", ["type", "sign", "magnitude", "dense", "channel"])
def test_a_damaged_part_of_the_image_is_seen(
    simulators: dict[str, RtlSimulator], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The comparison can fail: the reference does not look at the image."""
    spec = LayerSpec(8, 32, 6, pruned=0.25, unified=0.5, seed=11)
    machine = verification_machine("small")
    layer = spec.layer(machine)
    sizes = run_layer(layer, machine).sizes.part_bytes
    names = list(sizes)
    start = sum(sizes[name] for name in names[: names.index(part)])
    image = bytearray(rtl_simulator.memory_image(layer, machine))
    # Of the channel parameters the scales, of a stream every byte.
    for at in (
        range(start + 4, start + sizes[part], 7) if part == "channel" else range(start, start + sizes[part])
    ):
        image[at] ^= 0xFF
    monkeypatch.setattr(rtl_simulator, "memory_image", lambda *_: bytes(image))
    with pytest.raises(Mismatch):
        check(simulators["small"], spec)


@needs_rtl
def test_streamed_weights_are_refused(simulators: dict[str, RtlSimulator]) -> None:
    machine = verification_machine("groups-sorted")
    spec = LayerSpec(8, 600, 1, pruned=0, unified=0)
    assert run_layer(spec.layer(machine), machine).mapping.weight_residence == "streamed"
    with pytest.raises(InputError, match="streamed"):
        check_layer(simulators["groups-sorted"], spec.layer(machine), spec.inputs(machine))
    assert check(simulators["groups-sorted"], spec) is None


@needs_rtl
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(VERIFICATION_MACHINES) - set(FAST)))
def test_every_machine_of_the_verification(name: str) -> None:
    summary = verify_machine(verification_machine(name), 80, seed=1000)
    assert summary.layers >= 40


@needs_rtl
def test_the_command_writes_a_reproducer_that_fails_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A reference that forgets the rounding of the requantiser stands for a fault of the design."""
    honest = reference_outputs
    monkeypatch.setattr(verify, "reference_outputs", lambda *arguments: honest(*arguments) ^ 1)
    path = tmp_path / "failure.json"
    result = CliRunner().invoke(
        cli, ["verify", "--machine", "small", "--layers", "3", "--jobs", "1", "--reproducer", str(path)]
    )
    assert result.exit_code == 1
    assert "output [0, 0]" in result.output
    machine, spec = load_reproducer(path)
    assert machine == verification_machine("small")
    assert (spec.m, spec.k, spec.n, spec.stalls) == (1, 1, 1, Stalls())
    replayed = CliRunner().invoke(cli, ["verify", "--replay", str(path)])
    assert replayed.exit_code == 1
    monkeypatch.undo()
    replayed = CliRunner().invoke(cli, ["verify", "--replay", str(path)])
    assert replayed.exit_code == 0, replayed.output
    assert "all equal" in replayed.output


# --- What needs no Verilator ------------------------------------------------------------------------------------------------


def test_a_layer_by_hand() -> None:
    """Two weights, two inputs: (2·3 − 5·4 + 1)·3 = −39, halves up by shift 1: floor(−39/2 + 1/2) = −19."""
    machine = verification_machine("small")
    spec = LayerSpec(1, 2, 1, pruned=0, unified=0)
    layer = spec.layer(machine)
    weights = layer.weights
    assert weights is not None
    assert weights.requantizer is not None
    weights.dense[:] = [[[2, -5]]]
    weights.requantizer.bias[:], weights.requantizer.scale[:], weights.requantizer.shift[:] = 1, 3, 1
    assert reference_outputs(layer, np.array([[[3], [4]]]), machine).tolist() == [[-19]]


@settings(max_examples=80, deadline=None)
@example(  # the first step waits, 40 cycles of a fill of 41: the next one has inputs of its own
    spec=LayerSpec(
        m=1, k=9, n=4, groups=3, height=3, kernel=3, stride=2, pruned=0.0, unified=0.0, seed=0,
        linear=False, relu=False, stalls=Stalls(),
    ),
    name="groups",
)  # fmt: skip
@given(spec=specs(), name=st.sampled_from(sorted(VERIFICATION_MACHINES)))
def test_the_model_without_its_waits_is_the_formula(spec: LayerSpec, name: str) -> None:
    """Also transfer by transfer: the mapper's cycles and bytes are those of the program."""
    machine = verification_machine(name)
    try:
        run = run_layer(spec.layer(machine), machine)
    except FitError:
        return
    if run.mapping.weight_residence == "streamed":
        return
    program = layer_program(run, machine)
    ideal = causal_timeline(run, machine, program, wait_for_inputs=False, wait_for_drains=False).ends
    assert np.diff(ideal)[:-1].tolist() == run.mapping.column("step_cycles").tolist()
    assert ideal[-1] == run.mapping.latency_cycles
    verify.compare_transfers(run, program, "")
    causal = causal_timeline(run, machine, program).ends
    # docs/assumptions.md, "Overlap": the formula flatters a step by at most one fill and one drain.
    config = lower_machine(machine).step_config
    fill = -(-min(config.segment_words, run.layer.types.shape[2]) // config.fill_words)
    drain = -(-machine.array.rows * machine.array.block[0] * machine.array.columns // config.drain_words)
    # First loads and last store wait for nothing; a step may, the first one for the inputs of the next step's first fill.
    longer = np.diff(causal) - np.diff(ideal)
    assert causal[0] == ideal[0]
    assert longer[-1] == 0
    assert (longer >= 0).all()
    assert (longer <= fill + drain).all()
    stalled = causal_timeline(run, machine, program, Stalls(90, 128, 128)).ends
    assert all(late >= early for late, early in zip(stalled, causal, strict=True))


def test_waits_by_hand() -> None:
    """Three vectors, a buffer that holds one at a time, half a byte a cycle: the fill of step 1 must wait for its input."""
    machine = verification_machine("small").with_fields(
        {
            "activation_buffer.size_kib": 0.0078125,
            "output.size_kib": 0.03125,
            "dram.gb_per_s": 0.5,
            "dram.burst_bytes": 1,
        }
    )
    run = run_layer(LayerSpec(1, 4, 3, pruned=0, unified=0, linear=True).layer(machine), machine)
    assert run.mapping.input_residence == "grouped"
    program = layer_program(run, machine)
    # A vector has 4 bytes of 2 cycles each, an output 1; a pass of two dense blocks of 2 cycles takes 2·2 + 3.
    assert [program.cycles(step.inputs) for step in program.steps] == [8, 8, 8]
    ends = np.diff(causal_timeline(run, machine, program).ends).tolist()
    formula = run.mapping.column("step_cycles").tolist()
    # Step 0: fill 2, pass 7, meanwhile the load of 8. Step 1 begins with its vector in the store.
    assert formula[:1] == [max(2 + 7, 8)]
    assert ends[0] == max(2 + 7, 8 + 2)


def test_stalls_come_as_often_as_told() -> None:
    """Of 4,096 cycles about a half, never, always: the harness's copy is held to this one by every stalling layer."""
    cycles = np.arange(4096)
    assert 1900 < stalls(5, 1, cycles, 128).sum() < 2200
    assert not stalls(5, 1, cycles, 0).any()
    assert stalls(5, 1, cycles, 256).all()


def test_the_expander_gathers_what_a_convolution_multiplies() -> None:
    """Against a sum over taps written out, with padding, stride, groups and both column orders."""
    rng = np.random.default_rng(0)
    shape = LayerShape("c", "conv", 4, 6, (5, 4), (3, 2), (2, 1), ((1, 1), (0, 1)), (1, 1), groups=2, batch=2)
    x = rng.integers(-9, 9, (2, 4, 5, 4))
    weight = rng.integers(-9, 9, (6, 2, 3, 2))  # [out, in of the group, taps]
    expected = np.zeros((2, 6, *shape.output_size), np.int64)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 1)))
    for at in np.ndindex(*expected.shape):
        image, out, row, column = at
        window = padded[image, out // 3 * 2 : out // 3 * 2 + 2, 2 * row : 2 * row + 3, column : column + 2]
        expected[at] = (window * weight[out]).sum()
    for order, axes in (("tap_major", (0, 2, 3, 1)), ("channel_major", (0, 1, 2, 3))):
        matrix = weight.transpose(axes).reshape(2, 3, 12)
        types = np.full((2, 3, 12), 2, np.uint8)
        found = matrix @ input_matrix(Layer(shape, (1, 1), types, column_order=order), x)
        np.testing.assert_array_equal(found.reshape(6, -1), expected.transpose(1, 0, 2, 3).reshape(6, -1))


def test_results_of_a_stopped_run_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    summary = verify.Summary("a", 3, 0, 4, 5, 6, 7, 1, 2, 0.5, 0.25)
    line = verify.result_line(summary, 3, 9, "key")
    path.write_text(line + verify.result_line(summary, 4, 9, "another") + line[:-5])
    assert verify.load_results(path, "key") == {("a", 3, 9): summary}
    path.write_text("{}\n")
    with pytest.raises(InputError, match="line 1"):
        verify.load_results(path, "key")


def test_random_machines_are_such_as_the_rtl_can_be() -> None:
    machines = [verify.random_machine(seed) for seed in range(8)]
    assert verify.random_machine(3) == machines[3]
    assert len({machine.array.rows for machine in machines}) > 1
    for machine in machines:
        rtl_parameters(machine)


def test_shrinking_ends_at_the_smallest_failing_layer() -> None:
    found = shrink(replace(random_spec(3), k=40, m=20), lambda spec: spec.k >= 7 and spec.m >= 2)
    assert (found.m, found.k, found.n, found.groups, found.stalls) == (2, 7, 1, 1, Stalls())


def test_a_machine_whose_sign_port_comes_too_late_is_refused() -> None:
    """2x2 block, 4 + 8 bits through 6: two cycles. One multiplier must make a product in the first: no magnitude yet."""
    tight = verification_machine("small").with_fields({"weights.sign_port_bits": 6, "array.multipliers": 1})
    assert not unified_in_time(tight)
    with pytest.raises(InputError, match="sign_port_bits"):
        rtl_parameters(tight)
    assert unified_in_time(tight.with_fields({"weights.sign_port_bits": 5}))
    assert all(unified_in_time(load_machine(name)) for name in ("msa-8x8", "msa-16x16", "msa-32x32"))


@pytest.mark.parametrize(
    "content", ["", "{}", '{"machine": {}, "layer": {"m": 1}}', json.dumps({"layer": 3})]
)
def test_a_file_that_is_no_reproducer_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"bad\.json"):
        load_reproducer(path)
