"""A pass cycle by cycle: the oracle's states against the RTL's waveforms, and what is drawn of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsim.cli import cli
from hwsim.errors import FormatError, InputError
from hwsim.layer import DENSE, PRUNED, UNIFIED
from hwsim.oracle import COUNTERS, oracle_pass
from hwsim.rtl_simulator import find_verilator
from hwsim.trace import (
    STATE_FIELDS,
    PassTrace,
    pick_pass,
    trace_pass,
    trace_pass_rtl,
    trace_text,
    vcd_samples,
)
from hwsim.verify import verification_machine


def _missing() -> str | None:
    try:
        find_verilator()
    except InputError as error:
        return str(error)
    return None if all(map(shutil.which, ("g++", "make", "perl"))) else "no g++, make or perl"


needs_rtl = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


def random_types(seed: int, shape: Sequence[int]) -> np.ndarray:
    return (
        np.random.default_rng(seed)
        .choice([PRUNED, UNIFIED, DENSE], shape, p=[0.5, 0.3, 0.2])
        .astype(np.uint8)
    )


def small_trace(seed: int = 0) -> PassTrace:
    return trace_pass(pick_pass(verification_machine("small"), random_types(seed, (4, 30)), 0, 0, "test"))


@needs_rtl
@pytest.mark.parametrize(("row_tile", "segment"), [(0, 0), (0, 1), (0, 6), (1, 3), (1, 6)])
def test_the_waveforms_of_the_rtl_are_the_oracles_states(row_tile: int, segment: int) -> None:
    """A machine of short segments, the second row tile with two rows missing, the last segment ragged."""
    machine = verification_machine("segments")
    for seed in range(3):
        of = pick_pass(machine, random_types(seed, (6, 20)), row_tile, segment, "test")
        expected, found = trace_pass(of), trace_pass_rtl(of)
        assert (expected.source, found.source) == ("oracle", "RTL")
        np.testing.assert_array_equal(found.states, expected.states)


@needs_rtl
def test_all_types_that_a_stream_can_leave_out() -> None:
    machine = verification_machine("segments")
    for kind in (PRUNED, UNIFIED, DENSE):
        of = pick_pass(machine, np.full((3, 7), kind, np.uint8), 0, 1, "test")
        np.testing.assert_array_equal(trace_pass_rtl(of).states, trace_pass(of).states)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 4), columns=st.integers(1, 40))
def test_the_states_add_up_to_the_counters(seed: int, rows: int, columns: int) -> None:
    machine = verification_machine("small")
    types = random_types(seed, (rows, columns))
    trace = trace_pass(pick_pass(machine, types, 0, 0, "test"))
    counted = oracle_pass(
        types.tolist(), rows=4, skip_window=3, queue_depth=2, banks=4, unified_cycles=1, dense_cycles=2
    )
    assert trace.cycles == counted["cycles"]
    assert trace.field("granted").sum() == counted["latches"]
    assert trace.field("queue").max() <= 2
    for index, name in enumerate(COUNTERS):
        if index >= COUNTERS.index("busy"):
            missing = (4 - rows) * trace.cycles if name == "imbalance" else 0
            assert (trace.field("row_class") == index).sum() + missing == counted[name]
    executing = trace.executing_column()
    assert ((executing >= 0) == (trace.field("busy") > 0)).all()
    for row in range(rows):
        own = np.unique(executing[:, row])
        assert own[own >= 0].tolist() == np.flatnonzero(types[row]).tolist()


def test_a_pass_by_hand_in_characters() -> None:
    """Two rows ask bank 0 for block column 0 and get it together; DENSE takes two cycles, UNIFIED one."""
    types = np.array([[2, 0, 0], [1, 0, 1]], np.uint8)
    text = trace_text(trace_pass(pick_pass(verification_machine("small"), types, 0, 0, "test")), 1, 5)
    assert text.splitlines()[-12:] == [
        "row 0      scan 12...",
        "(0)       queue .1...",
        "          fetch .G...",
        "        operand ..o..",
        "             PE sfaDD",
        "row 1      scan 12...",
        "(1)       queue .11..",
        "          fetch .GG..",
        "        operand ..oo.",
        "             PE sfaUU",
        "         bank 0 .2...",
        "         bank 2 ..1..",
    ]


@pytest.mark.parametrize(
    ("row_tile", "segment", "field"), [(2, 0, "row tile"), (-1, 0, "row tile"), (0, 7, "segment")]
)
def test_a_pass_that_is_not_there_is_refused(row_tile: int, segment: int, field: str) -> None:
    with pytest.raises(InputError, match=field):
        pick_pass(verification_machine("segments"), random_types(0, (6, 20)), row_tile, segment, "test")


def test_rows_in_stored_order() -> None:
    types = np.array([[0, 0], [2, 2], [1, 0], [2, 0]], np.uint8)
    of = pick_pass(verification_machine("sorted"), types, 0, 0, "test")
    assert of.block_rows.tolist() == [1, 3, 2]
    assert of.types.tolist() == types[[1, 3, 2]].tolist()


def test_waveforms_are_read_at_the_end_of_the_low_phase(tmp_path: Path) -> None:
    path = tmp_path / "waves.vcd"
    path.write_text(
        "$timescale 1ps $end\n$scope module a $end\n$var wire 1 ! clock $end\n$scope module b $end\n"
        "$var wire 3 # x [2:0] $end\n$upscope $end\n$var wire 1 $ y $end\n$upscope $end\n$enddefinitions $end\n"
        "#0\n0!\nb101 #\n0$\n#1\n1!\nb111 #\n#2\n0!\n1$\n#3\n1!\n"
    )
    assert vcd_samples(path, "a.clock", ["a.b.x", "a.y"]).tolist() == [[5, 0], [7, 1]]
    with pytest.raises(FormatError, match=r"a\.z"):
        vcd_samples(path, "a.clock", ["a.z"])


# --- The command and the figure ---------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["trace", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_draws_in_characters() -> None:
    text = invoke("resnet20", "layer1.0.conv1", "--machine", "msa-8x8", "--cycles", "3:12")
    assert "cycles 3 to 12" in text
    assert text.count("operand ") == 4


def test_the_command_writes_the_figure_and_its_data(tmp_path: Path) -> None:
    np.save(tmp_path / "types.npy", random_types(1, (9, 40)))
    out = tmp_path / "figures" / "one.png"
    text = invoke(str(tmp_path / "types.npy"), "--machine", "msa-8x8", "--row-tile", "1", "--out", str(out))
    assert "of " in text
    assert out.stat().st_size > 10_000
    assert out.with_suffix(".pdf").exists()
    lines = out.with_suffix(".csv").read_text().splitlines()
    assert lines[0].startswith("cycle,row,block_row,scan,queue_entries,operand,busy_cycles")
    assert {line.split(",")[2] for line in lines[1:]} == {"8"}


def test_the_figure_has_the_states_as_its_data() -> None:
    from sweeps.trace_figure import trace_plot

    trace = small_trace()
    data = trace_plot(trace, 2, 9).data
    assert len(data) == 8 * 4
    renamed = {"queue": "queue_entries", "busy": "busy_cycles"}
    for name in STATE_FIELDS:
        if name != "row_class":
            assert data[renamed.get(name, name)].tolist() == trace.field(name)[1:9].ravel().tolist()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["resnet20", "layer1.0.conv7"], 'did you mean "layer1.0.conv'),
        (["resnet21", "layer1.0.conv1"], 'did you mean "resnet20"'),
        (["resnet20"], "LAYER: missing"),
        (["resnet20", "layer1.0.conv1", "--machine", "msa-8x9"], 'did you mean "msa-8x8"'),
        (["resnet20", "layer1.0.conv1", "--row-tile", "1"], "row tile: 1"),
        (["resnet20", "layer1.0.conv1", "--group", "1"], "group: 1"),
        (["resnet20", "layer1.0.conv1", "--cycles", "9:3"], "9:3"),
        (["no.npy"], "no such file"),
        (["no.npy", "conv1"], "LAYER"),
    ],
)
def test_bad_names_and_numbers_are_refused(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(cli, ["trace", *arguments])
    assert isinstance(result.exception, InputError)
    assert text in str(result.exception)
