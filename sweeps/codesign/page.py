"""The page of a study: its numbers in one file, and from them text, tables and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hwsim.errors import FormatError, InputError, Problem
from hwsim.files import write_atomically
from hwsim.report import package_versions
from sweeps.codesign.compare import Paired, SpeedUp, paired, speed_ups
from sweeps.codesign.folder import read_json, write_json
from sweeps.codesign.settings import CoDesignSpace
from sweeps.codesign.study import METHODS, Study, collect
from sweeps.figures.base import Plot, add_legend, line_handle, save_plot
from sweeps.style import PAGE_INCHES, marker_and_color, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["load_study", "store_study", "study_plot", "write_page"]

_LOOK = {method: marker_and_color(i) for i, method in enumerate(("codesign", "rival"))}
_RIVALS = tuple(method for method in METHODS if method != "codesign")
_TEXT = {
    "codesign": "co-design",
    "uniform": "uniform, all layers",
    "uniform-inner": "uniform, first and last dense",
}


def store_study(path: Path, study: Study, space: CoDesignSpace, folder: Path) -> None:
    """Write the numbers of the runs that are there.

    Raises
    ------
    InputError
        No goal has a seed with both methods.
    """
    rows = collect(study, space, folder)
    if not _goals(rows):
        raise InputError(str(folder), "no run of both methods with one seed and budget; train some first")
    content = {
        "network": study.network,
        "seeds": list(study.seeds),
        "goals": [{"quantity": goal.quantity, "limit": goal.limit} for goal in study.goals],
        "space": space.model_dump(mode="json"),
        "versions": package_versions(),
        "rows": rows,
    }
    write_json(path, content)


def load_study(path: Path) -> dict[str, Any]:
    """What `store_study` wrote.

    Raises
    ------
    InputError
        There is no such file.
    FormatError
        Damaged or incomplete.
    """
    found = read_json(path)
    if found is None:
        raise InputError(str(path), Problem("", "no such file", "give --runs to train and to write it"))
    missing = [name for name in ("network", "seeds", "goals", "space", "rows") if name not in found]
    if missing:
        raise FormatError(str(path), [Problem(name, "missing") for name in missing])
    return found


def _goals(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, list[int]]]:
    """``(quantity, limit, seeds)`` of the goals that both methods have runs of, the loosest last."""
    found: dict[tuple[str, float], dict[str, set[int]]] = {}
    for row in rows:
        found.setdefault((row["goal"], row["limit"]), {}).setdefault(row["method"], set()).add(row["seed"])
    both = {
        goal: sorted(set.intersection(*(seeds.get(method, set()) for method in METHODS)))
        for goal, seeds in found.items()
    }
    return [(*goal, seeds) for goal, seeds in sorted(both.items()) if seeds]


def _row_of(rows: Sequence[dict[str, Any]], limit: float, seed: int, method: str) -> dict[str, Any]:
    return next(row for row in rows if (row["limit"], row["seed"], row["method"]) == (limit, seed, method))


def rival_of(rows: Sequence[dict[str, Any]], limit: float, seed: int) -> dict[str, Any] | None:
    """The more accurate of the uniform runs; None where no uniform ratios reach the budget.

    Chosen by the test images, which flatters it: a user would not know.
    """
    runs = [_row_of(rows, limit, seed, method) for method in _RIVALS]
    reached = [run for run in runs if "infeasible" not in run]
    return max(reached, key=lambda run: run["accuracy"]["integer"], default=None)


def differences(rows: Sequence[dict[str, Any]]) -> list[tuple[float, Paired | None]]:
    """Per budget the accuracy of co-design less that of its rival, in percentage points; None where a rival is missing."""
    found: list[tuple[float, Paired | None]] = []
    for _, limit, seeds in _goals(rows):
        rivals = [rival_of(rows, limit, seed) for seed in seeds]
        points = [
            100
            * (_row_of(rows, limit, seed, "codesign")["accuracy"]["integer"] - rival["accuracy"]["integer"])
            for seed, rival in zip(seeds, rivals, strict=True)
            if rival is not None
        ]
        found.append((limit, paired(points) if len(points) == len(seeds) else None))
    return found


def _compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All runs of co-design, which are its curve, and its rivals at the budgets that are complete."""
    found = [row | {"side": "codesign"} for row in rows if row["method"] == "codesign"]
    for _, limit, seeds in _goals(rows):
        rivals = [rival_of(rows, limit, seed) for seed in seeds]
        found += [rival | {"side": "rival"} for rival in rivals if rival is not None]
    return found


