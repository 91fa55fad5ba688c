"""Commands that need the machine alone: conformance of passes, the machines that ship with hwsim."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["machines", "passes"]


@click.command(epilog="Example: hwsim passes --machine msa-16x16 --types types.npy --json")
@click.option(
    "--machine", default="msa-16x16", show_default=True, help="Preset, or the path of a machine file."
)
@click.option(
    "--types",
    "types_path",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="NumPy file with uint8[Mb, Kb]: 0 PRUNED, 1 UNIFIED, 2 DENSE.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line instead of a table.")
def passes(machine: str, types_path: Path, as_json: bool) -> None:
    """Simulate one pass of each row tile of an array of block types, in one segment.

    Prints the counters of docs/microarchitecture.md, section 3, per row tile in execution order, then the total.
    With --json each row tile is one object {"row_tile", "block_rows", counters} on a line of its own, and the last line is
    {"total": {counters}}.
    """
    from hwsim.conformance import count_passes
    from hwsim.machine import load_machine

    tiles, total = count_passes(load_machine(machine), types_path)
    if as_json:
        for tile in tiles:
            click.echo(json.dumps(tile))
        click.echo(json.dumps({"total": total}))
        return
    names = list(total)
    width = {name: max(len(name), len(f"{total[name]:,}")) for name in names}
    click.echo("row tile  " + "  ".join(name.rjust(width[name]) for name in names))
    for tile in tiles:
        click.echo(
            f"{tile['row_tile']:>8}  " + "  ".join(f"{tile[name]:,}".rjust(width[name]) for name in names)
        )
    click.echo("   total  " + "  ".join(f"{total[name]:,}".rjust(width[name]) for name in names))


@click.command(epilog="Example: hwsim machines msa-16x16")
@click.argument("name", required=False)
def machines(name: str | None) -> None:
    """List the machines that ship with hwsim; with NAME print that machine file, to start one of your own from."""
    from importlib import resources

    from hwsim.machine import load_machine, preset_names
    from hwsim.technology import technology_names

    if name is not None:
        load_machine(name)
        if name in preset_names():
            click.echo(
                resources.files("hwsim").joinpath("presets", f"{name}.toml").read_text("utf-8"), nl=False
            )
        else:
            click.echo(Path(name).read_text("utf-8"), nl=False)
        return
    click.echo("machines (array.block; multipliers per PE; clock):")
    for preset in preset_names():
        machine = load_machine(preset)
        array = machine.array
        click.echo(
            f"  {preset}: {array.rows} x {array.columns} PEs, blocks {array.block[0]}x{array.block[1]}, "
            f"{array.multipliers} multipliers, {machine.clock_mhz:g} MHz"
        )
    click.echo("technology tables: " + ", ".join(technology_names()))
