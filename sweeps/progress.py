"""Bars with an estimate for the commands of this package; elsewhere than on a terminal, lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

__all__ = ["counting_bar", "points_bar"]


@contextmanager
def points_bar() -> Iterator[Callable[[float, float, str, str], None]]:
    """A bar on a terminal; elsewhere a line every tenth. Call it with what is done, of how much, the points, and doing."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[points]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=False),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None, points="")
        told = -1

        def show(done: float, total: float, points: str, doing: str) -> None:
            nonlocal told
            bar.update(task, completed=done, total=total, description=doing, points=points)
            tenth = int(10 * done / total) if total else 10
            if not console.is_terminal and tenth > told:
                told = tenth
                click.echo(f"{10 * tenth:>3}%  {points}, {doing}", err=True)

        yield show


@contextmanager
def counting_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal only: what it tells of takes seconds. Call it with what is done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(doing), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
