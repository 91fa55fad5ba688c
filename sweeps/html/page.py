"""One self-contained HTML page on a sweep: no network, no script or font from elsewhere, readable on paper."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from hwsim.errors import InputError, Problem
from hwsim.files import write_atomically
from sweeps.figures import Plot, to_image
from sweeps.html.data import MARKS, front_goals, front_marks, payload, text_of, varying
from sweeps.html.details import Detail, point_detail
from sweeps.summary import summarise

if TYPE_CHECKING:
    from hwsim.explain import Explanation

__all__ = ["MOST_DETAILS", "PAGE_ROWS", "render_report", "shown_points", "write_report"]

MOST_DETAILS = 40
"""Points of the front that the page shows at length; of a longer front evenly many along it."""
MOST_EXPLAINED = 12
"""Points whose cycles are accounted for: that takes a simulation per change tried."""
PAGE_ROWS = 100
"""Rows of the table at a time."""

T = TypeVar("T")
Explain = Callable[[pd.Series], "Explanation | str"]


def render_report(
    *,
    title: str,
    tables: Mapping[str, pd.DataFrame],
    plots: Sequence[Plot],
    manifest: Mapping[str, Any],
    assumptions: str,
    selected: Collection[str] = (),
    explain: Explain | None = None,
    pages: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """The page as HTML.

    Parameters
    ----------
    title : str
    tables : mapping
        ``points``, ``layers``, ``energy`` and ``storage`` of a result store.
    plots : sequence of Plot
    manifest : mapping
        Of the result store: its runs with resolved configuration and versions.
    assumptions : str
        The text on what the model takes for granted.
    selected : collection of str
        Keys of points to show at length, beside those of the front and the extremes.
    explain : callable, optional
        From a row of ``points`` to where its cycles went, or to a sentence that says why that cannot be told.
    pages : str
        Folder, relative to the page, with a page of every other point (`write_report`); "" for none.
    progress : callable, optional
        Called with the points at length and the figures that are done, and with how many there will be.

    Raises
    ------
    InputError
        A column is missing, or there are no points.
    """
    points = tables["points"]
    if points.empty:
        raise InputError("points", Problem("", "no points, there is nothing to report"))
    sentences = summarise(points)
    failed = points[points["error"].notna()] if "error" in points else points.iloc[:0]
    done = points.drop(failed.index)
    done = _marked(done)
    shown = _shown(done, selected)
    tell = _Tally(len(shown) + len(plots), progress)
    keys = dict(zip(done["key"], _short_keys(done["key"]), strict=True))
    details = [tell(detail) for detail in _details(shown, done, tables, keys, explain)]
    return _template("report.html").render(
        title=title,
        sentences=sentences,
        **_table(done, _links(keys, details, pages), keys),
        page_rows=PAGE_ROWS,
        details=details,
        failed=[(_name(row), row["error"]) for row in failed.to_dict("records")],
        figures=[tell((plot, _embedded(plot))) for plot in plots],
        runs=[
            (run["started"], json.dumps(run["configuration"], indent=2, ensure_ascii=False), run["versions"])
            for run in manifest["runs"]
        ],
        assumptions=assumptions,
    )


class _Tally:
    """Hands things through, and tells how many of them there were."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def __call__(self, item: T) -> T:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
        return item


def _table(done: pd.DataFrame, links: Sequence[str], keys: Mapping[str, str]) -> dict[str, Any]:
    """What the template needs of all points: the first rows for readers without scripts, the rest as data."""
    if done.empty:
        table: dict[str, Any] = {"heads": [], "rows": [], "count": 0, "data": "{}"}
        return {"table": table, "constants": [], "front_text": "", "front_count": 0}
    columns, same = varying(done)
    rows = [
        (MARKS[row["mark"]], keys[row["key"]], [text_of(row[c.name], c) for c in columns])
        for row in done.head(PAGE_ROWS).to_dict("records")
    ]
    table = {
        "heads": [column.head for column in columns],
        "rows": rows,
        "count": len(done),
        "data": payload(done, columns, list(keys.values()), links),
    }
    return {
        "table": table,
        "constants": [(column.head, text_of(done[column.name].iloc[0], column)) for column in same],
        "front_text": front_goals(done)[1],
        "front_count": int((done["mark"] < MARKS.index("")).sum()),
    }


