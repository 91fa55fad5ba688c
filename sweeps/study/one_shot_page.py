"""The part of the page on networks that nobody retrains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from sweeps.figures.base import Plot
from sweeps.study.folder import Result
from sweeps.study.runs import METHODS, ONE_SHOT, Run
from sweeps.study.task_names import MEASURES, TITLES
from sweeps.style import PAGE_INCHES, marker_and_color, new_figure, style

__all__ = ["Point", "one_shot_plot", "one_shot_section", "points_of"]

USABLE_PERCENT = (90.0, 50.0)
"""Agreements below which a network is called unusable."""


@dataclass(frozen=True)
class Point:
    """One compressed network.

    Attributes
    ----------
    series : str
        Of the figure: what was done, and by which method.
    about : str
        Shares and bits.
    agreement_percent : float
    cosine : float or None
        Of sentences.
    layer_bytes : int
        Of the layers that the method treats, in the file or the stream.
    fp32_bytes : int
        Of the same weights in fp32.
    """

    series: str
    about: str
    agreement_percent: float
    cosine: float | None
    layer_bytes: int
    fp32_bytes: int

    @property
    def times_smaller(self) -> float:
        """Than the same weights in fp32."""
        return self.fp32_bytes / self.layer_bytes


def points_of(task: str, results: Iterable[Result]) -> list[Point]:
    """All compressed networks of a task, NNCodec's too, which are stored beside the fp32 network."""
    found = []
    for result in results:
        run = result.run
        if run.task != task:
            continue
        if run.method in ONE_SHOT:
            what = "blocks" if run.shape else "steps" if run.rounding_error else "rounded"
            series = f"{what}, {_short(run.method)}"
            about = " ".join(part for part in (run.shape.replace("x", "×"), run.point, run.variant) if part)
            found.append(_point(series, about, result.quality, int(result.details["layer_bytes"]), result))
        elif run.method == "start":
            peers = result.details.get("nncodec") or {}
            for peer in peers.get("points", []):
                found.append(
                    _point("NNCodec", f"qp {peer['qp']}", peer["quality"], int(peer["bytes"]), result)
                )
    return found


def _point(series: str, about: str, quality: Mapping[str, float], layer_bytes: int, result: Result) -> Point:
    fp32_bytes = int(result.details["treated_fp32_bytes"])
    return Point(series, about, 100 * quality["agreement"], quality.get("cosine"), layer_bytes, fp32_bytes)


def _short(method: str) -> str:
    return METHODS[method].label.removeprefix("one shot, ")


def one_shot_section(
    runs: Sequence[Run], results: Sequence[Result], figures: Mapping[str, str]
) -> Iterator[str]:
    """Text, tables and figures of all tasks.

    Parameters
    ----------
    runs : sequence of Run
        Planned.
    results : sequence of Result
    figures : mapping from task to path
    """
    tasks = list(dict.fromkeys(run.task for run in runs))
    yield from _text([result for result in results if result.run.task in tasks])
    for number, task in enumerate(tasks, start=1):
        yield f"### 2.{number} {TITLES[task]}"
        yield ""
        mine = [result for result in results if result.run.task == task]
        yield from _table([run for run in runs if run.task == task], mine)
        if task in figures:
            yield f"![agreement against bytes]({figures[task]})"
            yield ""
        yield from _limits(points_of(task, mine))


def _text(results: Sequence[Result]) -> Iterator[str]:
    sources = dict.fromkeys(
        f"{result.run.task}: {result.details['examples']}"
        for result in results
        if result.run.method == "start"
    )
    yield (
        "Published weights (`hwsim models`), no labels, no training of ours: `compress.one_shot`. *Hessian*: types by the "
        "Hessian's diagonal, ADMM, magnitudes, signs and dense integers against the Hessian of the calibration inputs, biases "
        "or normalisation refitted. *Projection*: types by the weights, each layer to the nearest blocks, rounded to the "
        "nearest integers. *Bits*: all layers are rounded to so many, one scale a layer. *Steps*: 8 bits, and coarser where "
        "the network's outputs mind least (`rounding_error`, in % of their energy). First layer, last layer and depthwise "
        "convolutions have no blocks and are rounded like the rest. Measured is "
        "how often the network read back from the file, with activations in float, answers as the fp32 network does: the same "
        "class, or the same nearest neighbour among the other sentences. That is no accuracy on ImageNet, and crops of six "
        "photographs are no sample of the world; one seed, a few hundred inputs: 1σ of a share of 80 % is about 3 points."
    )
    yield ""
    yield (
        "Inputs: crops of the photographs that ship with scikit-learn and scikit-image, no photograph in both halves; "
        "sentences of our own (`sweeps/study/sentences.txt`), no topic in both."
        + "".join(f" {source}." for source in sources)
    )
    yield ""
    yield (
        "Bytes are those of the compressed layers in the written file; the file also holds all else in float32, which no "
        "setting changes (batch normalisation, and the embedding tables of MiniLM, half of its weights). NNCodec "
        "(`use_dq=False`) is given the original weights of the same layers: no blocks, nothing for an accelerator to skip or "
        "to share, and no calibration. It is a different contest and stands here as a scale."
    )
    yield ""


