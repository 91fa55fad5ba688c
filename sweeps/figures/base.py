"""What all figures share: the `Plot`, its files, checks of tables, means over seeds, small parts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from hwsim.errors import InputError, Problem, nearest_name
from hwsim.files import write_atomically
from sweeps.style import marker_and_color, style
from sweeps.summary import identity_columns

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

Kind = Literal["png", "pdf", "csv"]

__all__ = [
    "CONFIGURATION",
    "DOT",
    "HOLD_TEXT",
    "RASTER_ABOVE",
    "WEIGHTS",
    "Plot",
    "add_legend",
    "best_unit",
    "block_text",
    "by_block",
    "check_fractions",
    "check_one",
    "line_handle",
    "marker_handle",
    "need_columns",
    "over_seeds",
    "patch_handle",
    "plain_log_ticks",
    "save_plot",
    "to_image",
    "to_svg",
    "with_result",
]

WEIGHTS = ["block", "block_rows", "block_columns", "pruned", "unified"]  # on which compressed weights depend
CONFIGURATION = [*WEIGHTS, "hold"]
HOLD_TEXT = {"lanes": "lanes fixed", "area": "area fixed"}
DOT: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.3}
RASTER_ABOVE = 5000  # markers; above it a vector file would be slow to open

_LARGEST_SVG = 250_000


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure with what belongs to it.

    Attributes
    ----------
    name : str
        Of its files.
    title, caption : str
        What it shows, in a few words and in a sentence or two.
    figure : matplotlib Figure
    data : DataFrame
        The numbers that are drawn, tidy, units in the column names.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    data: pd.DataFrame

    def _repr_html_(self) -> str:
        kind, content = to_image(self)
        if kind == "image/svg+xml":
            text = content.decode()
            image = text[text.index("<svg") :]
        else:
            image = f'<img src="data:{kind};base64,{base64.b64encode(content).decode()}">'
        title, caption = html.escape(self.title), html.escape(self.caption)
        return f"<figure>{image}<figcaption><b>{title}.</b> {caption}</figcaption></figure>"


def save_plot(
    plot: Plot, folder: str | Path, kinds: Sequence[Kind] = ("png", "pdf", "csv")
) -> dict[Kind, Path]:
    """Write ``<name>.png`` (300 dpi), ``<name>.pdf`` (vector, text stays text) and ``<name>.csv``.

    Parameters
    ----------
    plot : Plot
    folder : path
    kinds : sequence of {"png", "pdf", "csv"}
        What is written; ``("png",)`` for a page that holds the numbers itself.

    Returns
    -------
    dict
        Paths by kind.

    Raises
    ------
    HwsimError
        The disk is full or the folder cannot be written.
    """
    content: dict[Kind, Callable[[], bytes]] = {
        "png": lambda: _rendered(plot, "png", {"Software": None}),
        "pdf": lambda: _rendered(plot, "pdf", {"CreationDate": None, "ModDate": None}),
        "csv": lambda: plot.data.to_csv(index=False).encode(),
    }
    paths = {kind: Path(folder) / f"{plot.name}.{kind}" for kind in kinds}
    for kind, path in paths.items():
        write_atomically(path, content[kind]())
    return paths


def to_svg(plot: Plot) -> bytes:
    """The figure as SVG, the same bytes for the same figure."""
    return _rendered(plot, "svg", {"Date": None, "Creator": None})


def to_image(plot: Plot) -> tuple[str, bytes]:
    """``(media type, bytes)`` for a page: SVG, or where a cloud of points makes that large, PNG."""
    svg = to_svg(plot)
    if len(svg) <= _LARGEST_SVG:
        return "image/svg+xml", svg
    return "image/png", _rendered(plot, "png", {"Software": None})


def _rendered(plot: Plot, kind: str, metadata: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    with style():
        plot.figure.savefig(sink, format=kind, metadata=metadata)
    return sink.getvalue()


def with_result(points: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The columns of the points that have a result."""
    need_columns(points, columns, "points")
    if "error" in points:
        points = points[points["error"].isna()]
    if points.empty:
        raise InputError("points", Problem("", "no point with a result, nothing to draw"))
    missing = points[columns].isna().sum()
    problems = [
        Problem(str(column), f"{count} of {len(points)} values are missing", "leave those points out")
        for column, count in missing[missing > 0].items()
    ]
    if problems:
        raise InputError("points", problems)
    return points[columns]


