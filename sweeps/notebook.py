"""How results show themselves in a notebook."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from hwsim.errors import HwsimError
from sweeps.summary import summarise

if TYPE_CHECKING:
    from sweeps.store import ResultStore

__all__ = ["results_html"]


def results_html(store: ResultStore) -> str:
    """A result store in short: the summary in words, the front as a plot and as a table."""
    from sweeps.figures import pareto_plot
    from sweeps.html.data import MARKS, front_goals, front_marks, text_of, varying

    try:
        points = store.to_frame()
        sentences = summarise(points)
    except HwsimError as error:
        return f"<p>{html.escape(str(error))}</p>"
    listed = "".join(f"<li>{html.escape(text)}</li>" for text in sentences)
    done = points[points["error"].isna()]
    shown = [f"<p><b>{html.escape(str(store.path))}</b></p><ul>{listed}</ul>"]
    if len(done):
        goals, _ = front_goals(done)
        for _, group in done.groupby("network", sort=False):
            shown.append(
                pareto_plot(group, "accuracy_integer" if "maximise" in goals else "energy_pj")._repr_html_()
            )
        done = done.assign(mark=front_marks(done)).sort_values(["mark", "latency_ms"], kind="stable")
        columns, _ = varying(done)
        front = done[done["mark"] < MARKS.index("")].head(20)
        heads = "".join(f"<th>{html.escape(column.head)}</th>" for column in columns)
        rows = [
            "".join(f"<td>{html.escape(text_of(row[column.name], column))}</td>" for column in columns)
            for row in front.to_dict("records")
        ]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        shown.append(f"<table><caption>the front</caption><tr>{heads}</tr>{body}</table>")
    return "".join(shown)