def _table(runs: Sequence[Run], results: Sequence[Result]) -> Iterator[str]:
    stored = {result.run.key: result for result in results}
    pairs: dict[tuple[str, str, str], dict[str, Run]] = {}
    for run in runs:
        if run.method in ONE_SHOT:
            pairs.setdefault((run.shape, run.point, run.variant), {})[run.method] = run
    measure = MEASURES[runs[0].task].title
    yield (
        f"| blocks | what | {measure}: projection | Hessian | bytes of the layers | × smaller | bits per weight | "
        "bytes of the file |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    missing = 0
    rows = []
    for (shape, point, variant), pair in pairs.items():
        found = {method: stored[run.key] for method, run in pair.items() if run.key in stored}
        if not found:
            missing += 1
            continue
        result = found.get("hessian") or found["projection"]
        size, fp32 = int(result.details["layer_bytes"]), int(result.details["treated_fp32_bytes"])
        shown = " | ".join(_quality(found.get(method)) for method in ONE_SHOT)
        about = f"{point}, {variant}" if variant else point
        row = (
            f"| {shape.replace('x', '×')} | {about} | {shown} | {size:,} | {fp32 / size:.1f} | {32 * size / fp32:.2f} | "
            f"{result.file_bytes:,} |"
        )
        rows.append((size, row))
    yield from (row for _, row in sorted(rows, reverse=True))
    yield ""
    if missing:
        yield f"{missing} of {len(pairs)} points are *missing*."
        yield ""


def _quality(result: Result | None) -> str:
    if result is None:
        return "*missing*"
    cosine = result.quality.get("cosine")
    return f"{100 * result.quality['agreement']:.1f}" + ("" if cosine is None else f" (cosine {cosine:.3f})")


def _limits(points: Sequence[Point]) -> Iterator[str]:
    """The smallest network of each series that is still usable."""
    if not points:
        return
    yield "The smallest of each series that still agrees often enough:"
    yield ""
    heads = [f"at least {percent:.0f} % | what" for percent in USABLE_PERCENT]
    yield f"| series | points | {' | '.join(heads)} |"
    yield "|---|---|" + "---|---|" * len(heads)
    for series in sorted({point.series for point in points}):
        members = [point for point in points if point.series == series]
        cells = []
        for percent in USABLE_PERCENT:
            able = [point for point in members if point.agreement_percent >= percent]
            best = min(able, key=lambda point: point.layer_bytes, default=None)
            cells.append("none | " if best is None else f"{best.times_smaller:.1f}× | {best.about}")
        yield f"| {series} | {len(members)} | {' | '.join(cells)} |"
    yield ""


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in bytes and agreement, from small to large.

    >>> a, b, c = (Point("", "", quality, None, size, 9) for quality, size in ((50, 1), (40, 2), (60, 3)))
    >>> [point.layer_bytes for point in frontier([a, b, c])]
    [1, 3]
    """
    best, kept = -1.0, []
    for point in sorted(points, key=lambda point: (point.layer_bytes, -point.agreement_percent)):
        if point.agreement_percent > best:
            kept.append(point)
            best = point.agreement_percent
    return kept


def one_shot_plot(task: str, results: Sequence[Result]) -> Plot | None:
    """Agreement against how much smaller the layers are; each series with its frontier. None without points."""
    points = points_of(task, results)
    if not points:
        return None
    data = pd.DataFrame([{**vars(point), "times_smaller": point.times_smaller} for point in points])
    with style():
        figure = new_figure(PAGE_INCHES, 3.8)
        axes = figure.subplots()
        axes.grid(True)
        for index, series in enumerate(sorted(set(data["series"]))):
            marker, color = marker_and_color(index)
            members = [point for point in points if point.series == series]
            axes.plot(
                [point.times_smaller for point in members],
                [point.agreement_percent for point in members],
                marker=marker,
                color=color,
                linestyle="none",
                label=series,
            )
            best = frontier(members)
            axes.plot(
                [point.times_smaller for point in best],
                [point.agreement_percent for point in best],
                color=color,
                linewidth=0.8,
            )
        axes.set_xscale("log")
        ticks = [
            tick for tick in (4, 5, 6, 8, 10, 15, 20, 30, 50) if tick <= 1.2 * data["times_smaller"].max()
        ]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("compressed layers: times smaller than fp32")
        axes.set_ylabel("agreement with fp32 (%)")
        axes.set_ylim(-2, 102)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    caption = (
        "Lines: the frontier of each series. One seed. NNCodec codes the original weights, without blocks."
    )
    return Plot(f"study-{task}", TITLES[task], caption, figure, data)
