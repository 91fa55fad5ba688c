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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwsim import rtl_simulator, verify
from hwsim.cli import cli
from hwsim.errors import FitError, InputError
from hwsim.machine import load_machine
from hwsim.rtl_simulator import (
    Mismatch,
    RtlSimulator,
    Stalls,
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
    timeline_cycles,
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
FAST = ("small", "segments", "odd-formats")
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
        k=draw(st.integers(1, 60)),
        n=draw(st.integers(1, 9)),
        groups=draw(st.integers(1, 3)),
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
    assert fine > 0.005 * total


@needs_rtl
def test_a_stalling_load_port_changes_nothing_but_the_load(simulators: dict[str, RtlSimulator]) -> None:
    quiet = check(simulators["small"], LayerSpec(14, 33, 5, seed=3))
    stalled = check(simulators["small"], LayerSpec(14, 33, 5, seed=3, stalls=Stalls(load=190)))
    assert quiet is not None
    assert stalled is not None
    assert stalled.load_cycles > 2 * quiet.load_cycles
    assert stalled.layer_cycles == quiet.layer_cycles
    assert (stalled.outputs == quiet.outputs).all()


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
def test_weights_beyond_the_memories_are_refused(simulators: dict[str, RtlSimulator]) -> None:
    machine = verification_machine("small")
    spec = LayerSpec(4000, 90, 1, pruned=0, unified=0)
    assert run_layer(spec.layer(machine), machine).mapping.weight_residence != "whole"
    with pytest.raises(InputError, match="weights"):
        check_layer(simulators["small"], spec.layer(machine), spec.inputs(machine))
    assert check(simulators["small"], spec) is None


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
        cli, ["verify", "--machine", "small", "--layers", "3", "--reproducer", str(path)]
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


@settings(max_examples=60, deadline=None)
@given(spec=specs(), name=st.sampled_from(sorted(VERIFICATION_MACHINES)))
def test_the_timeline_without_stalls_is_the_mappers(spec: LayerSpec, name: str) -> None:
    machine = verification_machine(name)
    try:
        run = run_layer(spec.layer(machine), machine)
    except FitError:
        return
    totals = run.mapping.totals
    expected = totals["pass_cycles"] + totals["fill_stall_cycles"] + totals["drain_stall_cycles"]
    assert timeline_cycles(run, machine, Stalls()) == expected
    assert timeline_cycles(run, machine, Stalls(fill=128, drain=128)) >= expected


def test_stalls_come_as_often_as_told() -> None:
    """Of 4,096 cycles about a half, never, always: the harness's copy is held to this one by every stalling layer."""
    counted = sum(verify.stalls(5, 1, cycle, 128) for cycle in range(4096))
    assert 1900 < counted < 2200
    assert not any(verify.stalls(5, 1, cycle, 0) for cycle in range(99))
    assert all(verify.stalls(5, 1, cycle, 256) for cycle in range(99))


def test_shrinking_ends_at_the_smallest_failing_layer() -> None:
    found = shrink(random_spec(3), lambda spec: spec.k >= 7 and spec.m >= 2)
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
