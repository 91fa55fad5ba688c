"""Does the verification catch faults? A sample of the planted ones in every run, all of them in `hwsim mutants`.

``docs/mutants.txt`` is what a complete run printed; ``python tests/rtl/test_mutants.py`` writes the table of it in
docs/verification.md anew.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner

from hwsim import mutation, simulator, verify
from hwsim.cli import cli
from hwsim.errors import HwsimError, InputError
from hwsim.kernels import passes
from hwsim.mutation import (
    MUTANTS,
    MUTATION_MACHINES,
    KernelMutant,
    RtlMutant,
    mutant_source,
    mutation_machine,
    planted,
    run_mutants,
    sample,
)
from hwsim.rtl_simulator import Mismatch, build, find_verilator

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->"
CATCHES = {
    "cycles of a pass": r"(RTL|kernel) against oracle: (cycles of|\d+ segments)",
    "another counter of a pass": r"(RTL|kernel) against oracle: ",
    "an output": r"output \[",
    "a step's end or transfers": r"end \d|step \d",
    "a rule of the harness": "",
}
"""What catches a fault, by what the run says; the first that fits."""

HARMLESS = RtlMutant(999, "front_end", "a number that no source has: nothing is planted")


@pytest.fixture(scope="module")
def built() -> None:
    """The designs with the faults in them."""
    try:
        find_verilator()
    except InputError as error:
        pytest.skip(str(error))
    if not all(map(shutil.which, ("g++", "make", "perl"))):
        pytest.skip("a build by Verilator needs g++, make and perl")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(build, mutants=True), map(mutation_machine, MUTATION_MACHINES)))


def test_the_list_is_what_is_planted() -> None:
    numbers = [mutant.number for mutant in MUTANTS]
    assert len(set(numbers)) == len(numbers)
    assert sum(isinstance(mutant, RtlMutant) for mutant in MUTANTS) >= 40
    assert sum(isinstance(mutant, KernelMutant) for mutant in MUTANTS) >= 12
    mutation._check_sources()


def test_every_module_of_the_rtl_has_faults() -> None:
    sources = {path.name for path in resources.files("hwsim").joinpath("rtl").iterdir()}
    planted_in = {mutant.place for mutant in MUTANTS if isinstance(mutant, RtlMutant)}
    assert planted_in == {name for name in sources if name.endswith(".sv")}


def test_samples_of_all_seeds_are_all_faults_once() -> None:
    parts = [mutant for seed in range(5) for mutant in sample(5, seed)]
    assert sorted(mutant.number for mutant in parts) == sorted(mutant.number for mutant in MUTANTS)


@pytest.mark.parametrize("change", [{"correct": "no such text"}, {"correct": "now"}])
def test_a_substitution_that_does_not_match_once_is_an_error(change: dict[str, str]) -> None:
    mutant = next(mutant for mutant in MUTANTS if isinstance(mutant, KernelMutant))
    with pytest.raises(HwsimError, match="must once"):
        mutant_source(replace(mutant, **change))


def test_a_listed_fault_that_is_not_planted_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation, "MUTANTS", (*MUTANTS, HARMLESS))
    with pytest.raises(HwsimError, match="999"):
        next(run_mutants([HARMLESS], layers=1))


def test_a_planted_kernel_is_taken_out_again() -> None:
    right = simulator.run_passes
    with planted(next(mutant for mutant in MUTANTS if isinstance(mutant, KernelMutant))):
        assert simulator.run_passes is not right
    assert simulator.run_passes is right is passes.run_passes


@pytest.mark.usefixtures("built")
def test_without_the_define_nothing_of_the_faults_is_in_the_design() -> None:
    folder = resources.files("hwsim").joinpath("rtl")
    sources = sorted(str(path) for path in folder.iterdir() if path.name.endswith(".sv"))

    def preprocessed(*arguments: str) -> str:
        command = ["verilator", "-E", f"-I{folder}", *arguments, *sources]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return "\n".join(line for line in lines if not line.startswith("`line")).lower()

    if shutil.which("verilator") is None:
        pytest.skip("Verilator is not on the path")
    assert "mutant" not in preprocessed()
    assert preprocessed("-DHWSIM_MUTANTS").count("mutants::planted") == sum(
        isinstance(mutant, RtlMutant) for mutant in MUTANTS
    )


@pytest.mark.usefixtures("built")
def test_a_sample_is_caught() -> None:
    """Every fifth fault of the RTL and, for the time that a compilation takes, every tenth of the pass kernel."""
    rtl = [mutant for mutant in sample(5, 0) if isinstance(mutant, RtlMutant)]
    kernels = [mutant for mutant in sample(10, 2) if mutant.place == "passes.py"]
    assert len(rtl) >= 15
    assert len(kernels) >= 2
    survivors = [verdict.mutant for verdict in run_mutants([*rtl, *kernels], layers=30) if not verdict.caught]
    assert not survivors


@pytest.mark.slow
@pytest.mark.usefixtures("built")
def test_all_are_caught() -> None:
    survivors = [verdict.mutant for verdict in run_mutants(MUTANTS, layers=30) if not verdict.caught]
    assert not survivors


@pytest.mark.usefixtures("built")
def test_what_changes_nothing_survives_and_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation, "_check_sources", lambda: None)
    monkeypatch.setattr(mutation, "MUTANTS", (HARMLESS,))
    result = CliRunner().invoke(cli, ["mutants", "--layers", "3"])
    assert result.exit_code == 1, result.output
    assert "SURVIVED" in result.output
    assert "0 of 1 faults caught" in result.output


@pytest.mark.usefixtures("built")
def test_the_command_says_what_caught_a_fault() -> None:
    result = CliRunner().invoke(cli, ["mutants", "--layers", "3", "--only", "22"])
    assert result.exit_code == 0, result.output
    assert "fetch of segment" in result.output
    assert "1 of 1 faults caught" in result.output


@pytest.mark.usefixtures("built")
def test_nothing_is_said_of_faults_while_the_sound_design_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = verify.reference_outputs
    monkeypatch.setattr(verify, "reference_outputs", lambda *arguments: honest(*arguments) ^ 1)
    with pytest.raises(Mismatch):
        next(run_mutants([HARMLESS], layers=1))


def test_numbers_that_are_no_fault_are_refused() -> None:
    result = CliRunner().invoke(cli, ["mutants", "--only", "7777"])
    assert isinstance(result.exception, InputError)
    assert "7777" in str(result.exception)


def test_the_list_is_printed_without_a_build() -> None:
    result = CliRunner().invoke(cli, ["mutants", "--list"])
    assert result.exit_code == 0
    assert result.output.count("\n") == len(MUTANTS)


def stored_run() -> dict[int, tuple[str, str, str]]:
    """Of the stored run, by number: place and fault, and what caught it."""
    run = {}
    for line in (DOCS / "mutants.txt").read_text("utf-8").splitlines()[1:-1]:
        run[int(line[:4])] = (line[6:25].strip(), line[27:97].strip(), line[107:])
    return run


def fault_table() -> str:
    """Faults of the stored run by source and by what caught them, as Markdown."""
    counts: dict[str, dict[str, int]] = {}
    for place, _, caught in stored_run().values():
        by = next(name for name, pattern in CATCHES.items() if re.match(pattern, caught))
        row = counts.setdefault(place, dict.fromkeys(CATCHES, 0))
        row[by] += 1
    counts["**all**"] = {name: sum(row[name] for row in counts.values()) for name in CATCHES}
    lines = [["planted in", "faults", *CATCHES], ["---"] * (2 + len(CATCHES))]
    for place, row in counts.items():
        shown = place if place.startswith("*") else f"`{place}`"
        lines.append([shown, str(sum(row.values())), *(str(count or "") for count in row.values())])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def test_the_stored_run_caught_every_fault_of_the_list() -> None:
    run = stored_run()
    assert {number: row[:2] for number, row in run.items()} == {
        mutant.number: (mutant.place, mutant.fault) for mutant in MUTANTS
    }
    assert not [number for number, row in run.items() if "SURVIVED" in row[2]]


def test_the_table_in_the_documentation_is_that_of_the_stored_run() -> None:
    """Where this fails: ``python tests/rtl/test_mutants.py``."""
    text = (DOCS / "verification.md").read_text("utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == fault_table()


if __name__ == "__main__":
    page = DOCS / "verification.md"
    before, rest = page.read_text("utf-8").split(BEGIN)
    page.write_text(before + BEGIN + fault_table() + END + rest.split(END, 1)[1], "utf-8")