def write_report(path: str | Path, *, with_pages: bool = False, **content: Any) -> Path:
    """Write the page of `render_report` (same arguments); a crash leaves the old page or the whole new one.

    Parameters
    ----------
    path : path
    with_pages : bool
        Also a page for every point, in a folder beside the page that is named after it.

    Raises
    ------
    InputError
        As `render_report`; the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if with_pages:
        folder = f"{path.stem}-points"
        content["pages"] = folder
        _write_pages(path.parent / folder, path.name, content["title"], content["tables"])
    write_atomically(path, render_report(**content).encode())
    return path


def _write_pages(folder: Path, back: str, title: str, tables: Mapping[str, pd.DataFrame]) -> None:
    points = tables["points"]
    done = points[points["error"].isna()] if "error" in points else points
    columns, _ = varying(done)
    marks = front_marks(done)
    parts = {name: _by_key(tables[name]) for name in ("layers", "energy", "storage")}
    template = _template("point.html")
    rows = done.assign(mark=marks).iterrows()
    for (_, row), key in zip(rows, _short_keys(done["key"]), strict=True):
        own = {name: groups.get(row["key"], tables[name].iloc[:0]) for name, groups in parts.items()}
        detail = point_detail(row, own, columns, key=key, mark=MARKS[row["mark"]])
        text = template.render(title=title, point=detail, back=back)
        write_atomically(folder / f"{key}.html", text.encode())


def _embedded(plot: Plot) -> str:
    kind, content = to_image(plot)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sweeps.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def shown_points(points: pd.DataFrame, selected: Collection[str] = ()) -> pd.DataFrame:
    """The points that the page of `render_report` shows layer by layer.

    Raises
    ------
    InputError
        A selected key belongs to no point with a result.
    """
    return _shown(_marked(points[points["error"].isna()]), selected)


def _marked(done: pd.DataFrame) -> pd.DataFrame:
    """The points in the order of the page, with their marks."""
    if done.empty:
        return done
    return done.assign(mark=front_marks(done)).sort_values(["mark", "latency_ms"], kind="stable")


def _shown(done: pd.DataFrame, selected: Collection[str]) -> pd.DataFrame:
    """The extremes, the front (thinned where it is long) and the selected points, in the order of the table.

    A column ``explained`` says whose cycles to account for.
    """
    unknown = set(selected) - set(done["key"])
    if unknown:
        raise InputError("points", [Problem(key, "no such point with a result") for key in sorted(unknown)])
    if done.empty:
        return done
    front = done.index[done["mark"] < MARKS.index("")]
    places = np.unique(np.linspace(0, len(front) - 1, min(len(front), MOST_DETAILS)).round().astype(int))
    first = {done[name].idxmin() for name in ("latency_ms", "image_bytes", "energy_pj")}
    first |= set(done.index[done["mark"] == MARKS.index("knee")][:MOST_DETAILS])
    first |= set(done.index[done["key"].isin(list(selected))])
    shown = done[done.index.isin(first | set(front[places]))]
    by_rank = sorted(shown.index, key=lambda index: index not in first)  # a stable sort
    return shown.assign(explained=shown.index.isin(by_rank[:MOST_EXPLAINED]))


def _details(
    shown: pd.DataFrame,
    done: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    keys: Mapping[str, str],
    explain: Explain | None,
) -> Iterator[Detail]:
    if shown.empty:
        return
    columns, _ = varying(done)
    parts = {name: _by_key(tables[name], set(shown["key"])) for name in ("layers", "energy", "storage")}
    nothing = {name: tables[name].iloc[:0] for name in parts}
    for _, row in shown.iterrows():
        yield point_detail(
            row,
            {name: groups.get(row["key"], nothing[name]) for name, groups in parts.items()},
            columns,
            key=keys[row["key"]],
            mark=MARKS[row["mark"]],
            explanation=explain(row) if explain is not None and row["explained"] else None,
        )


def _by_key(frame: pd.DataFrame, keys: Collection[str] | None = None) -> dict[str, pd.DataFrame]:
    if keys is not None:
        frame = frame[frame["key"].isin(keys)]
    return {str(key): group for key, group in frame.groupby("key", sort=False)}


def _short_keys(keys: pd.Series) -> list[str]:
    """The first characters of each key, as many as tell all apart."""
    if keys.empty:
        return []
    texts = keys.astype(str)
    longest = int(texts.str.len().max())
    length = next((n for n in range(10, longest) if texts.str[:n].is_unique), longest)
    return texts.str[:length].str.replace(r"[^0-9A-Za-z.-]", "_", regex=True).tolist()


def _links(keys: Mapping[str, str], details: Sequence[Detail], pages: str) -> list[str]:
    here = {detail.key for detail in details}
    elsewhere = f"{pages}/{{}}.html" if pages else ""
    return [f"#point-{key}" if key in here else elsewhere.format(key) for key in keys.values()]


def _name(row: Mapping[Any, Any]) -> str:
    ratios = f"p {row['pruned']:g}, u {row['unified']:g}"
    return f"{row['network']}, {row['block']}, {ratios}, {row['hold']} fixed, seed {row['seed']}"