def need_columns(frame: pd.DataFrame, columns: list[str], source: str) -> None:
    names = [str(name) for name in frame.columns]
    problems = [
        Problem(name, "no such column", nearest_name(name, names)) for name in columns if name not in names
    ]
    if problems:
        raise InputError(source, problems)


def check_one(points: pd.DataFrame, columns: list[str]) -> None:
    """Refuse to draw several networks or machines as if they were one."""
    problems = [
        Problem(name, f"{points[name].nunique()} values", f'choose one: points[points["{name}"] == ...]')
        for name in columns
        if points[name].nunique(dropna=False) > 1
    ]
    if problems:
        raise InputError("points", problems)


def check_fractions(points: pd.DataFrame, columns: list[str]) -> None:
    problems = [
        Problem(name, f"{points[name].max():g}; an accuracy is a share between 0 and 1")
        for name in columns
        if not points[name].between(0, 1).all()
    ]
    if problems:
        raise InputError("points", problems)


_SPREAD = {"": "mean", "_min": "min", "_max": "max"}


def over_seeds(
    points: pd.DataFrame, by: list[str], columns: list[str], *, may_miss: bool = False
) -> pd.DataFrame:
    """Mean (under the column's own name), least and most over the seeds of each configuration, blocks by size.

    With ``may_miss`` single values may be missing; a configuration without any stays so.
    """
    identity = ["key", "network", "machine", "seed", *CONFIGURATION]
    need_columns(points, columns, "points")
    valid = points.loc[with_result(points, identity if may_miss else [*identity, *columns]).index]
    if valid[columns].isna().all(axis=None):
        raise InputError("points", Problem(", ".join(columns), "every value is missing, nothing to draw"))
    check_one(valid, [name for name in identity_columns(points) if name not in CONFIGURATION])
    repeated = int(valid.duplicated([*CONFIGURATION, "seed"]).sum())
    if repeated:
        found = f"{repeated} points share block, ratios, hold and seed with another"
        raise InputError("points", Problem("", found, "every point once"))
    one_each = valid.drop_duplicates([*by, "seed"])  # weights are the same for every way to hold the machine
    named = {f"{name}{end}": (name, how) for name in columns for end, how in _SPREAD.items()}
    frame = one_each.groupby(by, as_index=False).agg(seeds=("seed", "nunique"), **named)
    frame = frame.assign(block_size=frame["block_rows"] * frame["block_columns"])
    order = ["block_size", "block_rows", "pruned", "unified", *(["hold"] if "hold" in by else [])]
    return frame.sort_values(order, ignore_index=True).drop(columns="block_size")


def by_block(data: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """``(block, rows)`` by size of the block, then by its rows."""
    shapes = data[["block", "block_rows", "block_columns"]].drop_duplicates()
    shapes = shapes.assign(size=shapes["block_rows"] * shapes["block_columns"])
    blocks = shapes.sort_values(["size", "block_rows"])["block"]
    return [(block, data[data["block"] == block]) for block in blocks]


def block_text(block: object) -> str:
    return str(block).replace("x", "×")


def best_unit(largest: float, units: Mapping[float, str]) -> tuple[float, str]:
    """The greatest unit of which ``largest`` has at least two (units in falling order)."""
    scale = next((scale for scale in units if largest >= 2 * scale), list(units)[-1])
    return scale, units[scale]


def plain_log_ticks(axis: Any) -> None:
    """Ticks at 1, 2, 5 of each decade, written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def line_handle(label: str, **look: Any) -> Artist:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def marker_handle(index: int, label: str) -> Artist:
    marker, color = marker_and_color(index)
    return line_handle(label, marker=marker, color=color, linestyle="none")


def patch_handle(label: str, color: str, hatch: str = "") -> Artist:
    from matplotlib.patches import Patch

    return Patch(
        facecolor=color, edgecolor="black" if hatch else color, label=label, hatch=hatch, linewidth=0.4
    )


def add_legend(
    figure: Figure,
    place: Literal["outside upper center", "outside lower center"],
    handles: Sequence[Artist],
    columns: int,
) -> None:
    figure.legend(handles=list(handles), loc=place, ncols=min(columns, len(handles)))
