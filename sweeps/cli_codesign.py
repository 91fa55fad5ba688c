"""Commands of co-design. Only click is imported here; the work is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sweeps.codesign.run import Outcome
    from sweeps.codesign.settings import CoDesignSpace

__all__ = ["codesign", "codesign_study"]

_FOLDER = click.Path(file_okay=False, path_type=Path)

QUICK = {"train_images": 2000, "test_images": 1000, "dense_epochs": 2, "admm_epochs": 1, "retrain_epochs": 1}
"""Training of ``--quick``: shows the way, not the accuracy."""


@click.command(epilog="Example: hwsim codesign lenet5 --budget latency_us=5 --out results/lenet5-5us")
@click.argument("network")
@click.option(
    "--budget",
    required=True,
    metavar="NAME=LIMIT",
    help='Of one input: "latency_us=…", "latency_cycles=…", "energy_pj=…", "image_bytes=…" or "file_bytes=…".',
)
@click.option(
    "--space",
    type=click.Path(path_type=Path),
    help="Machines, block shapes, constraints and training (TOML, docs/codesign.md); by default one for small networks.",
)
@click.option("--data", help='"fashion-mnist" or "digits", in place of the space\'s.')
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of all training."
)
@click.option("--quick", is_flag=True, help="2,000 images and an epoch or two: to see what comes out.")
@click.option("--out", type=_FOLDER, help="Folder of the results; by default results/codesign.")
def codesign(
    network: str, budget: str, space: Path | None, data: str | None, seed: int, quick: bool, out: Path | None
) -> None:
    """Choose the machine and the blocks of every layer together, within a budget, and train the result.

    NETWORK is a network of the zoo, trained first, or a file of `hwsim train`. The same command on the same folder goes on
    where it was stopped. The folder holds the machine (machine.toml), the compressed model, its report (for hwsim explain and
    diff), the table of the alternation, and the resolved configuration with versions.
    """
    import logging

    import torch

    from compress import zoo
    from compress.container import check_writable
    from compress.train import load_checkpoint
    from hwsim.errors import InputError
    from sweeps.codesign.folder import check_claim
    from sweeps.codesign.run import ASKED, asked_of
    from sweeps.codesign.run import codesign as run
    from sweeps.codesign.settings import parse_goal
    from sweeps.codesign.study import dense_network
    from sweeps.weights import images_of

    torch.set_num_threads(1)  # batches this small gain little from a second thread
    logging.getLogger("compress").addHandler(logging.NullHandler())  # warnings are printed at the end
    is_file = Path(network).suffix == ".safetensors" or Path(network).is_file()
    asked = _all_of(
        {
            "budget": lambda: parse_goal(budget),
            "data": lambda: _check_data(data),
            "space": lambda: _space(space, data, quick),
            "network": lambda: load_checkpoint(network) if is_file else zoo.network(network),
        }
    )
    if problems := asked["space"].problems_with(asked["budget"]):
        raise InputError("codesign", problems)
    folder = out or Path("results/codesign")
    check_writable(folder / ASKED)
    images = images_of(asked["space"].training, seed)
    name = asked["network"].network if is_file else network
    check_claim(folder / ASKED, asked_of(name, images, asked["space"], asked["budget"], seed))
    with _bar() as tell:
        dense = asked["network"] if is_file else dense_network(folder, network, asked["space"], seed, tell)
        outcome = run(dense, images, asked["space"], asked["budget"], folder, seed=seed, tell=tell)
    _print(outcome, folder)


@click.command(
    "codesign-study",
    epilog="Example: hwsim codesign-study --runs results/codesign-study --out docs/codesign.md",
)
@click.option(
    "--runs",
    type=_FOLDER,
    help="Folder of the trained runs: what is missing is trained, then OUT's .json is written anew from it.",
)
@click.option("--stored-only", is_flag=True, help="Train nothing: take the runs that are there.")
@click.option("--network", default="lenet5", show_default=True)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="NAME=LIMIT",
    default=("latency_us=5", "latency_us=6.5", "latency_us=8"),
    show_default=True,
    help="Repeat it; run in this order.",
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(2, 100), help="0, 1, … so many.")
@click.option("--space", type=click.Path(path_type=Path), help="As of hwsim codesign.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("docs/codesign.md"),
    show_default=True,
    help="The page; the numbers lie beside it (.json), the figure in images/.",
)
def codesign_study(
    runs: Path | None,
    stored_only: bool,
    network: str,
    budgets: tuple[str, ...],
    seeds: int,
    space: Path | None,
    out: Path,
) -> None:
    """Compare co-design with uniform ratios at equal latency, and write the page with table and figure.

    Without --runs the page is written anew from the numbers that are stored beside it.
    """
    import logging

    import torch

    from compress import zoo
    from sweeps.codesign.page import load_study, store_study, write_page
    from sweeps.codesign.settings import parse_goal
    from sweeps.codesign.study import Study, run_study

    numbers = out.with_suffix(".json")
    if runs is not None:
        torch.set_num_threads(1)
        logging.getLogger("compress").setLevel(logging.ERROR)
        asked = _all_of(
            {
                "budgets": lambda: Study(network, tuple(map(parse_goal, budgets)), tuple(range(seeds))),
                "space": lambda: _space(space, None, False),
                "network": lambda: zoo.network(network),
            }
        )
        study, loaded = asked["budgets"], asked["space"]
        if not stored_only:
            with _bar() as tell:
                run_study(study, loaded, runs, tell=tell)
        store_study(numbers, study, loaded, runs)
    for path in write_page(load_study(numbers), out):
        click.echo(path)


def _check_data(data: str | None) -> None:
    from compress.data import BY_NAME
    from hwsim.errors import InputError, Problem, nearest_name

    if data is not None and data not in BY_NAME:
        raise InputError("--data", Problem("", f'"{data}" is not known', nearest_name(data, BY_NAME)))


def _space(path: Path | None, data: str | None, quick: bool) -> CoDesignSpace:
    """The space of a file, or the one that ships; with other data or a short training."""
    from importlib import resources

    from compress.data import BY_NAME
    from sweeps.codesign.settings import load_codesign_space

    with resources.as_file(resources.files("sweeps").joinpath("spaces", "codesign.toml")) as shipped:
        changes = (QUICK if quick else {}) | ({"dataset": data} if data in BY_NAME else {})
        return load_codesign_space(path or shipped, changes)


def _all_of(makers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each of some functions makes; the problems of all are told at once."""
    from hwsim.errors import InputError, Problem

    made: dict[str, Any] = {}
    problems = []
    for name, make in makers.items():
        try:
            made[name] = make()
        except InputError as error:
            problems += [
                Problem(
                    f"{error.source}: {item.field}" if item.field else error.source, item.message, item.hint
                )
                for item in error.problems
            ]
    if problems:
        raise InputError("codesign", problems)
    return made