def study_plot(rows: Sequence[dict[str, Any]]) -> Plot:
    """Accuracy over measured latency, every run a marker; and the paired differences with their intervals."""
    compared = _compared(rows)
    data = pd.DataFrame(
        {
            "side": [row["side"] for row in compared],
            "method": [row["method"] for row in compared],
            "budget_us": [row["limit"] for row in compared],
            "seed": [row["seed"] for row in compared],
            "latency_us": [row["trained"]["latency_us"] for row in compared],
            "accuracy_percent": [100 * row["accuracy"]["integer"] for row in compared],
        }
    )
    with style():
        figure = new_figure(PAGE_INCHES, 2.6)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_runs(left, data)
        _draw_differences(right, differences(rows))
        labels = {"codesign": "co-design", "rival": "uniform ratios, the better of two"}
        handles = [
            line_handle(label, marker=_LOOK[side][0], color=_LOOK[side][1]) for side, label in labels.items()
        ]
        add_legend(figure, "outside upper center", handles, 2)
    count = len({row["seed"] for row in compared})
    caption = (
        f"Left: every run an open marker, means over {count} seeds filled. Right: paired differences in accuracy at equal "
        "budget, mean and 95 % interval of Student's t."
    )
    return Plot("codesign", "Co-design against uniform ratios", caption, figure, data)


def _draw_runs(axes: Axes, data: pd.DataFrame) -> None:
    for side, runs in data.groupby("side"):
        marker, color = _LOOK[str(side)]
        look: dict[str, Any] = {"marker": marker, "color": color}
        axes.plot(
            runs["latency_us"], runs["accuracy_percent"], linestyle="none", markerfacecolor="none", **look
        )
        means = runs.groupby("budget_us")[["latency_us", "accuracy_percent"]].mean()
        axes.plot(means["latency_us"], means["accuracy_percent"], **look)
    axes.set_xlabel("latency of the trained network (µs)")
    axes.set_ylabel("accuracy of the integers (%)")
    axes.grid(axis="y")


def _draw_differences(axes: Axes, found: Sequence[tuple[float, Paired | None]]) -> None:
    marker, color = _LOOK["codesign"]
    for place, (_, difference) in enumerate(found):
        if difference is None:
            continue
        ends = [[difference.mean - difference.low], [difference.high - difference.mean]]
        error = ends if difference.count > 1 else None
        axes.errorbar(place, difference.mean, yerr=error, marker=marker, color=color, capsize=3)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(found)), [f"{limit:g}" for limit, _ in found])
    axes.set_xlim(-0.6, len(found) - 0.4)
    axes.set_xlabel("budget (µs)")
    axes.set_ylabel("co-design − uniform\n(percentage points)")
    axes.grid(axis="y")


def write_page(study: Mapping[str, Any], path: Path) -> list[Path]:
    """Write the page, and its figure (PNG) into ``images`` beside it.

    Returns
    -------
    list of Path
        The files written.
    """
    rows = study["rows"]
    plot = study_plot(rows)
    image = save_plot(plot, path.parent / "images", ("png",))
    write_atomically(path, _text(study, plot).encode())
    return [path, image["png"]]


def _text(study: Mapping[str, Any], plot: Plot) -> str:
    from importlib import resources

    rows = study["rows"]
    template = resources.files("sweeps.codesign").joinpath("page.md").read_text("utf-8")
    training = study["space"]["training"]
    goals = _goals(rows)
    trained = [row for row in rows if row["method"] == "codesign"]
    seeds = {limit: kept for _, limit, kept in goals}
    held = sorted({tuple(kept) for kept in seeds.values()})
    missing = [goal["limit"] for goal in study["goals"] if goal["limit"] not in seeds]
    state = (
        f"{len(held[0])} seeds at every budget"
        if len(held) == 1 and not missing
        else "; ".join(f"{limit:g} µs: {len(kept)} seeds" for limit, kept in seeds.items())
    )
    if missing:
        state += "; not complete yet: " + ", ".join(f"{limit:g} µs" for limit in missing)
    values = {
        "network": study["network"],
        "state": state,
        "images": f"{training['train_images'] or 'all':,}",
        "dense_epochs": training["dense_epochs"],
        "admm_epochs": training["admm_epochs"],
        "retrain_epochs": training["retrain_epochs"],
        "dataset": training["dataset"],
        "test_images": f"{trained[0]['test_images']:,}",
        "dense_accuracy": f"{100 * sum(r['accuracy']['dense'] for r in trained) / len(trained):.2f}",
        "area": study["space"]["constraints"]["area_mm2"],
        "machines": trained[0]["alternation"]["machines"],
        "equal_budget": _equal_budget(rows),
        "equal_accuracy": _equal_accuracy(rows),
        "plan_and_trained": _plan_and_trained(rows),
        "verdict": _verdict(rows),
        "caption": plot.caption,
        "every_run": _every_run(rows),
    }
    text = template
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", str(value))
    return text


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(line) + " |" for line in lines),
        ]
    )


