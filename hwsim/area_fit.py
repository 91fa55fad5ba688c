"""The area model's coefficients from synthesis: the machines that are synthesised, the fit and its errors.

``hwsim synth --fit`` runs Yosys on the parts of `FIT_MACHINES` (about an hour of one core; results are cached), writes what it
found to ``synthesis_runs.json`` and the coefficients to ``area_model.json``. Both are in ``synthesis_data`` of the package; the
tests fit the stored runs again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwsim.errors import InputError, Problem
from hwsim.gates import TERM_COMPONENTS, part_counts, part_terms
from hwsim.liberty import Library
from hwsim.machine import Machine, load_machine
from hwsim.synthesis import find_yosys, part_names, rtl_digest, synthesize, yosys_version

__all__ = [
    "FIT_MACHINES",
    "FitErrors",
    "Run",
    "fit_coefficients",
    "fit_errors",
    "fit_machine",
    "fit_runs",
    "left_out_errors",
    "load_runs",
    "model_json",
    "rtl_of_runs",
    "runs_json",
]

_BASE = {"array.rows": 8, "array.columns": 8, "operand_store.banks": 8}

FIT_MACHINES: dict[str, dict[str, object]] = {
    "8x8": {},
    "msa-16x16": {"array.rows": 16, "array.columns": 16, "operand_store.banks": 16},
    "single": {
        "dram.gb_per_s": 1.0,
        "array.block": [1, 1],
        "array.multipliers": 1,
        "array.sign_adders": 1,
        "front_end.skip_window": 1,
        "front_end.queue_depth": 1,
        "operand_store.banks": 2,
        "array.rows": 4,
    },
    "two-by-two": {
        "dram.gb_per_s": 3.2,
        "array.block": [2, 2],
        "array.multipliers": 2,
        "array.sign_adders": 4,
        "front_end.skip_window": 4,
        "front_end.queue_depth": 2,
        "operand_store.banks": 4,
        "array.rows": 4,
    },
    "eight-by-eight": {
        "dram.gb_per_s": 6.4,
        "array.block": [8, 8],
        "array.multipliers": 8,
        "array.sign_adders": 32,
        "weights.dense_port_bits": 128,
        "weights.sign_port_bits": 64,
        "array.columns": 4,
        "front_end.skip_window": 4,
    },
    "tall": {
        "array.block": [8, 2],
        "array.multipliers": 8,
        "front_end.queue_depth": 8,
        "array.columns": 16,
        "dram.gb_per_s": 19.2,
    },
    "flat": {
        "array.block": [2, 8],
        "front_end.queue_depth": 3,
        "operand_store.banks": 4,
        "dram.gb_per_s": 6.4,
    },
    "sixteen-multipliers": {
        "array.multipliers": 16,
        "weights.dense_port_bits": 128,
        "front_end.skip_window": 6,
    },
    "four-sign-adders": {"array.sign_adders": 4, "weights.sign_port_bits": 8, "dram.gb_per_s": 3.2},
    "four-bits": {
        "dram.gb_per_s": 3.2,
        "precision.weight_bits": 4,
        "precision.magnitude_bits": 4,
        "precision.activation_bits": 4,
        "precision.accumulator_bits": 20,
        "front_end.queue_depth": 6,
    },
    "sixteen-bits": {
        "dram.gb_per_s": 19.2,
        "precision.weight_bits": 16,
        "precision.magnitude_bits": 16,
        "precision.activation_bits": 16,
        "precision.accumulator_bits": 48,
        "weights.dense_port_bits": 128,
        "operand_store.banks": 4,
    },
    "long-window": {"front_end.skip_window": 16, "front_end.queue_depth": 16, "array.rows": 16},
    "many-banks": {
        "operand_store.banks": 32,
        "front_end.skip_window": 12,
        "precision.accumulator_bits": 24,
        "dram.gb_per_s": 1.6,
    },
    "four-by-eight": {
        "dram.gb_per_s": 8.0,
        "array.block": [4, 8],
        "array.multipliers": 8,
        "array.sign_adders": 32,
        "precision.magnitude_bits": 6,
        "precision.activation_bits": 6,
        "precision.accumulator_bits": 28,
        "weights.sign_port_bits": 64,
        "array.rows": 12,
        "operand_store.banks": 2,
    },
    "column-block": {
        "dram.gb_per_s": 3.2,
        "array.block": [16, 1],
        "array.multipliers": 8,
        "array.sign_adders": 8,
        "front_end.skip_window": 32,
        "array.rows": 4,
        "operand_store.banks": 16,
    },
    "row-block": {
        "dram.gb_per_s": 25.6,
        "array.block": [1, 16],
        "array.multipliers": 4,
        "array.sign_adders": 8,
        "front_end.skip_window": 2,
        "front_end.queue_depth": 1,
    },
    "odd": {
        "dram.gb_per_s": 6.4,
        "array.block": [6, 4],
        "array.multipliers": 6,
        "array.sign_adders": 12,
        "precision.weight_bits": 6,
        "front_end.skip_window": 5,
        "operand_store.banks": 6,
        "array.rows": 4,
    },
}
"""Machines that are synthesised: what each changes of ``msa-16x16`` with 8 rows, columns and banks."""


_CHOSEN = {
    ("weight_feed", False): (
        "8x8",
        "single",
        "two-by-two",
        "tall",
        "flat",
        "sixteen-multipliers",
        "four-bits",
        "sixteen-bits",
        "four-by-eight",
        "column-block",
        "row-block",
    ),
    ("sequencer", True): (
        "8x8",
        "msa-16x16",
        "single",
        "four-by-eight",
        "column-block",
        "row-block",
        "odd",
    ),
    ("loader", True): (
        "8x8",
        "single",
        "two-by-two",
        "flat",
        "four-sign-adders",
        "many-banks",
        "four-by-eight",
    ),
    ("channel", True): ("8x8", "msa-16x16"),  # it has no parameters
}
"""Of parts that take long, weigh little or hardly differ: the machines in which they are synthesised, with and without
the unified path."""


def fit_machine(name: str, *, unified: bool = True) -> Machine:
    """A machine of `FIT_MACHINES`, with or without the unified path."""
    fields = {**_BASE, **FIT_MACHINES[name], "name": name, "features.unified_path": unified}
    return load_machine("msa-16x16").with_fields(fields)


@dataclass(frozen=True)
class Run:
    """One synthesised part: of which machine, and what came out.

    Attributes
    ----------
    machine : str
        A name of `FIT_MACHINES`.
    unified : bool
        Whether with the unified path.
    part : str
    gate_equivalents : float
        Of one.
    registers : int
        Flip-flops of one.
    levels : int
        Cells on its longest path.
    delay_ns : float or None
    """

    machine: str
    unified: bool
    part: str
    gate_equivalents: float
    registers: int
    levels: int
    delay_ns: float | None


@dataclass(frozen=True)
class FitErrors:
    """Relative errors of the model: by part over the runs, and of the whole logic over the machines."""

    by_part: dict[str, NDArray[np.float64]]
    whole: dict[str, float]


def fit_runs(library: Library, progress: Callable[[str], None] = lambda name: None) -> list[Run]:
    """Synthesise every part of every machine of `FIT_MACHINES`; PE and weight feed also without the unified path.

    Raises
    ------
    InputError, SynthesisError
        As `hwsim.synthesis.synthesize`.
    """
    runs = []
    for name in FIT_MACHINES:
        for unified in (True, False):
            machine = fit_machine(name, unified=unified)
            for part in part_names(machine) if unified else ("pe", "weight_feed"):
                if name not in _CHOSEN.get((part, unified), FIT_MACHINES):
                    continue
                progress(f"{name} {part}" + ("" if unified else " (dense)"))
                found = synthesize(part, machine, library)
                registers = sum(n for cell, n in found.cells.items() if library.cells[cell].is_sequential)
                runs.append(
                    Run(
                        name,
                        unified,
                        part,
                        round(found.gate_equivalents, 2),
                        registers,
                        found.levels,
                        found.delay_ns,
                    )
                )
    return runs


def _terms(part: str) -> list[str]:
    return [term for term in TERM_COMPONENTS if term.startswith(f"{part}.")]


def fit_coefficients(runs: Iterable[Run]) -> dict[str, float]:
    """Gate equivalents per term, at least 0, by the least sum of squared relative errors of each part's runs.

    Raises
    ------
    InputError
        SciPy is not installed.
    """
    try:
        from scipy.optimize import nnls
    except ImportError:
        hint = 'pip install "hwsim[test]"'
        raise InputError("scipy", Problem("", "not found; the fit needs it", hint)) from None
    runs = list(runs)
    coefficients: dict[str, float] = {}
    for part in dict.fromkeys(run.part for run in runs):
        chosen, terms = [run for run in runs if run.part == part], _terms(part)
        sizes = np.array([_sizes(run, terms) for run in chosen])
        found = np.array([run.gate_equivalents for run in chosen])
        scale = np.abs(sizes).max(axis=0)
        scale[scale == 0] = 1.0
        values, _ = nnls(sizes / scale / found[:, None], np.ones(len(chosen)))
        coefficients |= {
            term: float(f"{value:.5g}") for term, value in zip(terms, values / scale, strict=True)
        }
    return coefficients


def _sizes(run: Run, terms: Sequence[str]) -> list[float]:
    machine = fit_machine(run.machine, unified=run.unified)
    sizes = part_terms(machine, machine.load_bytes_per_cycle)
    return [sizes[term] for term in terms]


def _predicted(run: Run, coefficients: dict[str, float]) -> float:
    terms = _terms(run.part)
    return sum(size * coefficients[term] for size, term in zip(_sizes(run, terms), terms, strict=True))


def fit_errors(runs: Iterable[Run], coefficients: dict[str, float]) -> FitErrors:
    """``model / synthesis − 1`` of every run, and of the sum over the synthesised parts of every machine."""
    runs = list(runs)
    parts = dict.fromkeys(run.part for run in runs)
    by_part = {
        part: np.array(
            [_predicted(run, coefficients) / run.gate_equivalents - 1 for run in runs if run.part == part]
        )
        for part in parts
    }
    whole = {}
    for name in dict.fromkeys(run.machine for run in runs):
        counts = part_counts(fit_machine(name))
        chosen = [run for run in runs if run.machine == name and run.unified]
        model = sum(
            counts[run.part] * _predicted(run, coefficients) for run in chosen
        )  # of the parts that were run
        whole[name] = model / sum(counts[run.part] * run.gate_equivalents for run in chosen) - 1
    return FitErrors(by_part, whole)


def left_out_errors(runs: Iterable[Run]) -> FitErrors:
    """Errors on each machine of the coefficients that were fitted to all the others."""
    runs = list(runs)
    by_part: dict[str, list[float]] = {}
    whole: dict[str, float] = {}
    for name in dict.fromkeys(run.machine for run in runs):
        others = [run for run in runs if run.machine != name]
        chosen = [run for run in runs if run.machine == name]
        errors = fit_errors(chosen, fit_coefficients(others))
        whole |= errors.whole
        for part, values in errors.by_part.items():
            by_part.setdefault(part, []).extend(values.tolist())
    return FitErrors({part: np.array(values) for part, values in by_part.items()}, whole)


def runs_json(runs: Sequence[Run], library: Library) -> str:
    """The runs with what made them: ``synthesis_runs.json``."""
    head = {
        "format": "hwsim-synthesis-runs",
        "version": 1,
        "command": "hwsim synth --fit",
        "yosys": yosys_version(find_yosys()),
        "liberty": {"name": library.name, "sha256": library.sha256, "nand2_um2": library.nand2_um2},
        "rtl": {part: rtl_digest(part) for part in dict.fromkeys(run.part for run in runs)},
        "machines": {name: fit_machine(name).model_dump(mode="json") for name in FIT_MACHINES},
        "columns": list(Run.__dataclass_fields__),
    }
    lines = ",\n".join(json.dumps(list(vars(run).values())) for run in runs)
    return json.dumps(head, indent=1)[:-2] + ',\n "runs": [\n' + lines + "\n]}\n"


def load_runs() -> list[Run]:
    """The stored runs."""
    return [Run(*line) for line in _stored()["runs"]]


def rtl_of_runs() -> dict[str, str]:
    """`hwsim.synthesis.rtl_digest` of each part, as it was when the stored runs were made."""
    return _stored()["rtl"]


def _stored() -> dict[str, Any]:
    file = resources.files("hwsim").joinpath("synthesis_data", "synthesis_runs.json")
    return json.loads(file.read_text("utf-8"))


def model_json(runs: Sequence[Run], library: Library) -> str:
    """The coefficients and their errors: ``area_model.json``."""
    coefficients = fit_coefficients(runs)
    content: dict[str, Any] = {
        "format": "hwsim-area-model",
        "version": 1,
        "source": f"hwsim synth --fit: {yosys_version(find_yosys())}, {library.name}",
        "unit": "NAND2 gate equivalents per term",
        "coefficients": coefficients,
    }
    for key, errors in (("fit", fit_errors(runs, coefficients)), ("left_out", left_out_errors(runs))):
        content[key] = {
            "whole_max": _worst(list(errors.whole.values())),
            "by_part_max": {part: _worst(values) for part, values in errors.by_part.items()},
            "by_part_mean": {part: round(float(np.abs(v).mean()), 4) for part, v in errors.by_part.items()},
        }
    return json.dumps(content, indent=1) + "\n"


def _worst(values: Iterable[float]) -> float:
    return round(max(abs(value) for value in values), 4)