@contextmanager
def _bar() -> Iterator[Callable[[str, float, float], None]]:
    """A bar per phase with an estimate on a terminal; elsewhere a line per phase."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        told = phase = ""

        def tell(doing: str, done: float, total: float) -> None:
            nonlocal told, phase
            if doing.partition(",")[0] != phase:
                phase = doing.partition(",")[0]  # a new phase has an estimate of its own
                bar.reset(task)
            bar.update(task, description=doing, completed=done, total=total)
            if not console.is_terminal and doing != told:
                told = doing
                click.echo(doing, err=True)

        yield tell


def _print(outcome: Outcome, folder: Path) -> None:
    import json

    from hwsim.tables import format_table

    result = outcome.result
    table = json.loads((folder / "alternation.json").read_text())
    for warning in result["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    shown = ("machine", "damage", "latency_us", "energy_pj", "image_bytes", "area_mm2")
    reached = [row for row in table["steps"] if row["damage"] is not None]
    click.echo(format_table([{name: row[name] for name in shown} for row in reached]))
    for number, ending in enumerate(table["endings"]):
        click.echo(f"start {number}   {ending}")
    click.echo(format_table(table["plan"]["layers"]))
    accuracy, spent = result["accuracy"], result["budget"]
    click.echo(f"machine   {result['machine']}")
    click.echo(
        f"accuracy  dense {accuracy['dense']:.2%}, projected {accuracy['projected']:.2%}, "
        f"retrained {accuracy['retrained']:.2%}; integers {accuracy['integer']:.2%}"
    )
    click.echo(
        f"budget    {spent['quantity']} {spent['reached']:,.10g} of {spent['limit']:,.10g} "
        f"({spent['reached'] / spent['limit']:.2%}), measured on the trained blocks"
    )
    for text in result["limits_broken"]:
        click.echo(f"warning: not kept after training: {text}", err=True)
    best = result["best_machine_for_trained"]
    if best["saves_percent"] > 0:
        click.echo(
            f"note      for the trained blocks {best['machine']} spends {best['saves_percent']:.2g} % less"
        )
    click.echo(f"results   {folder}")
