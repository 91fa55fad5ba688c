"""Commands that evaluate design spaces and show what came out. Only click is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sweeps.progress import counting_bar, points_bar

if TYPE_CHECKING:
    import pandas as pd

    from hwsim.explain import Explanation
    from sweeps.figures import Plot
    from sweeps.runner import Details, SweepProgress
    from sweeps.space import Space
    from sweeps.store import ResultStore

__all__ = ["demo", "figures", "query", "report", "sweep"]

_MOST_SIMULATED = 200  # points simulated again for figures, where a store holds totals only
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(epilog="Example: hwsim sweep space.toml --out results/space")
@click.argument("space", type=click.Path(path_type=Path))
@click.option("--out", type=_FOLDER, help="Folder of the results; by default results/NAME of the space.")
@click.option("--workers", type=click.IntRange(1), help="Processes; by default one per processor.")
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Work on a Dask cluster: tcp://HOST:PORT of its scheduler, or local for --workers Dask workers here.",
)
@click.option(
    "--details",
    type=click.Choice(["auto", "all", "none"]),
    default="auto",
    help="Keep the rows of each layer too; auto: up to 2,000 points.",
)
def sweep(
    space: Path, out: Path | None, workers: int | None, scheduler: str | None, details: Details
) -> None:
    """Evaluate every point of the design space file SPACE.

    Results are kept as they come. Run the same command again after an interruption: it goes on where it was, and computes
    nothing twice. docs/formats.md describes the file and the results.
    """
    loaded = _load_space(space)
    folder = out or Path("results") / loaded.name
    _run(loaded, folder, workers, scheduler, details)
    click.echo(f"results   {folder}")


@click.command(epilog="Example: hwsim figures results/space --out figures")
@click.argument("results", type=_FOLDER)
@click.option("--out", type=_FOLDER, help="Folder of the figures; by default RESULTS/figures.")
def figures(results: Path, out: Path | None) -> None:
    """Paper plots of a results folder: PNG, PDF, and the data of each as CSV.

    Block shape against speed-up and bandwidth, accuracy against ratio and compression, storage by stream, energy by
    component, roofline, Pareto fronts; all in one style, one or two columns of a paper wide.
    """
    from sweeps.store import ResultStore

    folder = out or results / "figures"
    tables, _ = _tables(ResultStore(_existing(results)), for_page=False)
    for path in _save_plots(_plots(tables), folder):
        click.echo(path)


@click.command(epilog="Example: hwsim report results/space --out report.html --point knee --point 3fa2c1")
@click.argument("results", type=_FOLDER)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="By default RESULTS/report.html."
)
@click.option(
    "--point",
    "chosen",
    multiple=True,
    help="Show this point layer by layer too: best, fastest, smallest, knee, or the beginning of a key; repeat it.",
)
@click.option("--pages", is_flag=True, help="Also a page for every point, in a folder beside the report.")
def report(results: Path, out: Path | None, chosen: tuple[str, ...], pages: bool) -> None:
    """One self-contained HTML page of a results folder: summary, interactive plot, tables, layers of the front."""
    from sweeps.store import ResultStore

    store = ResultStore(_existing(results))
    path = out or results / "report.html"
    tables, keys = _tables(store, chosen)
    plots = _plots(tables) if tables["points"]["error"].isna().any() else []
    _write_report(store, tables, plots, path, keys, with_pages=pages)
    click.echo(path)


@click.command(
    epilog='Example: hwsim query results/space "SELECT block, min(latency_ms) FROM points GROUP BY block"'
)
@click.argument("results", type=_FOLDER)
@click.argument("sql")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    help="By default a table.",
)
def query(results: Path, sql: str, form: str) -> None:
    """Ask a results folder in SQL (DuckDB): tables points, layers, energy, storage.

    Nothing is changed by a query: it sees the tables of this folder, and no other file.
    """
    from sweeps.query import run_query
    from sweeps.store import ResultStore

    frame = run_query(ResultStore(_existing(results)), sql)
    if form == "csv":
        click.echo(frame.to_csv(index=False), nl=False)
    elif form == "json":
        click.echo(frame.to_json(orient="records"))
    else:
        from hwsim.tables import format_table

        click.echo(format_table(frame.to_dict("records")) if len(frame) else "no rows")


@click.command(epilog="Example: hwsim demo --quick --out results/quick")
@click.option(
    "--out",
    type=_FOLDER,
    help="Folder of the results; by default results/demo, with --quick results/demo-quick.",
)
@click.option("--quick", is_flag=True, help="Fewer images, epochs and configurations: about two minutes.")
@click.option("--workers", type=click.IntRange(1), help="Processes that train; by default one per processor.")
def demo(out: Path | None, quick: bool, workers: int | None) -> None:
    """Train LeNet-5 on Fashion-MNIST, compress it at several block shapes and ratios, simulate, plot and report.

    The design space is the file demo.toml (demo-quick.toml with --quick) that ships with hwsim; it is copied into the folder.
    """
    import tomllib
    from importlib import resources

    from hwsim.files import write_atomically
    from sweeps.space import parse_space
    from sweeps.store import ResultStore
    from sweeps.summary import summarise

    name = "demo-quick.toml" if quick else "demo.toml"
    out = out or Path("results") / name.removesuffix(".toml")  # a folder holds one set of training settings
    text = resources.files("sweeps").joinpath("spaces", name).read_text("utf-8")
    _run(parse_space(tomllib.loads(text), name), out, workers)
    write_atomically(out / name, text.encode())
    store = ResultStore(out)
    points = store.to_frame()
    table = points.drop(columns=[column for column in points if points[column].isna().all()])
    write_atomically(out / "points.csv", table.to_csv(index=False).encode())
    tables, _ = _tables(store)
    plots = _plots(tables)
    _save_plots(plots, out / "figures")
    _write_report(store, tables, plots, out / "report.html")
    click.echo(_table(points))
    for sentence in summarise(points):
        click.echo(sentence)
    click.echo(f"page      {out / 'report.html'}")
    click.echo(f"table     {out / 'points.csv'}")
    click.echo(f"figures   {out / 'figures'} (PNG, PDF, CSV)")


def _load_space(path: Path) -> Space:
    from compress.data import BY_NAME
    from compress.zoo_shapes import zoo_names
    from sweeps.space import load_space

    return load_space(path, networks=zoo_names(), datasets=BY_NAME)


def _run(
    space: Space, folder: Path, workers: int | None, scheduler: str | None = None, details: Details = "auto"
) -> None:
    from sweeps.runner import run_sweep

    with points_bar() as show:

        def progress(now: SweepProgress) -> None:
            show(now.done, now.total, f"{now.points_done}/{now.points_total} points", now.doing)

        result = run_sweep(
            space, folder, workers=workers, scheduler=scheduler, details=details, progress=progress
        )
    reused = f", {result.reused} were there already" if result.reused else ""
    click.echo(f"computed  {result.computed} of {len(space)} points{reused}")


def _existing(results: Path) -> Path:
    from hwsim.errors import InputError

    if not (results / "points").is_dir():
        raise InputError(
            str(results), "no results here (no points/ inside); run hwsim sweep or hwsim demo first"
        )
    return results


def _plots(tables: Mapping[str, pd.DataFrame]) -> list[Plot]:
    from sweeps.figures import paper_figures

    with counting_bar("drawing") as progress:
        return paper_figures(tables, progress)


def _tables(
    store: ResultStore, chosen: tuple[str, ...] = (), *, for_page: bool = True
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The tables with the details of all points that are shown, and the keys of the chosen ones."""
    import pandas as pd

    from sweeps.figures import drawn_points
    from sweeps.html import shown_points
    from sweeps.points import add_details, choose_point
    from sweeps.store import TABLES

    tables = {name: store.to_frame(name) for name in TABLES}
    points = tables["points"]
    keys = [str(choose_point(points, choice)["key"]) for choice in chosen]
    shown = [drawn_points(points).head(_MOST_SIMULATED)] + ([shown_points(points, keys)] if for_page else [])
    with counting_bar("simulating") as progress:
        return add_details(store, tables, pd.concat(shown), progress), keys


