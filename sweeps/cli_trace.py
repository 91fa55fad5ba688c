"""The command that shows one pass of a layer cycle by cycle. Only click is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hwsim.layer import Layer
    from hwsim.machine import Machine
    from hwsim.trace import PassTrace

__all__ = ["trace"]

_MOST_CYCLES = 60


@click.command(
    epilog="Example: hwsim trace resnet18 layer1.0.conv1 --row-tile 3 --cycles 1:50 --out figures/pass.png"
)
@click.argument("model")
@click.argument("layer", required=False)
@click.option(
    "--machine",
    "machine_name",
    default="msa-16x16",
    show_default=True,
    help="Preset, or the path of a machine file.",
)
@click.option(
    "--block", default=None, help="Random map: block shape as 4x4; by default the machine's native block."
)
@click.option("--pruned", default=0.5, show_default=True, help="Random map: ratio of pruned blocks.")
@click.option("--unified", default=0.5, show_default=True, help="Random map: ratio of unified blocks.")
@click.option("--seed", default=0, show_default=True, help="Random map: seed.")
@click.option(
    "--group", default=0, show_default=True, type=click.IntRange(min=0), help="Of a grouped convolution."
)
@click.option(
    "--row-tile", default=0, show_default=True, type=click.IntRange(min=0), help="In execution order."
)
@click.option(
    "--segment",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of a pass that runs in several.",
)
@click.option(
    "--cycles", default=None, help=f"First and last cycle as 1:50; by default the first {_MOST_CYCLES}."
)
@click.option(
    "--rtl", is_flag=True, help="From the waveforms of the RTL, built with Verilator, not from the oracle."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the figure NAME.png, NAME.pdf and its data NAME.csv here instead of text.",
)
def trace(
    model: str,
    layer: str | None,
    machine_name: str,
    block: str | None,
    pruned: float,
    unified: float,
    seed: int,
    group: int,
    row_tile: int,
    segment: int,
    cycles: str | None,
    rtl: bool,
    out: Path | None,
) -> None:
    """Show one pass of LAYER of MODEL cycle by cycle: scan, queue, fetches, conflicts, operand and PEs of every row.

    MODEL is a compressed model file, a .npy file with uint8[Mb, Kb] block types (then without LAYER), or the name of a network
    of the zoo, whose layers get seeded random block maps. Without --out the picture is drawn in characters.
    """
    from hwsim.machine import load_machine
    from hwsim.trace import pick_pass, trace_pass, trace_pass_rtl

    machine = load_machine(machine_name)
    source, types = _types(machine, model, layer, block, (pruned, unified), seed, group)
    chosen = pick_pass(machine, types, row_tile, segment, source)
    traced = trace_pass_rtl(chosen) if rtl else trace_pass(chosen)
    first, last = _cycle_range(cycles, traced.cycles)
    where = f"{source}, row tile {row_tile}, segment {segment}, on {machine.name}"
    click.echo(f"{where}: cycles {first} to {last} of {traced.cycles}, from the {traced.source}")
    if out is None:
        _echo(traced, first, last)
        return
    from sweeps.figures import save_plot
    from sweeps.trace_figure import trace_plot

    for path in save_plot(trace_plot(traced, first, last, out.stem), out.parent).values():
        click.echo(path)


def _echo(traced: PassTrace, first: int, last: int) -> None:
    from hwsim.trace import trace_text

    click.echo(trace_text(traced, first, last))


def _types(
    machine: Machine,
    model: str,
    layer: str | None,
    block: str | None,
    ratios: tuple[float, float],
    seed: int,
    group: int,
) -> tuple[str, NDArray[np.uint8]]:
    """What the types are of, and ``uint8[Mb, Kb]`` at the machine's native block."""
    from hwsim.errors import InputError, Problem, nearest_name

    if Path(model).suffix == ".npy":
        from hwsim.conformance import load_types

        if layer is not None:
            raise InputError(model, Problem("LAYER", f'"{layer}", a .npy file is one layer', "leave it out"))
        return Path(model).name, load_types(Path(model))
    layers = {found.name: found for found in _layers(machine, model, block, ratios, seed)}
    if layer is None:
        raise InputError(model, Problem("LAYER", "missing", "one of: " + ", ".join(layers)))
    if layer not in layers:
        raise InputError(model, Problem("LAYER", f'no layer "{layer}"', nearest_name(layer, layers)))
    native = layers[layer].at_native_block(machine.array.block).types
    if group >= len(native):
        raise InputError(
            f"{model}, {layer}",
            Problem("group", f"{group}, the layer has {len(native)}: 0 … {len(native) - 1}"),
        )
    return f"{Path(model).name} {layer}", native[group]


def _layers(
    machine: Machine, model: str, block: str | None, ratios: tuple[float, float], seed: int
) -> list[Layer]:
    """The layers that `hwsim simulate` would run."""
    from compress.artifact import load_artifact
    from compress.cli_hardware import parse_block
    from compress.zoo_shapes import zoo_shapes
    from hwsim.layer import random_layers

    if Path(model).suffix == ".safetensors" or Path(model).exists():
        return load_artifact(model).layers(1)
    shape = parse_block(block) if block else machine.array.block
    return random_layers(zoo_shapes(model), shape, *ratios, seed, exempt_first_last=True)


def _cycle_range(text: str | None, cycles: int) -> tuple[int, int]:
    """First and last cycle, cut to the pass."""
    from hwsim.errors import InputError, Problem

    if text is None:
        return 1, min(cycles, _MOST_CYCLES)
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= min(int(last), cycles)):
        raise InputError(
            "cycles",
            Problem("", f'"{text}", the pass has cycles 1 … {cycles}', 'write first:last, as in "1:50"'),
        )
    return int(first), min(int(last), cycles)
