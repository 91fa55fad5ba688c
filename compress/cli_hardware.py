"""Commands that ask what a network costs on the machine: `hwsim simulate` and `hwsim storage`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compress.subjects import RandomMap
    from hwsim.layer import LayerShape
    from hwsim.report import Report

__all__ = [
    "map_options",
    "parse_block",
    "random_map",
    "simulate",
    "storage",
    "write_tables",
]


def parse_block(text: str) -> tuple[int, int]:
    """``"4x8"`` as ``(4, 8)``.

    Raises
    ------
    InputError
        Not two whole numbers of at least 1.
    """
    from hwsim.errors import InputError, Problem

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(
            "block", Problem("", f"{text!r} is not a block shape", 'write output x reduction, as in "4x4"')
        )
    return int(parts[0]), int(parts[1])


def map_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that take a compressed file or a network by name, with its machine."""
    options = (
        click.option(
            "--machine", default="msa-16x16", show_default=True, help="Preset, or the path of a machine file."
        ),
        click.option(
            "--block",
            default=None,
            help="Random map: block shape as 4x4; by default the machine's native block.",
        ),
        click.option("--pruned", default=0.5, show_default=True, help="Random map: ratio of pruned blocks."),
        click.option(
            "--unified", default=0.5, show_default=True, help="Random map: ratio of unified blocks."
        ),
        click.option(
            "--all-layers", is_flag=True, help="Random map: compress the first and the last layer too."
        ),
        click.option("--seed", default=0, show_default=True, help="Random map: seed."),
        click.option("--input-shape", help="Of one input, where an ONNX file leaves it open, as 3x48x320."),
        click.option(
            "--batch", default=1, show_default=True, type=click.IntRange(1), help="Inputs at a time."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def random_map(
    block: str | None,
    pruned: float,
    unified: float,
    all_layers: bool,
    seed: int,
    input_shape: str | None = None,
) -> RandomMap:
    """What the options of `map_options` say of random maps."""
    from compress.cli_networks import parse_shape
    from compress.subjects import RandomMap

    shape = parse_block(block) if block else None
    return RandomMap(shape, pruned, unified, all_layers, seed, parse_shape(input_shape))


@click.command(epilog="Example: hwsim simulate resnet18 --pruned 0.5 --unified 0.5 --machine msa-16x16")
@click.argument("model")
@map_options
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the report (report.json, for hwsim explain and diff) and its tables (CSV) to a folder.",
)
def simulate(
    model: str, machine: str, batch: int, as_json: bool, out: Path | None, **map_settings: Any
) -> None:
    """Cycles, traffic, energy, storage and area of MODEL on a machine, per layer.

    MODEL is a compressed model file, whose blocks are simulated as they are, or the name of a network of the zoo or an ONNX
    file, whose layers get seeded random block maps of the ratios given (time and bytes depend on the map, not on the weights).
    """
    import json

    from compress.subjects import load_subject
    from hwsim.machine import load_machine

    report = load_subject(model, load_machine(machine), random_map(**map_settings), batch).simulate()
    if out is not None:
        write_tables(report, ("layers", "energy", "storage", "area"), out)
        report.save(out / "report.json")
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        _print_report(report)


def _print_report(report: Report) -> None:
    from hwsim.tables import format_table

    columns = {
        "layer": "layer",
        "macs": "MACs",
        "compute_cycles": "pass cyc",
        "latency_cycles": "latency cyc",
        "bound": "bound",
        "speedup_compute_only": "×comp",
        "speedup_with_memory": "×mem",
        "dram_bytes": "DRAM B",
        "bits_per_weight": "bit/w",
        "energy_pj": "energy pJ",
    }
    rows = report.layers[list(columns)].rename(columns=columns).to_dict("records")
    click.echo(format_table(rows))
    click.echo(str(report))


def write_tables(result: Any, names: Sequence[str], folder: Path) -> None:
    """Write tables of a result as CSV."""
    from hwsim.files import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_atomically(folder / f"{name}.csv", getattr(result, name).to_csv(index=False).encode())


@click.command(
    epilog="Example: hwsim storage resnet18 --block 4x4 --block 8x8 --ratio 0.5,0.5 --ratio 0.75,0.25"
)
@click.argument("network")
@click.option(
    "--block", "blocks", multiple=True, default=("4x4",), show_default=True, help="Block shape; repeat it."
)
@click.option(
    "--ratio",
    "ratios",
    multiple=True,
    default=("0.5,0.5",),
    show_default=True,
    help="pruned,unified; the rest stays dense; repeat it.",
)
@click.option("--machine", default="msa-16x16", show_default=True, help="For number formats and row order.")
@click.option("--all-layers", is_flag=True, help="Compress the first and the last layer too.")
@click.option(
    "--seed", default=0, show_default=True, help="Of the random block maps (byte padding depends on them)."
)
@click.option("--input-shape", help="Of one input, where an ONNX file leaves it open, as 3x48x320.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row.")
def storage(
    network: str,
    blocks: tuple[str, ...],
    ratios: tuple[str, ...],
    machine: str,
    all_layers: bool,
    seed: int,
    input_shape: str | None,
    as_json: bool,
) -> None:
    """Bytes of the memory image and bits per weight of a network of the zoo or an ONNX file, without training.

    Sizes are those of the image of a seeded random block map of exactly these ratios.
    """
    import json

    from compress.cli_networks import parse_shape
    from compress.subjects import network_shapes
    from hwsim.machine import load_machine
    from hwsim.tables import format_table

    base = load_machine(machine)
    rows = []
    shapes = network_shapes(network, input_shape=parse_shape(input_shape))
    for block_text in blocks:
        block = parse_block(block_text)
        fitted = base.with_fields({"array.block": list(block)})
        for ratio in ratios:
            pruned, unified = _parse_ratio(ratio)
            rows.append(
                {"block": block_text, "pruned": pruned, "unified": unified}
                | _storage_row(shapes, fitted, block, pruned, unified, seed, all_layers)
            )
    if as_json:
        for row in rows:
            click.echo(json.dumps({"network": network} | row))
        return
    weights = sum(shape.weight_count for shape in shapes)
    names = {
        "image_bytes": "image B",
        "bits_per_weight": "bit/w",
        "ratio_to_fp32": "×fp32",
        "ratio_to_int8": "×int8",
    }
    table = [
        {
            names.get(key, key.replace("_bytes", "").replace("magnitude", "magn")): value
            for key, value in row.items()
        }
        for row in rows
    ]
    click.echo(f"{network}: {weights:,} weights, {4 * weights:,} bytes in fp32")
    click.echo(format_table(table))


def _parse_ratio(text: str) -> tuple[float, float]:
    from hwsim.errors import InputError, Problem

    try:
        pruned, unified = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            "ratio", Problem("", f"{text!r} is not a pair of ratios", 'write pruned,unified as in "0.5,0.25"')
        ) from None
    return pruned, unified


def _storage_row(
    shapes: list[LayerShape],
    machine: Any,
    block: tuple[int, int],
    pruned: float,
    unified: float,
    seed: int,
    all_layers: bool,
) -> dict[str, Any]:
    from hwsim.image import PARTS, image_sizes
    from hwsim.layer import random_layers
    from hwsim.lowering import effective_counts

    layers = random_layers(shapes, block, pruned, unified, seed, exempt_first_last=not all_layers)
    parts = dict.fromkeys(PARTS, 0)
    for layer in layers:
        for name, size in image_sizes(
            effective_counts(layer.types, machine), layer.shape.m, machine
        ).part_bytes.items():
            parts[name] += size
    total = sum(parts.values())
    weights = sum(shape.weight_count for shape in shapes)
    streams = {
        f"{name}_bytes": size for name, size in parts.items() if name not in ("offset", "order", "channel")
    }
    return {
        "image_bytes": total,
        "bits_per_weight": 8 * total / weights,
        "ratio_to_fp32": 4 * weights / total,
        "ratio_to_int8": weights / total,
        **streams,
        "other_bytes": total - sum(streams.values()),
    }