def _save_plots(plots: list[Plot], folder: Path) -> list[Path]:
    from sweeps.figures import save_plot

    paths: list[Path] = []
    with counting_bar("writing") as progress:
        for done, drawn in enumerate(plots, 1):
            paths += save_plot(drawn, folder).values()
            progress(done, len(plots))
    return paths


def _write_report(
    store: ResultStore,
    tables: dict[str, pd.DataFrame],
    plots: list[Plot],
    path: Path,
    selected: Sequence[str] = (),
    *,
    with_pages: bool = False,
) -> None:
    from hwsim.assumptions import ASSUMPTIONS
    from sweeps.html import write_report

    runs = store.manifest()
    with counting_bar("page") as progress:
        write_report(
            path,
            title=f"hwsim: {runs['runs'][-1]['configuration']['name']}" if runs["runs"] else "hwsim",
            tables=tables,
            plots=plots,
            manifest=runs,
            assumptions=ASSUMPTIONS,
            selected=selected,
            explain=lambda row: _explanation(store, row),
            with_pages=with_pages,
            progress=progress,
        )


def _explanation(store: ResultStore, row: pd.Series) -> Explanation | str:
    """Where the cycles of a point went, or why it cannot be simulated again."""
    from hwsim.errors import HwsimError
    from hwsim.explain import explain
    from sweeps.points import point_subject

    try:
        subject = point_subject(store, row)
        return explain(subject.machine, subject.layers, network=subject.network)
    except HwsimError as error:
        return f"Where the cycles went cannot be told, since the point cannot be simulated again: {error}"


def _table(points: pd.DataFrame) -> str:
    from hwsim.tables import format_table

    columns = {
        "block": "block",
        "pruned": "p",
        "unified": "u",
        "hold": "hold",
        "accuracy_float": "float %",
        "accuracy_integer": "int %",
        "latency_us": "µs",
        "speedup_compute_only": "×comp",
        "speedup_with_memory": "×mem",
        "speedup_equal_area": "×area",
        "energy_pj": "µJ",
        "file_bytes": "file B",
    }
    frame = points[points["error"].isna()].assign(
        accuracy_float=lambda f: 100 * f["accuracy_float"],
        accuracy_integer=lambda f: 100 * f["accuracy_integer"],
        energy_pj=lambda f: f["energy_pj"] / 1e6,
        latency_us=lambda f: 1e3 * f["latency_ms"],
    )
    return format_table(frame[list(columns)].rename(columns=columns).to_dict("records"))
