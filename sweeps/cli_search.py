"""Commands that search a design space: `hwsim search` and `hwsim search-proof`. Only click is imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sweeps.progress import counting_bar, points_bar

if TYPE_CHECKING:
    import pandas as pd

    from sweeps.search import Search, SearchProgress
    from sweeps.search.proof import Proof
    from sweeps.search.proposals import Sampler
    from sweeps.search.question import Question
    from sweeps.space import Space

__all__ = ["search", "search_proof"]

_FOLDER = click.Path(file_okay=False, path_type=Path)
_ROWS = 20
_PROOF_SHARE = 0.1
_LEAST_OF_THREE: dict[str, Sequence[str]] = {"minimise": ["latency_ms", "energy_pj", "area_mm2"]}
_PROOFS: dict[str, tuple[dict[str, Sequence[str]], ...]] = {
    "search-proof.toml": (
        _LEAST_OF_THREE,
        {"minimise": ["latency_ms", "area_mm2"], "constraints": ["average_power_mw<=300"]},
        {"minimise": ["latency_ms", "energy_pj", "pruned"], "constraints": ["area_mm2<=6"]},
    ),
    "search-held-out.toml": (
        _LEAST_OF_THREE,
        {"minimise": ["latency_ms", "energy_pj", "pruned"], "constraints": ["area_mm2<=10"]},
    ),
}
"""What is asked of the shipped spaces. ``pruned`` stands in for accuracy, which random block types do not have: what is gained
by pruning less."""


def _question_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--constraint",
            "constraints",
            multiple=True,
            metavar="BOUND",
            help='"COLUMN<=NUMBER" or "COLUMN>=NUMBER"; repeat it.',
        ),
        click.option("--maximise", multiple=True, metavar="COLUMN", help="Repeat it."),
        click.option(
            "--minimise", multiple=True, metavar="COLUMN", help="Two or three objectives in all; repeat it."
        ),
    ):
        command = option(command)
    return command


@click.command(
    epilog="Example: hwsim search space.toml --minimise latency_ms --minimise energy_pj "
    '--constraint "area_mm2<=12" --evaluations 400'
)
@click.argument("space", type=click.Path(path_type=Path))
@_question_options
@click.option(
    "--sampler",
    type=click.Choice(["hybrid", "nsga2", "tpe", "random"]),
    default="hybrid",
    show_default=True,
    help="hybrid: NSGA-II and a model of the results; docs/search.md compares them.",
)
@click.option(
    "--evaluations", type=click.IntRange(1), default=500, show_default=True, help="Different points."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--out", type=_FOLDER, help="Folder of the results; by default results/NAME of the space.")
@click.option("--workers", type=click.IntRange(1), help="Processes; by default one per processor.")
@click.option("--scheduler", metavar="ADDRESS", help="Work on a Dask cluster, as hwsim sweep does.")
def search(
    space: Path,
    minimise: tuple[str, ...],
    maximise: tuple[str, ...],
    constraints: tuple[str, ...],
    sampler: Sampler,
    evaluations: int,
    seed: int,
    out: Path | None,
    workers: int | None,
    scheduler: str | None,
) -> None:
    """Search the design space file SPACE for the Pareto front of two or three columns.

    Any numeric column of the results can be an objective or a constraint, machine axes and average_power_mw (energy over
    latency) included. Points that do not fit their machine are infeasible. Results go into the same store as those of hwsim
    sweep; run the same command again after an interruption: it takes the same way, and computes nothing twice.
    """
    from sweeps.search import SearchSettings, ask, run_search, save_search

    loaded = _load(space)
    question = ask(loaded, minimise, maximise, constraints)
    folder = out or Path("results") / loaded.name
    with points_bar() as show:

        def progress(now: SearchProgress) -> None:
            points = f"{now.evaluated}/{now.evaluations} points"
            show(now.evaluated, now.evaluations, points, f"{now.feasible} feasible, {now.doing}")

        result = run_search(
            loaded,
            folder,
            question,
            SearchSettings(sampler, evaluations, seed),
            workers=workers,
            scheduler=scheduler,
            progress=progress,
        )
    share = 100 * len(result.trials) / len(loaded)
    reused = f", {result.reused} of them were there already" if result.reused else ""
    click.echo(f"evaluated {len(result.trials)} of {len(loaded)} points ({share:.3g} %){reused}")
    paths = save_search(result, folder / "search")
    for line in _answer(result):
        click.echo(line)
    click.echo(f"search    {paths['front.csv'].parent} (front.csv, trials.csv, hypervolume.png)")
    click.echo(f"results   {folder}")


@click.command(epilog="Example: hwsim search-proof --out search.md")
@click.argument("space", type=click.Path(path_type=Path), required=False)
@_question_options
@click.option(
    "--evaluations", type=click.IntRange(1), help="Of each search; by default a tenth of the space."
)
@click.option(
    "--sampler",
    "samplers",
    type=click.Choice(["hybrid", "nsga2", "tpe", "random"]),
    multiple=True,
    help="By default all; repeat it.",
)
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="Searches per sampler.")
@click.option("--results", type=_FOLDER, help="Folder of the results; by default results/NAME of the space.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page here, its figures into images/ beside it.",
)
def search_proof(
    space: Path | None,
    minimise: tuple[str, ...],
    maximise: tuple[str, ...],
    constraints: tuple[str, ...],
    evaluations: int | None,
    samplers: tuple[Sampler, ...],
    seeds: int,
    results: Path | None,
    out: Path | None,
) -> None:
    """Compare searches with the truth: enumerate SPACE, search it with every sampler, show what was found.

    Without SPACE: the two spaces of about 5,000 points and the questions that ship with hwsim. With your own space, a part of
    a larger one that is small enough to enumerate, it tells how many evaluations a search of its kind needs.
    """
    from compress.container import check_writable
    from sweeps.search import ask

    if out is not None:
        check_writable(out)
    given: dict[str, Sequence[str]] = {
        "minimise": minimise,
        "maximise": maximise,
        "constraints": constraints,
    }
    if space is not None:
        asked = [(_load(space), [given])]
    else:
        own = any(given.values())
        asked = [(_shipped(name), [given] if own else list(shipped)) for name, shipped in _PROOFS.items()]
    # Every question is checked before the first is answered.
    questions = [(loaded, [ask(loaded, **parts) for parts in several]) for loaded, several in asked]
    groups: list[tuple[Space, list[Proof]]] = []
    for loaded, several in questions:
        done = sum(len(proofs) for _, proofs in groups)
        folder = results or Path("results") / loaded.name
        count = evaluations or max(int(len(loaded) * _PROOF_SHARE), 1)
        groups.append((loaded, _prove(loaded, folder, several, done + 1, count, seeds, samplers)))
    if out is not None:
        _write_page(groups, seeds, out)
        click.echo(out)


def _prove(
    space: Space,
    folder: Path,
    questions: Sequence[Question],
    first: int,
    evaluations: int,
    seeds: int,
    samplers: tuple[Sampler, ...],
) -> list[Proof]:
    """The questions about one space; ``first`` numbers the figure of the first one."""
    from sweeps.search.proof import prove
    from sweeps.search.proposals import SAMPLERS

    proofs = []
    for number, question in enumerate(questions, first):
        click.echo(f"{space.name}: {question}")
        with counting_bar(f"question {number}") as progress:
            proofs.append(
                prove(
                    space,
                    folder,
                    question,
                    evaluations=evaluations,
                    seeds=range(seeds),
                    samplers=samplers or SAMPLERS,
                    name=f"search-{number}",
                    progress=progress,
                )
            )
        click.echo(_table(proofs[-1].summary()))
    return proofs


def _load(path: Path) -> Space:
    from compress.data import BY_NAME
    from compress.zoo_shapes import zoo_names
    from sweeps.space import load_space

    return load_space(path, networks=zoo_names(), datasets=BY_NAME)


def _shipped(name: str) -> Space:
    import tomllib
    from importlib import resources

    from sweeps.space import parse_space

    text = resources.files("sweeps").joinpath("spaces", name).read_text("utf-8")
    return parse_space(tomllib.loads(text), name)


def _answer(result: Search) -> list[str]:
    """The front as a table, and its knees."""
    from sweeps.search import found_front, found_knees
    from sweeps.search.outcome import configurations

    front = found_front(result.trials, result.question)
    rows = front.iloc[sorted({round(i * (len(front) - 1) / max(_ROWS - 1, 1)) for i in range(_ROWS)})]
    some = f", {len(rows)} of them from one end to the other" if len(rows) < len(front) else ""
    lines = [f"question  {result.question}", f"front     {len(front)} points{some}"]
    table = configurations(result, rows)
    table = table.assign(**{name: table[name].map("{:.4g}".format) for name in result.question.columns})
    table = table.map(lambda value: f"{value:g}" if isinstance(value, float) else str(value))
    axes = [name for name in table.columns if name not in result.question.columns]
    same = [name for name in axes if len(rows) > 1 and table[name].nunique() == 1]
    if same:
        lines.append("all of them: " + ", ".join(f"{name} {table[name].iloc[0]}" for name in same))
    lines.append(_table(table.drop(columns=same)))
    for names, knee in found_knees(front, result.question).items():
        values = ", ".join(f"{name} {knee[name]:.6g}" for name in result.question.objectives)
        lines += [f"knee of {' and '.join(names)}: {str(knee['key'])[:12]}", f"  {values}"]
    return lines


def _table(frame: pd.DataFrame) -> str:
    from hwsim.tables import format_table

    shorter = {name: str(name).rpartition(".")[2] for name in frame.columns}
    ambiguous = [short for short in shorter.values() if list(shorter.values()).count(short) > 1]
    names = {name: name if short in ambiguous else short for name, short in shorter.items()}
    return format_table(frame.rename(columns=names).to_dict("records"))


def _write_page(groups: Sequence[tuple[Space, Sequence[Proof]]], seeds: int, out: Path) -> None:
    from hwsim.files import write_atomically
    from sweeps.figures import save_plot
    from sweeps.search.page import page

    for _, proofs in groups:
        for proof in proofs:
            save_plot(proof.plot, out.parent / "images", ("png",))
    write_atomically(out, page(groups, seeds).encode())
