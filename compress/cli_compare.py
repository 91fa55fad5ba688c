"""The command that sets other machines beside the block-skip machine: `hwsim compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hwsim.layer import Layer

__all__ = ["compare"]


@click.command(epilog="Example: hwsim compare resnet18 --pruned 0.5 --unified 0.5 --machine msa-16x16")
@click.argument("model")
@click.option(
    "--machine", default="msa-16x16", show_default=True, help="Preset, or the path of a machine file."
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME",
    help="A machine to compare with: dense, ws, ws-overlap, os, os-overlap, 2:4, 2:4-ws, channels, channels-ws, bitmap; again "
    "for more. Default: all.",
)
@click.option(
    "--weights",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The dense network of a compressed MODEL, as `hwsim train` wrote it: prune its elements by magnitude.",
)
@click.option(
    "--block", default=None, help="Random map: block shape as 4x4; by default the machine's native block."
)
@click.option("--pruned", default=0.5, show_default=True, help="Random map: ratio of pruned blocks.")
@click.option("--unified", default=0.5, show_default=True, help="Random map: ratio of unified blocks.")
@click.option("--all-layers", is_flag=True, help="Random map: compress the first and the last layer too.")
@click.option("--seed", default=0, show_default=True, help="Of random block maps and random elements.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Inputs at a time.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option("--csv", "as_csv", is_flag=True, help="The table of machines as CSV.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the tables as CSV to a folder.",
)
def compare(
    model: str,
    machine: str,
    baselines: tuple[str, ...],
    weights: Path | None,
    block: str | None,
    pruned: float,
    unified: float,
    all_layers: bool,
    seed: int,
    batch: int,
    as_json: bool,
    as_csv: bool,
    out: Path | None,
) -> None:
    """Cost of MODEL on its block-skip machine and on others, at equal multipliers and at equal area.

    MODEL is a compressed model file or the name of a network of the zoo, as for `hwsim simulate`. The others are dense
    arrays (the machine's own without its features; systolic, weight or output stationary, without and with overlap of
    tiles), 2:4 sparsity, pruned channels on dense arrays, and an array that skips single zero weights. Each gets the
    pattern that it needs at as many weights kept; accuracy is not compared. What each machine is and is granted:
    docs/comparison.md.
    """
    import json

    from compress.cli_hardware import random_map, write_tables
    from compress.subjects import is_file, load_subject
    from hwsim.comparison import compare as run
    from hwsim.errors import InputError, Problem
    from hwsim.files import write_atomically
    from hwsim.machine import load_machine

    if as_json and as_csv:
        raise InputError("compare", Problem("--json, --csv", "both given", "choose one"))
    if weights is not None and not is_file(model):
        raise InputError(
            "compare",
            Problem(
                "--weights",
                f"given, but {model} is a network by name, whose blocks are random",
                "give a compressed model file, or leave --weights out",
            ),
        )
    subject = load_subject(
        model, load_machine(machine), random_map(block, pruned, unified, all_layers, seed), batch
    )
    with _progress_bar() as progress:
        found = run(
            subject.machine,
            subject.layers,
            network=subject.network,
            baselines=baselines or None,
            weights=None if weights is None else _dense_weights(weights, subject.layers),
            seed=seed,
            progress=progress,
        )
    if out is not None:
        write_tables(found, ("machines", "layers"), out)
        write_atomically(out / "report.json", json.dumps(found.to_dict(), indent=1).encode())
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    elif as_csv:
        click.echo(found.machines.to_csv(index=False), nl=False)
    else:
        click.echo(str(found))


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the machines with an estimate of the time left, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)


def _dense_weights(path: Path, layers: list[Layer]) -> dict[str, NDArray]:
    """``[groups, m, k]`` of every layer, the input channel fastest, from a file that `hwsim train` wrote."""
    import numpy as np

    from compress.container import read_container
    from hwsim.errors import InputError, Problem

    _, tensors = read_container(path, "hwsim-dense", 1)
    found: dict[str, NDArray] = {}
    problems = []
    for layer in layers:
        shape = layer.shape
        key = f"{layer.name.split('#')[0]}.weight"  # a module that runs again carries a mark
        expected = (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)
        if key not in tensors:
            problems.append(Problem(key, "not in this file", "give the network that was compressed"))
        elif tensors[key].shape != expected:
            problems.append(Problem(key, f"shape {tensors[key].shape}, the layer needs {expected}"))
        else:
            matrix = np.moveaxis(tensors[key], 1, -1)
            found[layer.name] = matrix.reshape(shape.groups, shape.m, shape.k)
    if problems:
        raise InputError(str(path), problems)
    return found