def _equal_budget(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for (_, limit, seeds), (_, difference) in zip(_goals(rows), differences(rows), strict=True):
        cells = [f"{limit:g}", str(len(seeds))]
        for method in METHODS:
            runs = [_row_of(rows, limit, seed, method) for seed in seeds]
            reached = [run for run in runs if "infeasible" not in run]
            if len(reached) < len(runs):
                cells.append(f"reached by {len(reached)} of {len(runs)}")
                continue
            accuracy = 100 * sum(run["accuracy"]["integer"] for run in runs) / len(runs)
            latency = sum(run["trained"]["latency_us"] for run in runs) / len(runs)
            cells.append(f"{accuracy:.2f} % at {latency:.3f} µs")
        lines.append([*cells, _interval(difference)])
    head = [
        "budget (µs)",
        "seeds",
        *_TEXT.values(),
        "co-design less the better uniform (points, 95 % interval)",
    ]
    return _table(head, lines)


def _interval(found: Paired | None) -> str:
    if found is None:
        return "no uniform ratios reach it"
    if found.count < 2:
        return f"{found.mean:+.2f} (one seed)"
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _equal_accuracy(rows: Sequence[dict[str, Any]]) -> str:
    found = speed_ups(_compared(rows), "codesign", "rival")
    lines = []
    for _, limit, seeds in _goals(rows):
        of_limit = [each for each in found if each.limit == limit]
        if len(of_limit) == len(seeds):
            lines.append([f"{limit:g}", *(_factor(each) for each in of_limit), _mean_factor(of_limit)])
    widest = max(len(seeds) for _, _, seeds in _goals(rows))
    head = ["uniform's budget (µs)", *(f"seed {seed}" for seed in range(widest)), "mean (95 % interval)"]
    return _table(head, [line[:-1] + [""] * (len(head) - len(line)) + line[-1:] for line in lines])


def _factor(each: SpeedUp) -> str:
    if each.factor is None:
        return "not reached"
    return f"{'≥ ' if each.is_bound else ''}{each.factor:.2f}×"


def _mean_factor(found: Sequence[SpeedUp]) -> str:
    factors = [each.factor for each in found if each.factor is not None]
    if len(factors) < len(found):
        return f"reached by {len(factors)} of {len(found)}"
    result = paired(factors)
    if any(each.is_bound for each in found):  # a spread of bounds is no spread of factors
        return f"≥ {result.mean:.2f}×"
    if result.count < 2:
        return f"{result.mean:.2f}×"
    return f"{result.mean:.2f}× ({result.low:.2f} to {result.high:.2f})"


def _plan_and_trained(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["method"] != "codesign":
            continue
        best = row["best_machine_for_trained"]
        lines.append(
            [
                f"{row['limit']:g}",
                str(row["seed"]),
                f"{row['planned']['latency_us']:.3f}",
                f"{row['trained']['latency_us']:.3f}",
                "kept" if not row["limits_broken"] else "; ".join(row["limits_broken"]),
                "the same" if best["saves_percent"] <= 0 else f"another, {best['saves_percent']:.2g} % less",
            ]
        )
    head = ["budget (µs)", "seed", "first projection (µs)", "trained (µs)", "budget", "best machine for it"]
    return _table(head, lines)


def _every_run(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        start = [f"{row['limit']:g}", str(row["seed"]), _TEXT[row["method"]]]
        if "infeasible" in row:
            lines.append([*start, "not reached", *[""] * 6])
            continue
        trained = row["trained"]
        lines.append(
            [
                *start,
                f"{100 * row['accuracy']['integer']:.2f}",
                f"{trained['latency_us']:.3f}",
                f"{trained['energy_pj'] / 1e6:.3f}",
                f"{trained['image_bytes']:,.0f}",
                f"{trained['area_mm2']:.2f}",
                row["machine"],
                _choice(row),
            ]
        )
    head = ["budget (µs)", "seed", "method", "accuracy (%)", "µs", "µJ", "image (bytes)", "mm²"]
    return _table([*head, "machine", "blocks"], lines)


def _choice(row: dict[str, Any]) -> str:
    """What was decided for the layers, in a few words."""
    if row["method"] == "codesign":
        layers = row["plan"]["layers"]
        return "; ".join(
            f"{each['layer']} {each['block']} {each['kept_percent']:.0f} % kept" for each in layers
        )
    ratios = row["ratios"]
    shape = "x".join(map(str, ratios["block"]))
    return f"{shape}, p = {ratios['pruned']:g}, u = {ratios['unified']:g}"


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What the intervals allow to say, budget by budget."""
    parts = []
    for limit, found in differences(rows):
        if found is None:
            word = "with some seeds no uniform ratios reach it, co-design does"
        elif found.count < 2:
            word = "one seed only, which shows nothing"
        elif found.low > 0:
            word = "co-design keeps more accuracy, the interval excludes zero"
        elif found.high < 0:
            word = "uniform ratios keep more, the interval excludes zero"
        else:
            word = "the interval includes zero, so by the seeds alone a mean difference is not shown"
        shown = ""
        if found is not None:
            shown = f"{_interval(found)} points, above zero with {found.positive} of {found.count} seeds; "
        parts.append(f"- {limit:g} µs: {shown}{word}.")
    return "\n".join(parts)
