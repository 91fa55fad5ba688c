"""The command that synthesises the RTL, fits the area model and measures the switching energy of a PE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hwsim.liberty import Library
    from hwsim.machine import Machine

__all__ = ["synth"]


@click.command(epilog="Example: hwsim synth --machine msa-8x8 --part pe --part front_end")
@click.option(
    "--machine",
    "name",
    default="msa-16x16",
    show_default=True,
    help="A preset, or the path of a machine file.",
)
@click.option(
    "--liberty",
    type=click.Path(path_type=Path),
    help="Standard cells to map to. Default: Debian's qflow-tech-osu018.",
)
@click.option(
    "--part",
    "parts",
    multiple=True,
    help="pe, front_end, row_control, weight_feed, multicast, arbiter, requantizer, counters, sequencer, loader, channel "
    "or array (all of them, the default); again for more.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here as JSON."
)
@click.option(
    "--energy", is_flag=True, help="Instead: switching energy of one PE for dense, unified and mixed work."
)
@click.option(
    "--fit",
    is_flag=True,
    help="Instead: synthesise the machines of the area model and fit it anew (an hour).",
)
@click.option(
    "--fit-folder",
    default="hwsim/synthesis_data",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="With --fit: where runs and coefficients are written.",
)
def synth(
    name: str,
    liberty: Path | None,
    parts: tuple[str, ...],
    output: Path | None,
    energy: bool,
    fit: bool,
    fit_folder: Path,
) -> None:
    """Area, gate equivalents and path depth of the parts of a machine, by Yosys.

    Each module is synthesised once and multiplied by its count; memories are SRAM macros in silicon and only
    listed. Results are cached, so that an interrupted run goes on where it stopped.
    """
    from hwsim.liberty import DEFAULT_LIBERTY, load_library
    from hwsim.machine import load_machine
    from hwsim.synthesis import find_yosys

    if energy and fit:
        raise click.UsageError("--energy and --fit are two runs, choose one")
    machine = load_machine(name)
    find_yosys()
    library = load_library(liberty or DEFAULT_LIBERTY)
    if fit:
        _fit(library, fit_folder)
    elif energy:
        _energy(machine, library)
    else:
        _parts(machine, library, parts, output)


def _progress() -> Callable[[str], None]:
    """Says which part is being worked on, after how long; one line on a terminal."""
    import sys
    import time

    begun, seen = time.monotonic(), [0]

    def told(text: str) -> None:
        seen[0] += 1
        line = f"{time.monotonic() - begun:6.0f} s  {seen[0]}: {text}"
        click.echo(f"\r{line:70}" if sys.stderr.isatty() else line, err=True, nl=not sys.stderr.isatty())

    return told


def _parts(machine: Machine, library: Library, names: tuple[str, ...], output: Path | None) -> None:
    from hwsim.files import write_atomically
    from hwsim.synthesis import (
        array_totals,
        find_yosys,
        part_names,
        result_json,
        synthesize_machine,
        yosys_version,
    )
    from hwsim.tables import format_table

    chosen = tuple(part_names(machine)) if not names or "array" in names else names
    found = synthesize_machine(machine, library, chosen, progress=_progress())
    click.echo(err=True)
    rows = [
        {
            "part": part.part,
            "count": part.count,
            "µm² each": part.area_um2,
            "gates each": part.gate_equivalents,
            "gates": part.total_gate_equivalents,
            "regs (%)": 100 * part.sequential_um2 / part.area_um2 if part.area_um2 else 0.0,
            "memory bits": part.count * part.memory_bits,
            "levels": part.levels,
            "ns": part.delay_ns if part.delay_ns is not None else 0.0,
        }
        for part in found
    ]
    click.echo(format_table(rows))
    totals = array_totals(found)
    if len(found) > 1:
        share = 100 * totals["sequential_um2"] / totals["area_um2"]
        click.echo(
            f"sum: {totals['area_um2'] * 1e-6:.3g} mm², {totals['gate_equivalents']:,.0f} gate equivalents, {share:.0f} % of "
            f"it registers; {totals['memory_bits']:,} bits of memory outside of it"
        )
    slowest = max(found, key=lambda part: part.delay_ns or 0.0)
    click.echo(
        f"longest path: {slowest.part}, {slowest.levels} cells"
        + (f", {slowest.delay_ns:.3g} ns without wires" if slowest.delay_ns else "")
    )
    click.echo(
        f"{yosys_version(find_yosys())}; {library.name}, one gate equivalent is {library.nand2_um2:g} µm² "
        f"(SHA-256 {library.sha256[:16]}…)"
    )
    if output is not None:
        write_atomically(output, result_json(machine, found, library, find_yosys()).encode())
        click.echo(f"written: {output}")


def _energy(machine: Machine, library: Library) -> None:
    from hwsim.energy import energy_per_event
    from hwsim.switching import pe_switching
    from hwsim.tables import format_table
    from hwsim.technology import load_technology, technology_names

    g_o, g_k = machine.array.block
    click.echo(
        f"one PE of {machine.name}, {library.name}, random data; pJ per block of {g_o} × {g_k} weights",
        err=True,
    )
    rows = []
    ratios: dict[str, float] = {}
    for glitches in (True, False):
        found = {item.workload: item for item in pe_switching(machine, library, glitches=glitches)}
        name = "with glitches" if glitches else "without glitches"
        rows += [
            {
                "simulation": name,
                "work": item.workload,
                "toggles": item.toggles,
                "logic (pJ)": item.logic_pj,
                "clock pins (pJ)": item.clock_pj,
                "logic per weight (pJ)": item.logic_pj / (g_o * g_k),
            }
            for item in found.values()
        ]
        dense, unified = found["dense"], found["unified"]
        ratios[f"{name}, logic"] = dense.logic_pj / unified.logic_pj
        ratios[f"{name}, with clock pins"] = (dense.logic_pj + dense.clock_pj) / (
            unified.logic_pj + unified.clock_pj
        )
    click.echo(format_table(rows))
    for table in technology_names():
        events = energy_per_event(machine, load_technology(table))
        ratios[f"table {table}"] = events.event_pj("dense_column_blocks") / events.event_pj(
            "unified_column_blocks"
        )
    click.echo(
        format_table(
            [{"energy of a dense over a unified block": key, "ratio": ratio} for key, ratio in ratios.items()]
        )
    )


def _fit(library: Library, folder: Path) -> None:
    import json

    from hwsim.area_fit import fit_errors, fit_runs, left_out_errors, model_json, runs_json
    from hwsim.files import write_atomically
    from hwsim.tables import format_table

    runs = fit_runs(library, _progress())
    click.echo(err=True)
    content = model_json(runs, library)
    write_atomically(folder / "synthesis_runs.json", runs_json(runs, library).encode())
    write_atomically(folder / "area_model.json", content.encode())
    coefficients = json.loads(content)["coefficients"]
    errors, left_out = fit_errors(runs, coefficients), left_out_errors(runs)
    rows = [
        {
            "part": part,
            "runs": len(values),
            "mean error (%)": 100 * float(abs(values).mean()),
            "largest (%)": 100 * float(abs(values).max()),
            "mean, left out (%)": 100 * float(abs(left_out.by_part.get(part, values)).mean()),
            "largest, left out (%)": 100 * float(abs(left_out.by_part.get(part, values)).max()),
        }
        for part, values in errors.by_part.items()
    ]
    click.echo(format_table(rows))
    worst = max(left_out.whole, key=lambda machine: abs(left_out.whole[machine]))
    click.echo(
        f"whole logic of a machine left out: at most {100 * abs(left_out.whole[worst]):.1f} % ({worst})"
    )
    click.echo(f"written: {folder}/synthesis_runs.json, {folder}/area_model.json")
